"""How a terminal shows an agent at work: the question, each step as it ends, the answer.

It shows steps and answers as `step_view` words them in JSON, so that it does not matter whether the agent runs here or
is asked over the network.

Example::

    view = AskView(Console())
    view.question("What is 6 * 7?")
    view.step(step_json(1, step), "python")
    view.answer(trajectory_json(trajectory))
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_CHARACTERS = 60
"""Of what an outvoted candidate saw."""


class AskView:
    """Writes to `console`. Text of models is shown as it is, never as markup."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str, style: str = "dim") -> None:
        from rich.text import Text

        self._console.print(Text(text, style=style))

    def question(self, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self._console.print(Panel(Text(text), title="question", title_align="left"))

    def busy(self, text: str) -> contextlib.AbstractContextManager[Any]:
        """A spinner, where there is a terminal to see it."""
        return self._console.status(text) if self._console.is_terminal else contextlib.nullcontext()

    def step(self, step: Mapping[str, Any], language: str) -> None:
        """One of `step_view.step_json`."""
        from rich.syntax import Syntax
        from rich.text import Text

        head = Text(f"step {step['number']}  ", style="bold") + Text(step["thought"], style="italic")
        self._console.print(head)
        if step["action"] is not None:
            self._console.print(Syntax(step["action"], language, background_color="default", word_wrap=True))
        if step.get("candidates"):
            self.say(votes(step))
        self._console.print(Text(step["observation"], style="cyan"))

    def piece(self, text: str, *, thought: bool) -> None:
        """A piece of a stream of words, from an agent that tells no steps."""
        from rich.text import Text

        self._console.print(Text(text, style="italic dim" if thought else ""), end="")

    def answer(self, answer: Mapping[str, Any], *, expected: str = "") -> None:
        """One of `step_view.trajectory_json`."""
        if answer["failure"] is not None:
            self.say(f"failed: {answer['failure']['message']}", "red")
            return
        if answer["answer"] is None:
            self.say(f"no answer: {answer['stop_detail'] or answer['stop_reason']}", "bold yellow")
        else:
            self.say(f"answer: {answer['answer']}  ({answer['stop_reason']})", "bold")
        if expected:
            self.say(f"right answer: {expected}", "green" if answer["success"] else "red")
        usage = answer["usage"]
        self.say(
            f"{answer['duration_s']:.1f} s, {usage['completion_tokens']} tokens, {answer['tool_calls']} tool calls"
        )


def votes(step: Mapping[str, Any]) -> str:
    """How the candidates of a step voted: the chosen one's votes, those of the others by what they saw, and how many
    had none."""
    candidates = step["candidates"]
    chosen = candidates[step["chosen"]]
    groups: dict[str, int] = {}
    failed = spared = 0
    for candidate in candidates:
        if candidate["votes"]:
            if (candidate["votes"], candidate["observation"]) != (chosen["votes"], chosen["observation"]):
                seen = " ".join((candidate["observation"] if candidate["ran"] else candidate["text"]).split())
                seen = seen if len(seen) <= _SHOWN_CHARACTERS else f"{seen[:_SHOWN_CHARACTERS]}…"
                groups[seen] = candidate["votes"]
        elif candidate["ran"]:
            failed += 1
        else:
            spared += 1
    told = [f"votes: {chosen['votes']} of {len(candidates)} for this"]
    told += [f"{count} for {seen!r}" for seen, count in sorted(groups.items(), key=lambda group: -group[1])]
    told += [f"{failed} failed"] if failed else []
    told += [f"{spared} not run, as the vote was decided"] if spared else []
    return "; ".join(told)

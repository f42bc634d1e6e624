"""Try a student on a question, and see its thoughts, code and observations as they happen: everything in this process,
no Ray; or ask one that is served.

python -m launch.ask "In which city was the author of The Silver Harbor born?"
python -m launch.ask                                                    questions one after the other; Ctrl-D ends
python -m launch.ask --run runs/starter-seed0 --candidates 8 "..."      self-consistent actions, with their votes
python -m launch.ask --example two_hop                                  a held-out question of the run
python -m launch.ask --url http://127.0.0.1:8000/v1 "..."               of launch.serve, or any such endpoint
python -m launch.ask --json < questions.txt                             a line of JSON for each line

Each question stands for itself: students are trained on single questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

_INTERRUPTED = 130


class Answerer(Protocol):
    """An agent, here or elsewhere."""

    about: str
    language: str
    """Of its actions."""

    def ask(self, question: str, on_step: Callable[[Mapping[str, Any]], None], view: Any) -> Any:
        """Awaited: the answer with its steps, as `launch.serving.step_view.trajectory_json` says it."""
        ...

    def close(self) -> Any: ...


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.question is not None and options.example is not None:
        parser.error("give a question, or --example KIND, not both")
    if options.question is not None and not options.question.strip():
        parser.error("the question is empty")
    local = ("run", "student", "engine", "example", "override")
    if options.url and (given := [name for name in local if getattr(options, name)]):
        parser.error(f"--{given[0]} is for an agent of this machine; leave it out, or leave --url out")
    if not options.url and (options.model or options.api_key_env):
        parser.error("--model and --api-key-env are for an agent at a --url")
    if options.candidates < 1:
        parser.error(f"--candidates must be at least 1, not {options.candidates}")
    from envs.base import EnvError
    from rollout.policy import PolicyError

    try:
        with asyncio.Runner() as runner:
            return _run(options, runner)
    except (ValueError, OSError, EnvError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", help="what to ask; without it, questions are read from the terminal")
    parser.add_argument("--run", default="", help="a run's folder; default: the newest finished one under runs/")
    parser.add_argument("--student", default="", help="another student's folder")
    parser.add_argument("--policy", default="student", help="student, or teacher: the run's own (default: student)")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE",
                        help="without a run: the configuration, as of launch/distill.py")  # fmt: skip
    parser.add_argument("--engine", default="", help="on a CPU: in_process or own_process; default: as the run says")
    parser.add_argument("--example", metavar="KIND", help="ask a held-out question of this kind instead")
    parser.add_argument("--candidates", type=int, default=1, help="k of self-consistent actions; 1 is greedy")
    parser.add_argument("--json", action="store_true", help="print the answer with its steps as one line of JSON")
    parser.add_argument("--url", default="", help="ask the agent that is served there")
    parser.add_argument("--model", default="", help="of those served at --url; default: the first")
    parser.add_argument("--api-key-env", default="", metavar="NAME", help="variable that holds the key for --url")
    return parser


def _run(options: argparse.Namespace, runner: asyncio.Runner) -> int:
    from rich.console import Console

    from launch.serving.ask_view import AskView
    from launch.serving.lifecycle import leave

    # What is no answer goes to stderr where answers are for programs.
    view = AskView(Console(stderr=options.json, highlight=False))
    agent, tasks = _choose(options)
    asked = [task for task in tasks if task.kind == options.example]
    if options.example is not None and not asked:
        raise ValueError(
            f"--example {options.example!r}: this run has {', '.join(dict.fromkeys(t.kind for t in tasks))}"
        )
    question = asked[0].question if asked else options.question
    try:
        with view.busy("loading"):
            answerer: Answerer = runner.run(agent(asked[0] if asked else None))
    except KeyboardInterrupt:
        leave(_INTERRUPTED)
        raise
    status = 0
    try:
        if question is not None:
            return _ask(runner, answerer, question, view, options, expected=asked[0].answer if asked else "")
        for line in _questions(answerer, view):
            status = max(status, _ask(runner, answerer, line, view, options))
        return 0 if sys.stdin.isatty() else status
    finally:
        runner.run(answerer.close())


def _choose(options: argparse.Namespace) -> tuple[Callable[[Any], Any], Sequence[Any]]:
    """What starts the agent, given the task that it is asked if that is known; and the tasks that it could be."""
    if options.url:

        async def connect(task: Any) -> _Remote:
            from launch.serving.remote import RemoteAgent

            agent = await RemoteAgent.connect(options.url, model=options.model, api_key_env=options.api_key_env)
            return _Remote(agent, options.candidates)

        return connect, ()
    from launch.serving.plan import plan_agent

    plan = plan_agent(
        run=options.run, student=options.student, policy=options.policy, engine=options.engine,
        overrides=options.override,
    )  # fmt: skip
    settings = plan.settings(options.candidates)

    async def start(task: Any) -> _Local:
        from launch.serving.agent import Agent

        return _Local(await Agent.start(plan), plan.name, settings, task)

    return start, plan.tasks


class _Local:
    def __init__(self, agent: Any, name: str, settings: Any, task: Any) -> None:
        self._agent, self._settings, self._task = agent, settings, task
        self.about, self.language = name, "json" if settings.dialect == "tool" else "python"

    async def ask(self, question: str, on_step: Callable[[Mapping[str, Any]], None], view: Any) -> dict[str, Any]:
        from launch.serving.agent import Question
        from launch.serving.step_view import step_json, trajectory_json

        searches: list[Any] = []

        def told(step: Any) -> None:
            searches.append(self._agent.searches(step))
            on_step(step_json(len(searches), step, searches[-1]))

        asked = Question(text=question, settings=self._settings, task=self._task, sample_index=0)
        return trajectory_json(await self._agent.answer(asked, on_step=told), searches=searches)

    async def close(self) -> None:
        await self._agent.close()


class _Remote:
    language = "python"

    def __init__(self, agent: Any, candidates: int) -> None:
        self._agent, self._candidates = agent, candidates
        self.about = agent.model

    async def ask(self, question: str, on_step: Callable[[Mapping[str, Any]], None], view: Any) -> dict[str, Any]:
        return await self._agent.ask(
            question,
            candidates=self._candidates,
            on_step=on_step,
            on_piece=lambda text, thought: view.piece(text, thought=thought),
        )

    async def close(self) -> None:
        await self._agent.close()


def _questions(answerer: Answerer, view: Any) -> Iterator[str]:
    """From the terminal, with its history, or one a line from elsewhere."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  (gives input() its history and editing)

    view.say(f"{answerer.about}: ask a question; Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _ask(
    runner: asyncio.Runner,
    answerer: Answerer,
    question: str,
    view: Any,
    options: argparse.Namespace,
    *,
    expected: str = "",
) -> int:
    from launch.serving.remote import RemoteError
    from rollout.policy import EngineDiedError, PolicyError

    shown = not options.json
    if shown and (options.question or options.example or not sys.stdin.isatty()):
        view.question(question)
    try:
        with view.busy("thinking"):
            asked = answerer.ask(
                question, lambda step: view.step(step, answerer.language) if shown else None, view if shown else _Mute()
            )
            answer = runner.run(asked)
    except KeyboardInterrupt:
        view.say("stopped", "yellow")
        return _INTERRUPTED
    except EngineDiedError:
        raise
    except (RemoteError, PolicyError) as error:
        view.say(f"failed: {error}", "red")
        return 1
    if shown:
        view.answer(answer, expected=expected)
    else:
        print(json.dumps({"question": question, **answer}), flush=True)
    return 0 if answer["failure"] is None else 1


class _Mute:
    def piece(self, text: str, *, thought: bool) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())

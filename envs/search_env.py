"""`SearchEnv`: the agent searches and answers in tags, as Search-R1's does.

An action is `<search>query</search>` or `<answer>text</answer>`; other text around it is ignored, so that a raw turn
of a model is an action as well, and the first of the two tags counts. Results come back as
`<information>...</information>`, and what is neither is answered in Search-R1's own words. Which search engine
answers, and how its hits read, is the caller's.

Example::

    env = SearchEnv(search=lambda query: "Doc 1(Title: France) Paris is its capital.", grade=grade)
    env.reset(task, seed=0)
    env.step("<search>capital of France</search>").observation.text
    # '<information>Doc 1(Title: France) Paris is its capital.</information>'
    env.step("<answer>Paris</answer>").terminated       # True

Paper: arXiv 2503.09516.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from envs.base import ObservationKind, Task
from envs.stateless_env import Outcome, StatelessEnv, clip, run_together
from envs.tools import ToolError

INVALID = (
    "My previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again."
)
"""Search-R1's answer to a turn without an action."""
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


class SearchEnv(StatelessEnv):
    """One episode at a time; see `envs.base.Env` for the contract.

    `search(query)` gives the results as text; it raises `ToolError` for the model's mistake, is called from several
    threads, and must answer within `search_s`.
    """

    def __init__(
        self,
        *,
        search: Callable[[str], str],
        grade: Callable[[Task, str], float],
        max_steps: int = 5,
        search_s: float = 120.0,
        output_chars: int = 8000,
    ) -> None:
        super().__init__(grade=grade, max_steps=max_steps)
        for name, value in (("search_s", search_s), ("output_chars", output_chars)):
            if value <= 0:
                raise ValueError(f"{name}={value!r} must be positive")
        self._search, self._search_s, self._output_chars = search, search_s, output_chars

    def _act(self, actions: Sequence[str]) -> list[Outcome]:
        found = [_ACTION.search(action) for action in actions]
        queries = list(dict.fromkeys(tag[2].strip() for tag in found if tag and tag[1] == "search"))
        queries = [query for query in queries if query and query not in self._made]
        self._made |= zip(queries, self._ask(queries), strict=True)
        return [self._outcome(tag, self._made) for tag in found]

    def _ask(self, queries: Sequence[str]) -> list[str | ToolError]:
        if not queries:
            return []
        return run_together([lambda query=query: self._search(query) for query in queries], timeout_s=self._search_s)

    def _outcome(self, tag: re.Match[str] | None, answers: dict[str, str | ToolError]) -> Outcome:
        content = tag[2].strip() if tag else ""
        if tag is None or not content:
            return Outcome(text=INVALID, kind=ObservationKind.PARSE_ERROR)
        if tag[1] == "answer":
            return Outcome(text="", final=clip(content, self._output_chars))
        result = answers[content]
        if isinstance(result, ToolError):
            return Outcome(text=_information(f"Error: {result}"), kind=ObservationKind.CODE_ERROR, tool_calls=1)
        return Outcome(text=_information(clip(result.strip(), self._output_chars)), tool_calls=1)


def _information(text: str) -> str:
    return f"<information>{text}</information>"

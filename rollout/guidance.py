"""Guided episodes: the policy is shown a reference solution or a tutorial that its student will not see.

A teacher that fails a task alone often solves it with help, and then demonstrates what it could not have demonstrated.
The guide stands behind the question in the policy's own view and is no part of `Trajectory.messages`. `guide_leaks`
finds the turns that only make sense to a reader of the guide, so that no student learns to speak of what it cannot
see, or to answer out of nothing.

Example::

    text = guide_text(task, "solution")        # TaskError when the task holds none
    guide_leaks(trajectory)                    # ('step 1 speaks of the guide: "the reference solution"',)

After AgentTrek (arXiv 2412.09605), which replays tutorials, and the guided variant of arXiv 2505.17612's code.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from envs.base import ObservationKind, Task, TaskError
from envs.grading import number
from rollout.trajectory import SpanType, Step, Trajectory

GuideKind = Literal["none", "solution", "tutorial"]
GUIDES: tuple[str, ...] = get_args(GuideKind)

_SHOWN_AS = {
    "solution": "Reference solution",
    "tutorial": "Tutorial",
}
_INSTRUCTIONS = (
    "The text between the marks is for your eyes alone. Whoever reads your work has the question and what you write, "
    "nothing else. Let the text steer you, and act as if it were not there: never mention or quote it, reason from the "
    "question, find every fact with the tools and compute every number in code, also where you know it by now."
)


def guide_text(task: Task, kind: GuideKind) -> str | None:
    """What is shown behind the question of `task`; None for "none". Raises `TaskError` when the task has no such guide.

    A solution is `metadata["solution"]` (as MATH has it), or the sentences that HotpotQA's `supporting_facts` name in
    its `context`, or MuSiQue's `decomposition`; a tutorial is `metadata["tutorial"]`. A list of texts is shown as
    numbered lines.
    """
    if kind == "none":
        return None
    body = _body(task.metadata.get(kind))
    if not body and kind == "solution":
        body = _supporting_sentences(task.metadata) or _decomposition(task.metadata)
    if not body:
        found = ", ".join(map(str, task.metadata)) or "nothing"
        raise TaskError(
            f"task {task.id!r} has no {kind} to guide with: metadata[{kind!r}] must be a text or a list of texts; "
            f"its metadata holds {found}"
        )
    name = _SHOWN_AS[kind]
    return f"{_INSTRUCTIONS}\n\n--- {name} ---\n{body}\n--- End of {name.lower()} ---"


def _body(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Sequence) and value and all(isinstance(each, str) for each in value):
        return "\n".join(f"{at}. {each.strip()}" for at, each in enumerate(value, start=1))
    return ""


def _supporting_sentences(metadata: Mapping[str, Any]) -> str:
    """HotpotQA's: `supporting_facts` {title, sent_id} point into `context` {title, sentences}; "" for other shapes."""
    facts, context = metadata.get("supporting_facts"), metadata.get("context")
    try:
        pages = dict(zip(context["title"], context["sentences"], strict=True))  # type: ignore[index]
        named = list(zip(facts["title"], facts["sent_id"], strict=True))  # type: ignore[index]
        return "\n".join(f"{title}: {pages[title][sentence].strip()}" for title, sentence in named)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return ""


def _decomposition(metadata: Mapping[str, Any]) -> str:
    """MuSiQue's: a list of {question, answer}; "" for other shapes."""
    parts = metadata.get("decomposition") or ()
    try:
        return "\n".join(
            f"{number}. {part['question']}: {part['answer']}" for number, part in enumerate(parts, start=1)
        )
    except (TypeError, KeyError):
        return ""


# -- leaks

_NOUN = r"(?:guide|tutorial|hint|walkthrough|reference)"
_THING = r"(?:solution|answer|guide|tutorial|hint)s?"
_RIGHT = r"(?:final |correct |right )?"
_ALSO = r"(?:also |already |clearly |then )?"
_PHRASES = re.compile(
    "|".join(
        (
            rf"\b(?:reference|provided|official|worked|model|sample|supplied|hidden) {_THING}\b",
            rf"\b{_THING} (?:that )?(?:(?:was|were|is|are|has been|have been|i was|i am) )?"
            r"(?:provided|supplied|shown to me|given to me|given above|shown above)\b",
            rf"\b(?:according to|based on|following|as per|per|consult(?:ing)?|see|from) (?:the|this|my) {_NOUN}\b",
            rf"\b(?:the|this|my) (?:{_NOUN}|solution) {_ALSO}(?:says|said|tells|told|mentions|mentioned)\b",
            rf"\b(?:the|this|my) {_NOUN} {_ALSO}(?:suggests|states|stated|shows|indicates|recommends|describes)\b",
            rf"\bas (?:the|this|my) (?:{_NOUN}|solution) {_ALSO}(?:shows|does|has it|explains|puts it|notes)\b",
            r"\banswer key\b",
            r"\bground[- ]truth\b",
            rf"\bi(?:'ve been| was| am| have been) (?:already )?(?:given|told|shown) the {_RIGHT}(?:answer|result)\b",
            rf"\b(?:(?:i|we) already (?:know|knew)|knowing) (?:that )?the {_RIGHT}answer (?:is|was|to be)\b",
            r"\b(?:known|correct) answer (?:that )?(?:is|was) (?:given|provided|known)\b",
            r"\btext between the marks\b",
            r"\bfor my eyes\b",
            rf"\bas if (?:it|the (?:text|{_NOUN})) (?:were|was) not there\b",
            rf"\bwithout (?:mentioning|quoting|revealing) (?:it|the (?:text|{_NOUN}))\b",
            rf"\b(?:should|must|may|can) ?not (?:mention|quote|reveal) (?:it|that|the (?:text|{_NOUN}))\b",
        )
    ),
    re.IGNORECASE,
)
"""What speaks of a guide. Words that tasks use themselves ("the solution of the equation") are not among them."""
_FIRST_PHRASES = re.compile(
    r"\b(?:according to|based on|following|as per|consult(?:ing)?|see|from) (?:the|this) solution\b(?! (?:of|to|for)\b)"
    rf"|\b(?:the|this) solution {_ALSO}(?:suggests|states|stated|shows|indicates|describes|uses|gives)\b",
    re.IGNORECASE,
)
"""The same in a first turn; later ones may speak of what their own code has solved."""

_OVERLAP_WORDS, _OVERLAP_PROSE = 10, 7
"""So many words in a row as the guide has them, of which so many are words proper: shorter stretches, and formulas,
come out alike without looking."""
_WORD = re.compile(r"\w+")
_COMMENT = re.compile(r"#(.*)")
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")  # "2018-2019" holds no -2019
_FRACTION = re.compile(r"(?:(?<![\w.)\]])-)?\d+/\d+")
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+")
_NAME = re.compile(r"\b[^\W\d_]\w{2,}")
_SEEN_SHARE = 2 / 3
"""Of the words of an answer; the rest may be wording."""
_LITTLE_WORDS = frozenset(
    "a an the of in on at to for and or is are was were be by with from as it its this that what which who whom whose "
    "when where why how many much did do does has have had not no yes true false if then".split()
)
_JUDGEMENTS = frozenset(("yes", "no", "true", "false"))


def guide_leaks(trajectory: Trajectory) -> tuple[str, ...]:
    """Why the turns of a guided trajectory make no sense to whoever does not see its guide; () when they do, and for a
    trajectory without one.

    Looks for words about the guide and long stretches of its text in what was thought, for a query about a name that
    only the guide had told, and for a final answer that stood in no question and no observation and that no code
    computed. It reads words, not meanings: a thought that follows the guide in words of its own passes, as it should.
    """
    if trajectory.guide is None:
        return ()
    body = _guide_body(trajectory.guide)
    stretches = set(_stretches(body))
    guide_names = {name.casefold() for name in _NAME.findall(body) if name[0].isupper()} - _LITTLE_WORDS
    visible = trajectory.user_prompt or trajectory.task.question
    leaks: list[str] = []
    for at, step in enumerate(trajectory.steps, start=1):
        thought = _thought_of(step)
        lower = visible.casefold()
        for phrase in (*_PHRASES.finditer(thought), *(_FIRST_PHRASES.finditer(thought) if at == 1 else ())):
            if phrase[0].casefold() not in lower:
                leaks.append(f'step {at} speaks of the guide: "{_short(phrase[0])}"')
                break
        if copied := next((each for each in _stretches(thought) if each in stretches), None):
            if copied not in set(_stretches(visible)):
                leaks.append(f'step {at} repeats the guide: "{_short(" ".join(copied))}"')
        told = set(_WORD.findall(lower))
        for query in _queries(step):
            names = [name for name in _NAME.findall(query) if name[0].isupper() and name.casefold() in guide_names]
            if untold := [name for name in names if name.casefold() not in told]:
                leaks.append(f"step {at} asks for {untold[0]!r}, which only the guide had told")
                break
        visible = f"{visible}\n{step.observation}" if step.observation_kind is not ObservationKind.FINAL else visible
    if out_of_nothing := _answer_out_of_nothing(trajectory, visible):
        leaks.append(f"step {len(trajectory.steps)} answers {_short(out_of_nothing)!r}, which nothing before it shows")
    return tuple(leaks)


def _guide_body(guide: str) -> str:
    """Without our own words around it."""
    for name in _SHOWN_AS.values():
        _, begun, rest = guide.partition(f"--- {name} ---\n")
        if begun:
            return rest.rpartition(f"\n--- End of {name.lower()} ---")[0]
    return guide


def _thought_of(step: Step) -> str:
    """What a turn says in words: its thoughts and the comments of its code."""
    text = step.completion.text
    pieces = []
    for span in step.spans:
        piece = text[span.start : span.end]
        if span.type is SpanType.THOUGHT:
            pieces.append(piece)
        elif span.type is SpanType.CODE:
            pieces += _COMMENT.findall(piece)
    return "\n".join(pieces)


def _stretches(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of `_OVERLAP_WORDS` words, as far as they are prose."""
    words = _WORD.findall(text.casefold())
    proper = [len(word) > 1 and word.isalpha() for word in words]
    for start in range(len(words) - _OVERLAP_WORDS + 1):
        if sum(proper[start : start + _OVERLAP_WORDS]) >= _OVERLAP_PROSE:
            yield tuple(words[start : start + _OVERLAP_WORDS])


def _queries(step: Step) -> list[str]:
    """The texts that a turn gives to tools, those of the final answer aside."""
    action = step.action or ""
    if action.startswith("<search>"):
        return [action.removeprefix("<search>").removesuffix("</search>")]
    if action.startswith("["):
        try:
            calls = json.loads(action)
            return [
                value
                for call in calls
                if call["name"] != "final_answer"
                for value in call["arguments"].values()
                if isinstance(value, str)
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            pass  # code that begins with a list
    tree = _parsed(action)
    return [
        argument.value
        for call in (ast.walk(tree) if tree else ())
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id not in _OWN_CALLS
        for argument in (*call.args, *(keyword.value for keyword in call.keywords))
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


_OWN_CALLS = frozenset(("final_answer", "print", "str", "len", "repr", "format", "int", "float", "sorted", "set"))


def _answer_out_of_nothing(trajectory: Trajectory, visible: str) -> str | None:
    """The final answer, when it was written down by hand and nothing that the agent had seen holds it."""
    prediction = trajectory.prediction
    if prediction is None or trajectory.dialect == "cot" or not trajectory.steps:  # words alone may reason
        return None
    in_code = trajectory.dialect == "code"
    try:
        if in_code and not _is_written_by_hand(trajectory.steps):
            return None
    except RecursionError:  # nested too deeply to be followed
        return None
    words = _content_words(prediction)
    if prediction.strip().rstrip(".").casefold() in _JUDGEMENTS:
        return None if len(trajectory.steps) > 1 else prediction
    value = number(prediction)
    if value is not None:
        # Without code a sum is done in the thought, where it can be followed.
        return prediction if in_code and value not in _numbers(visible) else None
    if not words:
        return None
    told = set(_WORD.findall(visible.casefold()))
    shown = sum(word in told for word in words)
    return None if shown >= _SEEN_SHARE * len(words) else prediction


def _content_words(text: str) -> list[str]:
    words = _WORD.findall(_LATEX_COMMAND.sub(" ", text).casefold())
    return [word for word in words if word not in _LITTLE_WORDS]


def _numbers(text: str) -> set[Fraction]:
    found = (number(piece) for pattern in (_NUMBER, _FRACTION) for piece in pattern.findall(text))
    return {value for value in found if value is not None}


def _is_written_by_hand(steps: Sequence[Step]) -> bool:
    """Whether what the last code gives to `final_answer` is a constant, or a name that was set to one."""
    constants: dict[str, bool] = {}
    for step in steps:
        tree = _parsed(step.action or "")
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr | ast.For):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                value = node.value if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) else None
                for target in targets:
                    if isinstance(target, ast.Name):
                        constants[target.id] = value is not None and _is_constant(value, constants)
    tree = _parsed(steps[-1].action or "")
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "final_answer":
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            return all(_is_constant(each, constants) for each in given)
    return False


def _is_constant(node: ast.expr, constants: Mapping[str, bool]) -> bool:
    match node:
        case ast.Constant():
            return True
        case ast.Name(id=name):
            return constants.get(name, False)
        case ast.UnaryOp(operand=operand):
            return _is_constant(operand, constants)
        case ast.JoinedStr(values=values):
            return all(
                _is_constant(each.value if isinstance(each, ast.FormattedValue) else each, constants) for each in values
            )
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return all(_is_constant(item, constants) for item in items)
        case ast.Call(func=ast.Name(id="str" | "int" | "float" | "repr"), args=[only], keywords=[]):
            return _is_constant(only, constants)
    return False


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the code's own making: invalid escapes
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."

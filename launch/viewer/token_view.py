"""A trajectory as the tokens that a student is trained on: what each is, its weight, how likely its policy found it.

The row is made by `learner.examples`, as the learner makes it, with the settings that are kept beside the student that
the run has trained (`training.json`): what is shown is what was trained. A row that the learner refuses is shown with
the reason, its turns as they were sampled. Needs a tokenizer, with its chat template: a folder that is named, or that
of the student in the ledger's own run. transformers is imported when the first row is asked for, and without torch.

Example::

    view = TokenViews(tokenizer=None).of(trajectory, "runs/a/ledger")
    view.refused, view.tokens[0].weight
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from launch.viewer import shown_text
from rollout.trajectory import Completion, Trajectory

MOST_TOKENS = 20_000
"""A page shows so many; the row is checked whole."""
MOST_CHARACTERS = 200_000
"""A longer conversation would take many seconds to take apart, and nobody reads it token by token."""
_OWN_ROLLOUTS = frozenset({"grpo", "opd", "sod"})
"""Objectives that learn from a student's own rollouts, right or wrong (`Objective.successes_only` is False): named here
because to ask them is to import torch."""
_FAINT_PROBABILITIES = (0.99, 0.9, 0.7, 0.5, 0.25, 0.1)
_LARGEST_ROW = 1_000_000
_PARENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a row."""

    html: Markup
    id: int
    span: str
    weight: float
    turn: int
    """-1: only read."""
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    """(token, log-probability), likeliest first: what was likeliest in its place."""

    @property
    def shade(self) -> int | None:
        """0 (nearly certain) to 6 (hardly expected); None: unknown."""
        if self.logprob is None:
            return None
        p = math.exp(min(0.0, self.logprob))
        return sum(p < bound for bound in _FAINT_PROBABILITIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """A row for the page."""

    tokens: tuple[Token, ...] = ()
    length: int = 0
    """Of the whole row, in tokens."""
    trained: int = 0
    weight: float = 0.0
    refused: str = ""
    """Why the learner does not train on it."""
    unknown: str = ""
    """Why there are no tokens to show."""
    tokenizer: str = ""
    settings: str = ""
    """In words."""
    has_logprobs: bool = False


class TokenViews:
    """Keeps the tokenizers that it has loaded. Any thread may ask; one is answered at a time."""

    def __init__(self, *, tokenizer: str | None) -> None:
        self._named = tokenizer
        self._makers: dict[str, tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def folder(self, ledger_uri: str) -> str | None:
        """Of the tokenizer for a ledger's rows; None when there is none."""
        return self._named or found_tokenizer(ledger_uri)

    def of(self, trajectory: Trajectory, ledger_uri: str) -> TokenView:
        """Raises nothing for a row or a tokenizer that cannot be used: the view says why."""
        folder = self.folder(ledger_uri)
        if folder is None:
            return TokenView(
                unknown="There is no trained student beside this ledger. Start the viewer with --tokenizer FOLDER to "
                "see its rows as the tokens of that tokenizer."
            )
        characters = sum(len(message.content) for message in trajectory.messages())
        if characters > MOST_CHARACTERS:
            return TokenView(
                unknown=f"It has {characters:,} characters; up to {MOST_CHARACTERS:,} are shown as tokens. "
                "python -m learner.audit checks rows of any length."
            )
        with self._lock:
            try:
                maker, settings = self._maker(folder)
            except Exception as error:  # whatever transformers says of a folder, in its many classes
                return TokenView(unknown=f"The tokenizer in {folder} cannot be used: {' '.join(str(error).split())}")
            return _view(maker, trajectory, folder, settings)

    def _maker(self, folder: str) -> tuple[Any, str]:
        if folder not in self._makers:
            from learner.examples import ExampleMaker

            recipe = _recipe(folder)
            settings = {
                "max_row_tokens": int(recipe.get("max_row_tokens", _LARGEST_ROW)),
                "system_prompt": recipe.get("system_prompt"),
                "span_weights": recipe.get("span_weights") or {},
                "successes_only": recipe.get("objective") not in _OWN_ROLLOUTS,
            }
            self._makers[folder] = (ExampleMaker(_load(folder), **settings), _in_words(recipe))
        return self._makers[folder]


def found_tokenizer(ledger_uri: str) -> str | None:
    """The student's of the run that a ledger lies in (RUN/ledger, RUN/evaluation/NAME)."""
    if "://" in ledger_uri:
        return None
    for parent in list(Path(ledger_uri).resolve().parents)[:_PARENTS]:
        student = parent / "learner" / "student"
        if (student / "tokenizer_config.json").is_file():
            return str(student)
    return None


def _load(folder: str) -> Any:
    import transformers

    # The class of fast tokenizers reads any tokenizer.json and, unlike AutoTokenizer, needs no torch: 30 MB, not 330.
    quick = (Path(folder) / "tokenizer.json").is_file()
    return (transformers.PreTrainedTokenizerFast if quick else transformers.AutoTokenizer).from_pretrained(folder)


def _recipe(folder: str) -> dict[str, Any]:
    """How the student in this folder was trained; empty when nobody says."""
    try:
        found = json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
        recipe = found.get("recipe")
    except (OSError, ValueError, AttributeError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _in_words(recipe: dict[str, Any]) -> str:
    if not recipe:
        return "no training.json beside the tokenizer: every span weighs 1, no row is too long"
    weights = ", ".join(f"{name} {value:g}" for name, value in sorted((recipe.get("span_weights") or {}).items()))
    return (
        f"as this student was trained: objective {recipe.get('objective', 'unknown')}, rows of at most "
        f"{recipe.get('max_row_tokens', '?')} tokens, span weights {weights or 'all 1'}"
    )


def _view(maker: Any, trajectory: Trajectory, folder: str, settings: str) -> TokenView:
    from learner.examples import Example

    made = maker.make(trajectory)
    tokenizer = maker.renderer.tokenizer
    if isinstance(made, Example):
        scores = made.scores
        own = None if scores is None else scores.behaviour_logprobs
        tops = (
            ()
            if scores is None
            else _teacher_top(tokenizer, scores.teacher_ids, scores.teacher_logprobs, made.token_ids)
        )
        facts = zip(made.span_types, made.loss_weights, made.turns, strict=True)
        tokens = [
            Token(html=html, id=id_, span=span.value, weight=weight, turn=turn, logprob=logprob, top=top or ())
            for html, id_, (span, weight, turn), logprob, top in zip_longest(
                _texts(tokenizer, made.token_ids[:MOST_TOKENS]),
                made.token_ids[:MOST_TOKENS],
                list(facts)[:MOST_TOKENS],
                _known(own, min(len(made), MOST_TOKENS)),
                list(tops)[:MOST_TOKENS],
            )
        ]
        return TokenView(
            tokens=tuple(tokens),
            length=len(made),
            trained=sum(weight > 0 for weight in made.loss_weights),
            weight=math.fsum(made.loss_weights),
            tokenizer=folder,
            settings=settings,
            has_logprobs=any(token.logprob is not None for token in tokens),
        )
    refused = f"{made.reason.value.replace('_', ' ')}: {made.detail}" if made.detail else made.reason.value
    sampled = [t for i, step in enumerate(trajectory.steps) for t in _sampled(tokenizer, step.completion, i)]
    return TokenView(
        tokens=tuple(sampled[:MOST_TOKENS]),
        length=len(sampled),
        refused=refused,
        unknown="" if sampled else "Its policy did not tell the ids of what it sampled.",
        tokenizer=folder,
        settings=settings,
        has_logprobs=any(token.logprob is not None for token in sampled),
    )


def _sampled(tokenizer: Any, completion: Completion, turn: int) -> list[Token]:
    """A turn of a refused row as its policy sampled it; nothing where the ids are not known or another tokenizer's."""
    ids = completion.token_ids or ()
    if any(not 0 <= each < len(tokenizer) for each in ids):
        return []
    values = completion.logprobs or ()
    logprobs = [None] * (len(ids) - len(values)) + [float(each) for each in values]
    tops: list[tuple[tuple[str, float], ...]] = [()] * len(ids)
    if completion.top_ids and completion.top_logprobs and values:
        k = len(completion.top_ids) // len(values)
        for i in range(len(values)):
            pairs = zip(completion.top_ids[i * k : i * k + k], completion.top_logprobs[i * k : i * k + k], strict=True)
            tops[len(ids) - len(values) + i] = tuple((_name(tokenizer, id_), float(p)) for id_, p in pairs)
    return [
        Token(html=html, id=id_, span="sampled", weight=0.0, turn=turn, logprob=logprob, top=top)
        for html, id_, logprob, top in zip(_texts(tokenizer, ids), ids, logprobs, tops, strict=True)
    ]


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[Markup]:
    """What each token adds to the text; the last one of those that share a character has it."""
    from rollout.rendering import decoded_ends

    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found, start = [], 0
    for end in decoded_ends(tokenizer, ids):
        piece = text[start:end]
        start = max(start, end)
        html = shown_text.plain(piece).html.replace("\n", Markup('<span class="nl">\u23ce</span>\n'))
        found.append(html or Markup('<span class="ctl" title="a part of a character">\u00b7</span>'))
    return found


def _known(values: np.ndarray | None, count: int) -> Iterable[float | None]:
    if values is None:
        return [None] * count
    return [float(each) if np.isfinite(each) else None for each in values[:count]]


def _teacher_top(
    tokenizer: Any, ids: np.ndarray | None, logprobs: np.ndarray | None, own: Sequence[int]
) -> list[tuple[tuple[str, float], ...]]:
    if ids is None or logprobs is None:
        return []
    found = []
    for row, values in zip(ids[: len(own)], logprobs[: len(own)], strict=True):
        pairs = sorted(((float(p), int(i)) for i, p in zip(row, values, strict=True) if i >= 0), reverse=True)
        found.append(tuple((_name(tokenizer, i), p) for p, i in pairs))
    return found


def _name(tokenizer: Any, id_: int) -> str:
    if not 0 <= id_ < len(tokenizer):
        return f"token {id_}"
    return tokenizer.decode([id_], skip_special_tokens=False, clean_up_tokenization_spaces=False)

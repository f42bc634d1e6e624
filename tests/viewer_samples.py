"""Ledgers for the viewer's tests: two policies on the same tasks, votes, log-probabilities, and hostile texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from learner_samples import trajectory

from envs.base import ObservationKind
from rollout.ledger import LedgerWriter
from rollout.trajectory import Candidate, Failure, FailureClass, StopReason, Trajectory

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2"><svg/onload=window.hacked=3>',
    '"><a href="javascript:window.hacked=4">click</a>\' onmouseover=window.hacked=5 x="',
    "</pre></main></body><iframe srcdoc='<script>parent.hacked=6</script>'></iframe>",
    "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "data:text/html,<script>window.hacked=7</script> ${window.hacked=8} `</textarea>`",
    "right\u202eto left\u2066 isolate \u200bzero\u00adsoft",
    "nul\x00 esc\x1b[31mred\x1b[0m bell\x07 \ud83d lone",
    "e" + "\u0301" * 300,
    "</title><style>*{display:none}</style><meta http-equiv=refresh content='0;url=http://hostile.test/'>",
)


def numbered(i: int, *, policy: str = "teacher", success: bool = True) -> Trajectory:
    """The i-th task's, by this policy; later ones start later."""
    made = trajectory(i, success=success)
    return replace(
        made,
        key=f"{made.task.id}|{policy}|0|0",
        policy=policy,
        prediction=made.prediction if success else "17",
        started_at_s=1.7e9 + i,
        duration_s=1.0 + i,
    )


def voted(of: Trajectory) -> Trajectory:
    """Its first step chosen among three candidates, two of which agree."""
    step = of.steps[0]
    same = Candidate(text=step.completion.text, observation=step.observation, kind=ObservationKind.OK, votes=2)
    lost = Candidate(text="Thought: no idea.", observation="NameError: x", kind=ObservationKind.CODE_ERROR, votes=0)
    return replace(of, steps=(replace(step, candidates=(lost, same, same), chosen=1), *of.steps[1:]))


def failed(i: int) -> Trajectory:
    """No result."""
    return replace(
        numbered(i, success=False),
        failure=Failure(failure_class=FailureClass.ENGINE, message="the engine went away"),
        stop_reason=StopReason.FAILED,
        prediction=None,
        reward=0.0,
    )


def hostile(i: int, text: str) -> Trajectory:
    """The text in every place that holds any."""
    made = numbered(i)
    steps = tuple(
        replace(
            step,
            completion=replace(step.completion, text=text),
            spans=(),
            action=text,
            observation=text,
            candidates=(Candidate(text=text, observation=text, kind=ObservationKind.OK, votes=1),),
        )
        for step in made.steps
    )
    return replace(
        made,
        key=f"{text}|{i}",
        task=replace(made.task, question=text, answer=text, kind=text, id=f"{text}-{i}", metadata={"note": text}),
        steps=steps,
        policy=text,
        weights_version=text,
        prediction=text,
        system_prompt=text,
        guide=text,
        stop_detail=text,
        first_thought=text,
    )


def write(folder: Path, trajectories: list[Trajectory], *, writer: str = "w") -> Path:
    """A ledger with these rows, or these rows more."""
    LedgerWriter(folder, writer=writer).append(trajectories)
    return folder

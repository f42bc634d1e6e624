"""The rollout numbers: the engine-bound fraction, orchestration, k=8, trajectories/s beside smolagents, the ledger.

python benchmarks/rollout.py --student runs/starter-seed0/learner/student
python benchmarks/rollout.py --only engine --repeats 1 --tasks 200     # one part, quickly

Medians of `--repeats` runs of each side, taken in turn, on one machine and in one run. The model is the student of the
embedded default on vLLM. Without `--student` it is the untrained base student, which never ends a turn: every turn is
`max_tokens` of junk then, so that only costs, not scores, mean anything. What runs beside the engine (env hosts,
sandboxes, retrieval, Ray) shares the machine's cores with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.rollout_world import BASE_STUDENT, stage
from benchmarks.scoreboard import Row
from rollout.vllm_policy import EngineKind

PARTS = ("engine", "k8", "smolagents", "orchestration", "ledger")
ON_STAGE = PARTS[:-1]


def measure(options: Any, parts: Sequence[str]) -> Iterator[Row]:
    if "orchestration" in parts:
        from benchmarks import rollout_orchestration

        yield from rollout_orchestration.rows(repeats=options.repeats)
    if "ledger" in parts:
        from benchmarks import rollout_ledger

        yield from rollout_ledger.rows(repeats=options.repeats)
    if not any(part in parts for part in ON_STAGE):
        return
    with stage(
        options.student,
        concurrency=options.concurrency,
        slots=max(options.concurrency, options.peer_concurrency, 64),
        tasks=max(options.tasks, options.peer_tasks),
        engine=options.engine,
        env_hosts=options.env_hosts,
    ) as ready:
        if "engine" in parts:
            from benchmarks import rollout_engine

            for candidates in options.candidates:
                tasks = options.tasks if candidates == 1 else max(2 * options.concurrency, options.tasks // 2)
                yield from rollout_engine.rows(
                    ready, candidates=candidates, tasks=tasks, slots=options.concurrency, repeats=options.repeats
                )
        if "orchestration" in parts:
            from benchmarks import rollout_orchestration

            yield from rollout_orchestration.rows_with_envs(ready, repeats=options.repeats)
        if "k8" in parts:
            from benchmarks import rollout_candidates

            tasks = max(128, options.tasks // 2)
            yield from rollout_candidates.rows(ready, candidates=8, tasks=tasks, slots=32, repeats=options.repeats)
        if "smolagents" in parts:
            from benchmarks import rollout_smolagents

            yield from rollout_smolagents.rows(
                ready,
                options.student,
                tasks=options.peer_tasks,
                slots=options.peer_concurrency,
                repeats=options.repeats,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--student", type=Path, default=BASE_STUDENT, help="a trained student's folder")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated parts of: {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the medians are printed")
    parser.add_argument("--tasks", type=int, default=400, help="episodes of a run")
    parser.add_argument("--peer-tasks", type=int, default=384, help="tasks for smolagents and for us beside it")
    parser.add_argument("--peer-concurrency", type=int, default=192, help="our episodes in flight beside smolagents")
    parser.add_argument("--concurrency", type=int, default=64, help="episodes in flight")
    parser.add_argument("--skip-ledger", action="store_true", help="leave the ledger's numbers out")
    parser.add_argument(
        "--env-hosts", type=int, help="Ray actors for the envs, 0: none; default: the embedded default's"
    )
    parser.add_argument("--engine", choices=get_args(EngineKind), help="where vLLM runs; default: as configured")
    parser.add_argument(
        "--candidates", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8],
        help="engine: 1, 8 or both, as 1,8",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    parts = [part for part in options.only.split(",") if not (part == "ledger" and options.skip_ledger)]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {unknown.pop()!r} is unknown; there are {', '.join(PARTS)}")
    if unknown := set(options.candidates) - {1, 8}:
        parser.error(f"--candidates {unknown.pop()}: the goals are for 1 and 8")
    if options.tasks < 2 * options.concurrency:
        parser.error(f"--tasks {options.tasks} never fills {options.concurrency} slots twice; give more")
    if not (options.student / "config.json").is_file():
        parser.error(f"--student {options.student} is no Hugging Face folder: it holds no config.json")
    options.student = options.student.absolute()
    trained = (options.student / "training.json").is_file()
    kind = "a trained student" if trained else "an untrained student, whose turns are junk of max_tokens"
    title = f"Rollouts with {options.student.name} ({kind}), {os.cpu_count()} cores, medians of {options.repeats}"
    print(title, flush=True)
    return scoreboard.publish(list(measure(options, parts)), options, title=title)


if __name__ == "__main__":
    sys.exit(main())

"""Try a student on a question, and see its thoughts, code and observations: everything in this process, no Ray.

python -m launch.ask "In which city was the author of The Silver Harbor born?"
python -m launch.ask --run runs/starter-seed0 --candidates 8 "..."      self-consistent actions
python -m launch.ask --example two_hop                                  a held-out question of the run
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", help="what to ask")
    parser.add_argument("--run", help="a run's folder; default: the newest finished one under runs/")
    parser.add_argument("--example", metavar="KIND", help="ask a held-out question of this kind instead")
    parser.add_argument("--candidates", type=int, default=1, help="k of self-consistent actions; 1 is greedy")
    parser.add_argument("--student", help="another student's folder")
    options = parser.parse_args(arguments)
    if (options.question is None) == (options.example is None):
        parser.error("give a question, or --example KIND")
    if options.candidates < 1:
        parser.error(f"--candidates must be at least 1, not {options.candidates}")
    try:
        return asyncio.run(_ask(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


async def _ask(options: argparse.Namespace) -> int:
    from envs.base import Task
    from envs.pool import EnvHost
    from launch.cluster import QUIET
    from launch.evaluation import student_settings, student_spec
    from launch.run_folder import RunFolder
    from launch.world import load_world
    from rollout.async_env import ThreadedEnv
    from rollout.episode import run_episode

    folder = RunFolder(options.run or _newest_run())
    config = folder.config()
    world = load_world(config, folder.index)
    task = Task(id="asked", question=options.question or "", answer="", kind="asked")
    if options.example:
        examples = [held_out for held_out in world.test if held_out.kind == options.example]
        if not examples:
            kinds = ", ".join(dict.fromkeys(held_out.kind for held_out in world.test))
            raise ValueError(f"--example {options.example!r}: this run has {kinds}")
        task = examples[0]
    student = Path(options.student) if options.student else folder.student
    if not (student / "config.json").is_file():
        raise ValueError(f"{student} holds no student yet: let launch/distill.py finish, or name one with --student")
    spec = student_spec(config, str(student))
    os.environ.update({**QUIET, **spec.environment()})
    mode = "greedy" if options.candidates == 1 else "self_consistent"
    settings = student_settings(replace(config, evaluate=replace(config.evaluate, candidates=options.candidates)), mode)
    retriever = world.retriever.build() if world.retriever else None
    host = EnvHost(config.env, (lambda query, k: retriever.search([query], k)[0]) if retriever else None)
    policy = spec.build()
    try:
        env = ThreadedEnv(host.make())
        trajectory = await run_episode(task, policy=policy, env=env, settings=settings)
        await env.close()
    finally:
        await policy.close()
        host.close()
    _show(trajectory, expected=task.answer)
    return 0 if trajectory.failure is None else 1


def _show(trajectory, *, expected: str) -> None:  # noqa: ANN001  (rich and the record are imported late)
    from rich.console import Console
    from rich.panel import Panel
    from rich.syntax import Syntax
    from rich.text import Text

    console = Console()
    console.print(Panel(Text(trajectory.task.question), title="question", title_align="left"))
    for number, step in enumerate(trajectory.steps, start=1):
        thought = step.completion.text.split("Code:")[0].strip()
        console.print(Text(f"step {number}  ", style="bold") + Text(thought, style="italic"))
        if step.action is not None:
            console.print(Syntax(step.action, "python", background_color="default", word_wrap=True))
        if step.candidates:
            votes = ", ".join(str(candidate.votes) for candidate in step.candidates)
            console.print(Text(f"votes of {len(step.candidates)} candidates: {votes}", style="dim"))
        console.print(Text(step.observation, style="cyan"))
    if trajectory.failure is not None:
        console.print(Text(f"failed: {trajectory.failure.message}", style="red"))
        return
    console.print(Text(f"answer: {trajectory.prediction}  ({trajectory.stop_reason.value})", style="bold"))
    if expected:
        console.print(Text(f"right answer: {expected}", style="green" if trajectory.success else "red"))


def _newest_run() -> Path:
    finished = sorted(Path("runs").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ValueError("no finished run under runs/: run launch/distill.py first, or name one with --run")
    return finished[-1].parent


if __name__ == "__main__":
    sys.exit(main())

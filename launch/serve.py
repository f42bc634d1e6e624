"""Serve a student as an agent behind an OpenAI-compatible endpoint: its code runs in the sandbox here, its searches in
the run's index, and any chat client sees its steps as they happen.

python -m launch.serve                                        the newest finished run under runs/
python -m launch.serve --run runs/starter-seed0 --candidates 8
python -m launch.serve --student runs/starter-seed0/learner/snapshots/0.1
python -m launch.serve --run runs/starter-seed0 --policy teacher
python -m launch.serve --student my-model recipe=paper retrieval.corpus=wiki.jsonl
APPRENTICE_KEY=... python -m launch.serve --host 0.0.0.0 --api-key-env APPRENTICE_KEY

curl -N localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
     -d '{"stream": true, "messages": [{"role": "user", "content": "What is 6 * 7?"}]}'

The last user message of a conversation is the task; earlier messages are left out unless --history says how many are
put in front of it, since students are trained on single questions. System messages are left out: a student has the
prompt that it was trained with.

Beyond OpenAI's fields a request may hold candidates, max_steps, top_k, trajectory (true: all that happened, beside the
answer) and steps (where they are shown); launch/serving/chat_request.py says how. A teacher behind an API is paid for
each question; the spend cap of its run does not hold here.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from envs.base import EnvError
    from learner.config import ConfigError
    from rollout.ledger import LedgerError

    try:
        return _serve(options)
    except (ConfigError, LedgerError, EnvError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is served")
    what.add_argument("--run", default="", help="a run's folder; default: the newest finished one under runs/")
    what.add_argument("--student", default="", help="another student's folder; default: the run's")
    what.add_argument("--policy", default="student", help="student, or teacher: the run's own (default: student)")
    what.add_argument(
        "overrides", nargs="*", metavar="key=value", help="without a run: the configuration, as of launch/distill.py"
    )
    what.add_argument("--model-name", default="", help="what clients call it; default: the run's name")
    what.add_argument("--engine", default="", help="on a CPU: in_process or own_process; default: as the run says")
    how = parser.add_argument_group("how it answers, where a request does not say")
    how.add_argument("--candidates", type=int, default=1, help="k of self-consistent actions; 1 is greedy")
    how.add_argument("--history", type=int, default=0, help="earlier messages in front of the question (default: 0)")
    how.add_argument(
        "--steps", default="reasoning", choices=("reasoning", "content", "none"),
        help="where steps are shown: as thinking (reasoning_content), folded in the content, or not at all",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument("--places", type=int, default=16, help="questions at a time (default: %(default)s)")
    limits.add_argument("--line", type=int, default=64, help="questions that may wait (default: %(default)s)")
    limits.add_argument("--wait-s", type=float, default=30.0, help="and how long (default: %(default)g s)")
    limits.add_argument("--deadline-s", type=float, default=300.0, help="of an answer (default: %(default)g s)")
    limits.add_argument("--drain-s", type=float, default=30.0, help="for what is under way at the end (%(default)g s)")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="address to listen at; others than loopback need a key")
    where.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    where.add_argument(
        "--api-key-env", default="", metavar="NAME", help="variable that holds the key clients must send"
    )
    where.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="further name it is called by"
    )
    where.add_argument("--cors-origin", action="append", default=[], metavar="ORIGIN", help="web page that may call it")
    where.add_argument("--ledger", default="", metavar="FOLDER", help="record every served episode there")
    return parser


def _serve(options: argparse.Namespace) -> int:
    key = _key(options.api_key_env, options.host)
    _check(options)
    from launch.serving.chat_request import StepsIn
    from launch.serving.lifecycle import listen, run_service, url_of
    from launch.serving.plan import plan_agent
    from launch.serving.recorder import Recorder
    from launch.serving.service import Service, ServiceSettings
    from launch.serving.service_metrics import ServiceMetrics
    from rollout.ledger import LedgerWriter

    assert options.steps in get_args(StepsIn)
    plan = plan_agent(
        run=options.run, student=options.student, policy=options.policy, engine=options.engine,
        overrides=options.overrides,
    )  # fmt: skip
    plan.settings(options.candidates)
    settings = ServiceSettings(
        model=options.model_name or plan.name,
        candidates=options.candidates,
        history=options.history,
        steps=options.steps,
        places=options.places,
        line=options.line,
        wait_s=options.wait_s,
        deadline_s=options.deadline_s,
        key=key,
        hosts=_hosts(options.host, options.allowed_host),
        origins=tuple(options.cors_origin),
    )
    metrics = ServiceMetrics()
    recorder = Recorder(LedgerWriter(options.ledger, writer="serve"), metrics) if options.ledger else None
    bound = listen(options.host, options.port)

    async def serve() -> int:
        service = Service(plan, settings, recorder=recorder, metrics=metrics)
        _say(f"{settings.model} at {url_of(bound, options.host)}/v1, loading")
        return await run_service(service, bound, drain_s=options.drain_s, say=_say)

    with bound:
        return asyncio.run(serve())


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be 0 to 65535, not {options.port}")
    if options.drain_s < 0:
        raise ValueError(f"--drain-s must not be negative, as {options.drain_s:g} is")
    if options.engine not in ("", "in_process", "own_process"):
        raise ValueError(f"--engine {options.engine!r} is unknown; there are in_process, own_process")
    for origin in options.cors_origin:
        if "://" not in origin or origin.endswith("/"):
            raise ValueError(f"--cors-origin {origin!r}: give an origin such as https://chat.example, without a path")


def _key(variable: str, host: str) -> str:
    if not variable:
        if not _is_loopback(host):
            raise ValueError(
                f"--host {host} can be reached by others: name a variable that holds a key with --api-key-env NAME"
            )
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env {variable}: that variable is not set, or empty")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"--api-key-env {variable}: a key is printable ASCII without spaces")
    return key


def _hosts(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names it answers to; () for any, where it listens at all addresses and none was named."""
    from launch.serving.guard import LOOPBACK

    if host in ("0.0.0.0", "::") and not allowed:
        return ()
    return tuple(dict.fromkeys([*LOOPBACK, host.lower(), *(name.lower() for name in allowed)]))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m envs.sandbox doctor` prints the layers in force; `... run < program.py` runs one program as a step.

`run` prints JSON: the observation that an agent would be shown (`observation`, `kind`) and the fields of `Execution`.
Exit status: 0 for a program that ran, 1 for one that failed or met a limit, 2 when there was nothing to run or no
sandbox to run it in.

    echo 'import sympy; sympy.factorint(2**64 + 1)' | python -m envs.sandbox run --wall-s 5
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from envs.sandbox import DEFAULT_MODULES, Execution, Sandbox, SandboxError, SandboxLimits

_MEANING = {
    "user_namespace": "lets an ordinary user have the other namespaces",
    "mount_namespace": "a file tree of its own",
    "network_namespace": "no network devices, not even loopback",
    "ipc_namespace": "no shared memory or queues of others",
    "uts_namespace": "a host name of its own",
    "cgroup_namespace": "does not see the control groups of the host",
    "pid_namespace": "sees no other process; all of an episode dies at once",
    "private_root": "a read-only root with the Python libraries and nothing else",
    "rlimits": "address space, processor time, files, descriptors",
    "unprivileged_uid": "the user that code runs as",
    "no_capabilities": "no privilege, and none to be had",
    "no_new_privs": "no way back to more",
    "landlock": "reads the Python libraries only, writes nothing (needs Linux 5.13)",
    "fork_metering": "forks only when the driver says so",
    "seccomp": "the allow-list of system calls",
    "no_network": "tried: a socket",
    "no_host_files": "tried: /etc/passwd",
    "no_writing": "tried: a new file",
    "no_exec": "tried: another program",
    "no_signals": "tried: a signal to another process",
    "no_fork": "tried: a fork that was not granted",
    "lazy_imports": "modules that were not loaded at the start can be imported",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m envs.sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="which layers are in force here, found out by trying")
    doctor.add_argument("--json", action="store_true", help="for machines")
    run = commands.add_parser("run", help="run the program on standard input as one step, and print what it did")
    default = SandboxLimits()
    run.add_argument("--wall-s", type=float, default=default.wall_s, help="seconds it may take (%(default)s)")
    run.add_argument("--cpu-s", type=int, default=default.cpu_s, help="seconds of processor time (%(default)s)")
    run.add_argument("--memory-mb", type=int, default=default.memory_mb, help="(%(default)s)")
    run.add_argument("--output-chars", type=int, default=default.output_chars, help="kept of each text (%(default)s)")
    run.add_argument("--seed", type=int, default=0, help="of random and numpy.random (%(default)s)")
    run.add_argument("--modules", nargs="+", metavar="MODULE", default=DEFAULT_MODULES, help="that it may import")
    for command in (doctor, run):
        command.add_argument("--unsafe", action="store_true", help="go on without layers that are not available")
    options = parser.parse_args(arguments)
    try:
        return _doctor(options) if options.command == "doctor" else _run(options)
    except (SandboxError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _doctor(options: argparse.Namespace) -> int:
    with Sandbox(unsafe=options.unsafe) as sandbox:
        report = sandbox.report()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for layer, state in report.items():
        shown = "yes" if state is True else "no" if state is False else state
        print(f"{layer:18} {shown:10} {_MEANING.get(layer, '')}")
    return 0


def _run(options: argparse.Namespace) -> int:
    limits = SandboxLimits(
        wall_s=options.wall_s,
        cpu_s=options.cpu_s,
        memory_mb=options.memory_mb,
        output_chars=options.output_chars,
    )
    try:
        code = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the program is not UTF-8 text: {error}") from None
    with (
        Sandbox(limits=limits, modules=options.modules, unsafe=options.unsafe) as sandbox,
        sandbox.start(options.seed) as session,
    ):
        execution = session.run(code, _no_tools)
    print(json.dumps(_shown(execution), indent=2))
    return 0 if execution.error is None else 1


def _shown(execution: Execution) -> dict:
    from envs.code_env import observe

    observation = observe(execution)
    return {"observation": observation.text, "kind": observation.kind.value, **asdict(execution)}


def _no_tools(name: str, args: list, kwargs: dict) -> object:
    raise LookupError(f"no tool {name!r} here")


if __name__ == "__main__":
    sys.exit(main())

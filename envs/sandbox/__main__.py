"""`python -m envs.sandbox doctor` prints the layers in force; `... run < program.py` runs one program as a step."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from envs.sandbox import Sandbox, SandboxError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m envs.sandbox", description=__doc__)
    parser.add_argument("command", choices=["doctor", "run"])
    parser.add_argument("--unsafe", action="store_true", help="go on without layers that are not available")
    options = parser.parse_args()
    try:
        with Sandbox(unsafe=options.unsafe) as sandbox:
            if options.command == "doctor":
                report = sandbox.report()
                for layer, state in report.items():
                    print(f"{layer:20} {'yes' if state is True else 'no' if state is False else state}")
                return 0
            with sandbox.start(seed=0) as session:
                execution = session.run(sys.stdin.read(), _no_tools)
            print(json.dumps(asdict(execution), indent=2))
            return 0 if execution.error is None else 1
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 2


def _no_tools(name: str, args: list, kwargs: dict) -> object:
    raise LookupError(f"no tool {name!r} here")


if __name__ == "__main__":
    sys.exit(main())

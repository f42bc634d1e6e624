"""What the commands of jobs share: their arguments, the way to a checked configuration, and a polite end.

Example::

    options = job_parser("launch/distill.py", __doc__, example="seed=1").parse_args(arguments)
    config = checked_config(options, "distill", DistillConfig, check)
    if isinstance(config, int):
        return config                # nothing was started
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from launch.config import JobConfig

REFUSED = 2
T = TypeVar("T", bound="JobConfig")


def job_parser(prog: str, doc: str | None, *, example: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """`example`: overrides that a person may give."""
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help=f"Hydra overrides, such as {example}")
    parser.add_argument("--cfg", action="store_true", help="print the configuration as YAML and stop")
    return parser


def checked_config(options: argparse.Namespace, name: str, schema: type[T], check: Callable[[T], None]) -> T | int:
    """`configs/<name>.yaml` with the overrides, after `check`; or the exit code where the command ends here.

    From then on a job that is stopped politely ends as one that is interrupted: everything it started ends first.
    """
    from launch.config_reading import compose, parse_config
    from learner.config import ConfigError

    try:
        plain = compose(options.overrides, name=name)
        config = parse_config(plain, schema)
        if options.cfg:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.create(plain)), end="")
            return 0
        check(config)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    stops_like_an_interrupt()
    return config


def stops_like_an_interrupt() -> None:
    """From now on SIGTERM ends this process as SIGINT does: everything it started ends first."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # both: a shell's background job starts with SIGINT ignored
        signal.signal(stop, signal.default_int_handler)

"""The runtime environment of a submitted job, as JSON for `ray job submit --runtime-env-json`.

    ray job submit --working-dir . --runtime-env-json "$(python -m launch.runtime_env --install gpu)" \\
        -- python launch/distill.py run_dir=s3://bucket/runs/a

It is `launch/clusters/runtime_env.yaml`, and with `--install` every package of the lock file beside it, for clusters
whose machines have Ray alone (the same version): Ray makes a virtual environment of them on each node, once for each
content of the lock file, which takes minutes. Where there is an image (`launch/clusters/Dockerfile`), pass the YAML
file itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "launch" / "clusters" / "runtime_env.yaml"
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"


def runtime_env(install: str | None = None) -> dict[str, Any]:
    """`install`: "cpu" or "gpu", the lock file whose packages are installed. Raises `OSError`."""
    import yaml

    described = yaml.safe_load(BASE.read_text())
    if install is not None:
        options = ["--no-deps", "--disable-pip-version-check", "--no-input"]
        if install == "cpu":
            options += ["--extra-index-url", PYTORCH_CPU]  # PyPI has torch for CUDA alone
        described["pip"] = {"packages": pins(ROOT / f"requirements-{install}.lock"), "pip_install_options": options}
    return described


def pins(lock: Path) -> list[str]:
    """Its requirements, one each, with their markers."""
    lines = (line.split(" #")[0].strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.runtime_env", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", choices=("cpu", "gpu"), help="packages of requirements-BUILD.lock, too")
    print(json.dumps(runtime_env(parser.parse_args(arguments).install)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

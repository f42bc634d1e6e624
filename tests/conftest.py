"""Fixtures that several test files share: one Ray cluster for the whole session, started only if a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RAY_ENV_VARS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # the default reports to a server outside
    "RAY_AUTH_MODE": "disabled",  # the default writes a token into the home folder
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The `ray` module, connected to a cluster of its own with 4 logical CPUs; ended with the session.

    Tests share it: end the actors that a test starts, and give named actors names of your own.
    """
    os.environ.update(RAY_ENV_VARS)  # Ray reads them when it is imported
    import ray

    # Workers import the packages under test from the checkout, wherever pytest was started from.
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    ray.init(
        address="local",  # never join a cluster that happens to run on this machine
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {**RAY_ENV_VARS, "PYTHONPATH": os.pathsep.join(filter(None, paths))}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()

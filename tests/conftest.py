"""Fixtures that several test files share: one Ray cluster and one S3 server for the whole session, each started only if
a test asks for it. And which tests go together when two processes share the work (`pytest -n 2 --dist loadgroup`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROCESS = os.environ.get("PYTEST_XDIST_WORKER")
"""Name of this process among those that pytest-xdist has started; None when there is one alone."""
FIRST = ("test_distill",)
"""Files that take longest and start no cluster of the session's: what comes last keeps one process waiting."""
DEEPSPEED = ("test_curriculum", "test_learner", "test_model_selection")
"""How the names of files begin that run DeepSpeed in their process: together, before anything else there. An engine of
vLLM that ends takes torch's process group along, and DeepSpeed cannot start again."""
if PROCESS is not None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the cores have work enough
RAY_ENV_VARS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # the default reports to a server outside
    "RAY_AUTH_MODE": "disabled",  # the default writes a token into the home folder
}


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks after this
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, with its fixtures, and all files that use the Ray cluster in the same one."""
    if PROCESS is None:
        return
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    places = {"deepspeed": 0, "ray": 1} | {name: place for place, name in enumerate(FIRST, start=2)}

    def group(item: pytest.Item) -> str:
        if item.path in on_ray:
            return "ray"
        return "deepspeed" if item.path.stem.startswith(DEEPSPEED) else item.path.stem

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: places.get(group(item), len(places)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The `ray` module, connected to a cluster of its own with 4 logical CPUs; ended with the session.

    Tests share it: end the actors that a test starts, and give named actors names of your own.
    """
    os.environ.update(RAY_ENV_VARS)  # Ray reads them when it is imported
    import ray

    # Workers import the packages under test from the checkout, wherever pytest was started from. They inherit this:
    # with a `runtime_env` Ray would start Python twice for each, and none could be used again.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])
    try:
        ray.init(
            address="local",  # never join a cluster that happens to run on this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=200 << 20,
        )
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    try:
        yield ray
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3-compatible server without a bucket; tests share it: give each its own bucket or folder."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def bucket(s3_endpoint: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """`s3://NAME` of a bucket of the test file's own; the environment says how it is reached."""
    settings = {
        "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-real-key", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        from pyarrow.fs import S3FileSystem

        name = request.path.stem.replace("_", "-")
        S3FileSystem(endpoint_override=s3_endpoint, allow_bucket_creation=True).create_dir(name)
        yield f"s3://{name}"


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """For a command that is run in this process: what it does on SIGINT and SIGTERM ends with the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

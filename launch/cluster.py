"""The Ray that a run works on: its own on this machine, or one that is there already.

A local Ray ends with the run, whatever ends it: its processes are started by this one and follow it. Telemetry is off.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from launch.config import ClusterConfig
from launch.local_ray import local_ray

ROOT = Path(__file__).resolve().parent.parent
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
START_S = 300.0
REACH_S = 10.0
"""A head that lives takes a connection within it."""


class ClusterError(RuntimeError):
    """No Ray to work on; the message says which was asked for."""


@contextmanager
def ray_cluster(config: ClusterConfig, *, variables: Sequence[str] = ()) -> Iterator[str]:
    """Connects to (or starts) Ray; yields what it is, for people. Leaves nothing of its own behind.

    `variables` of the environment (keys, an object store's address) that are set here must be set in its workers too.
    Raises `ClusterError`.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if config.metrics_port is not None:
        if address:
            raise ClusterError(
                f"cluster.metrics_port={config.metrics_port} is for a local Ray; the one at {address} has its own: "
                "ray start --metrics-export-port"
            )
        _check_free(config.metrics_port)
    if not address and "RAY_AUTH_MODE" not in os.environ:
        # The local Ray listens on every address of the machine; only this process and its children know the token.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    # Workers import our packages from here, installed or not.
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if address:
        check_reachable(address)
    on_stop = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            what = stack.enter_context(_joined(address) if address else _started(config))
        except Exception as error:  # a bare one where the node does not come up in time
            reason = str(error).splitlines()[0]
            raise ClusterError(f"cannot use Ray at {address or 'this machine'}: {reason}") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_stop)  # ray.init puts a handler of its own there
        _check_variables([name for name in variables if os.environ.get(name)] if address else [])
        yield what


@contextmanager
def _joined(address: str) -> Iterator[str]:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        yield f"the Ray at {address}"
    finally:
        ray.shutdown()


@contextmanager
def _started(config: ClusterConfig) -> Iterator[str]:
    what = "a Ray of its own on this machine"
    if config.metrics_port is not None:
        what += f", metrics at http://127.0.0.1:{config.metrics_port}/metrics"
    with local_ray(
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _metrics_export_port=config.metrics_port,
    ):
        yield what


def _check_free(port: int) -> None:
    """Ray's agent would die of a port that is taken, and only its log would say so."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ClusterError(
                f"cluster.metrics_port {port} cannot be listened on ({error.strerror}); choose another, or null for any"
            ) from None


def check_reachable(address: str) -> None:
    """Raises `ClusterError` where nobody listens; Ray itself tries for minutes. "auto": the address that Ray finds."""
    where = address.rpartition("://")[2].partition("/")[0]
    if where in ("auto", "local"):
        from ray._private.services import canonicalize_bootstrap_address

        try:
            where = canonicalize_bootstrap_address(where) or ""
        except (ConnectionError, ValueError) as error:
            raise ClusterError(f"there is no Ray to be found ({address!r}): {str(error).splitlines()[0]}") from None
    host, _, port = where.rpartition(":")
    if not (host and port.isdigit()):  # Ray knows better what it may be
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ClusterError(f"no Ray answers at {where} ({address!r}): {reason}") from None


def _check_variables(names: Sequence[str]) -> None:
    """Workers of a local Ray have this process' environment; those of a cluster have their node's, and the job's."""
    if not names:
        return
    import ray

    look = ray.remote(num_cpus=0)(_unset)
    try:
        unset = ray.get(look.remote(list(names)), timeout=START_S)
    except (ray.exceptions.RayError, TimeoutError) as error:  # type: ignore[attr-defined]
        raise ClusterError(f"the cluster runs nothing for us: {str(error).strip().splitlines()[-1]}") from None
    if unset:
        raise ClusterError(
            f"{', '.join(unset)}: set here, but not where the cluster's workers run: set it in the environment of the "
            "nodes (or in the job's runtime environment, which Ray writes to its own logs)"
        )


def _unset(names: list[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]

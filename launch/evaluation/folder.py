"""The folder of an evaluation: one set of tasks, and a ledger for each policy and mode.

    out/config.json                    the configuration of the last call
    out/<policy>/policy.json           which policy that is, its weights' fingerprint included
    out/<policy>/<mode>/row.json       how it was run; <mode>-sampled where each task has several samples
    out/<policy>/<mode>/ledger/        every trajectory and every failure
    out/results.json, out/spend.jsonl

Other policies, modes and samples are added; other tasks, another env or another corpus are refused, since keys of
trajectories do not tell of them. So is a policy of the same name that is another model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config_reading import to_plain
from launch.evaluation.config import EvaluationConfig
from launch.run_folder import POLICY_FIXED, RunFolderError, write_json
from rollout.episode import EpisodeSettings
from rollout.policy_spec import PolicySpec

_WEIGHTS = ("*.safetensors", "*.bin")
_PIECES, _PIECE_BYTES = 64, 64 << 10
_ENV_FREE = ("judge", "unsafe", "math", "max_steps", "name", "context_passages")
"""Of the env: what a mode or a machine decides, or the keys of trajectories say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRecord:
    """One row of the results: a policy in a mode."""

    policy: str
    mode: str
    digest: str
    """How keys of its trajectories end: of its settings."""
    runs: int
    """Of each task."""
    votes: bool
    """Its score is that of the vote over them."""
    sampled: bool
    """Several samples of each task, where one would be greedy: a row of its own, which more samples go on with."""

    @property
    def name(self) -> str:
        return f"{self.policy}, {self.mode}" + " sampled" * self.sampled

    @property
    def place(self) -> str:
        """Of its files, in the policy's folder."""
        return self.mode + "-sampled" * self.sampled

    def key(self, task_id: str, sample: int) -> str:
        """As `EpisodeSettings.key` makes it."""
        return f"{task_id}|{self.policy}|{sample}|{self.digest}"

    @classmethod
    def of(cls, config: EvaluationConfig, mode: str) -> RowRecord:
        return cls(
            policy=config.policy.policy_name,
            mode=mode,
            digest=_digest(config.settings(mode)),
            runs=config.runs(mode),
            votes=mode == "whole_run_vote",
            sampled=config.samples > 1,
        )


class EvaluationFolder:
    """Paths of one evaluation."""

    def __init__(self, out: str | Path) -> None:
        self.path = Path(out).absolute()
        self.results = self.path / "results.json"
        self.spend = self.path / "spend.jsonl"
        self._record = self.path / "config.json"

    def index(self, config: EvaluationConfig) -> Path:
        """Where the retrieval index is: a run's own, if these are its pages."""
        run = Path(config.run) / "index" if config.run else None
        return run if run is not None and not config.retrieval.corpus and run.is_dir() else self.path / "index"

    def ledger(self, row: RowRecord) -> Path:
        return self._row(row) / "ledger"

    def rows(self) -> list[RowRecord]:
        """All that any call has left, in the order in which they came."""
        files = sorted(self.path.glob("*/*/row.json"), key=lambda file: json.loads(file.read_text())["began_unix_s"])
        records = [json.loads(file.read_text()) for file in files]
        return [RowRecord(**{name: record[name] for name in RowRecord.__slots__}) for record in records]

    def settings(self, row: RowRecord) -> dict[str, Any]:
        """How the row's episodes were run."""
        return json.loads((self._row(row) / "row.json").read_text())["settings"]

    @contextmanager
    def claim(self, config: EvaluationConfig) -> Iterator[bool]:
        """Hold the folder; yields whether an earlier call left something. Raises `RunFolderError`."""
        if (
            self.path.exists()
            and not self._record.exists()
            and any(each.name != ".lock" for each in self.path.iterdir())
        ):
            raise RunFolderError(f"out {self.path} is not empty and holds no evaluation; choose another out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise RunFolderError(f"out {self.path} cannot be used: {error.strerror or error}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another evaluation runs in {self.path}; wait for it or choose another out"
                ) from None
            found = self._record.exists()
            self.check(config)
            write_json(self._record, to_plain(config))
            yield found

    def check(self, config: EvaluationConfig) -> None:
        """Raises `RunFolderError` where `config` does not go with what is here; writes nothing."""
        if self._record.exists():
            there, here = _world(json.loads(self._record.read_text())), _world(to_plain(config))
            for key in dict.fromkeys([*there, *here]):
                if there.get(key) != here.get(key):
                    raise RunFolderError(
                        f"out {self.path} is of another evaluation: there {key} is {there.get(key)!r}, here it is "
                        f"{here.get(key)!r}; choose another out"
                    )
        name = config.policy.policy_name
        record = self.path / safe_name(name) / "policy.json"
        if record.exists() and (there := json.loads(record.read_text())) != (here := _identity(config.policy)):
            differing = next(key for key in here if there.get(key) != here[key])
            raise RunFolderError(
                f"{record} is of another policy {name!r}: there {differing} is {there.get(differing)!r}, here it is "
                f"{here[differing]!r}; give this one a policy.name of its own, or choose another out"
            )

    def begin(self, config: EvaluationConfig, row: RowRecord, *, unix_s: float) -> None:
        """Record how a row is run. The folder must be claimed."""
        folder = self._row(row)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder.parent / "policy.json", _identity(config.policy))
        record = folder / "row.json"
        began = json.loads(record.read_text())["began_unix_s"] if record.exists() else unix_s
        settings = to_plain(config.settings(row.mode))
        write_json(record, {**asdict(row), "began_unix_s": began, "settings": settings})

    def _row(self, row: RowRecord) -> Path:
        return self.path / safe_name(row.policy) / row.place


def safe_name(name: str) -> str:
    """A file's name; two names that would share one are kept apart."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".") or "policy"
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def fingerprint(folder: str | Path) -> str:
    """Of a model's weights: of their files' sizes and of pieces all over them; "" where there is no such folder."""
    path = Path(folder)
    digest = hashlib.sha256()
    files = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern)) if path.is_dir() else []
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as weights:
            for i in range(_PIECES):
                weights.seek(size * i // _PIECES)
                digest.update(weights.read(_PIECE_BYTES))
    return digest.hexdigest()[:16] if files else ""


def _identity(spec: PolicySpec) -> dict[str, Any]:
    plain = to_plain(spec)
    identity = {name: plain[name] for name in (*POLICY_FIXED, "adapter")}
    if spec.kind == "vllm":
        identity["weights"] = "+".join(
            filter(None, (fingerprint(spec.model), fingerprint(spec.adapter or "/dev/null")))
        )
    return identity


def _world(plain: dict[str, Any]) -> dict[str, Any]:
    """What keys of trajectories do not tell of."""
    tasks = {name: value for name, value in plain["tasks"].items() if name in ("source", "seed")}
    benchmark = {name: plain["benchmark"][name] for name in ("name", "factual")}
    env = {name: value for name, value in plain["env"].items() if name not in _ENV_FREE}
    retrieval = {name: value for name, value in plain["retrieval"].items() if name != "timeout_s"}
    parts = {"tasks": tasks, "benchmark": benchmark, "env": env, "retrieval": retrieval}
    if plain["tasks"]["source"] == "files" and not benchmark["name"]:
        parts["tasks"]["test"] = [{k: v for k, v in each.items() if k != "count"} for each in plain["tasks"]["test"]]
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    judge = plain["env"]["judge"]
    return flat | {"passages": plain["passages"], "env.judge.model": judge["model"] if judge else None}


def _digest(settings: EpisodeSettings) -> str:
    from rollout.trajectory import trajectory_key

    return trajectory_key(task_id="", policy="", sample_index=0, settings=settings.in_key()).rpartition("|")[2]

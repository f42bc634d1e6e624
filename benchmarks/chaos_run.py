"""One run under fire: a small but whole `launch/distill.py` on a cluster that is being broken, and what it left.

The teacher is the built-in expert, the student two layers, the search BM25: what takes time is what the job does around
them. A run that draws an engine ends with an evaluation on vLLM. When the driver is killed, or the job gives up with
"the same command goes on", the same command is given again, as a person or a supervisor would.

Example::

    with ChaosCluster(folder) as cluster:
        chaos = Chaos(cluster, tiny_student(folder / "student"))
        quiet = chaos.run("quiet", [])
        result = chaos.run("seed-7", draw(random.Random(7), ["queue", "node"], cluster.workers), quiet_s=quiet.took_s)
        print(result.findings, result.recoveries)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos_cluster import BACK_S, ChaosCluster
from benchmarks.chaos_faults import ENGINE_AT, PROCESSES, Fault, of_kind, targets
from benchmarks.chaos_invariants import (
    Finding,
    check_ledger,
    check_orphans,
    check_rows,
    check_time,
    check_told,
)
from launch.config import DistillConfig
from launch.config_reading import load_config
from launch.world import load_world
from learner.base_student import BASE_STUDENT_FOLDER
from rollout.ledger import Ledger

EPISODES, PASSES = 300, 2
SETTINGS = [
    f"tasks.train_count={EPISODES}", "tasks.test_count=6", "retrieval.kind=bm25", "episode.max_steps=3",
    "rollout.workers=2", "rollout.concurrency=2", "rollout.env_hosts=2", "rollout.queue_capacity=16",
    "cluster.roles.envs.strategy=SPREAD",
    f"learner.epochs={PASSES}", "learner.ranks=2", "learner.tokens_per_step=2000", "learner.optimizer=adamw",
    "learner.checkpoint_every_steps=10", "learner.snapshot_at=[]", "learner.collective_timeout_s=60",
    "learner.restarts=6",
    "evaluate.candidates=2", "evaluate.max_tokens=24", "evaluate.max_model_len=1000", "evaluate.kv_cache_mb=64",
    "evaluate.engine=own_process", "evaluate.concurrency=4",
]  # fmt: skip
ATTEMPTS = 8
"""So often is the command given, at most."""
ENDS_S = 45.0
"""Within it a job that has ended leaves nothing."""
TOLD = {"rollout worker", "env host", "retrieval", "queue", "feed", "learner rank", "driver", "node", "raylet"}
TOLD_AS = {"learner rank": "learner", "driver": "job", "raylet": "node"}
"""Kind of fault -> what its event is called, where that differs."""
UNSEEN_S = 2.0
"""A job looks at its parts once a second: a driver that is killed so soon after one of them cannot have told of it. Its
own end is told, by the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """A fault that was done."""

    kind: str
    away_s: float
    """From the fault until what it hit was there again and the job had come further; of a network or a disk, from its
    own end on."""
    lasted_s: float
    """The fault itself."""
    felt: bool
    """The job went on without it for a while: it did not end before, by itself or by a fault of its own."""


@dataclass(slots=True, kw_only=True)
class Result:
    """What became of one run."""

    name: str
    took_s: float = 0.0
    commands: int = 0
    """How often the command was given."""
    gave_up: int = 0
    """How often it ended with an error of its own."""
    findings: list[Finding] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    not_done: list[Fault] = field(default_factory=list)
    said: str = ""

    def count(self, *what: str) -> int:
        return sum(each.count for each in self.findings if each.what in what)


@dataclass(slots=True)
class _Open:
    """A fault that is under way."""

    fault: Fault
    at_s: float
    had: set[int]
    """Processes of its kind before."""
    work: int
    healed_s: float | None = None
    filler: Path | None = None
    lived_s: float | None = None
    """How long the driver lived on; None: it was not killed."""
    replaced: bool = False
    """What was hit is there again; then work has to grow beyond `work`."""


class Chaos:
    """Runs on one cluster, one after another."""

    def __init__(self, cluster: ChaosCluster, student: Path) -> None:
        self.cluster, self._student = cluster, student
        self._job: subprocess.Popen | None = None
        self._earlier: set[int] = set()
        """Of the job, when the command was given again: what a driver that was killed leaves is about to end."""
        self.steps = 100.0
        """Of the whole training, as an undisturbed run has told."""

    def run(
        self, name: str, faults: Sequence[Fault], *, engine: bool = False, quiet_s: float = 0.0, noise_s: float = 0.0
    ) -> Result:
        """Until the job is done; then what must hold is looked at. Undisturbed runs have no `quiet_s`."""
        self.cluster.wait_whole()
        hosts = self.cluster.hosts
        inside = hosts.disk / name
        run, log = hosts.seen(inside), self.cluster.folder / f"{name}.log"
        overrides = [
            f"run_dir={inside}", f"cluster.address={self.cluster.address}", f"learner.model_path={self._student}",
            f"evaluate.rows=[{'student' if engine else ''}]", *SETTINGS,
        ]  # fmt: skip
        command = [sys.executable, "launch/distill.py", *overrides]
        result = Result(name=name)
        limit_s = (4 * quiet_s if quiet_s else 600.0) + 90.0 * len(faults)
        began_s = time.monotonic()
        waiting, open_faults = list(faults), list[_Open]()
        killed_driver = False
        self._job = None
        try:
            while True:
                now_s = time.monotonic()
                if now_s - began_s > limit_s:
                    words = f"not done after {limit_s:.0f} s"
                    result.findings.append(Finding(what="hang", count=1, words=words))
                    break
                if self._job is None or self._job.poll() is not None:
                    if self._job is not None and self._job.returncode == 0:
                        break
                    if self._job is not None and not killed_driver:
                        result.gave_up += 1
                    if result.commands == ATTEMPTS:
                        result.findings.append(
                            Finding(what="hang", count=1, words=f"the command was given {ATTEMPTS} times")
                        )
                        break
                    killed_driver = False
                    self._earlier = {each.pid for kind in PROCESSES for each in of_kind(kind, self.cluster)}
                    self._job = self.cluster.start_job(command, log)
                    result.commands += 1
                self.cluster.tend()
                while waiting and not killed_driver and self._moment(run) >= waiting[0].at:
                    if (begun := self._begin(waiting[0], run)) is None:
                        break
                    if waiting[0].kind == "driver":
                        killed_driver = True
                        for each in open_faults:
                            each.lived_s = begun.at_s - each.at_s
                    open_faults.append(begun)
                    waiting.pop(0)
                for each in list(open_faults):
                    if (recovery := self._recovered(each, run)) is not None:
                        result.recoveries.append(recovery)
                        open_faults.remove(each)
                time.sleep(0.1)
            result.took_s = time.monotonic() - began_s
        finally:
            hosts.heal()
            for each in open_faults:
                if each.filler is not None:
                    each.filler.unlink(missing_ok=True)
        for each in open_faults:  # the job was done before, or never came back
            result.recoveries.append(self._closed(each))
        result.not_done = waiting
        result.said = log.read_text(errors="replace")
        result.findings += check_orphans(self._left())
        if not result.count("hang"):
            result.findings += self._look(run, overrides, result, quiet_s=quiet_s, noise_s=noise_s)
        if not result.findings:
            shutil.rmtree(run)  # the shared disk is small
        return result

    def _look(
        self, run: Path, overrides: list[str], result: Result, *, quiet_s: float, noise_s: float
    ) -> list[Finding]:
        config = load_config(overrides, DistillConfig)
        tasks = load_world(config, self.cluster.folder / "index").train
        expected = {config.episode.key(task, config.teacher.policy_name, 0) for task in tasks}
        found = check_ledger(Ledger(run / "ledger"), expected) + check_rows(run, passes=PASSES)
        felt = [TOLD_AS.get(each.kind, each.kind) for each in result.recoveries if each.felt and each.kind in TOLD]
        found += check_told(run, felt)
        if not quiet_s:
            self.steps = float(max(1, learned_steps(run)))
        else:
            flight_s = max((t.duration_s for t in Ledger(run / "ledger").trajectories()), default=0.0)
            allowed_s = sum(each.away_s + each.lasted_s + flight_s for each in result.recoveries)
            found += check_time(took_s=result.took_s, undisturbed_s=quiet_s, allowed_s=allowed_s, noise_s=noise_s)
        return found

    def _left(self) -> list[str]:
        deadline_s = time.monotonic() + ENDS_S
        if self._job is not None and self._job.poll() is None:
            self._job.kill()
            self._job.wait(10)
        while (left := self.cluster.of_jobs()) and time.monotonic() < deadline_s:
            self.cluster.tend()
            time.sleep(0.5)
        return left

    # -- faults

    def _begin(self, fault: Fault, run: Path) -> _Open | None:
        """Do it, if what it hits is there."""
        assert self._job is not None
        at_s, work = time.monotonic(), _work(run)
        if fault.kind == "network":
            self.cluster.hosts.cut(fault.host, fault.other)
            return _Open(fault, at_s, set(), work)
        if fault.kind == "disk":
            return _Open(fault, at_s, set(), work, filler=self.cluster.hosts.fill())
        hit = targets(fault, self.cluster, self._job.pid, but=self._earlier)
        had = self._of_kind(fault.kind) if fault.kind in PROCESSES else set()
        if not hit or (fault.kind == "engine" and not _evaluated(run)):
            return None  # an engine that dies before it has worked ends the job: it may be its settings
        self.cluster.kill(hit)
        if fault.kind == "driver":
            self._job.wait(10)
        return _Open(fault, at_s, had or {each.pid for each in hit}, work)

    def _recovered(self, each: _Open, run: Path) -> Recovery | None:
        fault, now_s = each.fault, time.monotonic()
        if fault.seconds and each.healed_s is None:
            if now_s - each.at_s < fault.seconds:
                return None
            each.healed_s, each.work = now_s, _work(run)
            if fault.kind == "network":
                self.cluster.hosts.heal()
            elif each.filler is not None:
                each.filler.unlink()
        if not each.replaced:
            each.replaced = self._is_replaced(each)
            if each.replaced:
                each.work = _work(run)
        if not each.replaced or _work(run) <= each.work:
            return None
        return self._closed(each, felt=each.lived_s is None or each.lived_s > UNSEEN_S)

    def _closed(self, each: _Open, felt: bool = False) -> Recovery:
        now_s = time.monotonic()
        from_s = each.at_s if each.healed_s is None else each.healed_s
        return Recovery(kind=each.fault.kind, away_s=now_s - from_s, lasted_s=from_s - each.at_s, felt=felt)

    def _is_replaced(self, each: _Open) -> bool:
        kind = each.fault.kind
        if kind in PROCESSES:
            now = self._of_kind(kind)
            return len(now) >= len(each.had) and bool(now - each.had)
        if kind in ("node", "raylet"):
            return time.monotonic() - each.at_s > BACK_S and self.cluster.is_up(each.fault.host)
        if kind == "driver":
            return self._job is not None and self._job.pid not in each.had
        return True

    def _of_kind(self, kind: str) -> set[int]:
        return {each.pid for each in of_kind(kind, self.cluster, but=self._earlier)}

    def _moment(self, run: Path) -> float:
        """How far the job is."""
        if (run / "learner" / "final.json").exists():
            return ENGINE_AT
        try:
            share = min(1.0, Ledger(run / "ledger").count() / EPISODES)
        except OSError:
            return 0.0
        if share < 1.0:
            return 0.5 * share
        arrivals = run / "learner" / "metrics.jsonl"
        steps = len(arrivals.read_bytes().splitlines()) if arrivals.exists() else 0
        return 0.5 + 0.49 * min(1.0, steps / self.steps)


def _work(run: Path) -> int:
    """Bytes of what the job has to show for itself: it grows with each episode, step and evaluated task."""
    total = 0
    for folder, _, names in os.walk(run):
        part = Path(folder).relative_to(run).parts[:1]
        for name in names:
            if part in (("ledger",), ("evaluation",)) or (part == ("learner",) and name == "metrics.jsonl"):
                try:
                    total += (Path(folder) / name).stat().st_size
                except OSError:
                    continue
    return total


def _evaluated(run: Path) -> bool:
    """Something is."""
    return any((run / "evaluation").glob("*/**/*.parquet"))


def learned_steps(run: Path) -> int:
    """Of a run that is done."""
    return int(json.loads((run / "learner" / "final.json").read_text())["step"])


def tiny_student(folder: Path) -> Path:
    """A Qwen2 of two layers with the base student's tokenizer, written to `folder`."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE_STUDENT_FOLDER)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=3072, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

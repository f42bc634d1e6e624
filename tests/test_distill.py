"""The main job as its user runs it: a small run that is killed, goes on, finishes, and leaves no process behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_processes import assert_nothing_left, processes_of, start_marked

from launch.distill import main as distill
from learner.audit.__main__ import main as audit
from rollout.ledger import Ledger

SMALL = [
    "tasks.train_count=150", "tasks.test_count=2", "learner.epochs=1", "learner.checkpoint_every_steps=2",
    "rollout.concurrency=4", "rollout.queue_capacity=16", "evaluate.candidates=2", "evaluate.max_tokens=24",
    "evaluate.kv_cache_mb=64", "evaluate.engine=in_process", "episode.max_steps=3", "retrieval.kind=bm25",
]  # fmt: skip


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    return start_marked([sys.executable, "launch/distill.py", f"run_dir={run_dir}", *SMALL, *overrides], run_dir)


def wait_for(condition, job: subprocess.Popen, within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline, "the job did not come that far"
        time.sleep(0.1)


def finish(job: subprocess.Popen, within_s: float = 240.0) -> str:
    try:
        output, _ = job.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    return output


@pytest.mark.timeout(400)
def test_a_killed_job_goes_on_and_loses_and_repeats_nothing(tmp_path, capsys, signals_kept):
    run_dir = tmp_path / "run"
    ledger = run_dir / "ledger"
    first = start(run_dir, "rollout.concurrency=1")
    wait_for(lambda: ledger.exists() and len(Ledger(ledger).keys()) >= 10, first)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=10)
    first.stdout.close()
    assert_nothing_left(run_dir)
    recorded = Ledger(ledger).keys()
    assert 10 <= len(recorded) < 150

    second = start(run_dir)
    output = finish(second)
    assert second.returncode == 0, output
    assert f"found of an earlier job: {len(recorded)} of 150 trajectories" in output
    assert_nothing_left(run_dir)

    report = Ledger(ledger).validate()
    assert report.ok and report.rows == 150 and Ledger(ledger).duplicates() == 0
    assert recorded < Ledger(ledger).keys()

    last_line = output.strip().splitlines()[-1]
    assert last_line == f"results: {run_dir / 'results.json'}"
    results = json.loads((run_dir / "results.json").read_text())
    kinds = {"arithmetic", "two_hop", "arithmetic_unseen", "two_hop_unseen"}
    assert set(results["scores"]) == {"untrained", "student", "student_self_consistent", "teacher"}
    for scores in results["scores"].values():
        assert set(scores) == kinds
        assert all(score["n"] == 2 and score["low"] <= score["mean"] <= score["high"] for score in scores.values())
    # One pass over everything that could be trained on: no row lost with the killed job, none trained on twice.
    trainable = sum(t.trainable for t in Ledger(ledger).trajectories())
    assert results["learner"]["rows"] == trainable > 130
    assert (run_dir / "learning_curve.png").stat().st_size > 5000
    assert (Path(results["student"]) / "model.safetensors").exists()

    assert audit([str(ledger), "--tokenizer", results["student"], "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["ok"] and proof["rows"] == trainable and proof["stop_tokens"] == proof["turns"] > trainable

    assert distill([f"run_dir={run_dir}", *SMALL]) == 0
    output = capsys.readouterr().out
    assert "this run is complete" in output and output.strip().splitlines()[-1] == last_line


@pytest.mark.timeout(200)
def test_an_interrupted_job_says_so_and_leaves_no_process(tmp_path):
    run_dir = tmp_path / "run"
    job = start(run_dir, "tasks.train_count=3000", "learner.epochs=3")
    wait_for(lambda: len(processes_of(run_dir)) > 6, job)
    time.sleep(3)
    job.send_signal(signal.SIGINT)
    output = finish(job, within_s=60)
    assert job.returncode == 130, output
    assert "interrupted; the same command goes on from" in output
    assert_nothing_left(run_dir)

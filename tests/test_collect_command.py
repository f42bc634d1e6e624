"""`launch/collect.py` as its user runs it: what it refuses, killed and run again, several teachers, a spend cap, a
bucket, an interrupt. The jobs share this session's Ray; they are its drivers, not its owners."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer

from envs.base import Task
from launch.collect import main
from launch.collect_folder import CollectFolder
from launch.collect_summary import summarise, summary_table
from launch.config import CollectConfig
from launch.config_reading import load_config
from rollout.curation import Curation
from rollout.ledger import Ledger, LedgerWriter
from rollout.retries import RetryRule
from rollout.storage import open_storage
from rollout.trajectory import Failure, FailureClass, StopReason, Trajectory, Usage

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["retrieval.kind=bm25", "rollout.concurrency=8"]
WRONG = "Thought: I know.\nCode:\n```py\nfinal_answer(1)\n```<end_code>"


# -- what needs no Ray


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["learner.epochs=3"], "config learner: a collection has none"),
        (["run_dir=x"], "say where with out="),
        (["teachers=[{teacher: {kind: expert}, wieght: 2}]"], "config teachers.wieght: unknown key"),
        (["teachers=[{teacher: {kind: expert}, weight: 0}]"], "weight of a teacher must be above 0"),
        (["teachers=[{teacher: {kind: expert}}, {teacher: {kind: expert}}]"], "two teachers are named 'starter"),
        (["curation.filters=[corect]"], "did you mean 'correct'?"),
        (["spend.usd=0"], "allows nothing"),
        (["env=tool"], "the built-in expert knows the envs 'code' and 'answer', not 'tool'"),
        (["env.context_passages=3"], "context_passages=3 is for env 'answer'"),
        (["recipe=cot_rag", "retrieval.kind=none"], "env.context_passages=3 needs something to search"),
        (["episode.guide=solution", "tasks=tests/data/none.jsonl"], "'tests/data/none.jsonl' does not exist"),
        (["out=ftp://host/x"], "begins with s3:// or gs://"),
        (["tasks=/no/such.jsonl", "retrieval.kind=none"], "task file '/no/such.jsonl' does not exist"),
        (["teacher=vllm", "teacher.model=/no/such"], "'/no/such' is no Hugging Face folder"),
        (["teacher=openai", "teacher.model=m", "teacher.base_url=http://127.0.0.1:9/v1"], "does not answer"),
        (
            ["teacher=openai", "teacher.model=m", "teacher.base_url=http://api.example.org/v1",
             "teacher.api_key_env=NO_SUCH_KEY"],
            "set the environment variable NO_SUCH_KEY",
        ),
        (
            ["teacher=openai", "teacher.model=m", "teacher.base_url=http://127.0.0.1:9/v1", "spend.usd=5"],
            "config teacher.prices: spend.usd=5 is a cap in money, so prices are needed",
        ),
    ],
)  # fmt: skip
def test_it_refuses_in_one_line_before_anything_starts(overrides, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    out = tmp_path / "out"
    arguments = overrides if any(text.startswith("out=") for text in overrides) else [f"out={out}", *overrides]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("error: ") and len(said.strip().splitlines()) == 1, said
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([f"out={tmp_path / 'file' / 'x'}"]) == 2
    assert "cannot be used: Not a directory" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main([f"out={tmp_path}"]) == 2
    assert "is not empty and holds no collection" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_guide_that_a_task_does_not_have_is_told_before_anything_starts(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    overrides = [f"tasks={tmp_path / 'q.jsonl'}", "retrieval.kind=none", "episode.guide=solution"]
    assert main([*overrides, f"out={tmp_path / 'out'}"]) == 2
    assert "has no solution to guide with" in capsys.readouterr().err


def test_one_file_of_tasks_is_named_on_the_command_line():
    [task_set] = load_config(["tasks=data/my-questions.jsonl"], CollectConfig).tasks.train
    assert (task_set.path, task_set.kind) == ("data/my-questions.jsonl", "my_questions")


def test_a_bucket_keeps_what_can_be_made_again_on_this_machine():
    config = load_config(["out=s3://bucket/a", "recipe=paper"], CollectConfig)
    assert config.scratch.startswith("runs/scratch-")
    assert config.env.judge is not None and config.env.judge.cache_path == f"{config.scratch}/judge.sqlite"


def trajectory(key: str, *, success: bool = True, failure: FailureClass | None = None) -> Trajectory:
    return Trajectory(
        key=key,
        task=Task(id="t", question="?", answer="1", kind="k"),
        dialect="code",
        system_prompt="",
        steps=(),
        policy="a",
        success=success and failure is None,
        reward=float(success and failure is None),
        stop_reason=StopReason.FAILED if failure else StopReason.FINAL,
        failure=Failure(failure_class=failure, message="m") if failure else None,
        usage=Usage(requests=1, prompt_tokens=10, completion_tokens=5, cost_usd=0.25),
    )


def test_the_closing_check_accounts_for_every_episode(tmp_path):
    writer = LedgerWriter(tmp_path, writer="w")
    failed = [trajectory("e", failure=FailureClass.ENGINE), trajectory("i", failure=FailureClass.INPUT)]
    writer.append([trajectory("r"), trajectory("w", success=False), trajectory("other"), *failed])
    writer.append([trajectory("r")])
    curation = Curation.from_config(["correct"])
    expected = {"a": {"r", "w", "e", "i", "never"}}
    summary = summarise(Ledger(tmp_path), expected, rule=RetryRule(), curation=curation)
    assert (summary.expected, summary.recorded, summary.failed) == (5, 2, {"engine": 1, "input": 1})
    assert (summary.quarantined, summary.missing, summary.duplicates, summary.beyond) == (1, 1, 1, 1)
    assert not summary.complete and summary.closing_line().endswith("1 not run, each once: NOT COMPLETE")
    assert summary.cost_usd == 1.0 and summary.all.accepted == 1
    assert summary.to_json()["cost_per_accepted_usd"] == 1.0
    assert summary_table(summary).row_count == 1
    done = summarise(Ledger(tmp_path), {"a": {"r", "w", "e", "i"}}, rule=RetryRule(), curation=curation)
    assert done.complete and "2 recorded + 2 failed (engine 1, input 1), each once" in done.closing_line()


# -- jobs

KEY = "sk-secret-of-the-test"
WITHIN_S = 250.0
"""A job takes some five seconds; on a machine that does much else besides, far more."""
slow_machine = pytest.mark.timeout(600)


class Job:
    """Runs the command as a driver of the session's Ray."""

    def __init__(self, address: str, out: str, environment: dict[str, str]) -> None:
        self.out = out
        self._environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT), **environment}
        if environment:
            self.of_workers(environment)

    def of_workers(self, environment: dict[str, str]) -> None:
        """As `ray job submit --runtime-env-json` gives a job's workers their environment; they start later then."""
        of_job = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), **environment}}}
        self._environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(of_job)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "launch/collect.py", f"out={self.out}", *SMALL, *overrides]
        return subprocess.Popen(
            command, cwd=ROOT, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *overrides: str, code: int = 0) -> str:
        process = self.start(*overrides)
        try:
            said, _ = process.communicate(timeout=WITHIN_S)
        finally:
            process.kill()
        assert process.returncode == code, said
        return said


@pytest.fixture
def job(ray_cluster, tmp_path) -> Job:
    return Job(ray_cluster.get_runtime_context().gcs_address, str(tmp_path / "out"), {})


@pytest.fixture
def job_with_key(ray_cluster, tmp_path) -> Job:
    return Job(ray_cluster.get_runtime_context().gcs_address, str(tmp_path / "out"), {"OPENAI_API_KEY": KEY})


@slow_machine
def test_a_key_that_the_clusters_workers_do_not_have_is_told_at_once(job_with_key, server):
    job_with_key.of_workers({"OPENAI_API_KEY": ""})
    said = job_with_key.run(*asks(server), "tasks.train_count=5", code=1)
    assert "OPENAI_API_KEY: set here, but not where the cluster's workers run" in said and server.answered == 0


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(reply=lambda request: WRONG, share=0.0) as server:
        yield server


def asks(server: FaultServer) -> list[str]:
    """A teacher behind an API that never searches; its envs are the worker's own. So the job has few actors."""
    alone = ["retrieval.kind=none", "rollout.env_hosts=0"]
    return ["teacher=openai", "teacher.model=m", f"teacher.base_url={server.base_url}", *alone]


def teachers(server: FaultServer) -> str:
    prices = "{prompt_usd_per_million: 1000, completion_usd_per_million: 1000}"
    api = f"{{kind: openai, model: m, base_url: '{server.base_url}', prices: {prices}}}"
    return f"teachers=[{{teacher: {{kind: expert}}, weight: 2}}, {{teacher: {api}}}]"


def summary_of(out: str) -> dict[str, Any]:
    return json.loads((Path(out) / "summary.json").read_text())


def wait_for(condition: Any, process: subprocess.Popen[str], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the job did not come that far"
        time.sleep(0.05)


@pytest.fixture
def refused_or_done(capsys, signals_kept) -> Callable[..., str]:
    """Runs, in this process, a command that starts no Ray; returns what it says."""

    def run(job: Job, *overrides: str, code: int = 0) -> str:
        assert main([f"out={job.out}", *SMALL, *overrides]) == code
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_what_went_wrong_is_kept_in_a_bucket_over_jobs(bucket, tmp_path):
    for machine, part in (("a", "queue"), ("b", "env host")):
        folder = CollectFolder(f"{bucket}/under-fire", str(tmp_path / machine))
        with folder.events(lambda line: None) as events:
            events.tell(part, f"{part} died", away_s=1.5)
    lines = open_storage(f"{bucket}/under-fire").read("events.jsonl").decode().splitlines()
    assert [json.loads(line)["what"] for line in lines] == ["queue", "env host"]


@slow_machine
def test_a_killed_collection_goes_on_and_ends_with_each_key_once(job, refused_or_done):
    ledger = Path(job.out) / "ledger"
    first = job.start("tasks.train_count=300")
    wait_for(lambda: ledger.exists() and Ledger(ledger).count() >= 20, first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=10)
    recorded = Ledger(ledger).keys()
    assert 20 <= len(recorded) < 300

    said = job.run("tasks.train_count=302")  # more tasks are no other configuration
    assert f"302 episodes, {len(recorded)} recorded by an earlier job" in said
    assert "302 episodes = 302 recorded, each once: every episode is accounted for" in said
    assert recorded < Ledger(ledger).keys() and Ledger(ledger).count() == 302 and Ledger(ledger).duplicates() == 0
    summary = summary_of(job.out)
    assert summary["complete"] and summary["curation"]["kept"] == 302
    assert set(summary["teachers"]["starter-expert"]) == {"arithmetic", "two_hop"}

    assert "nothing is missing" in refused_or_done(job, "tasks.train_count=302")
    other = refused_or_done(job, "tasks.train_count=302", "tasks.arithmetic_share=0.1", code=2)
    assert "belongs to another run: there tasks.arithmetic_share is 0.7, here it is 0.1" in other


@slow_machine
def test_several_teachers_share_the_tasks_stop_at_the_spend_cap_and_go_on(job_with_key, server):
    both = [teachers(server), "tasks.train_count=60"]
    said = job_with_key.run(*both, "spend.usd=0.8", code=3)
    assert "stopped: the spend cap of 0.8 USD is used up" in said and "NOT COMPLETE" in said
    assert "stopped at the spend cap: raise spend.usd=0.8; the same command then goes on" in said
    first = summary_of(job_with_key.out)
    assert first["missing"] > 0 and 0 < first["spent"]["spent_usd"] <= 0.8
    assert first["teachers"]["starter-expert"].keys() == {"arithmetic", "two_hop"}  # it costs nothing, and ended

    said = job_with_key.run(*both, "spend.usd=200")
    assert "60 episodes = 60 recorded" in said
    second = summary_of(job_with_key.out)
    by_policy = Counter(trajectory.policy for trajectory in Ledger(f"{job_with_key.out}/ledger").trajectories())
    assert by_policy.total() == 60 and 10 < by_policy["m"] < 30
    # Each answer was paid once, over both jobs, and is in the record of the episode that it was for.
    assert server.answered == second["spent"]["requests"] == by_policy["m"]
    assert second["cost_usd"] == pytest.approx(second["spent"]["spent_usd"])
    assert all(
        KEY not in path.read_text(errors="replace") for path in Path(job_with_key.out).rglob("*") if path.is_file()
    )
    assert KEY not in said


@slow_machine
def test_an_interrupt_lets_what_runs_end(job):
    with FaultServer(reply=lambda request: WRONG, share=0.0, answer_s=1.0) as server:
        process = job.start(*asks(server), "rollout.concurrency=4", "tasks.train_count=400")
        wait_for(lambda: server.requests >= 6, process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: nothing more is started" in said and "the same command goes on from" in said
    assert Ledger(f"{job.out}/ledger").count() == server.answered


@slow_machine
def test_a_collection_in_a_bucket_goes_on_there(
    ray_cluster, s3_endpoint, tmp_path, monkeypatch, server, refused_or_done
):
    from pyarrow.fs import S3FileSystem

    store = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    job = Job(ray_cluster.get_runtime_context().gcs_address, "s3://collected/a", store)
    few = [*asks(server), "tasks.train_count=12", f"scratch={tmp_path / 'scratch'}"]
    assert "there is no bucket 'collected'" in refused_or_done(job, *few, code=2)
    files = S3FileSystem(endpoint_override=s3_endpoint, allow_bucket_creation=True, region="us-east-1")
    files.create_dir("collected")

    assert "12 episodes = 12 recorded" in job.run(*few)
    assert Ledger("s3://collected/a/ledger").count() == server.answered == 12
    with files.open_input_stream("collected/a/summary.json") as file:
        assert json.loads(file.read())["spent"]["requests"] == 12
    with files.open_input_stream("collected/a/spend.jsonl") as file:
        assert json.loads(file.read())["requests"] == 12
    assert "nothing is missing" in refused_or_done(job, *few)
    other = refused_or_done(job, *few, "seed=1", code=2)
    assert "belongs to another run: there seed is 0, here it is 1" in other

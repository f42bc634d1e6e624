"""Runs in an object store: who may have one, what another machine finds of it, and how it comes into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bucket.learner_mirror import LearnerMirror, NotSharedError
from launch.bucket.lease import LeaseTimes
from launch.bucket.stored_run import StoredRun, open_run
from launch.config import DistillConfig
from launch.config_reading import load_config
from launch.fetch import main as fetch
from launch.run_folder import RunFolder, RunFolderError, RunLostError
from rollout.ledger import Ledger, LedgerWriter
from rollout.storage import open_storage
from tests.test_ledger import trajectory

QUICK = LeaseTimes(beat=0.2, give_up=5, takeover=10)


@pytest.fixture(scope="module")
def config() -> DistillConfig:
    return load_config([])


def run(uri: str, scratch: Path) -> StoredRun:
    return StoredRun(uri, str(scratch), times=QUICK)


def learner_step(folder: Path, step: int) -> None:
    place = folder / "checkpoints" / f"step-{step:07d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text(str(step))


def finished_run(uri: str, scratch: Path, config: DistillConfig) -> None:
    """As a job leaves it, with a learner and workers that could be anywhere."""
    job = run(uri, scratch)
    with job.claim(config):
        learner = scratch / "of-the-learner"
        with job.keeper().kept(learner, rank=0, attempt="a"):
            learner_step(learner, 100)
            (learner / "student").mkdir()
            (learner / "student" / "model").write_text("weights")
            (learner / "metrics.jsonl").write_text('{"step": 100}\n')
        LedgerWriter(job.ledger, writer="w").append([trajectory("a"), trajectory("b")])
        LedgerWriter(job.scores / "student", writer="w").append([trajectory("c")])
        (job.learner / "final.json").write_text("{}")
        job.results.write_text("{}")


def test_another_machine_goes_on_where_the_first_one_was_interrupted(
    bucket: str, tmp_path: Path, config: DistillConfig
) -> None:
    first = run(f"{bucket}/a", tmp_path / "one")
    with pytest.raises(KeyboardInterrupt), first.claim(config) as found:
        assert not found
        keeper = first.keeper()
        with keeper.kept(first.learner, rank=0, attempt="a"):
            learner_step(first.learner, 200)
        first.metrics.write_text('{"step": 200}\n')
        raise KeyboardInterrupt

    second = run(f"{bucket}/a", tmp_path / "two")
    with second.claim(config) as found:
        assert found and second.metrics.read_text() == '{"step": 200}\n'
        assert second.checkpoints() == ["step-0000200"]
        with second.keeper().kept(second.learner, rank=0, attempt="b"):
            assert (second.learner / "checkpoints" / "step-0000200" / "state.json").read_text() == "200"


def test_two_jobs_cannot_have_one_run(bucket: str, tmp_path: Path, config: DistillConfig) -> None:
    with run(f"{bucket}/b", tmp_path / "one").claim(config):
        with pytest.raises(RunFolderError, match="run_dir another job is running in s3://test-stored-run/b"):
            with run(f"{bucket}/b", tmp_path / "two").claim(config):
                pass


def test_a_run_of_another_configuration_is_refused_and_given_back(
    bucket: str, tmp_path: Path, config: DistillConfig
) -> None:
    with run(f"{bucket}/c", tmp_path / "one").claim(config):
        pass
    with pytest.raises(RunFolderError, match="run_dir s3://test-stored-run/c belongs to another run: there seed is 0"):
        with run(f"{bucket}/c", tmp_path / "two").claim(load_config(["seed=1"])):
            pass
    with run(f"{bucket}/c", tmp_path / "three").claim(config) as found:
        assert found


def test_a_prefix_that_holds_something_else_is_refused(bucket: str, tmp_path: Path, config: DistillConfig) -> None:
    open_storage(f"{bucket}/d").replace("notes.txt", b"mine")
    with pytest.raises(RunFolderError, match="s3://test-stored-run/d is not empty and holds no run"):
        with run(f"{bucket}/d", tmp_path).claim(config):
            pass


def test_a_bucket_that_is_missing_is_named(tmp_path: Path, bucket: str, config: DistillConfig) -> None:
    with pytest.raises(RunFolderError, match="there is no bucket 'nowhere'"):
        with run("s3://nowhere/run", tmp_path).claim(config):
            pass


def test_a_job_that_lost_its_run_writes_no_more_and_says_why(
    bucket: str, tmp_path: Path, config: DistillConfig
) -> None:
    job = run(f"{bucket}/e", tmp_path / "one")
    with pytest.raises(RunLostError, match="taken over|has taken"), job.claim(config):
        keeper = job.keeper()
        open_storage(f"{bucket}/e").claim("lease/000009.json", b"{}")
        with keeper.kept(job.learner, rank=0, attempt="a"):
            learner_step(job.learner, 300)
    assert not job.checkpoints()


def test_scratch_of_a_run_that_was_removed_from_the_store_does_not_come_back(
    bucket: str, tmp_path: Path, config: DistillConfig
) -> None:
    job, store = run(f"{bucket}/f", tmp_path), open_storage(f"{bucket}/f")
    with job.claim(config):
        job.results.write_text("{}")
        (job.path / "ledger").mkdir()
    store.remove(*[each.name for each in store.walk("")])
    with job.claim(config) as found:
        assert not found and not job.results.exists() and not (job.path / "ledger").exists()


def test_a_rank_on_a_machine_that_does_not_share_the_folder_says_so(tmp_path: Path) -> None:
    keeper = LearnerMirror(uri=str(tmp_path / "store"), fence=None, sight_s=0.3)
    with pytest.raises(NotSharedError, match="rank 1 does not see rank 0's folder .*: ranks on several machines"):
        with keeper.kept(tmp_path / "other", rank=1, attempt="a"):
            pass
    with keeper.kept(tmp_path / "same", rank=0, attempt="a"):
        with keeper.kept(tmp_path / "same", rank=1, attempt="a"):
            pass


def test_fetch_makes_a_folder_of_it_that_every_command_reads(
    bucket: str, tmp_path: Path, config: DistillConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(f"{bucket}/g", tmp_path / "scratch", config)
    for _ in range(2):
        assert fetch([f"{bucket}/g", str(tmp_path / "copy"), "--without-checkpoints"]) == 0
    copy = RunFolder(tmp_path / "copy")
    assert copy.config() == config and copy.results.exists() and (copy.learner / "final.json").exists()
    assert (copy.student / "model").read_text() == "weights" and not copy.checkpoints()
    assert Ledger(copy.ledger).keys() == {"a", "b"} and copy.evaluated() == ["student"]
    assert fetch([f"{bucket}/nothing", str(tmp_path / "other")]) == 2
    assert "s3://test-stored-run/nothing holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run_dir", "told"),
    [("s3://b/run?region=x", "name the endpoint in AWS_ENDPOINT_URL"), ("ftp://b/run", "begins with s3:// or gs://")],
)
def test_a_uri_that_cannot_be_a_run_is_refused(run_dir: str, told: str, config: DistillConfig) -> None:
    with pytest.raises(RunFolderError, match=told):
        open_run(load_config([f"run_dir='{run_dir}'"]))


def test_the_index_says_what_is_whole(bucket: str, tmp_path: Path, config: DistillConfig) -> None:
    finished_run(f"{bucket}/h", tmp_path, config)
    store = open_storage(f"{bucket}/h")
    assert set(json.loads(store.read("mirror.json"))["files"]) == {"config.json", "learner/final.json", "results.json"}
    assert set(json.loads(store.read("learner/mirror.json"))["folders"]) == {"checkpoints/step-0000100", "student"}

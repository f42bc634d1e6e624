"""A run's folder in an object store: what is copied, what is brought back, and who may write."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.bucket.lease import FOLDER, Fence, Lease, LeaseHeld, LeaseLost, LeaseTimes
from launch.bucket.mirror import INDEX, Mirror, Mirroring
from rollout.storage import FolderStorage, Storage, StorageError, open_storage

WHOLE = ("checkpoints/*", "best")


def checkpoint(folder: Path, step: int, *, content: bytes = b"weights", within: str = "checkpoints") -> Path:
    """Made as the learner makes it: out of sight, then renamed."""
    partial = folder / within / f".partial-{step}"
    (partial / "deep").mkdir(parents=True)
    (partial / "state.json").write_text(json.dumps(step))
    (partial / "empty").touch()
    (partial / "deep" / "weights").write_bytes(content)
    os.replace(partial, folder / within / f"step-{step}")
    return folder / within / f"step-{step}"


def lost_at(*, look: int) -> Callable[[], None]:
    """A fence that holds until it is asked for that time."""
    looks = iter(range(1, look + 1))

    def check() -> None:
        if next(looks) == look:
            raise LeaseLost("gone")

    return check


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_another_machine_gets_what_was_copied_and_nothing_else(bucket: str, tmp_path: Path) -> None:
    here, there, place = tmp_path / "here", tmp_path / "there", f"{bucket}/a"
    checkpoint(here, 100)
    (here / "log.jsonl").write_text('{"step": 1}\n{"step": 2')
    (here / "secret").mkdir()
    (here / "secret" / "x").write_text("x")
    assert Mirror(here, place, whole=WHOLE, skip=("secret/",)).push()
    checkpoint(there, 50)
    (there / "old.json").write_text("of another job")
    assert Mirror(there, place, whole=WHOLE).pull()
    assert files_of(there) == {
        "log.jsonl": b'{"step": 1}\n',
        "checkpoints/step-100/state.json": b"100",
        "checkpoints/step-100/empty": b"",
        "checkpoints/step-100/deep/weights": b"weights",
    }


def test_what_another_mirror_copies_is_left_to_it(tmp_path: Path) -> None:
    here, store = tmp_path / "here", str(tmp_path / "store")
    checkpoint(here / "learner", 1)
    for name in ("learner/final.json", "learner/metrics.jsonl", "results.json"):
        (here / name).write_text("{}\n")
    ours = Mirror(here, store, skip=("learner/*", "learner/*/"), keep=("learner/final.json",))
    ours.push()
    Mirror(here / "learner", f"{store}/learner", whole=WHOLE, skip=("final.json",)).push()
    ours.push()
    there = tmp_path / "there"
    Mirror(there, store, skip=("learner/*", "learner/*/"), keep=("learner/final.json",)).pull()
    assert sorted(files_of(there)) == ["learner/final.json", "results.json"]
    Mirror(there / "learner", f"{store}/learner", whole=WHOLE, skip=("final.json",)).pull()
    assert files_of(there) == files_of(here)


def test_a_checkpoint_that_was_copied_in_part_is_no_checkpoint(bucket: str, tmp_path: Path) -> None:
    here, there, place = tmp_path / "here", tmp_path / "there", f"{bucket}/b"
    checkpoint(here, 100)
    Mirror(here, place, whole=WHOLE).push()
    open_storage(place).replace("checkpoints/step-200/state.json", b"200")  # and then the machine was gone
    Mirror(there, place, whole=WHOLE).pull()
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["step-100"]


def test_what_is_removed_here_is_removed_there_once_the_new_is_there(bucket: str, tmp_path: Path) -> None:
    here, place = tmp_path / "here", f"{bucket}/c"
    mirror = Mirror(here, place, whole=WHOLE)
    for step in (100, 200):
        checkpoint(here, step)
        mirror.push()
    for path in (here / "checkpoints" / "step-100").rglob("*"):
        if path.is_file():
            path.unlink()
    os.rename(here / "checkpoints" / "step-100", tmp_path / "gone")
    mirror.push()
    assert mirror.folders() == ["checkpoints/step-200"]
    assert not open_storage(place).walk("checkpoints/step-100")


def test_a_folder_that_is_replaced_is_whole_at_every_moment(bucket: str, tmp_path: Path) -> None:
    here, place = tmp_path / "here", f"{bucket}/d"
    mirror = Mirror(here, place, whole=WHOLE)
    os.rename(checkpoint(here, 1, content=b"first", within=""), here / "best")
    mirror.push()

    for content in (b"second", b"third"):
        os.rename(here / "best", tmp_path / content.decode())
        os.rename(checkpoint(here, 1, content=content, within=""), here / "best")
        before = files_of(tmp_path / content.decode())
        cut = Mirror(here, place, whole=WHOLE, fence=lost_at(look=3))  # just before the index is written
        with pytest.raises(LeaseLost):
            cut.push()
        there = tmp_path / f"there-{content.decode()}"
        Mirror(there, place, whole=WHOLE).pull()
        assert files_of(there / "best") == before
        mirror.push()
        Mirror(there, place, whole=WHOLE).pull()
        assert (there / "best" / "deep" / "weights").read_bytes() == content


def test_the_machine_that_wrote_last_keeps_what_it_had_not_copied_yet(bucket: str, tmp_path: Path) -> None:
    here, there, place = tmp_path / "here", tmp_path / "there", f"{bucket}/e"
    checkpoint(here, 100)
    Mirror(here, place, whole=WHOLE).push()
    checkpoint(here, 200)  # and then the job was killed
    again = Mirror(here, place, whole=WHOLE)
    again.pull()
    assert sorted(path.name for path in (here / "checkpoints").iterdir()) == ["step-100", "step-200"]
    sent = {each.name: each.modified_s for each in open_storage(place).walk("checkpoints/step-100")}
    again.push()
    assert {each.name: each.modified_s for each in open_storage(place).walk("checkpoints/step-100")} == sent

    other = Mirror(there, place, whole=WHOLE)
    other.pull()
    checkpoint(there, 300)
    other.push()
    checkpoint(here, 250)  # of a branch that nobody follows
    Mirror(here, place, whole=WHOLE).pull()
    assert sorted(path.name for path in (here / "checkpoints").iterdir()) == ["step-100", "step-200", "step-300"]


def test_an_object_that_is_not_what_was_copied_is_refused(bucket: str, tmp_path: Path) -> None:
    here, place = tmp_path / "here", f"{bucket}/f"
    checkpoint(here, 100)
    Mirror(here, place, whole=WHOLE).push()
    open_storage(place).replace("checkpoints/step-100/deep/weights", b"weightz")
    with pytest.raises(StorageError, match=f"checkpoints/step-100 is not what was copied there.*{INDEX}"):
        Mirror(tmp_path / "there", place, whole=WHOLE).pull()


def test_a_store_that_takes_nothing_is_told_of_while_it_goes_on_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a").write_text("a")
    (tmp_path / "store").write_text("no folder")
    mirroring = Mirroring(Mirror(tmp_path / "here", str(tmp_path / "store")), every_s=0.01, patience_s=0.05)
    with pytest.raises(OSError), mirroring:
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                mirroring.check()
                time.sleep(0.01)


def test_what_is_written_while_it_goes_on_is_in_the_store_at_the_end(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    with Mirroring(Mirror(here, str(tmp_path / "store"), whole=WHOLE), every_s=0.01):
        for step in range(1, 6):
            checkpoint(here, step)
            (here / "log.jsonl").write_text("".join(f"{i}\n" for i in range(step)))
    Mirror(there, str(tmp_path / "store"), whole=WHOLE).pull()
    assert files_of(there) == files_of(here)


# -- the lease

QUICK = LeaseTimes(beat=0.1, give_up=0.6, takeover=1.0)


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return FolderStorage(tmp_path / "store")
    return open_storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_a_lease_that_is_given_back_is_free_at_once(store: Storage) -> None:
    with Lease.acquire(store) as first:
        pass
    with Lease.acquire(store) as second:
        assert second.number == first.number + 1
        assert [each.name for each in store.list(FOLDER)] == [f"{FOLDER}/000002.json"]


def test_a_second_job_is_refused_as_soon_as_the_first_one_is_heard_of(store: Storage) -> None:
    times = LeaseTimes(beat=1.1, give_up=20, takeover=30)  # a store's times may have whole seconds
    told: list[str] = []
    with Lease.acquire(store, times=times):
        with pytest.raises(LeaseHeld, match=f"another job is running in .*process {os.getpid()}"):
            Lease.acquire(store, say=told.append, times=times)
    assert len(told) == 1 and "this one goes on in" in told[0]


def test_the_lease_of_a_job_that_died_falls_free(tmp_path: Path) -> None:
    store = FolderStorage(tmp_path)
    dead = Lease.acquire(store, times=QUICK)
    dead._ended.set()  # its process is no more
    with Lease.acquire(store, times=QUICK) as lease:
        assert lease.number == 2
        with pytest.raises(LeaseLost, match="another job has taken"):
            Fence(str(tmp_path), dead.number).check()
        lease.fence.check()


def test_of_many_who_find_a_free_lease_one_gets_it(tmp_path: Path) -> None:
    store, barrier = FolderStorage(tmp_path), threading.Barrier(6)
    leases: list[Lease] = []
    refused: list[LeaseHeld] = []

    def want() -> None:
        barrier.wait(20)
        try:
            leases.append(Lease.acquire(store, times=LeaseTimes(beat=0.2, give_up=20, takeover=30)))
        except LeaseHeld as error:
            refused.append(error)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for lease in leases:
        lease.release()
    assert (len(leases), len(refused)) == (1, 5)


def test_a_job_whose_run_is_taken_over_is_interrupted_and_knows_why(tmp_path: Path) -> None:
    store = FolderStorage(tmp_path)
    with Lease.acquire(store, times=QUICK) as lease:
        store.claim(f"{FOLDER}/000007.json", b"{}")
        with pytest.raises(KeyboardInterrupt):
            time.sleep(20)
        with pytest.raises(LeaseLost, match="taken"):
            lease.check()


def test_a_job_that_cannot_renew_its_lease_gives_up_before_others_may_take_it(tmp_path: Path) -> None:
    lease = Lease.acquire(FolderStorage(tmp_path / "store"), times=QUICK)
    os.rename(tmp_path / "store", tmp_path / "elsewhere")
    (tmp_path / "store").write_text("no folder")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20)
    lost_after = time.monotonic() - began
    assert lease.lost is not None and "could not be renewed" in str(lease.lost)
    assert lost_after > QUICK.beat
    lease.release()

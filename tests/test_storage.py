"""Where ledgers are kept: folders that fill up, and object stores that speak S3 (a server of the tests' own)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.ledger import Ledger, LedgerError, LedgerWriter
from rollout.object_storage import ObjectStorage
from rollout.storage import FolderStorage, StorageError, open_storage, rename_to_new
from rollout.trajectory import FailureClass
from tests.loopback_server import AnsweringHandler, LoopbackServer
from tests.test_ledger import ROOT, trajectory

# -- folders


def test_files_that_are_published_together_come_together_or_not_at_all(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.prepare("a", "b")
    storage.publish({"b/taken": b"old"}, by="w")
    with pytest.raises(FileExistsError):
        storage.publish({"a/new": b"new", "b/taken": b"new"}, by="w")
    assert not storage.list("a") and not storage.leftovers("a", "b")
    assert storage.read("b/taken") == b"old"


def test_of_many_who_claim_a_name_one_gets_it(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    won: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: won.append(storage.claim("it", b"%d" % i))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(won) == [False] * 7 + [True]


def test_where_there_are_no_hard_links_one_of_many_gets_the_name_all_the_same(tmp_path: Path) -> None:
    won: list[int] = []
    both = threading.Barrier(8)

    def work(i: int) -> None:
        (tmp_path / f".{i}.tmp").write_text(str(i))
        both.wait(30)
        try:
            rename_to_new(tmp_path / f".{i}.tmp", tmp_path / "it")
        except FileExistsError:
            return
        won.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [(tmp_path / "it").read_text()] == [str(i) for i in won]
    assert not (tmp_path / ".it-lock.tmp").exists()


def test_a_scheme_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'ftp://host/x': name a folder, or a URI that begins with s3:// or gs://"):
        open_storage("ftp://host/x")


_FILL = """
import errno, json, os, subprocess, sys
from pathlib import Path
from rollout.ledger import Ledger, LedgerWriter
from rollout.trajectory import FailureClass
from tests.test_ledger import trajectory
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=True)
writer = LedgerWriter(folder / "l", writer="w")
rows = [trajectory("bulk", question=os.urandom(30_000).hex()), trajectory("bulk-f", failure=FailureClass.ENGINE)]
kept = 0
while True:
    try:
        writer.append(rows)
        kept += 1
    except OSError as error:
        full = error.errno == errno.ENOSPC
        break
ballast = sorted((folder / "l" / "shards").iterdir())
report = Ledger(folder / "l").validate()
ok, rows_then, failures_then = report.ok and not report.leftovers, report.rows, report.failures
before = Ledger(folder / "l").shards()
try:
    from rollout.ledger_compaction import compact
    compact(Ledger(folder / "l"))
    compacted = "made"
except OSError as error:
    compacted = error.errno == errno.ENOSPC
same = Ledger(folder / "l").shards() == before and not Ledger(folder / "l").validate().leftovers
ballast[0].unlink()
ballast[1].unlink()
names = writer.append([trajectory("after")])
print(json.dumps(dict(full=full, kept=kept, ok=ok, rows=rows_then, failures=failures_then, compacted=compacted,
    same=same, after="after" in Ledger(folder / "l").keys())))
"""


def test_a_disk_that_is_full_breaks_nothing_and_the_append_can_be_tried_again(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own, for a small file system")
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", _FILL, str(tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("kept") == found.pop("rows") == found.pop("failures"), "both shards of an append, or neither"
    assert found == {"full": True, "ok": True, "compacted": True, "same": True, "after": True}


def test_a_file_that_may_not_grow_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import json, os, resource, signal, sys\n"
        "from rollout.ledger import Ledger, LedgerWriter\n"
        "from tests.test_ledger import trajectory\n"
        "writer = LedgerWriter(sys.argv[1], writer='w')\n"
        "large = trajectory('large', question=os.urandom(100_000).hex())\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    writer.append([large])\n"
        "    failed = False\n"
        "except OSError:\n"
        "    failed = True\n"
        "left = Ledger(sys.argv[1]).validate().leftovers\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "writer.append([large])\n"
        "print(json.dumps([failed, left, sorted(Ledger(sys.argv[1]).keys())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "l")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, [], ["large"]]


# -- object stores

KEY = "not-a-real-key-7f3a"


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Iterator[str]:
    """The endpoint of an S3-compatible server, with the bucket 'runs'; credentials are in the environment."""
    settings = {
        "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": KEY, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        from pyarrow.fs import S3FileSystem

        S3FileSystem(endpoint_override=s3_endpoint, allow_bucket_creation=True).create_dir("runs")
        yield s3_endpoint


def test_a_ledger_in_a_bucket_does_all_that_one_in_a_folder_does(s3: str) -> None:
    where = "s3://runs/one/ledger"
    assert Ledger(where).keys() == set()
    writer = LedgerWriter(where, writer="w")
    rows = [trajectory(key) for key in "abc"]
    writer.append([*rows[:2], trajectory("x", failure=FailureClass.INPUT)])
    writer.append(rows[1:])
    ledger = Ledger(where)
    assert list(ledger.trajectories()) == rows
    assert (ledger.duplicates(), ledger.settled().quarantined) == (1, {"x": FailureClass.INPUT})
    report = ledger.compact()
    assert (report.merged, report.made, report.duplicates) == (2, 1, 1)
    LedgerWriter(where, writer="w").append([trajectory("d")])
    assert list(Ledger(where).trajectories()) == [*rows, trajectory("d")]
    report = Ledger(where).validate()
    assert report.ok and not report.leftovers and (report.rows, report.failures) == (4, 1)


def test_a_uri_may_have_gone_through_a_path_or_name_its_endpoint_itself(s3: str) -> None:
    LedgerWriter(Path("s3://runs/two"), writer="w").append([trajectory("a")])
    assert Ledger("s3://runs/two").keys() == {"a"}
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("AWS_ENDPOINT_URL")
        assert Ledger(f"s3://runs/two?endpoint_override={s3}&region=us-east-1").keys() == {"a"}


def test_of_several_who_claim_an_object_one_at_most_gets_it(s3: str) -> None:
    both = threading.Barrier(3)
    won: list[bool] = []

    def work(i: int) -> None:
        storage = ObjectStorage("s3://runs/claims")
        both.wait(30)
        won.append(storage.claim("manifests/000001.json", b"%d" % i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    storage = ObjectStorage("s3://runs/claims")
    assert len(won) == 3 and won.count(True) <= 1
    assert [each.name for each in storage.list("manifests")] == ["manifests/000001.json"] * won.count(True)
    assert storage.claim("manifests/000002.json", b"x") and not storage.claim("manifests/000002.json", b"y")
    assert storage.read("manifests/000002.json") == b"x" and not storage.leftovers("manifests")


def test_a_bucket_that_is_missing_is_named_to_readers_and_writers(s3: str) -> None:
    for use in (lambda: Ledger("s3://nowhere/run"), lambda: LedgerWriter("s3://nowhere/run", writer="w")):
        with pytest.raises(LedgerError, match=f"there is no bucket 'nowhere' at {s3}: make it first"):
            use()


def test_a_prefix_that_holds_something_else_is_refused(s3: str) -> None:
    ObjectStorage("s3://runs/other").replace("notes.txt", b"mine")
    with pytest.raises(LedgerError, match="holds files but no ledger.json"):
        LedgerWriter("s3://runs/other", writer="w")


def test_an_endpoint_that_cannot_be_reached_is_named(s3: str) -> None:
    with pytest.raises(LedgerError, match=r"http://127.0.0.1:9: is the endpoint right \(AWS_ENDPOINT_URL\)"):
        Ledger("s3://runs/one?endpoint_override=http://127.0.0.1:9")


def test_credentials_that_are_refused_are_asked_for_and_never_told(s3: str) -> None:
    class Refusing(AnsweringHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send((403, {"content-type": "application/xml"}, b"" if self.command == "HEAD" else body))

        do_HEAD = do_PUT = do_POST = do_GET

    server = LoopbackServer(Refusing)
    try:
        with pytest.raises(LedgerError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") as refused:
            Ledger(f"s3://runs/one?endpoint_override={server.url.removesuffix('/v1')}")
    finally:
        server.close()
    assert KEY not in str(refused.value)


def test_an_append_that_the_store_refuses_can_be_tried_again(s3: str) -> None:
    writer = LedgerWriter("s3://runs/three", writer="w")
    writer.append([trajectory("a")])
    broken = LedgerWriter("s3://runs/three", writer="v")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        broken._storage = ObjectStorage("s3://runs/three")
        with pytest.raises(StorageError, match="cannot write to s3://runs/three"):
            broken.append([trajectory("b")])
    broken._storage = ObjectStorage("s3://runs/three")
    broken.append([trajectory("b")])
    assert Ledger("s3://runs/three").keys() == {"a", "b"}


def test_credentials_in_a_uri_and_options_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="in the environment, not in the URI") as refused:
        Ledger("s3://me:secret@bucket/run")
    assert "secret" not in str(refused.value)
    with pytest.raises(ValueError, match="unknown option 'regoin'; a URI may have"):
        Ledger("s3://bucket/run?regoin=x")

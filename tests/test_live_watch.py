"""`python -m launch.watch`: a job that runs elsewhere, looked at through its folder."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from live_samples import LEARNING, NOW_S, STARTED_S, learning_status, scored_status

from launch.live.status import JobStatus, Said, to_json
from launch.live.status_file import NAME
from launch.watch import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path, learning_status())
    return tmp_path


def write(folder: Path, status: JobStatus) -> None:
    part = folder / "part"
    part.write_bytes(to_json(status))
    os.replace(part, folder / NAME)


def ended(state="done", **changes) -> JobStatus:
    return replace(scored_status(), state=state, updated_unix_s=NOW_S + 1, **changes)


@pytest.fixture
def job(folder) -> Iterator[threading.Thread]:
    """Ends a moment after it is started."""

    def end() -> None:
        time.sleep(0.5)
        said = (*learning_status().said, Said(unix_s=STARTED_S + 260, text="evaluation: untrained"))
        write(folder, ended(said=said))

    thread = threading.Thread(target=end)
    yield thread
    thread.join()


def test_a_look_shows_the_job_and_writes_nothing(folder, capsys):
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*")}
    assert main([str(folder), "--once"]) == 0
    out = capsys.readouterr().out
    assert "starter-seed0" in out and "silent for" in out and "2549/5500" in out and "[00:02] Ray: a Ray" in out
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*")} == before


def test_programs_get_the_status_itself(folder, capsys):
    assert main([str(folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["stages"][0]["episodes"]["recorded"] == 2449 and status["learning"]["step"] == 188


def test_where_there_is_no_terminal_it_prints_the_jobs_own_lines_until_the_end(folder, job, capsys):
    job.start()
    assert main([str(folder), "--every", "0.1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["[00:02] Ray: a Ray of its own on this machine", "[03:20] a rank of the learner died"]
    assert re.match(r"\[04:32\]   episodes 2549/5500 \(100 found\); .*queue 205/256; step 188", lines[2])
    assert lines[3] == "[04:20] evaluation: untrained"
    assert lines[4].startswith("[04:33]   episodes 372/400; success 340/372;") and lines[5] == "[04:33] done"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("state", "error", "said"),
    [("failed", "the disk is full", "failed: the disk is full"), ("interrupted", "", "interrupted")],
)
def test_a_job_that_did_not_get_done_is_told(folder, capsys, state, error, said):
    write(folder, ended(state, error=error))
    assert main([str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"[04:33] {said}"


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_folder_without_a_job_is_refused(tmp_path, capsys, missing):
    assert main([str(tmp_path / missing)]) == 2
    assert "holds no status.json: give the folder of a job" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--every", "0"], ["--every", "nan"], []])
def test_wrong_arguments_are_refused(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        main([*([str(tmp_path)] if arguments else []), *arguments])
    assert refused.value.code == 2


def test_a_file_that_cannot_be_read_for_a_moment_ends_nothing(folder, capsys):
    def spoil() -> None:
        time.sleep(0.3)
        (folder / NAME).write_text("{")
        time.sleep(0.4)
        write(folder, ended())

    thread = threading.Thread(target=spoil)
    thread.start()
    assert main([str(folder), "--every", "0.1"]) == 0
    thread.join()


def test_a_status_in_a_bucket_is_watched_too(s3_endpoint, monkeypatch, capsys):
    from pyarrow.fs import S3FileSystem

    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = S3FileSystem(endpoint_override=s3_endpoint, allow_bucket_creation=True, region="us-east-1")
    files.create_dir("watched")
    with files.open_output_stream(f"watched/mine/{NAME}") as file:
        file.write(to_json(learning_status()))
    assert main(["s3://watched/mine", "--once"]) == 0
    assert "2549/5500" in capsys.readouterr().out


def test_a_terminal_shows_the_picture_and_is_left_as_it_was(folder, job):
    """A real one, of 80 columns and 24 lines."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "launch.watch", str(folder), "--every", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown, deadline_s = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline_s:
            ready, _, _ = select.select([ours], [], [], 1.0)
            try:
                got = os.read(ours, 65536) if ready else b""
            except OSError:  # the other side is closed
                break
            shown += got
            if b"2549/5500" in shown and job.ident is None:
                job.start()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert LEARNING in text and "9 failed" in text and "340 of 372" not in text
    assert "done 04:33" in text and shown.rstrip().endswith(b"\x1b[?25h")  # the cursor is back

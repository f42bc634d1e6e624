"""A cluster under fire: runs whose parts are killed, cut off and filled (slow), and what such runs are checked by. Each
check is shown to catch what it is there for."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from learner_samples import trajectory
from report_samples import run_folder, sampled

from benchmarks.chaos_cluster import MARK, ChaosCluster
from benchmarks.chaos_faults import KINDS, draw, kinds_of_run
from benchmarks.chaos_hosts import Hosts
from benchmarks.chaos_invariants import check_ledger, check_orphans, check_rows, check_time, check_told
from envs.base import EnvError
from launch.actor_watch import ActorWatch
from launch.events import EventRecord, read_events
from launch.learning_trouble import LearningTrouble
from launch.patient_lines import PatientLines
from launch.report import draw_learning_curve
from launch.report.event_section import TITLE, went_wrong
from launch.report.figures import gather
from launch.report.run_files import find
from launch.source import StreamSource
from launch.wiring import Environments
from learner.base import Progress
from learner.checkpoints import CheckpointFolder
from learner.full_disk import patiently
from rollout.ledger import Ledger, LedgerWriter
from rollout.node_watch import changed
from rollout.placement_fit import Node
from rollout.task_feed import CollectProgress, WorkerState
from rollout.trajectory_queue import QueueRestartedError, TrajectoryQueue

ROWS = [trajectory(i) for i in range(6)]
KEYS = {each.key for each in ROWS}


# -- the checks catch what they are there for


def run_of(folder: Path, *, arrived: list[str], rows: int, step: int = 3) -> Path:
    LedgerWriter(folder / "ledger", "w").append(ROWS)
    (folder / "learner").mkdir()
    (folder / "learner" / "arrivals.jsonl").write_text("".join(json.dumps(key) + "\n" for key in arrived))
    (folder / "learner" / "final.json").write_text(json.dumps({"rows": rows, "refused": {}, "step": step}))
    return folder


def test_a_whole_run_has_no_finding(tmp_path: Path) -> None:
    run = run_of(tmp_path, arrived=[each.key for each in ROWS], rows=12)
    assert check_ledger(Ledger(run / "ledger"), KEYS) + check_rows(run, passes=2) == []


def test_a_row_that_was_removed_is_found_to_be_lost(tmp_path: Path) -> None:
    LedgerWriter(tmp_path, "w").append(ROWS[1:])
    [found] = check_ledger(Ledger(tmp_path), KEYS)
    assert (found.what, found.count) == ("lost", 1) and ROWS[0].key in found.words


def test_a_row_that_is_there_twice_is_found_to_be_a_duplicate(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path, "w")
    writer.append(ROWS)
    writer.append(ROWS[:2])
    [found] = check_ledger(Ledger(tmp_path), KEYS)
    assert (found.what, found.count) == ("duplicate", 2)


def test_a_row_that_nobody_asked_for_is_found(tmp_path: Path) -> None:
    LedgerWriter(tmp_path, "w").append(ROWS)
    [found] = check_ledger(Ledger(tmp_path), KEYS - {ROWS[3].key})
    assert (found.what, found.count) == ("foreign", 1)


def test_a_row_that_a_student_was_not_trained_on_is_found(tmp_path: Path) -> None:
    run = run_of(tmp_path, arrived=[each.key for each in ROWS[1:]], rows=10)
    assert [(each.what, each.count) for each in check_rows(run, passes=2)] == [("rows", 2), ("rows", 1)]


def test_a_row_that_a_student_was_trained_on_twice_is_found(tmp_path: Path) -> None:
    run = run_of(tmp_path, arrived=[each.key for each in (*ROWS, ROWS[0])], rows=12)
    [found] = check_rows(run, passes=2)
    assert found.what == "rows" and "more than once" in found.words


def test_more_time_than_recovery_takes_is_found() -> None:
    assert check_time(took_s=100, undisturbed_s=50, allowed_s=40, noise_s=10) == []
    [found] = check_time(took_s=101, undisturbed_s=50, allowed_s=40, noise_s=10)
    assert found.what == "time"


def test_a_fault_that_nobody_tells_of_is_found(tmp_path: Path) -> None:
    EventRecord(tmp_path).tell("queue", "the queue died and is back")
    (tmp_path / "report.html").write_text(f"<h2>{TITLE}</h2>")
    assert check_told(tmp_path, ["queue"]) == []
    assert [each.words for each in check_told(tmp_path, ["queue", "queue", "node"])] == [
        "a queue was felt 2 times and told 1 times", "a node was felt 1 times and told 0 times"
    ]  # fmt: skip
    (tmp_path / "report.html").write_text("all is well")
    assert [each.what for each in check_told(tmp_path, ["queue"])] == ["untold"]


def test_a_process_that_outlives_its_job_is_found_even_when_it_hides_its_environment(tmp_path: Path) -> None:
    cluster = ChaosCluster(tmp_path / "cluster")
    child = "import subprocess, sys; print(subprocess.Popen(['sleep', '60'], env={}).pid, flush=True); sys.stdin.read()"
    parent = subprocess.Popen(
        [sys.executable, "-c", child], env={**os.environ, MARK: str(cluster.folder)}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert parent.stdout is not None and int(parent.stdout.readline())
        assert len(cluster.processes()) == 2
        parent.kill()
        parent.wait(10)
        [found] = check_orphans(cluster.of_jobs())
        assert found.what == "orphan" and "sleep 60" in found.words
    finally:
        cluster.kill(cluster.processes())
        parent.kill()
        parent.wait(10)
    assert check_orphans(cluster.of_jobs()) == []


# -- what is broken


def test_a_seed_always_draws_the_same_and_thirty_runs_draw_each_kind_several_times() -> None:
    plans = [kinds_of_run(seed, 3) for seed in range(30)]
    assert plans == [kinds_of_run(seed, 3) for seed in range(30)]
    assert all(len(set(plan)) == 3 for plan in plans)
    assert all(sum(kind in plan for plan in plans) >= 5 for kind in KINDS)
    drawn = [draw(random.Random(5), KINDS, ["a", "b"]) for _ in range(2)]
    assert drawn[0] == drawn[1] and {fault.kind for fault in drawn[0]} == set(KINDS)


SERVE = "import http.server as h; h.HTTPServer(('0.0.0.0', 8000), h.SimpleHTTPRequestHandler).serve_forever()"
ASK = "import socket, sys; socket.create_connection((sys.argv[1], 8000), timeout=2)"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path / "hosts", names=["head", "a", "b"], disk_mb=1) as hosts:
        if hosts.why:
            pytest.skip(hosts.why)
        yield hosts


def test_a_link_between_two_hosts_is_cut_and_heals_and_others_keep_theirs(hosts: Hosts) -> None:
    def reaches(one: str) -> bool:
        asked = hosts.command(one, [sys.executable, "-c", ASK, hosts.address("a")])
        return subprocess.run(asked, capture_output=True, timeout=30).returncode == 0

    server = subprocess.Popen(hosts.command("a", [sys.executable, "-c", SERVE]), stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 60
        while not reaches("b"):
            assert time.monotonic() < deadline_s
        assert hosts.cut("a", "b")
        assert reaches("head") and not reaches("b")
        hosts.heal()
        assert reaches("b")
    finally:
        server.kill()
        server.wait(10)


def test_the_hosts_share_a_disk_that_fills_and_that_only_they_see(hosts: Hosts) -> None:
    filler = hosts.fill()
    assert filler is not None and filler.stat().st_size <= 1 << 20 and not list(hosts.disk.iterdir())
    write = hosts.command("b", ["dd", "if=/dev/zero", f"of={hosts.disk / 'x'}", "bs=4k", "count=1"])
    assert b"No space left" in subprocess.run(write, capture_output=True, timeout=30).stderr
    filler.unlink()
    assert subprocess.run(write, capture_output=True, timeout=30).returncode == 0


def test_a_checkpoint_waits_for_a_disk_that_is_full(hosts: Hosts) -> None:
    import torch

    filler, folder = hosts.fill(), CheckpointFolder(hosts.seen(hosts.disk) / "checkpoints", keep=1)
    assert filler is not None
    with pytest.raises(OSError, match="No space left"):
        patiently(lambda: (filler.parent / "more").write_bytes(bytes(9000)), patience_s=0)
    freed = threading.Timer(2.0, filler.unlink)
    freed.start()
    began_s = time.monotonic()
    folder.begin("step-1")
    folder.write_part("step-1", 0, [("weight", torch.arange(50_000.0))], facts={})
    folder.finish("step-1", {"step": 1})
    assert time.monotonic() - began_s >= 1.5
    assert folder.damage("step-1") is None and folder.state("step-1") == {"step": 1}
    freed.join()


# -- what went wrong is told


def actor(state: str, restarts: int, kind: str = "EnvHost") -> dict[str, Any]:
    return {"ActorID": "1", "ActorClassName": kind, "State": state, "NumRestarts": restarts,
            "Address": {"IPAddress": "10.0.0.7"}}  # fmt: skip


def test_an_actor_that_died_is_told_at_once_and_again_when_it_is_back(tmp_path: Path) -> None:
    watch = ActorWatch(EventRecord(tmp_path))
    for state, restarts in [("ALIVE", 0), ("RESTARTING", 0), ("RESTARTING", 1)]:
        watch.look_at_actors([actor(state, restarts), actor(state, restarts, "SomebodyElses")])
    assert [(each.what, each.words) for each in read_events(tmp_path)] == [("env host", "an env host died")]
    for _ in range(2):
        watch.look_at_actors([actor("ALIVE", 1)])
    [died, back] = read_events(tmp_path)
    assert back.words == "an env host is back on 10.0.0.7" and back.away_s is not None
    assert back.returned and not died.returned


def test_an_actor_that_was_back_before_anybody_looked_is_told_once(tmp_path: Path) -> None:
    watch = ActorWatch(EventRecord(tmp_path))
    for restarts in (0, 1, 1):
        watch.look_at_actors([actor("ALIVE", restarts)])
    [event] = read_events(tmp_path)
    assert event.words == "an env host died and is back on 10.0.0.7" and not event.returned


def test_env_hosts_that_die_while_they_are_waited_for_are_asked_again(ray_cluster: Any, tmp_path: Path) -> None:
    asked = tmp_path / "asked"

    @ray_cluster.remote(num_cpus=0, max_restarts=1)
    class Host:
        def can_preview(self) -> bool:
            if not asked.exists():
                asked.touch()
                time.sleep(60)
            return True

    host = Host.remote()  # type: ignore[attr-defined]

    def kill() -> None:
        while not asked.exists():
            time.sleep(0.05)
        ray_cluster.kill(host, no_restart=False)

    killer = threading.Thread(target=kill)
    killer.start()
    assert Environments([[host]], None).wait_ready()
    killer.join()
    ray_cluster.kill(host)
    with pytest.raises(EnvError, match="the env hosts could not start: The actor is dead"):
        Environments([[host]], None).wait_ready()


def test_nodes_that_are_lost_and_join_are_told_and_those_of_the_start_are_not(tmp_path: Path) -> None:
    watch = ActorWatch(EventRecord(tmp_path))
    a, b, again = (Node(name=key[0], key=key, total={"CPU": 1}) for key in ("a1", "b1", "b2"))
    cluster = None
    for nodes in ([a, b], [a], [a, again]):
        cluster = changed(cluster, nodes, {})
        watch.look_at_nodes(cluster)
    assert [(each.what, each.words) for each in read_events(tmp_path)] == [
        ("node", "the node b was lost"), ("node", "the node b joined")
    ]  # fmt: skip


def test_a_node_that_was_lost_as_a_job_ended_is_told_by_the_next(tmp_path: Path) -> None:
    def next_job_tells(*keys: str) -> list[str]:
        before = len(read_events(tmp_path))
        watch = ActorWatch(EventRecord(tmp_path))
        nodes = [Node(name=key[0], key=key, total={"CPU": 1}) for key in keys]
        for cluster in (changed(None, nodes, {}), changed(None, nodes, {})):
            watch.look_at_nodes(cluster)
        return [f"{each.what}: {each.words}" for each in read_events(tmp_path)[before:]]

    kept = tmp_path / "nodes.json"
    assert next_job_tells("a1", "b1", "c1") == []
    assert next_job_tells("a1", "c2", "b1") == ["node: the node c was lost as an earlier job ended"]
    assert next_job_tells("a1", "c2") == ["node: the node b was lost as an earlier job ended"]
    assert next_job_tells("x1") == []  # of another cluster
    assert next_job_tells("x1", "y1") == []
    os.utime(kept, (0, 0))
    assert next_job_tells("x1") == []  # long ago
    kept.write_text('{"x1": "x", "y')
    assert next_job_tells("x1") == []


def test_nodes_that_could_not_be_kept_are_kept_at_the_next_look(tmp_path: Path) -> None:
    watch, kept = ActorWatch(EventRecord(tmp_path)), tmp_path / "nodes.json"
    cluster = changed(None, [Node(name="a", key="a1", total={"CPU": 1})], {})
    kept.mkdir()  # nothing can be written there
    watch.look_at_nodes(cluster)
    kept.rmdir()
    watch.look_at_nodes(cluster)
    assert json.loads(kept.read_text()) == {"a1": "a"}


def test_a_learner_that_went_on_and_a_disk_that_was_full_are_told_at_once_and_when_it_is_over(tmp_path: Path) -> None:
    def told() -> list[tuple[str, bool]]:
        return [(each.what, each.returned) for each in read_events(tmp_path)]

    trouble, full = LearningTrouble(EventRecord(tmp_path)), WorkerState(note="the ledger cannot be written: No space")
    calm = CollectProgress()
    for _ in range(2):
        trouble.look(Progress(step=4, first_step_unix_s=1.0), CollectProgress(workers={"w": full}))
    assert told() == [("disk", False)]
    trouble.look(Progress(step=4, first_step_unix_s=1.0, restarts=1), calm)
    assert told() == [("disk", False), ("learner", False), ("disk", True)]
    trouble.look(Progress(step=0, restarts=1), calm)
    assert len(told()) == 3
    for _ in range(2):
        trouble.look(Progress(step=5, first_step_unix_s=2.0, restarts=1), calm)
    assert told()[3:] == [("learner", True)]
    assert all((each.away_s is not None) == each.returned for each in read_events(tmp_path))


def test_lines_that_found_no_room_are_written_with_the_next_and_a_torn_one_spoils_none(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines.jsonl"
    lines = PatientLines(path)
    path.parent.write_text("in the way")  # nothing can be written
    lines.add({"a": 1})
    path.parent.unlink()
    path.parent.mkdir()
    path.write_text('{"torn')
    lines.add({"a": 2})
    assert path.read_text().splitlines() == ['{"torn', '{"a": 1}', '{"a": 2}']


def test_a_learning_curve_is_drawn_past_a_line_that_was_torn(tmp_path: Path) -> None:
    row = {"step": 1, "tokens": 10, "loss": 1.0, "loss_by_span": {}, "minutes": 1.0, "recorded": 1, "rows": 1}
    (tmp_path / "metrics.jsonl").write_text(f'{json.dumps(row)}\n{{"step": 2, "to\n{json.dumps(row)}\n')
    draw_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="torn")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_report_has_a_section_of_its_own_for_what_went_wrong_and_none_where_nothing_did(tmp_path: Path) -> None:
    run = run_folder(tmp_path, collected=[sampled(1)])
    assert not went_wrong(gather(find(run)))
    EventRecord(run).tell("retrieval", "the <retrieval> actor died", away_s=3.14)
    with open(run / "events.jsonl", "a") as file:
        file.write('{"unix_s": 1, "wha')
    section = str(went_wrong(gather(find(run))))
    assert TITLE in section and "the &lt;retrieval&gt; actor died" in section and "3.1 s" in section


# -- a queue that dies


def kill(ray_cluster: Any, queue: TrajectoryQueue) -> None:
    ray_cluster.kill(queue._actor, no_restart=False)


@pytest.mark.timeout(120)
def test_a_queue_that_dies_is_back_empty_and_tells_each_consumer_once(ray_cluster: Any) -> None:
    queue = TrajectoryQueue.create(capacity=8)
    try:
        queue.put(ROWS[:2])
        assert [each.key for each in queue.get(1, timeout_s=10) or []] == [ROWS[0].key]
        kill(ray_cluster, queue)
        with pytest.raises(QueueRestartedError, match="what was in it is in the ledger"):
            while True:
                queue.get(1, timeout_s=0.2)
        queue.put(ROWS[2:3])
        assert [each.key for each in queue.get(5, timeout_s=10) or []] == [ROWS[2].key]
    finally:
        queue.kill()


@pytest.mark.timeout(120)
def test_what_a_dead_queue_held_comes_from_the_ledger_and_nothing_comes_twice(ray_cluster: Any, tmp_path: Path) -> None:
    queue, writer = TrajectoryQueue.create(capacity=8), LedgerWriter(tmp_path, "w")
    source = StreamSource(tmp_path, queue)
    got: list[str] = []

    def take(count: int) -> None:
        while len(got) < count:
            got.extend(each.key for each in source.next(1, timeout_s=0.2) or [])

    try:
        assert source.next(1, timeout_s=0.1) == []
        writer.append(ROWS[:4])
        queue.put(ROWS[:4])
        take(2)
        kill(ray_cluster, queue)
        take(4)
        producing = threading.Thread(target=lambda: (writer.append(ROWS[4:]), queue.put(ROWS[3:]), queue.close()))
        producing.start()
        take(6)
        producing.join(30)
        while (more := source.next(5, timeout_s=0.2)) is not None:
            assert not more
        assert sorted(got) == sorted(KEYS)
    finally:
        queue.kill()


# -- whole runs


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_runs_under_fire_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    seed, record = int(os.environ.get("FAULT_SEED", "0")), tmp_path / "chaos.json"
    command = [sys.executable, "benchmarks/chaos.py", "--runs=4", f"--seed={seed}", "--quiet=1", "--check",
               f"--json={record}"]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    job = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = job.communicate(timeout=2300)
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    print(said)
    assert job.returncode == 0
    rows = {row["what"]: row["measured"] for row in json.loads(record.read_text())["rows"] if row["group"] == "all"}
    assert (rows["lost"], rows["duplicate"], rows["orphan"], rows["hang"]) == (0, 0, 0, 0)

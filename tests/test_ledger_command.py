"""`python -m launch.ledger`: each command on real small ledgers, as a person or a script would use it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from expert_samples import CODE_POLICY, COT_POLICY, expert_trajectories
from loopback_server import AnsweringHandler, LoopbackServer

from launch.evaluation.intervals import score
from launch.ledger.__main__ import main
from launch.ledger.output import Fill
from rollout.ledger import Ledger, LedgerWriter
from rollout.records import from_table
from rollout.trajectory import Failure, FailureClass, StopReason, Trajectory, Usage

COUNT = 12
Expert = tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]


@pytest.fixture(scope="module")
def expert() -> Expert:
    return expert_trajectories(COUNT)


def failed(trajectory: Trajectory, failure_class: FailureClass, message: str = "no answer in 30 s") -> Trajectory:
    return replace(
        trajectory, success=False, reward=0.0, prediction=None, steps=(), stop_reason=StopReason.FAILED,
        failure=Failure(failure_class=failure_class, message=message), usage=Usage(requests=1, cost_usd=0.5),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, expert: Expert) -> str:
    """The expert in code (what each cost, 0.25 USD) and in words, four failures of one task, three of others, and a
    duplicate row."""
    coded, said = expert
    writer = LedgerWriter(tmp_path / "ledger", writer="w")
    paid = [replace(each, usage=replace(each.usage, cost_usd=0.25)) for each in coded[3:]]
    writer.append([*paid, *[failed(coded[0], FailureClass.ENGINE)] * 4])
    writer.append([*said, failed(coded[1], FailureClass.ENVIRONMENT), failed(coded[2], FailureClass.MODEL)])
    writer.append([said[0], failed(coded[3], FailureClass.LIMIT)])
    return str(tmp_path / "ledger")


def run(*arguments: str) -> int:
    return main([str(each) for each in arguments])


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `--json` says."""
    assert run(*arguments, "--json") == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def by_key(folder: str | Path) -> dict[str, Trajectory]:
    return {each.key: each for each in Ledger(folder).trajectories()}


# -- show


def test_show_counts_what_is_there_and_what_it_cost(folder, expert, capsys):
    coded, said = expert
    right = sum(each.success for each in said)
    data = asked(capsys, "show", folder)
    total = data["total"]
    assert (total["results"], data["tasks"], data["duplicates"]) == (2 * COUNT - 3, COUNT, 1)
    assert total["right"] == total["accepted"] == COUNT - 3 + right
    groups = {(each["kind"], each["policy"]): each for each in data["groups"]}
    kinds = Counter(each.task.kind for each in said)
    arithmetic = groups["arithmetic", COT_POLICY]
    wilson = score(right, kinds["arithmetic"])
    assert arithmetic["success"] == {"mean": wilson.mean, "low": wilson.low, "high": wilson.high, "n": wilson.n}
    assert groups["two_hop", COT_POLICY]["usd_per_accepted"] is None and arithmetic["step_count_mean"] == 1.0
    assert groups["two_hop", CODE_POLICY]["tool_calls_mean"] == 2.0
    # Failed attempts were paid, too: seven of them, half a dollar each.
    assert data["cost_usd"] == pytest.approx(0.25 * (COUNT - 3) + 7 * 0.5)
    assert data["cost_per_accepted_usd"] == pytest.approx(data["cost_usd"] / total["accepted"])
    assert data["stop_reasons"] == {"final": total["results"]}
    assert {name: each["attempts"] for name, each in data["failures"].items()} == {
        "engine": 4, "environment": 1, "limit": 1, "model": 1,
    }  # fmt: skip
    assert data["failures"]["engine"]["example"] == "no answer in 30 s"
    assert (data["without_result"], data["quarantined"]) == (3, 2), "one that failed has a result; one is tried again"


def test_show_accepts_by_the_curation_that_is_named(folder, expert, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("filters: [correct, {name: length, max_steps: 1}]")
    by_file = asked(capsys, "show", folder, "--curation", str(tmp_path / "mine.yaml"))
    assert by_file["total"]["accepted"] == sum(each.success for each in expert[1])
    assert asked(capsys, "show", folder, "--curation", "none")["total"]["accepted"] == 2 * COUNT - 3


def test_the_default_curation_is_the_papers(folder, capsys):
    default, named = (asked(capsys, "show", folder, *more) for more in ((), ("--curation", "paper")))
    assert default == named


def test_show_reads_several_ledgers_as_one(folder, expert, tmp_path, capsys):
    LedgerWriter(tmp_path / "other", writer="w").append(expert[0])
    data = asked(capsys, "show", folder, str(tmp_path / "other"))
    assert (data["total"]["results"], data["duplicates"]) == (2 * COUNT, 1 + COUNT - 3)
    assert data["without_result"] == 0, "the other ledger has the results"


def test_show_is_a_table_for_people(folder, capsys):
    assert run("show", folder) == 0
    shown = capsys.readouterr().out
    for part in ("arithmetic", CODE_POLICY, "USD per", "failed attempts included", "2 of them quarantined", "engine"):
        assert part in shown


def test_show_of_an_empty_ledger_says_so(tmp_path, capsys):
    LedgerWriter(tmp_path / "empty", writer="w")
    data = asked(capsys, "show", str(tmp_path / "empty"))
    assert data["total"]["results"] == 0 and data["cost_per_accepted_usd"] is None
    assert run("show", str(tmp_path / "empty")) == 0 and "0 results of 0 tasks" in capsys.readouterr().out


# -- failures, validate, compact


def test_failures_are_listed_by_key_with_what_becomes_of_them(folder, expert, capsys):
    keys = [each.key for each in expert[0]]
    data = asked(capsys, "failures", folder)
    assert data["states"] == {"retryable": 1, "quarantined": 2, "solved": 1}
    states = {each["key"]: (each["state"], each["attempts"]) for each in data["failures"]}
    assert states == {
        keys[0]: ("quarantined", 4), keys[1]: ("retryable", 1), keys[2]: ("quarantined", 1), keys[3]: ("solved", 1),
    }  # fmt: skip
    engine = asked(capsys, "failures", folder, "--class", "engine")["failures"]
    assert [each["key"] for each in engine] == [keys[0]] and engine[0]["message"] == "no answer in 30 s"
    assert asked(capsys, "failures", folder, "--retryable")["keys"] == 1
    assert asked(capsys, "failures", folder, "--quarantined", "--attempts", "9")["keys"] == 1
    assert run("failures", folder, "--limit", "1") == 0
    assert "3 more are not listed" in capsys.readouterr().out


def test_validate_fails_for_a_damaged_ledger(folder, capsys):
    assert asked(capsys, "validate", folder)["ok"] is True
    shard = next(Path(folder).glob("shards/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    told = asked(capsys, "validate", folder, code=1)
    assert told["ok"] is False and shard.name in told["ledgers"][0]["unreadable"][0]
    assert run("validate", folder) == 1 and "NOT whole" in capsys.readouterr().out
    assert shard.name in refused(capsys, "show", folder)


def test_compact_loses_no_row(folder, capsys):
    before = by_key(folder)
    [report] = asked(capsys, "compact", folder)["ledgers"]
    assert report["merged"] > report["made"] and report["duplicates"] == 1
    assert by_key(folder) == before and asked(capsys, "show", folder)["duplicates"] == 0


# -- filter, merge, compose


def test_filter_makes_a_ledger_of_what_is_kept_and_says_what_each_removed(folder, tmp_path, capsys):
    before, out = contents(folder), tmp_path / "kept"
    data = asked(capsys, "filter", folder, "--curation", "strict", "--out", str(out))
    kept = by_key(out)
    assert data["kept"] == len(kept) == COUNT - 3 and {each.policy for each in kept.values()} == {CODE_POLICY}
    removed = {each["filter"]: each["removed"] for each in data["filters"]}
    assert removed["correct"] > 0 and removed["used_tools"] > 0 and sum(removed.values()) == COUNT
    assert contents(folder) == before and kept.items() <= by_key(folder).items()


def test_filter_without_a_new_ledger_prints_the_table_alone(folder, tmp_path, capsys):
    here = sorted(tmp_path.iterdir())
    assert run("filter", folder, "--curation", "paper") == 0
    shown = capsys.readouterr().out
    assert "Curation paper" in shown and "no_parse_error" in shown and sorted(tmp_path.iterdir()) == here


def test_merge_has_each_key_once_and_every_failure(folder, expert, tmp_path, capsys):
    LedgerWriter(tmp_path / "other", writer="w").append(expert[0])
    data = asked(capsys, "merge", folder, str(tmp_path / "other"), "--out", str(tmp_path / "all"))
    assert (data["results"], data["repeated"], data["failures"]) == (2 * COUNT, COUNT - 3, 7)
    merged = Ledger(tmp_path / "all")
    assert by_key(tmp_path / "all") == {**by_key(tmp_path / "other"), **by_key(folder)}
    assert merged.duplicates() == 0 and len(list(merged.failures())) == 7 and merged.validate().ok


def test_compose_joins_two_policies(folder, expert, tmp_path, capsys):
    right = sum(each.success for each in expert[1][3:])
    data = asked(capsys, "compose", folder, "--first", CODE_POLICY, "--second", COT_POLICY, "--with-singles",
                 "--out", str(tmp_path / "both"))  # fmt: skip
    assert (data["composed"], data["singles"]) == (right, COUNT - 3 - right)
    assert data["refused"]["second_wrong"]["count"] == COUNT - 3 - right
    policies = Counter(each.policy for each in Ledger(tmp_path / "both").trajectories())
    assert policies == {f"{CODE_POLICY}+{COT_POLICY}": right, CODE_POLICY: COUNT - 3 - right}
    line = refused(capsys, "compose", folder, "--first", "a", "--second", "b", "--out", str(tmp_path / "no"))
    assert "no trajectory is of policy 'a'" in line


# -- regrade


def test_regrade_by_other_answers_changes_verdicts_and_nothing_else(folder, expert, tmp_path, capsys):
    wrong = expert[0][4]
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"id": wrong.task.id, "question": "?", "answer": "another"}) + "\n")
    before = contents(folder)
    data = asked(capsys, "regrade", folder, "--tasks", str(tasks), "--out", str(tmp_path / "again"))
    # Two trajectories are of this task; the one in words may have been wrong already.
    changed = [each for each in data["changes"] if each["key"] == wrong.key]
    assert changed == [
        {"key": wrong.key, "answer": "another", "prediction": wrong.prediction, "was": True, "is": False}
    ]
    assert data["now_right"] == 0 and data["without_new_answer"] == data["results"] - 2
    old, new = by_key(folder), by_key(tmp_path / "again")
    assert new.keys() == old.keys() and contents(folder) == before
    differing = {key for key in old if new[key] != old[key]}
    assert differing == {key for key in old if old[key].task.id == wrong.task.id}
    again = new[wrong.key]
    assert (again.success, again.reward, again.task.answer) == (False, 0.0, "another")
    assert len(list(Ledger(tmp_path / "again").failures())) == 7


def test_regrade_finds_answers_by_question(folder, expert, tmp_path, capsys):
    tasks = tmp_path / "tasks.jsonl"
    rows = [{"id": f"other-{i}", "question": each.task.question, "answer": "x"} for i, each in enumerate(expert[0])]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    data = asked(capsys, "regrade", folder, "--tasks", str(tasks), "--out", str(tmp_path / "again"))
    assert data["without_new_answer"] == 0 and data["now_wrong"] == sum(
        each.success for each in by_key(folder).values()
    )


def test_regrade_by_another_grader(tmp_path, expert, capsys):
    half = replace(expert[0][0], prediction="1/2", success=False, reward=0.0)
    half = replace(half, task=replace(half.task, answer="0.5"))
    silent = replace(half, key=expert[0][1].key, prediction=None)
    LedgerWriter(tmp_path / "ledger", writer="w").append([half, silent])
    data = asked(capsys, "regrade", str(tmp_path / "ledger"), "--grader", "math", "--out", str(tmp_path / "math"))
    assert (data["now_right"], data["now_wrong"]) == (1, 0)
    graded = by_key(tmp_path / "math")
    assert graded[half.key].success and graded[half.key].task.grader == "math" and not graded[silent.key].success


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that finds everything right but "wrong", and refuses what speaks of "forbidden": its URL, and the
    prompts that came."""
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    prompts: list[str] = []

    class Handler(AnsweringHandler):
        def do_POST(self) -> None:
            prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][0]["content"]
            prompts.append(prompt)
            verdict = "incorrect" if "a wrong prediction" in prompt else "correct"
            message = {"role": "assistant", "content": f"Verdict: {verdict}"}
            body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
            status = 400 if "forbidden" in prompt else 200
            self.send((status, {"content-type": "application/json"}, json.dumps(body).encode()))

    server = LoopbackServer(Handler)
    yield server.url, prompts
    server.close()


def test_regrade_asks_a_judge_for_what_is_not_plainly_equal(tmp_path, expert, judge, capsys):
    url, prompts = judge
    rows = [
        replace(expert[0][i], prediction=said or expert[0][i].task.answer, success=False, reward=0.0)
        for i, said in enumerate(["in other words", "a wrong prediction", ""])
    ]
    LedgerWriter(tmp_path / "ledger", writer="w").append(rows)
    options = ("--grader", "judge", "--judge-model", "m", "--judge-url", url)
    data = asked(capsys, "regrade", str(tmp_path / "ledger"), *options, "--out", str(tmp_path / "judged"))
    assert data["now_right"] == 2 and len(prompts) == 2
    assert [each.success for each in Ledger(tmp_path / "judged").trajectories()] == [True, False, True]


def test_a_judge_that_refuses_ends_the_command_and_nothing_is_made(tmp_path, expert, judge, capsys):
    LedgerWriter(tmp_path / "ledger", writer="w").append([replace(expert[0][0], prediction="forbidden")])
    options = ("--grader", "judge", "--judge-model", "m", "--judge-url", judge[0])
    line = refused(capsys, "regrade", str(tmp_path / "ledger"), *options, "--out", str(tmp_path / "judged"))
    assert "judge m at" in line and [path.name for path in tmp_path.iterdir()] == ["ledger"]


# -- export and import


@pytest.mark.parametrize("name", ["chat", "trl", "smolagents", "sharegpt"])
def test_export_for_other_tools(folder, tmp_path, name, capsys):
    out = tmp_path / "out.jsonl"
    data = asked(capsys, "export", folder, "--format", name, "--out", str(out), "--curation", "strict")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == data["rows"] >= data["trajectories"] == COUNT - 3
    assert "web_search" in out.read_text()


def test_export_of_the_rows_themselves_loses_nothing(folder, tmp_path, capsys):
    asked(capsys, "export", folder, "--format", "parquet", "--out", str(tmp_path / "all.parquet"))
    assert {each.key: each for each in from_table(pq.read_table(tmp_path / "all.parquet"))} == by_key(folder)
    asked(capsys, "export", folder, "--format", "jsonl", "--out", str(tmp_path / "all.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert {row["key"]: row["prediction"] for row in rows} == {k: t.prediction for k, t in by_key(folder).items()}


def test_what_was_exported_can_be_imported(folder, tmp_path, capsys):
    chat = tmp_path / "chat.jsonl"
    run("export", folder, "--format", "chat", "--out", str(chat), "--curation", "strict")
    capsys.readouterr()
    with open(chat, "a") as file:
        file.write("{broken\n")
    data = asked(capsys, "import", str(chat), "--out", str(tmp_path / "back"))
    assert data["imported"] == COUNT - 3 and [each["rows"] for each in data["refused"].values()] == [1]
    old = [each for each in by_key(folder).values() if each.policy == CODE_POLICY]
    back = list(Ledger(tmp_path / "back").trajectories())
    actions = [sorted([step.action for step in each.steps] for each in rows) for rows in (old, back)]
    assert actions[0] == actions[1] and all(each.success for each in back)


# -- refusals, atomicity, help


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "{tmp}/none"), "none is no ledger: there is no ledger.json in it"),
        (("show", "{tmp}"), "is a run; its ledger is"),
        (("show", "{tmp}/files"), "holds files but no ledger.json"),
        (("show", "{ledger}", "--curation", "srict"), "'srict' is neither a file nor one of none, paper, strict"),
        (("filter", "{ledger}", "--curation", "{tmp}/bad.yaml"), "bad.yaml: filter 'corect' is unknown"),
        (("filter", "{ledger}", "--curation", "{tmp}/files/y.yaml"), "y.yaml cannot be read: while parsing"),
        (("filter", "{ledger}", "--curation", "{tmp}/files/x.yaml"), "must hold one key, filters"),
        (("filter", "{ledger}", "--curation", "paper", "--out", "{tmp}/files"), "exists and is not empty"),
        (("merge", "{ledger}", "--out", "{ledger}"), "exists and is not empty"),
        (("regrade", "{ledger}", "--out", "{tmp}/new"), "give --grader, --tasks, or both"),
        (("regrade", "{ledger}", "--grader", "maths", "--out", "{tmp}/new"), "grader 'maths' is unknown"),
        (("regrade", "{ledger}", "--grader", "judge", "--out", "{tmp}/new"), "name its model with --judge-model"),
        (("regrade", "{ledger}", "--tasks", "{tmp}/no.jsonl", "--out", "{tmp}/new"), "no.jsonl"),
        (("export", "{ledger}", "--format", "pdf", "--out", "{tmp}/x"), "format 'pdf' cannot be written"),
        (("export", "{ledger}", "--format", "chat", "--out", "{tmp}/bad.yaml"), "exists; name a new file"),
        (("import", "{tmp}/bad.yaml", "--out", "{tmp}/new"), "bad.yaml is in no format that can be imported"),
        (("import", "{tmp}/none.jsonl", "--out", "{tmp}/new"), "none.jsonl is not there"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(folder, tmp_path, arguments, says, capsys):
    (tmp_path / "bad.yaml").write_text("filters: [corect]")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.yaml").write_text("- correct")
    (tmp_path / "files" / "y.yaml").write_text("filters: [correct")
    before = contents(str(tmp_path))
    given = [each.format(tmp=tmp_path, ledger=folder) for each in arguments]
    assert says in refused(capsys, *given)
    assert contents(str(tmp_path)) == before


def test_a_command_that_fails_late_leaves_nothing(folder, tmp_path, capsys):
    """Everything is graded and written by the time it turns out that no answer was of use."""
    (tmp_path / "tasks.jsonl").write_text('{"id": "foreign", "question": "foreign?", "answer": "1"}\n')
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, "regrade", folder, "--tasks", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "new"))
    assert "no task of" in line and sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_may_be_filled(folder, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    asked(capsys, "merge", folder, "--out", str(tmp_path / "new"))
    assert by_key(tmp_path / "new") == by_key(folder)


def test_rows_are_gathered_into_shards_of_a_size(tmp_path, expert):
    rows = [replace(expert[1][0], key=f"{i}") for i in range(600)]
    for name, shard_bytes, shards in (("large", 2**26, 1), ("small", 2**16, 3)):
        fill = Fill(LedgerWriter(tmp_path / name, writer="w"), shard_bytes=shard_bytes)
        for each in [*rows, failed(rows[0], FailureClass.ENGINE)]:
            fill(each)
        fill.flush()
        ledger = Ledger(tmp_path / name)
        assert len(ledger.shards()) == shards and list(ledger.trajectories()) == rows
        assert len(list(ledger.failures())) == 1


def test_vote_compares_single_runs_with_the_majority(tmp_path, expert, capsys):
    base = expert[0][0]
    runs = [("1", False), (base.prediction, True), (base.prediction, True)]
    writer = LedgerWriter(tmp_path / "ledger", writer="w")
    writer.append(
        [
            replace(base, key=f"{base.key}{i}", sample_index=i, prediction=prediction, success=right)
            for i, (prediction, right) in enumerate(runs)
        ]
    )
    writer.append([replace(expert[1][0], success=False)])
    data = asked(capsys, "vote", str(tmp_path / "ledger"), "--out", str(tmp_path / "voted"))
    voted, single = ({each["policy"]: each for each in data["groups"]}[name] for name in (CODE_POLICY, COT_POLICY))
    assert (voted["tasks"], voted["runs"], voted["voted"]["mean"], voted["any"]["mean"]) == (1, 3, 1.0, 1.0)
    assert voted["single"]["mean"] == voted["agreement"] == pytest.approx(2 / 3)
    assert single["voted"]["mean"] == 0.0
    assert by_key(tmp_path / "voted").keys() == {f"{base.key}1", expert[1][0].key}
    assert run("vote", str(tmp_path / "ledger"), "--policy", CODE_POLICY) == 0
    shown = capsys.readouterr().out
    assert CODE_POLICY in shown and COT_POLICY not in shown
    assert "no result is of policy 'x'; there are expert-code" in refused(
        capsys, "vote", str(tmp_path / "ledger"), "--policy", "x"
    )


def test_ledgers_may_be_in_a_bucket(folder, bucket, capsys):
    asked(capsys, "merge", folder, "--out", f"{bucket}/a/ledger")
    data = asked(capsys, "filter", f"{bucket}/a/ledger", "--curation", "strict", "--out", f"{bucket}/kept")
    assert data["kept"] == COUNT - 3 and by_key(f"{bucket}/kept").items() <= by_key(folder).items()
    shown, local = asked(capsys, "show", f"{bucket}/a/ledger"), asked(capsys, "show", folder)
    assert shown["total"] == local["total"] and shown["failures"] == local["failures"]
    assert asked(capsys, "validate", f"{bucket}/a/ledger", f"{bucket}/kept")["ok"] is True
    assert "exists and is not empty" in refused(capsys, "merge", folder, "--out", f"{bucket}/kept")
    assert "no ledger" in refused(capsys, "show", f"{bucket}/nothing")


def test_help_answers_without_the_heavy_imports():
    program = (
        "import sys\nfrom launch.ledger.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'pyarrow', 'numpy', 'rich', 'pydantic', 'rollout'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    for command in ("show", "regrade", "filter", "merge", "export", "import", "validate", "compact", "compose", "vote"):
        assert f"\n    {command} " in done.stdout

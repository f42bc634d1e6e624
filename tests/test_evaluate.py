"""`launch/evaluate.py` as its user runs it: the eight sets end to end, in several modes; it resumes; policies join. The
jobs share this session's Ray; they are its drivers, not its owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fault_server import FaultServer

from rollout.ledger import Ledger

ROOT = Path(__file__).resolve().parent.parent
PAPER8 = ROOT / "tests" / "data" / "paper8"
WITHIN_S = 250.0
"""A job takes some ten seconds; on a machine that does much else besides, far more."""
slow_machine = pytest.mark.timeout(600)

ANSWERS = {
    # Factual answers in other words than the files', for the judge.
    "Mona Lisa": "It was Leonardo", "Rhine": "Yes", "Night Watch": "the city of Amsterdam", "Althing": "Reykjavik",
    "Four Seasons": "1741", "pole": "Amundsen (Roald)", "Klondike": "Au", "Austria": "Danube",
    "Camino": "The Atlantic", "Fuji": "Japanese yen", "Discovery": "the 20th century",
    "Blade Runner": "Philip Kindred Dick", "Casablanca": "Metropolis", "Delft": "yes", "Seven Samurai": "Japan",
    "Elizabeth": "Mary Stuart, Queen of Scots",
    # Mathematical ones in another form.
    "pmatrix": "$-32$", "x^2+bx+16": r"(-\infty, -8] \cup [8, \infty)", "hyperbola": r"6\sqrt3", "two cities": "180",
    "mill": "8,990,625", "screws": "427564.3125", "coins": "-2000182", "A rope": "1410934.714",
    "7^{100}": "001", "divisors": "72", "odd positive": "29", r"8\times 8": "1568",
    "series": "0.75", "larger solution": r"\sqrt{2}+3", "|x-1|": "[-1, 3]", "ball": r"4\pi\sqrt{3}",
}  # fmt: skip
WRONG_OF = ("Rhine", "coins", "ball")
"""Questions that are answered wrongly, one a set."""


def reply(request: Mapping[str, Any]) -> str:
    """As a model that knows all of it but those three; as the judge, which it is asked to be too."""
    asked = request["messages"][-1]["content"]
    if "Verdict:" in asked:
        return f"Verdict: {'incorrect' if '42424' in asked.partition('<candidate>')[2] else 'correct'}"
    question = asked.rpartition("Question: ")[2]
    [name] = [name for name in ANSWERS if name in question]
    answer = "42424" if name in WRONG_OF else ANSWERS[name]
    system = request["messages"][0]["content"]
    if "Code:" in system:
        return f"Thought: I know.\nCode:\n```py\nfinal_answer({answer!r})\n```<end_code>"
    return answer if "at once" in system else f"I know.\n\nAnswer: {answer}"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(reply=reply, share=0.0) as server:
        yield server


class Command:
    """Runs the command as a driver of the session's Ray."""

    def __init__(self, address: str, out: Path) -> None:
        self.out = out
        of_job = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
        self._environment = {
            **os.environ,
            "RAY_ADDRESS": address,
            "PYTHONPATH": str(ROOT),
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(of_job),
        }

    def run(self, *overrides: str, code: int = 0) -> str:
        command = [sys.executable, "launch/evaluate.py", f"out={self.out}", *overrides]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, text=True, timeout=WITHIN_S, capture_output=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())


@pytest.fixture
def command(ray_cluster, tmp_path) -> Command:
    return Command(ray_cluster.get_runtime_context().gcs_address, tmp_path / "out")


def eight(server: FaultServer) -> list[str]:
    return [
        "benchmark=paper8", f"benchmark.folder={PAPER8}", f"retrieval.corpus={PAPER8 / 'passages.jsonl'}",
        "retrieval.kind=bm25", "env.judge.model=m", f"env.judge.base_url={server.base_url}",
        "policy=openai", "policy.model=m", f"policy.base_url={server.base_url}",
        "policy.prices={prompt_usd_per_million: 1000, completion_usd_per_million: 1000}",
    ]  # fmt: skip


@slow_machine
def test_the_eight_sets_are_graded_end_to_end_and_done_once(command, server):
    said = command.run(*eight(server), "modes=[agent,cot_rag]")
    results = command.results()
    wanted = dict.fromkeys(("math500", "bamboogle", "musique", "2wiki", "aime"), 1.0)
    wanted |= dict.fromkeys(("hotpotqa", "gsm_hard", "olymmath"), 0.75)
    for row in ("m, agent", "m, cot_rag"):
        assert {kind: score["mean"] for kind, score in results["scores"][row].items()} == wanted
        averages = {name: score["mean"] for name, score in results["averages"][row].items()}
        assert averages == pytest.approx(
            {"in-domain average": 0.875, "out-of-domain average": 5.5 / 6, "average": 7.25 / 8}
        )
        assert results["rows"][row]["all"]["cost_usd"] > 0 and results["rows"][row]["missing"] == 0
    [pair] = results["pairs"]
    assert (pair["test"]["n"], pair["test"]["difference"], pair["test"]["p_value"]) == (32, 0.0, 1.0)
    assert "hotpotqa (in)" in said and "out-of-domain average" in said

    asked = server.requests
    again = json.loads(command.run(*eight(server), "modes=[agent,cot_rag]", "--json"))
    assert server.requests == asked  # nothing is paid twice
    assert again["scores"] == results["scores"]
    assert Ledger(command.out / "m" / "agent" / "ledger").count() == 32


@pytest.mark.slow
@slow_machine
def test_the_starter_student_takes_all_eight_sets_in_every_mode(command):
    command.run(
        "policy.model=base_student", "benchmark=paper8", f"benchmark.folder={PAPER8}", "benchmark.factual=f1",
        f"retrieval.corpus={PAPER8 / 'passages.jsonl'}", "retrieval.kind=bm25", "evaluate.max_tokens=48",
        "evaluate.candidates=2", "modes=[agent,agent_sc,whole_run_vote,cot,cot_rag,direct]",
    )  # fmt: skip
    results = command.results()
    assert len(results["rows"]) == 6 and len(results["pairs"]) == 15
    assert all(row["missing"] == 0 and not row["unresolved"] for row in results["rows"].values())
    assert all(len(scores) == 8 for scores in results["scores"].values())
    assert set(results["rows"]["base_student, whole_run_vote"]["pass_at_k"]) == {"1", "2"}


@pytest.mark.slow
@slow_machine
def test_the_expert_solves_the_starter_world_and_another_policy_joins_its_table(command):
    command.run("policy=expert", "modes=[agent,cot]", "tasks.test_count=3", "retrieval.kind=bm25")
    command.run("policy.model=base_student", "tasks.test_count=3", "retrieval.kind=bm25", "evaluate.max_tokens=48")
    results = command.results()
    assert {name: row["averages"]["average"]["mean"] for name, row in results["rows"].items()} == {
        "starter-expert, agent": 1.0,
        "starter-expert, cot": 1.0,
        "base_student, agent": 0.0,
    }
    other = command.run("policy=expert", "tasks.test_count=3", "retrieval.kind=bm25", "tasks.seed=1", code=2)
    assert other == ""

"""The viewer on a ledger of a million rows: how long a filter takes, and how much memory the server holds.

python benchmarks/viewer.py                    # some three minutes and 1 GB of disk, under --folder
python benchmarks/viewer.py --rows 50000       # a try

Rows are real trajectories of the built-in teacher (real sandbox, real search), repeated with ids, questions, policies,
outcomes and times of their own; each observation ends in a sentence of its own, of words as frequent as words are, so
that the text index has a vocabulary to hold. The server is `python -m launch.view`, a process of its own that is asked
over HTTP; a time is that of a whole page, from the first to the last byte. Each filter is asked for several times with
other values, so that no answer is there already; the worst counts. Beside it stands the processor time that the server
took for it, which other work on the machine cannot lengthen as much. Memory is the peak of the resident set (VmHWM),
from the start on: building the index is in it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute

if not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import scoreboard
from benchmarks.scoreboard import Row
from rollout.ledger import LedgerWriter
from rollout.records import SCHEMA, to_table
from rollout.trajectory import Completion, Trajectory

pc: Any = pyarrow.compute  # its functions are made at run time

ROWS = 1_000_000
GOAL_S = 1.0
GOAL_MB = 500.0
BASES = 64
SHARD_ROWS = 4096
ATTEMPTS = 4
POLICIES = ("teacher", "student-0.1", "student-0.5", "student")
SUCCESS_RATES = (0.98, 0.35, 0.7, 0.88)
FAILED_SHARE = 0.01
WORDS, SENTENCES, SENTENCE_WORDS = 60_000, 20_000, 24
_SYLLABLES = "ba de fi go lu ma ne pi ro su ta ve wi xo za bri cro dra fle gru".split()
_START_S, _INDEX_S, _REQUEST_S = 120.0, 3600.0, 120.0


# -- the ledger


def bases() -> list[Trajectory]:
    """Episodes of the built-in teacher; those of students have sampled ids and log-probabilities, made up."""
    from envs.pool import EnvHost, EnvSpec
    from envs.retrieval.bm25 import Bm25Retriever
    from envs.retrieval.corpus import Corpus, Passage
    from envs.starter import StarterWorld
    from rollout.async_env import ThreadedEnv
    from rollout.episode import EpisodeSettings, run_episode
    from rollout.expert import ExpertPolicy

    world = StarterWorld(seed=1)
    tasks = world.train_tasks(BASES, seed=0)
    pages = Corpus(Passage(id=i, title=title, text=text) for i, title, text in world.passages())
    retriever = Bm25Retriever.build(pages)
    host = EnvHost(EnvSpec(), lambda query, k: retriever.search([query], k)[0])

    async def run() -> list[Trajectory]:
        env = ThreadedEnv(host.make())
        try:
            settings = EpisodeSettings(dialect="code")
            return [await run_episode(task, policy=ExpertPolicy(), env=env, settings=settings) for task in tasks]
        finally:
            await env.close()

    try:
        found = asyncio.run(run())
    finally:
        host.close()
    rng = random.Random(0)
    return [_sampled(each, rng) if i % 4 == 3 else each for i, each in enumerate(found)]


def _sampled(of: Trajectory, rng: random.Random) -> Trajectory:
    def said(completion: Completion) -> Completion:
        n = max(1, completion.completion_tokens)
        ids = tuple(rng.randrange(3000) for _ in range(n))
        return replace(completion, token_ids=ids, logprobs=tuple(-rng.expovariate(9.0) for _ in ids))

    return replace(of, steps=tuple(replace(step, completion=said(step.completion)) for step in of.steps))


def vocabulary(rng: np.random.Generator) -> list[str]:
    """Made-up words, the most frequent first."""
    made = dict.fromkeys("".join(rng.choice(_SYLLABLES, int(rng.integers(2, 6)))) for _ in range(WORDS * 2))
    return list(made)[:WORDS]


def make_ledger(folder: Path, rows: int) -> list[str]:
    """Returns its vocabulary."""
    rng = np.random.default_rng(0)
    words = vocabulary(rng)
    frequency = 1 / np.arange(1, len(words) + 1)
    frequency /= frequency.sum()
    picks = rng.choice(len(words), (SENTENCES, SENTENCE_WORDS), p=frequency)
    sentences = pa.array([" ".join(words[i] for i in each) for each in picks])
    base = to_table(bases()).combine_chunks()
    writer = LedgerWriter(folder, writer="made")
    for first in range(0, rows, SHARD_ROWS):
        n = min(SHARD_ROWS, rows - first)
        table = _altered(base, sentences, first, n, rng)
        failed = pa.array(rng.random(n) < FAILED_SHARE)
        writer.append_tables(results=table.filter(pc.invert(failed)), failures=_failures(table.filter(failed)))
    return words


def _altered(base: pa.Table, sentences: pa.Array, first: int, n: int, rng: np.random.Generator) -> pa.Table:
    """Rows `first` to `first + n`, four policies on each task."""
    numbers = np.arange(first, first + n)
    policy = numbers % len(POLICIES)
    tasks = numbers // len(POLICIES)
    table = base.take(pa.array(tasks % base.num_rows))
    ids = pa.array([f"task-{i:07d}" for i in tasks])
    policies = pa.array([POLICIES[i] for i in policy])
    success = rng.random(n) < np.array(SUCCESS_RATES)[policy]
    task = table.column("task").combine_chunks()
    question = pc.binary_join_element_wise(task.field("question"), pc.cast(pa.array(tasks), pa.string()), " no. ")
    changed = {
        "key": pc.binary_join_element_wise(ids, policies, "0", "made", "|"),
        "task": _with(task, id=ids, question=question),
        "task_id": ids,
        "policy": policies,
        "success": pa.array(success),
        "reward": pa.array(success.astype(np.float64)),
        "prediction": pc.if_else(pa.array(success), table.column("prediction").combine_chunks(), "no idea"),
        "trainable": pa.array(success),
        "started_at_s": pa.array(1.79e9 + numbers + rng.random(n)),
        "duration_s": pa.array(rng.gamma(2.0, 2.0, n)),
        "steps": _talkative(table.column("steps").combine_chunks(), sentences, rng),
    }
    columns = [changed.get(name, table.column(name)) for name in SCHEMA.names]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _talkative(steps: Any, sentences: pa.Array, rng: np.random.Generator) -> pa.Array:
    inside = steps.flatten()
    more = sentences.take(pa.array(rng.integers(0, len(sentences), len(inside))))
    inside = _with(inside, observation=pc.binary_join_element_wise(inside.field("observation"), more, "\n"))
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(steps).to_numpy(zero_copy_only=False))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inside, type=steps.type)


def _with(struct: Any, **columns: pa.Array) -> pa.Array:
    arrays = [columns.get(field.name, struct.field(field.name)) for field in struct.type]
    return pa.StructArray.from_arrays(arrays, fields=list(struct.type))


def _failures(table: pa.Table) -> pa.Table | None:
    n = table.num_rows
    if not n:
        return None
    classes = pa.array(["engine", "environment"] * n)[:n]
    failure = SCHEMA.field("failure").type
    texts = pa.array(["the engine went away"] * n)
    changed = {
        "failure": pa.StructArray.from_arrays([classes, texts], fields=list(failure)),
        "failure_class": classes,
        "stop_reason": pa.array(["failed"] * n),
        "success": pa.array([False] * n),
        "prediction": pa.nulls(n, pa.string()),
    }
    return pa.Table.from_arrays([changed.get(name, table.column(name)) for name in SCHEMA.names], schema=SCHEMA)


# -- the server


class Server:
    """`python -m launch.view`, ended by its own handle."""

    def __init__(self, ledger: Path, cache: Path) -> None:
        command = [sys.executable, "-m", "launch.view", str(ledger), "--cache", str(cache)]
        self.started = time.monotonic()
        root = Path(__file__).resolve().parent.parent
        self._process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        timer = threading.Timer(_START_S, self._process.kill)
        timer.start()
        lines = [self._process.stdout.readline().strip() for _ in range(2)]
        timer.cancel()
        if not lines[1].startswith("http://"):
            raise RuntimeError(f"the viewer did not start: {lines}")
        self.port = int(lines[1].rstrip("/").rpartition(":")[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get(self, path: str) -> tuple[float, bytes]:
        """(seconds, body)."""
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_REQUEST_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {body[:300]!r}")
        return time.perf_counter() - started, body

    def progress(self) -> dict[str, Any]:
        return json.loads(self.get("/progress")[1])

    def peak_mb(self) -> float:
        """Of the resident set, since the start."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def processor_s(self) -> float:
        """All its threads' since the start."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def now_mb(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


# -- what is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A filter, with other values each time."""

    what: str
    queries: Callable[[random.Random, Sequence[str], int], list[tuple[str, str]]]
    """(rng, vocabulary, rows) -> what stands in the address."""


def _fixed(*pairs: tuple[str, str]) -> Callable[[random.Random, Sequence[str], int], list[tuple[str, str]]]:
    return lambda rng, words, rows: list(pairs)


def _at_task(rng: random.Random, words: Sequence[str], rows: int) -> list[tuple[str, str]]:
    return [("task", f"{rng.randrange(rows // len(POLICIES)):07d}")]


QUESTIONS = (
    Question(what="all rows, newest first", queries=_fixed()),
    Question(what="not solved", queries=_fixed(("outcome", "wrong"))),
    Question(
        what="kind, policy and outcome, longest first",
        queries=lambda rng, words, rows: [
            ("kind", rng.choice(("arithmetic", "two_hop"))),
            ("policy", rng.choice(POLICIES)),
            ("outcome", "wrong"),
            ("sort", "-seconds"),
        ],
    ),
    Question(what="a part of the task's id", queries=_at_task),
    Question(
        what="failure class", queries=lambda rng, words, rows: [("failure", rng.choice(("engine", "environment")))]
    ),
    Question(
        what="steps and score, by tool calls",
        queries=_fixed(("steps_min", "3"), ("score_max", "0.5"), ("sort", "tools")),
    ),
    Question(what="a rare word", queries=lambda rng, words, rows: [("q", f'"{rng.choice(words[20_000:])}"')]),
    Question(what="a frequent word", queries=lambda rng, words, rows: [("q", f'"{words[rng.randrange(8)]}"')]),
    Question(
        what="a word of every row",
        queries=lambda rng, words, rows: [("q", rng.choice(("thought", "observation", "print")))],
    ),
    Question(
        what="two frequent words, a policy, by score",
        queries=lambda rng, words, rows: [
            ("q", " ".join(f'"{word}"' for word in rng.sample(words[:30], 2))),
            ("policy", rng.choice(POLICIES)),
            ("sort", "score"),
        ],
    ),
    Question(
        what="a phrase",
        queries=lambda rng, words, rows: [("q", rng.choice(('"works for"', '"final answer"', '"execution logs"')))],
    ),
    Question(
        what="the beginning of a word, 3 letters",
        queries=lambda rng, words, rows: [("q", rng.choice(words)[:3])],
    ),
    Question(
        what="a word without another", queries=lambda rng, words, rows: [("q", f"print -{words[rng.randrange(30)]}")]
    ),
    Question(what="nothing like that", queries=_fixed(("q", "qqqqzzzz"))),
)


def timed(
    server: Server, question: Question, rng: random.Random, words: Sequence[str], rows: int
) -> tuple[float, float, int]:
    """(the worst time, the mean of the server's processor time, rows found last)."""
    worst, found, before = 0.0, 0, server.processor_s()
    for _ in range(ATTEMPTS):
        seconds, body = server.get(f"/?{urlencode(question.queries(rng, words, rows))}")
        worst = max(worst, seconds)
        found = int(body.split(b"<b>")[1].split(b"</b>")[0].replace(b",", b""))
    return worst, (server.processor_s() - before) / ATTEMPTS, found


def measured(server: Server, words: Sequence[str], rows: int) -> Iterator[Row]:
    rng = random.Random(0)
    # While it reads: what is there must not be slow then.
    columns_s = _until(server, lambda told: told["rows"] >= rows and not told["unread"])
    yield Row(what="columns of all rows are there", measured=columns_s, unit="s")
    while_reading = max(timed(server, QUESTIONS[i], rng, words, rows)[0] for i in (0, 1, 2, 3, 6))
    yield _row("the slowest of five filters while it reads texts", while_reading, "")
    words_s = _until(server, lambda told: not told["reading"])
    yield Row(what="all texts can be searched", measured=words_s, unit="s")
    for question in QUESTIONS:
        seconds, processor_s, found = timed(server, question, rng, words, rows)
        yield _row(question.what, seconds, f"{processor_s:.2f} s of processor, {found:,} rows")
    page = server.get("/?outcome=wrong")[1].decode()
    deep = []
    for _ in range(3):
        seconds, body = server.get("/?" + page.split('rel="next" href="/?')[1].split('"')[0].replace("&amp;", "&"))
        page = body.decode()
        deep.append(seconds)
    yield _row("the next page, three times", max(deep), "")
    identity = page.split('href="/t/')[1][:16]
    yield _row("one trajectory, in its selection", server.get(f"/t/{identity}?outcome=wrong")[0], "")
    yield _row("side by side", server.get(f"/compare?a={identity}")[0], "")
    seconds, _ = server.get("/policies")
    yield Row(what="two policies on all tasks", measured=seconds, unit="s", group="beside")
    seconds, body = server.get("/export?format=jsonl&outcome=failed")
    lines = body.count(b"\n")
    yield Row(
        what="export of the failures", measured=lines / seconds, unit="rows/s", beside=f"{lines:,} rows", group="beside"
    )
    peak = server.peak_mb()
    yield Row(
        what="memory, peak of it all",
        measured=peak,
        unit="MB",
        goal=f"< {GOAL_MB:g}",
        kept=peak < GOAL_MB,
        beside=f"{server.now_mb():.0f} MB at the end",
        group="memory",
    )


def _row(what: str, seconds: float, beside: str) -> Row:
    return Row(
        what=what,
        measured=seconds,
        unit="s",
        goal=f"< {GOAL_S:g}",
        kept=seconds < GOAL_S,
        beside=beside,
        group="filter",
    )


def _until(server: Server, reached: Callable[[dict[str, Any]], bool]) -> float:
    """Seconds since the start of the server."""
    deadline = time.monotonic() + _INDEX_S
    while time.monotonic() < deadline:
        if reached(server.progress()):
            return time.monotonic() - server.started
        time.sleep(0.2)
    raise TimeoutError(f"the index is not done after {_INDEX_S:g} s: {server.progress()}")


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> int:
    parser = scoreboard.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"default {ROWS:,}")
    parser.add_argument("--folder", type=Path, help="where to make the ledger; it is removed at the end")
    options = parser.parse_args()
    if options.rows < 10_000:
        parser.error(f"--rows {options.rows}: use 10000 or more")
    folder = Path(tempfile.mkdtemp(prefix="viewer-benchmark-", dir=options.folder))
    try:
        free_gb, needed_gb = shutil.disk_usage(folder).free / 1e9, 2e-6 * options.rows
        if free_gb < needed_gb:
            parser.error(
                f"--rows {options.rows}: {free_gb:.1f} GB are free in {folder.parent}, {needed_gb:.1f} are needed"
            )
        started = time.monotonic()
        words = make_ledger(folder / "ledger", options.rows)
        made = Row(
            what="the ledger",
            measured=_size_mb(folder / "ledger"),
            unit="MB",
            beside=f"made in {time.monotonic() - started:.0f} s",
            group="made",
        )
        with Server(folder / "ledger", folder / "cache") as server:
            rows = [made, *measured(server, words, options.rows)]
        rows.append(Row(what="its index", measured=_size_mb(folder / "cache"), unit="MB", group="made"))
        with Server(folder / "ledger", folder / "cache") as server:
            again_s = _until(server, lambda told: not told["reading"])
        rows.append(Row(what="opened again", measured=again_s, unit="s", group="made"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    load = os.getloadavg()[0]
    return scoreboard.publish(
        rows, options, title=f"the viewer on {options.rows:,} rows; load of the machine {load:.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())

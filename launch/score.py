"""`python -m launch.score LEDGER --teacher MODEL --student TOKENIZER`: a teacher's likeliest tokens at every trained
place of a ledger's rows, kept beside it for objectives that compare distributions (span, opd, sod).

    python -m launch.score runs/a/ledger --teacher Qwen/Qwen2.5-32B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct
    python -m launch.score runs/a/ledger --teacher qwen32b --base-url http://teacher:8000/v1 --student models/student

Rows are made exactly as the learner will make them, with the student's tokenizer, chat template and system prompt; a
teacher with another tokenizer is refused. What was scored before is not scored again, so a run that was cut off is run
again. The scores go to LEDGER/scores/<teacher> (`learner.stored_scores`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:  # run as a file: imports come from the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.live.view import LiveView

if TYPE_CHECKING:
    from learner.examples import Example, ExampleMaker
    from learner.stored_scores import ScoreWriter
    from rollout.scoring import Scorer

_BATCHES_AHEAD = 4
"""Rows that are given to the scorer together, in multiples of those that it scores at once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 no row could be scored, 2 refused or failed, 130 interrupted."""
    options = _parser().parse_args(arguments)
    from learner.stored_scores import StoredScoresError
    from rollout.ledger import LedgerError
    from rollout.policy import PolicyError
    from rollout.rendering import RenderingError
    from rollout.scoring import ScoringError

    try:
        counts = asyncio.run(_score(options))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (LedgerError, PolicyError, RenderingError, ScoringError, StoredScoresError, OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if counts.scored + counts.found else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ledger", help="folder or s3:// URI of the ledger")
    parser.add_argument("--teacher", required=True, help="Hugging Face id or folder; with --base-url, its name there")
    parser.add_argument("--student", required=True, help="Hugging Face id or folder of the student (its tokenizer)")
    parser.add_argument("--top-k", type=int, default=8, help="likeliest tokens a place (default 8)")
    parser.add_argument("--max-row-tokens", type=int, default=1024, help="as the learner's (default 1024)")
    parser.add_argument("--system-prompt", default=None, help="the student's own; default: the trajectory's")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm", help="what loads the teacher")
    parser.add_argument("--base-url", default="", help="a vLLM server that has it, such as http://teacher:8000/v1")
    parser.add_argument("--teacher-tokenizer", default="", help="with --base-url, where --teacher is no tokenizer")
    parser.add_argument("--dtype", default="auto", help="of the teacher's weights (default auto)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share each layer (vllm)")
    parser.add_argument("--rows-at-once", type=int, default=16, help="rows in the engine at a time (vllm)")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="tokens computed at once: bounds memory (vllm)")
    parser.add_argument("--out", default="", help="folder of the scores; default: LEDGER/scores/<teacher>")
    return parser


@dataclass(slots=True)
class Counts:
    """What became of the rows."""

    scored: int = 0
    found: int = 0
    """Scored by an earlier run."""
    places: int = 0
    tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> trajectories that a student is not trained on."""


async def _score(options: argparse.Namespace) -> Counts:
    from transformers import AutoTokenizer

    from learner.examples import ExampleMaker
    from learner.stored_scores import ScoreWriter
    from rollout.scoring import check_same_tokenizer

    if options.top_k < 1:
        raise ValueError(f"--top-k is {options.top_k}; it must be at least 1")
    out = _folder(options)
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    maker = ExampleMaker(tokenizer, max_row_tokens=options.max_row_tokens, system_prompt=options.system_prompt)
    writer = ScoreWriter(out, teacher=options.teacher, top_k=options.top_k)
    view, counts, begun_s = LiveView(), Counts(), time.monotonic()
    scorer: Scorer | None = None
    try:
        with view.stage(f"teacher {options.teacher} scores {options.ledger}"):
            for rows in _batches(options, maker, out, counts):
                if scorer is None:
                    scorer = await asyncio.to_thread(_scorer, options)
                    check_same_tokenizer(scorer.tokenizer, tokenizer)
                await _score_rows(rows, scorer, tokenizer, writer, counts, options.top_k)
                _show(view, counts, begun_s)
            _show(view, counts, begun_s, last=True)
    finally:
        writer.flush()
        if scorer is not None:
            await scorer.close()
    view.say(f"{counts.places:,} places with {options.top_k} tokens each in {time.monotonic() - begun_s:.0f} s: {out}")
    for reason, count in counts.refused.most_common():
        view.say(f"not trained on: {count:,} {reason}")
    return counts


def _batches(options: argparse.Namespace, maker: ExampleMaker, out: Path, counts: Counts) -> Iterator[list[Example]]:
    """Rows that have no scores yet."""
    from learner.examples import Example
    from learner.stored_scores import StoredScores
    from rollout.ledger import Ledger

    before = StoredScores(out) if any(out.glob("part-*.parquet")) else None
    batch: list[Example] = []
    for trajectory in Ledger(options.ledger).trajectories():
        made = maker.make(trajectory)
        if not isinstance(made, Example):
            counts.refused[made.reason.value] += 1
        elif before is not None and before.has(made.key, made.token_ids):
            counts.found += 1
        else:
            batch.append(made)
            if len(batch) == options.rows_at_once * _BATCHES_AHEAD:
                yield batch
                batch = []
    if batch:
        yield batch


async def _score_rows(
    rows: Sequence[Example], scorer: Scorer, tokenizer: Any, writer: ScoreWriter, counts: Counts, top_k: int
) -> None:
    import numpy as np

    from rollout.scoring import check_row

    for row in rows:
        check_row(row.token_ids, scorer.tokenizer, tokenizer)
    for row, scores in zip(rows, await scorer.score([row.token_ids for row in rows], top_k), strict=True):
        trained = np.asarray(row.loss_weights) > 0
        writer.add(row.key, row.token_ids, scores.ids, scores.logprobs, trained)
        counts.scored += 1
        counts.places += int(trained.sum())
        counts.tokens += len(row)


def _show(view: LiveView, counts: Counts, begun_s: float, *, last: bool = False) -> None:
    rate = counts.tokens / max(time.monotonic() - begun_s, 1e-9)
    figures = {
        "rows": f"{counts.scored:,}",
        "scored before": f"{counts.found:,}",
        "not trained on": f"{counts.refused.total():,}",
        "tokens/s": f"{rate:,.0f}",
    }
    view.show(figures, last=last)


def _folder(options: argparse.Namespace) -> Path:
    """Where the scores go."""
    if options.out:
        return Path(options.out)
    if "://" in options.ledger:
        raise ValueError(f"{options.ledger} is no folder of this machine; say where the scores go with --out")
    name = Path(options.teacher).name
    return Path(options.ledger) / "scores" / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _scorer(options: argparse.Namespace) -> Scorer:
    if options.base_url:
        from rollout.vllm_scoring import VllmServerScorer

        return VllmServerScorer(options.teacher, base_url=options.base_url, tokenizer=options.teacher_tokenizer)
    if options.engine == "transformers":
        from rollout.scoring import TransformersScorer

        return TransformersScorer(options.teacher, dtype=options.dtype)
    from rollout.vllm_scoring import VllmScorer

    return VllmScorer(
        options.teacher,
        max_row_tokens=options.max_row_tokens,
        chunk_tokens=options.chunk_tokens,
        rows_at_once=options.rows_at_once,
        dtype=options.dtype,
        tensor_parallel_size=options.tensor_parallel_size,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Rows of task files, whatever their format, each with its place (file and line or row) for messages.

| where | what |
|---|---|
| `x.jsonl`, `x.ndjson` | one JSON object a line |
| `x.json` | the paper's `{"metadata", "examples": [...]}`, or a list of objects |
| `x.parquet` | a Parquet file |
| a folder | a data set that Hugging Face's `save_to_disk` wrote; `folder:split` where it has several splits |
| `hf:owner/name[:config][:split]` | a data set of the Hugging Face hub, or of its local cache without a network |

Only rows: what a row must hold is `tasks.py`'s part. Nothing is executed: data sets with loading scripts are refused by
`datasets` itself.

Example::

    for place, row in rows_of("hf:openai/gsm8k:main:test"):
        place      # "hf:openai/gsm8k:main:test: row 0"
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from envs.base import TaskError

HUB = "hf:"
_FORMATS = ".jsonl, .ndjson, .json and .parquet files, folders of datasets' save_to_disk, and hf:owner/name"
_PARQUET_ROWS = 1024
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")

Placed = tuple[str, Any]
"""Place of a row for messages, and the row as it was found."""


def rows_of(source: str | Path) -> Iterator[Placed]:
    """All rows, in order. Raises `TaskError` for what does not exist or cannot be read."""
    name = str(source)
    if name.startswith(HUB):
        return _hub_rows(name)
    path = Path(name)
    if path.is_dir():
        return _saved_rows(path, None)
    if not path.is_file():
        folder, colon, split = name.rpartition(":")
        if colon and Path(folder).is_dir():
            return _saved_rows(Path(folder), split)
        raise TaskError(f"task file {name!r} does not exist")
    match path.suffix.lower():
        case ".json":
            return _json_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case ".jsonl" | ".ndjson":
            return _lines(path)
    raise TaskError(f"task file {name!r} has no known format; there are {_FORMATS}")


def stem_of(source: str | Path) -> str:
    """A short name of the source, which ids of its rows are made with."""
    name = str(source)
    if name.startswith(HUB):
        dataset, *rest = name.removeprefix(HUB).split(":")
        return "-".join([dataset.rstrip("/").rpartition("/")[2], *rest])
    return name.rstrip("/").rpartition("/")[2] if Path(name).is_dir() else Path(name).stem.replace(":", "-")


def is_papers_format(source: str | Path) -> bool:
    """Whether a file is of the paper's format: its own files hold examples without an answer."""
    return str(source).endswith(".json")


def _lines(path: Path) -> Iterator[Placed]:
    # Bytes are split at line feeds alone: JSON strings may hold other characters that Unicode calls line ends.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if text := _text(line, place).strip().removeprefix("\ufeff"):
                yield place, _json(text, place)


def _json_rows(path: Path) -> Iterator[Placed]:
    text = _text(path.read_bytes(), str(path)).removeprefix("\ufeff")
    document = _json(text, str(path), by_line=True)
    examples = document.get("examples") if isinstance(document, dict) else document
    if not isinstance(examples, list):
        raise TaskError(f'{path}:1: expected {{"examples": [...]}} or a list of tasks')
    yield from ((f"{path}: example {i}", row) for i, row in enumerate(examples))


def _parquet_rows(path: Path) -> Iterator[Placed]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: not readable as Parquet after row {number}: {_one_line(error)}") from error


def _saved_rows(folder: Path, split: str | None) -> Iterator[Placed]:
    if not any((folder / name).is_file() for name in _SAVED):
        raise TaskError(
            f"folder {str(folder)!r} is no saved data set: it holds none of {', '.join(_SAVED)}; "
            "write one with datasets' save_to_disk"
        )
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, for damaged or foreign files
        raise TaskError(f"folder {str(folder)!r} cannot be read as a data set: {_one_line(error)}") from error
    yield from _dataset_rows(found, str(folder), split)


def _hub_rows(name: str) -> Iterator[Placed]:
    dataset, *rest = name.removeprefix(HUB).split(":")
    if not dataset or len(rest) > 2:
        raise TaskError(f"{name!r}: expected hf:owner/name, hf:owner/name:split or hf:owner/name:config:split")
    split = rest.pop() if rest and (len(rest) == 2 or rest[-1].partition("[")[0] in _SPLITS) else None
    config = rest.pop() if rest else None
    datasets = _datasets()
    try:
        found = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # of many kinds: no network, no such data set, a wrong config or split
        raise TaskError(_hub_problem(name, dataset, error)) from error
    yield from _dataset_rows(found, name, None)


def _hub_problem(name: str, dataset: str, error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectTimeout", "LocalEntryNotFoundError"}:
        return (
            f"{name!r} is not in the local cache and the hub cannot be reached ({_one_line(error)}); where there is a "
            f"network, run datasets.load_dataset({dataset!r}, ...).save_to_disk(folder), and give that folder here"
        )
    return f"{name!r} cannot be loaded: {_one_line(error)}"


def _dataset_rows(found: Any, name: str, split: str | None) -> Iterator[Placed]:
    if hasattr(found, "keys"):  # a DatasetDict
        if split is None and len(found) > 1:
            raise TaskError(f"{name!r} has the splits {', '.join(found)}; name one as {name}:{next(iter(found))}")
        chosen = split or next(iter(found), None)
        if chosen not in found:
            raise TaskError(f"{name!r} has no split {chosen!r}; there are {', '.join(found) or 'none'}")
        found = found[chosen]
    elif split is not None:
        raise TaskError(f"{name!r} has no splits, so it has no {split!r}; name the folder alone")
    for number in range(len(found)):
        yield f"{name}: row {number}", found[number]


def _datasets() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError:
        raise TaskError("saved data sets and hf: names need the package `datasets`: pip install datasets") from None
    return datasets


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{place}: not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None


def _json(text: str, place: str, *, by_line: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if by_line else place
        raise TaskError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deep
        raise TaskError(f"{place}: not usable JSON: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

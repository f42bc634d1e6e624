"""Where a ledger's files are: a folder of a file system, or a prefix of an object store (`rollout.object_storage`).

A small seam: names are relative ('shards/a.parquet'), a file appears whole or not at all, and what has been published
is durable. It knows nothing of what the files hold.

Example::

    storage = open_storage("s3://bucket/runs/7/ledger")       # or a path
    storage.publish({"shards/a.parquet": data}, by="worker-0")
    storage.read("shards/a.parquet")
"""

from __future__ import annotations

import os
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa

T = TypeVar("T")

_OBJECT_STORE = re.compile(r"(s3|gs|gcs):/+(?=[^/])")


class StorageError(OSError):
    """A store that cannot be used; the message names it and says what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A file as a listing shows it."""

    name: str
    size_bytes: int
    modified_s: float
    """Unix time, by the store's clock."""


class Storage(Protocol):
    """All methods raise `OSError`: `FileNotFoundError` for a name that is not there, `StorageError` for a store that
    cannot be reached, does not exist or refuses us."""

    uri: str
    """As it was named."""
    width: int
    """So many requests at once are worth while: each one waits for a network, or none does."""

    def empty(self) -> bool:
        """Nothing is there, leftovers apart; the place itself may be missing."""
        ...

    def prepare(self, *folders: str) -> None:
        """Make the place and these folders in it, where there is such a thing as a folder."""
        ...

    def list(self, folder: str) -> list[Stored]:
        """The files of a folder by name, leftovers left out; empty when there is no such folder."""
        ...

    def walk(self, folder: str) -> list[Stored]:
        """The files of a folder and of all folders in it, as `list`."""
        ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str) -> pa.NativeFile:
        """For reading parts of it."""
        ...

    def publish(self, files: Mapping[str, bytes | pa.Buffer], *, by: str) -> None:
        """All of these new files, or none of them. `by` marks what a killed call leaves behind.

        The names must be unique for ever: only some stores notice one that is taken (`FileExistsError`).
        """
        ...

    def claim(self, name: str, data: bytes) -> bool:
        """Create the file, unless it exists: False. Of several who try at the same time one at most succeeds."""
        ...

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        """Readers see the old content or the new one."""
        ...

    def remove(self, *names: str) -> None:
        """Nothing happens for what is gone already."""
        ...

    def leftovers(self, *folders: str) -> list[Stored]:
        """Of calls that are in flight or were killed, in these folders."""
        ...


def open_storage(where: str | Path) -> Storage:
    """A path, `s3://bucket/prefix` or `gs://bucket/prefix`. Touches nothing yet; raises `ValueError` for another
    scheme."""
    text = str(where)
    if found := _OBJECT_STORE.match(text):  # a URI that went through `Path` has lost one of its slashes
        from rollout.object_storage import ObjectStorage

        return ObjectStorage(f"{found[1]}://{text[found.end() :]}")
    if "://" in text:
        if not text.startswith("file://"):
            raise ValueError(f"{text!r}: name a folder, or a URI that begins with s3:// or gs://")
        text = text.removeprefix("file://")
    return FolderStorage(Path(text))


def ahead(work: Callable[[str], T], names: Iterable[str], width: int) -> Iterator[T]:
    """`map`, with up to `width` calls in flight in threads, results in order. A call's error is raised in its turn."""
    if width <= 1:
        yield from map(work, names)
        return
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(width, thread_name_prefix="ledger")
    try:
        for name in names:
            waiting.append(pool.submit(work, name))
            if len(waiting) >= width:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class FolderStorage:
    """A folder, on a local or a network file system. Files are written aside, synced, linked to their name, and the
    folder is synced, so a call that has returned survives a crash of the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.uri, self.width = folder, str(folder), 1

    def empty(self) -> bool:
        try:
            return all(is_leftover(path.name) for path in self._folder.iterdir())
        except FileNotFoundError:
            return True

    def prepare(self, *folders: str) -> None:
        for folder in folders:
            (self._folder / folder).mkdir(parents=True, exist_ok=True)

    def list(self, folder: str) -> list[Stored]:
        return [each for each in self._scan(folder) if not is_leftover(each.name)]

    def walk(self, folder: str) -> list[Stored]:
        places = [str(Path(path).relative_to(self._folder)) for path, _, _ in os.walk(self._folder / folder)]
        found = [each for place in places for each in self.list("" if place == "." else place)]
        return sorted(found, key=lambda each: each.name)

    def leftovers(self, *folders: str) -> list[Stored]:
        return [each for folder in folders for each in self._scan(folder) if is_leftover(each.name)]

    def _scan(self, folder: str) -> list[Stored]:
        found: list[Stored] = []
        try:
            with os.scandir(self._folder / folder) as entries:
                for entry in entries:
                    try:
                        state = entry.stat()
                    except FileNotFoundError:
                        continue  # removed since
                    if entry.is_file():
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        found.append(Stored(name=name, size_bytes=state.st_size, modified_s=state.st_mtime))
        except FileNotFoundError:
            pass
        return sorted(found, key=lambda each: each.name)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self._folder / name), "rb")

    def publish(self, files: Mapping[str, bytes | pa.Buffer], *, by: str) -> None:
        temporary: dict[str, Path] = {}
        linked: list[Path] = []
        try:
            for name, data in files.items():
                target = self._folder / name
                temporary[name] = target.with_name(f".{by}-{uuid.uuid4().hex}.tmp")
                _write(temporary[name], data)
            for name, path in temporary.items():
                _link(path, self._folder / name)
                linked.append(self._folder / name)
            for folder in {path.parent for path in linked}:
                _sync(folder)
        except BaseException:
            for path in linked:
                path.unlink(missing_ok=True)
            raise
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def claim(self, name: str, data: bytes) -> bool:
        try:
            self.publish({name: data}, by="claim")
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        target = self._folder / name
        temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}.tmp")
        try:
            _write(temporary, data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(target.parent)

    def remove(self, *names: str) -> None:
        for name in names:
            (self._folder / name).unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """A file of a call that is in flight or was killed."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".tmp")


def _write(path: Path, data: bytes | pa.Buffer) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, target: Path) -> None:
    """Give the finished file its name; unlike a rename this can never replace another one."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (some network file systems)
        if not temporary.exists():
            raise
        rename_to_new(temporary, target)


def rename_to_new(temporary: Path, target: Path) -> None:
    """What `os.link` does, where there are no hard links. Raises `FileExistsError`, also while somebody else is at it.

    Whoever is killed in here leaves a file that keeps this one name taken until it is cleaned up as a leftover.
    """
    lock = target.with_name(f".{target.name}-lock.tmp")
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        if target.exists():
            raise FileExistsError(f"{target} exists already")
        os.rename(temporary, target)
    finally:
        lock.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

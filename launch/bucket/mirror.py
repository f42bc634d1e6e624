"""A folder of this machine, kept in a store: what is written to the one is copied to the other, and brought back.

Whoever writes the folder knows nothing of it. There are two kinds of things in it:

- single files (numbers, logs, pictures): copied when they have changed, each by one atomic write;
- whole folders (checkpoints, students): they appear in the folder by a rename, are copied file by file, and count only
  once `mirror.json` names them, which is written last. One that is replaced is copied beside the old one first.

`mirror.json` says what there is; objects that it does not name are leftovers of a job that died. `pull` makes the
folder what `mirror.json` says and nothing else, unless the last one who wrote there wrote from this very folder: then
what he had not copied when he died is here, and is right. Several mirrors may share a store, each with a folder of its
own in it. It is no backup and keeps no versions.

Example::

    mirror = Mirror(Path("scratch/learner"), "s3://bucket/run/learner", whole=("checkpoints/*", "student"))
    mirror.pull()
    with Mirroring(mirror) as mirroring:        # copies every few seconds in a thread, and a last time at the end
        ...                                     # write into the folder
        mirroring.check()                       # raises StorageError when the store takes nothing for minutes
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.storage import StorageError, ahead, open_storage

INDEX = "mirror.json"
_MARK = ".mirrored-by"
"""In the folder: who copied it last."""
EVERY_S = 15.0
PATIENCE_S = 300.0
"""A store that takes nothing for so long ends the job: what it does would be lost with its machine."""
_BLOCK_BYTES = 8 << 20
_AGAIN = ".again"
"""Ends the place of a whole folder that replaces another one."""

_Files = dict[str, list[int]]
"""Name -> [bytes, crc32]."""


@dataclass(slots=True)
class _Index:
    """What `mirror.json` holds."""

    files: list[str] = field(default_factory=list)
    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> {"at": where its objects are, "files": `_Files`}."""
    by: str = ""
    """Who wrote it."""


class Mirror:
    """`folder` in the store's `place`.

    `whole`: patterns of whole folders; `skip`: patterns of files and, with a / at their end, of folders that are not
    copied (hidden ones never are), but for the files in `keep`; `without`: whole folders that `pull` leaves out.
    `fence` is called before each copy and raises where this process must not write any more. For one thread at a time.
    """

    def __init__(
        self,
        folder: Path,
        place: str,
        *,
        whole: Sequence[str] = (),
        skip: Sequence[str] = (),
        keep: Sequence[str] = (),
        without: Sequence[str] = (),
        fence: Callable[[], None] | None = None,
    ) -> None:
        self.folder, self.place = folder, place
        self._storage = open_storage(place)
        self._whole, self._skip, self._keep, self._fence = tuple(whole), tuple(skip), tuple(keep), fence or _free
        self._without = tuple(without)
        self._by = uuid.uuid4().hex
        self._index: _Index | None = None
        self._copied: dict[str, object] = {}
        """Name -> the state of the file or folder when it was copied."""

    # -- from the store

    def pull(self) -> bool:
        """Make the folder what the store says; what is right already is not read again. Returns whether there was
        anything. Raises `StorageError`, `OSError`."""
        index = self._read_index()
        files, folders = self._here()
        if index.by and index.by == self._last_here():
            self._index = index
            known = {name for name, each in index.folders.items() if _measured(self.folder / name) == each["files"]}
            self._copied = {name: state for name, state in folders.items() if name in known}
            return True
        for name in set(files) - set(index.files):
            (self.folder / name).unlink(missing_ok=True)
        for name in set(folders) - set(index.folders):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for _ in ahead(self._bring_file, index.files, self._storage.width):
            pass
        for name, entry in index.folders.items():
            if not _matches(name, self._without):
                self._bring_folder(name, entry)
        (self.folder / _MARK).unlink(missing_ok=True)  # equal to the store, and not ahead of it
        self._index = index
        files, folders = self._here()
        self._copied = {**files, **folders}
        return bool(index.files or index.folders)

    def bring(self, name: str) -> bool:
        """Of the whole folders only this one, as the store has it; False where it has none."""
        entry = self._read_index().folders.get(name)
        if entry is not None:
            self._bring_folder(name, entry)
        return entry is not None

    def folders(self) -> list[str]:
        """The whole folders that the store has."""
        return list(self._read_index().folders)

    def _bring_file(self, name: str) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.part")
        try:
            partial.write_bytes(self._storage.read(name))
        except FileNotFoundError:
            raise StorageError(f"{self.place}/{name} is missing, though {INDEX} names it") from None
        os.replace(partial, target)

    def _bring_folder(self, name: str, entry: dict[str, Any]) -> None:
        target = self.folder / name
        if target.is_dir() and _measured(target) == entry["files"]:
            return
        partial = target.with_name(f".part-{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

        def bring(file: str) -> None:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            with self._storage.open(f"{entry['at']}/{file}") as source, open(partial / file, "wb") as copy:
                while block := source.read(_BLOCK_BYTES):
                    copy.write(block)

        for _ in ahead(bring, entry["files"], self._storage.width):
            pass
        if _measured(partial) != entry["files"]:
            raise StorageError(f"{self.place}/{entry['at']} is not what was copied there; remove {name} from {INDEX}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)

    # -- to the store

    def push(self) -> bool:
        """Copy what has changed; returns whether everything that was there is there now. Raises `StorageError`, and
        what `fence` raises."""
        self._fence()
        index = self._index if self._index is not None else self._read_index()
        # Whole folders are looked at first and copied last: the files beside a checkpoint are never older than it.
        _, folders = self._here()
        files, _ = self._here()
        complete, changed = True, False
        new = _Index(files=list(index.files), folders=dict(index.folders))
        old_places: set[str] = set()
        due = [name for name, state in files.items() if self._copied.get(name) != state]
        for done, name in zip(ahead(self._send_file, due, self._storage.width), due, strict=True):
            complete &= done
            if done:
                self._copied[name], changed = files[name], True
        for name, state in folders.items():
            if self._copied.get(name) == state:
                continue
            before = index.folders.get(name)
            at = name if before is None or before["at"] != name else name + _AGAIN
            self._fence()
            sent = self._send_folder(name, at, state)
            if sent is None:
                complete = False
                continue
            new.folders[name] = {"at": at, "files": sent}
            if before is not None:
                old_places.add(before["at"])
            self._copied[name], changed = state, True
        gone: list[str] = []
        if complete:
            gone = [name for name in new.files if name not in files]
            old_places |= {new.folders[name]["at"] for name in new.folders if name not in folders}
            new.folders = {name: entry for name, entry in new.folders.items() if name in folders}
        new.files = sorted(name for name in self._copied if name in files)
        if not complete:
            new.files = sorted({*new.files, *index.files})
        if changed or gone or new.folders != index.folders or self._index is None:
            self._fence()
            new.by = self._by
            self._storage.replace(INDEX, _encoded(new))
            (self.folder / _MARK).write_text(self._by)
            self._index = new
        for name in gone:
            self._copied.pop(name, None)
            self._storage.remove(name)
        for place in old_places - {entry["at"] for entry in new.folders.values()}:
            self._storage.remove(*[each.name for each in self._storage.walk(place)])
        for name in set(self._copied) - set(files) - set(folders):
            del self._copied[name]
        return complete

    def _send_file(self, name: str) -> bool:
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return False
        if name.endswith(".jsonl"):
            data = data[: data.rfind(b"\n") + 1]  # a line that is being written is not copied in half
        self._prepare(name)
        self._storage.replace(name, data)
        return True

    def _send_folder(self, name: str, at: str, state: object) -> _Files | None:
        """None where it was removed or replaced meanwhile."""
        folder = self.folder / name
        try:
            measured = _measured(folder)

            def send(file: str) -> None:
                self._prepare(f"{at}/{file}")
                with pa.memory_map(str(folder / file)) if measured[file][0] else _nothing() as source:
                    self._storage.replace(f"{at}/{file}", source.read_buffer())

            for _ in ahead(send, measured, self._storage.width):
                pass
            return measured if _state(folder) == state else None
        except FileNotFoundError:
            return None

    def _prepare(self, name: str) -> None:
        self._storage.prepare(name.rpartition("/")[0])

    # -- both

    def _read_index(self) -> _Index:
        try:
            found = json.loads(self._storage.read(INDEX))
            return _Index(files=list(found["files"]), folders=dict(found["folders"]), by=str(found["by"]))
        except FileNotFoundError:
            return _Index()
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.place}/{INDEX} cannot be read ({error!r})") from None

    def _last_here(self) -> str:
        mark = self.folder / _MARK
        return mark.read_text() if mark.is_file() else ""

    def _here(self) -> tuple[dict[str, object], dict[str, object]]:
        """Single files and whole folders of this machine by name, with what changes when they do."""
        files: dict[str, object] = {}
        folders: dict[str, object] = {}
        for path, inside, names in os.walk(self.folder):
            where = Path(path).relative_to(self.folder).as_posix().removeprefix(".")
            prefix = f"{where}/" if where else ""
            for each in list(inside):
                name = prefix + each
                if each.startswith(".") or _matches(name + "/", self._skip):
                    inside.remove(each)
                elif _matches(name, self._whole):
                    inside.remove(each)
                    folders[name] = _state(self.folder / name)
            for each in names:
                name = prefix + each
                skipped = name not in self._keep and _matches(name, self._skip)
                if skipped or each.startswith(".") or each.endswith(".tmp") or name == INDEX:
                    continue
                try:
                    stat = os.stat(self.folder / name)
                except FileNotFoundError:
                    continue
                files[name] = (stat.st_size, stat.st_mtime_ns)
        return files, folders


class Mirroring:
    """Pushes a mirror in a thread; as a context manager it pushes a last time at a good end, and raises if it cannot.

    `every_s`: between two looks at the folder.
    """

    def __init__(self, mirror: Mirror, *, every_s: float = EVERY_S, patience_s: float = PATIENCE_S) -> None:
        self._mirror, self._every_s, self._patience_s = mirror, every_s, patience_s
        self._ended = threading.Event()
        self._failing_since_s: float | None = None
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def check(self) -> None:
        """Raises the `OSError` of a store that has taken nothing for `patience_s`."""
        since_s, failure = self._failing_since_s, self._failure
        if failure is not None and since_s is not None and time.monotonic() - since_s > self._patience_s:
            raise failure

    def close(self, *, last: bool = True) -> None:
        """`last`: copy once more what has changed. Raises `OSError`."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        if last:
            self._mirror.push()

    def __enter__(self) -> Mirroring:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(last=kind is None)

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._mirror.push()
                self._failing_since_s = self._failure = None
            except OSError as error:
                self._failure = error
                if self._failing_since_s is None:
                    self._failing_since_s = time.monotonic()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Part by part: `*` does not reach over a `/`."""
    parts = name.split("/")
    return any(
        len(parts) == len(wanted := pattern.split("/"))
        and name.endswith("/") == pattern.endswith("/")
        and all(map(fnmatch.fnmatchcase, parts, wanted))
        for pattern in patterns
    )


def _inside(folder: Path) -> Iterator[Path]:
    for path, inside, names in os.walk(folder):
        inside.sort()
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(path) / name


def _state(folder: Path) -> object:
    try:
        found = [(path, path.stat()) for path in _inside(folder)]
    except FileNotFoundError:
        return None
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _measured(folder: Path) -> _Files:
    measured: _Files = {}
    for path in _inside(folder):
        size, checksum = 0, 0
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
        measured[path.relative_to(folder).as_posix()] = [size, checksum]
    return measured


def _free() -> None:
    """Nobody else may write."""


def _nothing() -> pa.BufferReader:
    """An empty file cannot be mapped."""
    return pa.BufferReader(b"")


def _encoded(index: _Index) -> bytes:
    return (json.dumps({"by": index.by, "files": index.files, "folders": index.folders}, indent=2) + "\n").encode()

"""Checkpoints in a folder: written whole or not at all, checked when read, the oldest removed.

    checkpoints/step-0000700/learner_state.json      what the trainer must remember, and a checksum of every other file
                            /rank-000.json           which tensor is in which file
                            /rank-000-00.safetensors what rank 0 wrote: every world_size-th parameter, whole, fp32

`CheckpointFolder` knows files and tensors by name; what they mean is `learner.trained_state`'s, and which settings must
agree is the backend's. Each rank calls `write_part`, then rank 0 alone `finish`. Not DeepSpeed's format: that one can
be read by the same number of ranks alone.

Example::

    store = CheckpointFolder(Path("runs/a/learner/checkpoints"), keep=2)
    store.begin("step-0000700")                              # rank 0, then all wait for it
    store.write_part("step-0000700", 0, tensors, facts={})   # every rank, then all wait
    store.finish("step-0000700", {"step": 700})              # rank 0
    store.names()[0], store.damage("step-0000700")           # newest first; None when it is whole
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.full_disk import patiently

if TYPE_CHECKING:
    import torch

STATE_FILE = "learner_state.json"
FILE_BYTES = 2 * 2**30
"""About how much one file of tensors holds: what a rank needs in CPU memory to write it."""


class CheckpointFolder:
    """The checkpoints of one run. `keep`: how many finished ones are left. Raises OSError."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def names(self) -> list[str]:
        """Finished checkpoints, newest first; whether their files are whole is not looked at."""
        return sorted((path.name for path in self.folder.glob("step-*") if path.is_dir()), reverse=True)

    # -- writing

    def begin(self, name: str) -> None:
        """Make room for it, out of sight."""
        shutil.rmtree(self._partial(name), ignore_errors=True)
        patiently(lambda: self._partial(name).mkdir(parents=True, exist_ok=True))

    def write_part(
        self, name: str, rank: int, tensors: Iterable[tuple[str, torch.Tensor]], *, facts: Mapping[str, Any]
    ) -> None:
        """Write one rank's tensors (name, CPU tensor), a file at a time, and an index of them. `facts`: JSON-able."""
        from safetensors.torch import save_file

        folder = self._partial(name)
        places: dict[str, str] = {}
        files: dict[str, dict[str, int]] = {}
        waiting: dict[str, torch.Tensor] = {}

        def flush() -> None:
            path = folder / f"rank-{rank:03d}-{len(files):02d}.safetensors"

            def save() -> None:
                save_file(waiting, path)
                path.chmod(0o644)
                _sync(path)

            patiently(save)
            files[path.name] = _measure(path)
            places.update(dict.fromkeys(waiting, path.name))
            waiting.clear()

        held_bytes = 0
        for key, tensor in tensors:
            waiting[key] = tensor.contiguous()
            held_bytes += tensor.numel() * tensor.element_size()
            if held_bytes >= FILE_BYTES:
                flush()
                held_bytes = 0
        if waiting:
            flush()
        index = folder / f"rank-{rank:03d}.json"
        content = json.dumps({"tensors": places, "files": files, "facts": dict(facts)})
        patiently(lambda: (index.write_text(content), _sync(index)))

    def finish(self, name: str, state: Mapping[str, Any]) -> None:
        """Seal what the ranks wrote, show it under its name, and remove the oldest beyond those kept."""
        partial = self._partial(name)
        indexes = {path.name: _measure(path) for path in sorted(partial.glob("rank-*.json"))}
        content = json.dumps({"state": state, "indexes": indexes})
        sealed = json.dumps({"content": content, "crc32": zlib.crc32(content.encode())})
        patiently(lambda: ((partial / STATE_FILE).write_text(sealed), _sync(partial / STATE_FILE)))
        _sync(partial)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(partial, self.folder / name)
        _sync(self.folder)
        for old in self.names()[self.keep :]:
            shutil.rmtree(self.folder / old, ignore_errors=True)

    # -- reading

    def state(self, name: str) -> dict[str, Any]:
        """What `finish` was given. Raises OSError and ValueError for a damaged file."""
        return self._manifest(name)["state"]

    def damage(self, name: str, *, rank: int = 0, world_size: int = 1) -> str | None:
        """What is wrong with its files, or None; of several ranks each looks at its share of them."""
        folder = self.folder / name
        try:
            for index, measured in self._manifest(name)["indexes"].items():
                if _measure(folder / index) != measured:
                    return f"{index} is not what was written"
            files = sorted(self._files(name).items())
            for file, measured in files[rank::world_size]:
                if not (folder / file).is_file():
                    return f"{file} is missing"
                if _measure(folder / file) != measured:
                    return f"{file} is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def facts(self, name: str) -> list[dict[str, Any]]:
        """What each rank told `write_part`, by rank."""
        return [index["facts"] for index in self._indexes(name)]

    def open(self, name: str) -> TensorFiles:
        """Its tensors by name."""
        folder = self.folder / name
        places = {key: folder / file for index in self._indexes(name) for key, file in index["tensors"].items()}
        return TensorFiles(places)

    def set_aside(self, name: str) -> Path:
        """Rename a damaged one, so that it is neither resumed from nor counted. Returns where it is."""
        aside = self.folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(self.folder / name, aside)
        return aside

    def _partial(self, name: str) -> Path:
        return self.folder / f".partial-{name}"

    def _manifest(self, name: str) -> dict[str, Any]:
        sealed = json.loads((self.folder / name / STATE_FILE).read_text())
        if zlib.crc32(sealed["content"].encode()) != sealed["crc32"]:
            raise ValueError(f"{STATE_FILE} is not what was written")
        return json.loads(sealed["content"])

    def _indexes(self, name: str) -> list[dict[str, Any]]:
        return [
            json.loads((self.folder / name / index).read_text()) for index in sorted(self._manifest(name)["indexes"])
        ]

    def _files(self, name: str) -> dict[str, dict[str, int]]:
        return {file: measured for index in self._indexes(name) for file, measured in index["files"].items()}


class TensorFiles:
    """Tensors by name, read from their files when asked for."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = dict(places)
        self._open: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> torch.Tensor:
        """On the CPU. Raises KeyError."""
        from safetensors import safe_open

        path = self._places[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path].get_tensor(key)


def _measure(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"bytes": size, "crc32": checksum}


def _sync(path: Path) -> None:
    """Have it on the disk before the name of the whole is shown."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

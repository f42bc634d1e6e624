"""The manifest of a ledger: which shards a compaction made, and which ones they replace.

A ledger that was never compacted has none. Each compaction adds one generation, `manifests/000001.json` and so on; the
newest one counts. A generation is a file that only one of several compactors can create (`Storage.claim`), so it
decides which of them has won. None is ever removed: a slow compactor must find the number taken.

What makes up the ledger (`Snapshot`): the manifest's shards, then every other shard in the listing that the manifest
does not replace. Files of a compaction that no manifest names are leftovers of one that was killed or lost.

Example::

    snapshot(storage).results        # ('shards/compacted-000001-ab12cd34-0001.parquet', 'shards/w0-....parquet')
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rollout.storage import Storage, Stored

MANIFESTS = "manifests"
SHARDS = "shards"
FAILURES = "failures"
COMPACTED = "compacted-"
"""How the names of the files that compactions make begin; no writer may be called so."""

_FORMAT = "trajectory-ledger-manifest"


class ManifestError(ValueError):
    """A manifest that cannot be understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One shard that a compaction made."""

    name: str
    rows: int
    size_bytes: int
    sha256: str
    """Of the file, in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One generation."""

    generation: int
    """0: never compacted."""
    results: tuple[ShardEntry, ...] = ()
    failures: tuple[ShardEntry, ...] = ()
    replaced: frozenset[str] = frozenset()
    """Shards whose rows are in the ones above, and that may still be there."""
    created: str = ""

    @property
    def names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in (*self.results, *self.failures))

    def entries(self, kind: str) -> tuple[ShardEntry, ...]:
        return self.results if kind == SHARDS else self.failures

    def to_json(self) -> bytes:
        record = {
            "format": _FORMAT,
            "generation": self.generation,
            "created": self.created,
            "results": [asdict(entry) for entry in self.results],
            "failures": [asdict(entry) for entry in self.failures],
            "replaced": sorted(self.replaced),
        }
        return (json.dumps(record, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises `ManifestError`."""
        try:
            record = json.loads(data)
            if record["format"] != _FORMAT:
                raise ValueError(f"format {record['format']!r} is not {_FORMAT!r}")
            return cls(
                generation=record["generation"],
                created=record["created"],
                results=tuple(ShardEntry(**each) for each in record["results"]),
                failures=tuple(ShardEntry(**each) for each in record["failures"]),
                replaced=frozenset(record["replaced"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(repr(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What made up the ledger at one moment."""

    manifest: Manifest
    listed: tuple[Stored, ...]
    """Every shard file that was there, of both kinds."""

    def shards(self, kind: str) -> list[str]:
        """Names of the shards to read, those of the manifest first."""
        return [entry.name for entry in self.manifest.entries(kind)] + [each.name for each in self.loose(kind)]

    def loose(self, kind: str) -> list[Stored]:
        """Shards as their writers left them, which no compaction has taken up, by name."""
        return [
            each
            for each in self.listed
            if each.name.startswith(f"{kind}/") and not is_compacted(each.name) and not self.is_replaced(each.name)
        ]

    def is_replaced(self, name: str) -> bool:
        return name in self.manifest.replaced

    def orphans(self) -> list[Stored]:
        """Files of compactions that the manifest does not name, whose number is taken: nobody will ever name them."""
        named = self.manifest.names
        return [
            each
            for each in self.listed
            if is_compacted(each.name)
            and each.name not in named
            and generation_of(each.name) <= self.manifest.generation
        ]


def snapshot(storage: Storage) -> Snapshot:
    """Costs three listings and reading the newest manifest. Raises `ManifestError` with the name of a damaged one.

    The shards are listed before the manifest is read: files are removed only after a manifest that replaces them is
    there, so what a listing lacks is named by the manifest that is read after it.
    """
    listed = tuple(each for kind in (SHARDS, FAILURES) for each in storage.list(kind) if each.name.endswith(".parquet"))
    return Snapshot(manifest=latest(storage), listed=listed)


def latest(storage: Storage) -> Manifest:
    """The newest generation; raises `ManifestError`."""
    names = [each.name for each in storage.list(MANIFESTS) if each.name.endswith(".json")]
    if not names:
        return Manifest(generation=0)
    newest = max(names)
    try:
        return Manifest.from_json(storage.read(newest))
    except ManifestError as error:
        raise ManifestError(f"{newest} is damaged ({error})") from error


def claim(storage: Storage, manifest: Manifest) -> bool:
    """Make it the newest; False when its generation exists already."""
    return storage.claim(f"{MANIFESTS}/{manifest.generation:06d}.json", manifest.to_json())


def is_compacted(name: str) -> bool:
    return name.rpartition("/")[2].startswith(COMPACTED)


def generation_of(name: str) -> int:
    """Of a compacted shard's name."""
    number = name.rpartition("/")[2].removeprefix(COMPACTED).split("-")[0]
    return int(number) if number.isdigit() else 0

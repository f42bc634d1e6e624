"""`ledger.json`, the file that says what a folder is: `is_ledger` looks at it, `make` writes it.

Nothing of one run is in it. A ledger of an earlier schema version is read as it is; its mark is raised by the first
writer of this version, so that code of before refuses it with a reason instead of finding shards it cannot read.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from rollout.ledger_manifest import FAILURES, MANIFESTS, SHARDS
from rollout.ledger_shards import LedgerError
from rollout.records import READABLE_VERSIONS, SCHEMA_VERSION
from rollout.storage import Storage, StorageError

MARK = "ledger.json"
_FORMAT = "trajectory-ledger"


def version(storage: Storage) -> int | None:
    """The ledger's schema version; None when nothing is there yet.

    Raises `LedgerError` for anything that is not a ledger of a version that can be read, or cannot be reached.
    """
    try:
        described = _read(storage)
        if described is None:
            # The mark is looked for again: another writer may have made the ledger between the two looks.
            if storage.empty() or (described := _read(storage)) is None:
                if storage.empty():
                    return None
                raise LedgerError(f"{storage.uri} holds files but no {MARK}, so it is no ledger; name a new folder")
        found = described["schema_version"]
        if described["format"] != _FORMAT:
            raise ValueError(f"format {described['format']!r} is not {_FORMAT!r}")
    except NotADirectoryError as error:
        raise LedgerError(f"{storage.uri} is a file; a ledger is a folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{storage.uri}/{MARK} does not describe a ledger ({error!r})") from error
    except StorageError as error:
        raise LedgerError(str(error)) from error
    if found not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise LedgerError(f"ledger {storage.uri} has schema version {found}; this code reads {readable}")
    return found


def make(storage: Storage) -> None:
    """Make the folder, or raise an earlier version's mark. Writers that start together all write the same."""
    try:
        found = version(storage)
        if found != SCHEMA_VERSION:
            storage.prepare("")
            described = (found and _read(storage)) or {"format": _FORMAT, "created": datetime.now(UTC).isoformat()}
            described = {**described, "schema_version": SCHEMA_VERSION}
            storage.replace(MARK, (json.dumps(described, indent=2) + "\n").encode())
        storage.prepare(SHARDS, FAILURES, MANIFESTS)
    except StorageError as error:
        raise LedgerError(str(error)) from error


def _read(storage: Storage) -> dict | None:
    try:
        return json.loads(storage.read(MARK))
    except FileNotFoundError:
        return None

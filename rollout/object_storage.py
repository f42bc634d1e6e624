"""A prefix of an object store as a ledger's storage: `s3://bucket/prefix`, `gs://bucket/prefix`, through pyarrow.fs.

Credentials, region and endpoint come from the environment, as other tools of the store have them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the shared AWS files, an
instance's role; GOOGLE_APPLICATION_CREDENTIALS), or, region and endpoint, from the URI's query
(`?region=eu-west-1&endpoint_override=http://minio:9000`). Buckets are not made.

The client runs threads of its own from the first call on, so a process that uses one must not be forked after it (start
the sandbox's zygotes first, or in processes of their own, as Ray's actors are).

A PUT is atomic and is seen by every later read and listing. What these stores do not have here is "create unless it
exists", so `claim` is built on their consistency: see there.

Example::

    ObjectStorage("s3://bucket/runs/7/ledger").list("shards")
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa

from rollout.storage import StorageError, Stored, ahead, is_leftover

if TYPE_CHECKING:
    import pyarrow.fs

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 15.0
"""For a request that makes no progress; with all attempts, a store that hangs is given up within some two minutes."""
ATTEMPTS = 3
WIDTH = 16
"""Requests at once: each takes some tens of milliseconds, whatever its size."""
_CLAIM_AGE_S = 600.0
"""A claim that is older belongs to somebody who was killed; far above what one takes."""
_S3_OPTIONS = {"region", "endpoint_override", "scheme", "tls_ca_file_path"}


class ObjectStorage:
    """See `rollout.storage.Storage`. The connection is made by the first call."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.split("?")[0].rstrip("/")
        self.width = WIDTH
        parts = urlsplit(uri)
        self._scheme, self._bucket = parts.scheme, parts.netloc
        if "@" in parts.netloc:
            raise ValueError("give credentials of an object store in the environment, not in the URI of a ledger")
        self._root = (parts.netloc + parts.path).rstrip("/")
        self._options = dict(parse_qsl(parts.query))
        known = _S3_OPTIONS if self._scheme == "s3" else {"endpoint_override", "scheme"}
        if unknown := sorted(set(self._options) - known):
            raise ValueError(f"{self.uri}: unknown option {unknown[0]!r}; a URI may have {', '.join(sorted(known))}")
        self._connected: Any = None
        self._connecting = threading.Lock()

    # -- reading

    def empty(self) -> bool:
        with self._told("list"):
            fs = self._fs()
            from pyarrow.fs import FileSelector

            if fs.get_file_info(FileSelector(self._root, allow_not_found=True)):
                return False
            self._look_for_bucket()
            return True

    def list(self, folder: str) -> list[Stored]:
        return [each for each in self._scan(folder) if not is_leftover(each.name)]

    def walk(self, folder: str) -> list[Stored]:
        return [each for each in self._scan(folder, recursive=True) if not is_leftover(each.name)]

    def leftovers(self, *folders: str) -> list[Stored]:
        return [each for folder in folders for each in self._scan(folder) if is_leftover(each.name)]

    def _scan(self, folder: str, *, recursive: bool = False) -> list[Stored]:
        with self._told("list"):
            fs = self._fs()
            from pyarrow.fs import FileSelector

            place = f"{self._root}/{folder}".rstrip("/")
            found = fs.get_file_info(FileSelector(place, allow_not_found=True, recursive=recursive))
        return sorted(
            (
                Stored(
                    name=each.path.removeprefix(f"{self._root}/"),
                    size_bytes=each.size,
                    modified_s=(each.mtime_ns or 0) / 1e9,
                )
                for each in found
                if each.is_file
            ),
            key=lambda each: each.name,
        )

    def read(self, name: str) -> bytes:
        with self._told("read"), self._fs().open_input_stream(f"{self._root}/{name}", compression=None) as file:
            return file.read()

    def open(self, name: str) -> pa.NativeFile:
        with self._told("read"):
            return self._fs().open_input_file(f"{self._root}/{name}")

    # -- writing

    def prepare(self, *folders: str) -> None:
        """An object store has no folders to make."""

    def publish(self, files: Mapping[str, bytes | pa.Buffer], *, by: str) -> None:
        put: list[str] = []
        try:
            for name, data in files.items():
                put.append(name)
                self._put(name, data)
        except BaseException:
            try:
                self.remove(*put)  # the last one too: its answer may have been lost on the way
            except OSError:
                pass  # the store is away
            raise

    def claim(self, name: str, data: bytes) -> bool:
        """Everybody who wants the name first says so under a name of his own, then looks: whoever sees nobody else may
        go on. Two who see one another both step back and try again after a random pause, so nobody waits for anybody
        and two never both succeed."""
        folder, _, last = name.rpartition("/")
        for _ in range(5):
            mine = f"{folder}/.{last}-{uuid.uuid4().hex}.tmp"
            started = time.monotonic()
            self._put(mine, b"claim")
            try:
                if any(each.name == name for each in self.list(folder)):
                    return False
                now = max(each.modified_s for each in self.leftovers(folder) if each.name == mine)
                others = [
                    each
                    for each in self.leftovers(folder)
                    if each.name.startswith(f"{folder}/.{last}-")
                    and each.name != mine
                    and now - each.modified_s < _CLAIM_AGE_S
                ]
                if not others and time.monotonic() - started < _CLAIM_AGE_S / 2:
                    if any(each.name == name for each in self.list(folder)):
                        return False  # they finished between our two looks
                    self._put(name, data)
                    return True
            finally:
                self.remove(mine)
            time.sleep(random.uniform(0.05, 1.0))
        return False

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        self._put(name, data)

    def remove(self, *names: str) -> None:
        for _ in ahead(self._remove, names, min(self.width, len(names))):
            pass

    def _remove(self, name: str) -> None:
        with self._told("remove from"):
            try:
                self._fs().delete_file(f"{self._root}/{name}")
            except FileNotFoundError:
                pass

    def _put(self, name: str, data: bytes | pa.Buffer) -> None:
        with self._told("write to"):
            with self._fs().open_output_stream(f"{self._root}/{name}", compression=None) as stream:
                stream.write(data)

    # -- the connection

    def _fs(self) -> pyarrow.fs.FileSystem:
        with self._connecting:
            if self._connected is None:
                self._connected = self._s3() if self._scheme == "s3" else self._gcs()
            return self._connected

    def _s3(self) -> pyarrow.fs.FileSystem:
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        return S3FileSystem(
            region=self._options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            endpoint_override=self._endpoint() or None,
            scheme=self._options.get("scheme"),
            tls_ca_file_path=self._options.get("tls_ca_file_path"),
            connect_timeout=CONNECT_TIMEOUT_S,
            request_timeout=REQUEST_TIMEOUT_S,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
            background_writes=False,
            allow_delayed_open=True,  # a small object is one request
        )

    def _gcs(self) -> pyarrow.fs.FileSystem:
        from datetime import timedelta

        from pyarrow.fs import GcsFileSystem

        return GcsFileSystem(
            endpoint_override=self._options.get("endpoint_override"),
            scheme=self._options.get("scheme", "https"),
            retry_time_limit=timedelta(seconds=REQUEST_TIMEOUT_S),
        )

    def _endpoint(self) -> str:
        if self._scheme != "s3":
            return self._options.get("endpoint_override", "")
        named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        return self._options.get("endpoint_override") or next(filter(None, map(os.environ.get, named)), "")

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Errors of the store, said so that one knows what to change."""
        try:
            yield
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            text = str(error)
            if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
                raise self._no_bucket() from error
            place = f" at {self._endpoint()}" if self._endpoint() else ""
            if "NETWORK_CONNECTION" in text or "curlCode" in text or "REQUEST_TIMEOUT" in text:
                hint = "is the endpoint right (AWS_ENDPOINT_URL), and can it be reached from here?"
            elif any(code in text for code in ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE", "403", "401")):
                hint = (
                    "give credentials that may use this bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    if self._scheme == "s3"
                    else "give credentials that may use this bucket: GOOGLE_APPLICATION_CREDENTIALS"
                )
            else:
                hint = "it may be a passing trouble of the store"
            raise StorageError(f"cannot {doing} {self.uri}{place}: {hint} ({text})") from error

    def _look_for_bucket(self) -> None:
        """Raises `StorageError` when it is missing: to a listing it is just empty."""
        from pyarrow.fs import FileType

        try:
            found = self._fs().get_file_info(self._bucket)
        except OSError as error:
            if "ACCESS_DENIED" in str(error) or "403" in str(error):
                return  # one may use objects without a right to look at their bucket
            raise
        if found.type is FileType.NotFound:
            raise self._no_bucket()

    def _no_bucket(self) -> StorageError:
        place = f" at {self._endpoint()}" if self._endpoint() else ""
        return StorageError(f"there is no bucket {self._bucket!r}{place}: make it first, or correct {self.uri}")

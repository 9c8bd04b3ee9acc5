"""One folder on a disk or in a bucket, through fsspec: whole-or-absent writes, listings."""

import contextlib
import importlib.util
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# gcsfs asks each bucket for its storage layout over gRPC, which takes 20-80 s an operation where gRPC is closed.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.config import conf
from fsspec.implementations.local import LocalFileSystem

from sdjax.files import held, write_whole
from sdjax.retrying import retry
from sdjax.values import one_line

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs, with a traceback, it also raises

READERS = 32  # files that are fetched at once: a bucket answers in tens of milliseconds, however small they are

REMEDY = "delete this manifest and run the command again"
_SILENCE = 300  # seconds that a connection may bring nothing, before it is given up and the call tried again

S = TypeVar("S")
T = TypeVar("T")


def limit_silence(config: dict[str, Any]) -> None:
    """Have file systems of gs:// URLs, of which fsspec makes one for many, give up a connection that says nothing.

    gcsfs would wait for ever. A user's own `requests_timeout` stays.
    """
    # Only with gcsfs there is aiohttp, which takes a third of a second to import.
    if importlib.util.find_spec("gcsfs") is None or any("requests_timeout" in config.get(p, {}) for p in ("gs", "gcs")):
        return
    from aiohttp import ClientTimeout

    # Under one of the two names of the protocol: fsspec joins what it finds under both.
    config.setdefault("gs", {})["requests_timeout"] = ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE)


limit_silence(conf)


def parallel_map(
    call: Callable[[S], T], items: Iterable[S], threads: int = READERS, waits: Callable[[S], bool] = lambda _: True
) -> Iterator[T]:
    """The call's value for each item, in order, by many threads; never more than twice as many values wait.

    Calls that by `waits` do not wait for a disk or a network are made by this thread: to hand them over costs more.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[T]] = deque()
        for item in items:
            if waits(item):
                begun.append(pool.submit(call, item))
            elif begun:
                begun.append(_done(call(item)))
            else:
                yield call(item)
                continue
            if len(begun) > 2 * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


class DamagedError(ValueError):
    """A file that a job wrote cannot be read; the message is one line that names it and what mends it."""


@dataclass(frozen=True)
class Store:
    """A folder named by a path or an fsspec URL; names are relative to it, with forward slashes.

    Every call is retried while its errors are transient. A write is whole or absent.
    """

    url: str

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.url)[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The name as the file system takes it."""
        root = fsspec.core.url_to_fs(self.url)[1].rstrip("/")
        return f"{root}/{name}" if name else root

    def exists(self, name: str) -> bool:
        return retry(lambda: self.fs.exists(self.path(name)))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those from `start` up to `end`. FileNotFoundError where it is absent."""
        return retry(lambda: bytes(self.fs.cat_file(self.path(name), start=start, end=end)))  # type: ignore[arg-type]

    def write(self, name: str, data: bytes, *, create: bool = False) -> None:
        """Put a whole file.

        Raises:
            FileExistsError: `create` is set and the file is there; Cloud Storage checks it as it commits
                (ifGenerationMatch=0), a disk before it writes.
        """
        path = self.path(name)
        # To Cloud Storage in one request, whatever the size: of an upload in parts whose answer is lost, the client
        # cannot tell what has arrived.
        one = {"chunksize": len(data) + 1} if self.url.startswith(("gs://", "gcs://")) else {}

        def put() -> None:
            if not self.is_local:
                self.fs.pipe_file(path, data, mode="create" if create else "overwrite", **one)
                return
            if create and os.path.exists(path):
                raise FileExistsError(path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_whole(Path(path), data)

        retry(put)

    def find(self, folder: str, *, maxdepth: int | None = None) -> list[str]:
        """The names of all files under a folder, down to `maxdepth`, sorted; none where the folder is absent."""
        fs, root = self.fs, self.path()

        def listing() -> list[str]:
            fs.invalidate_cache()
            return list(fs.find(self.path(folder), maxdepth=maxdepth))

        try:
            return sorted(str(path)[len(root) + 1 :] for path in retry(listing))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See `sdjax.files.held`; a bucket is kept from nobody."""
        busy = f"another job is writing to {self.url}; wait until it has ended"
        with held(self.path(), busy) if self.is_local else contextlib.nullcontext():
            yield

    def delete(self, names: list[str]) -> None:
        """Remove files; an absent one is no error."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                retry(lambda: self.fs.rm_file(self.path(name)))

        for _ in parallel_map(remove, names):
            pass

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file's object, or None where it is absent, cut short or anything else."""
        try:
            value = json.loads(self.read(name))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A manifest's table, of those of the columns that it has.

        Raises:
            DamagedError: it is no whole Parquet file.
        """
        data = self.read(name)
        try:
            # Arrow's threads may outlive a call, and abort a process that ends meanwhile (apache/arrow#34314).
            table = pq.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)
            table.validate(full=True)  # text that is not UTF-8, which reading alone lets through
        except Exception as error:  # damage makes pyarrow raise all sorts
            raise DamagedError(f"{name} cannot be read: {one_line(error)}; {REMEDY}") from None
        return table

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

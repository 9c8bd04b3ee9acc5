"""How far a running job is: each worker process keeps a small file in the output, and the launcher adds them up.

Files, because they work for any runner: threads, processes and machines that cannot see each other all write to OUTPUT.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from contextlib import suppress
from datetime import UTC
from typing import IO

from pipelines.storage import Store, parallel_map

FOLDER = ".progress"
_OURS = re.compile(rf"{re.escape(FOLDER)}/[^/]+-[0-9]+-[0-9a-f]{{8}}\.json")
_LIVELY = 60  # seconds for which a process is taken to be at work after it has told how far it is
_EVERY = {True: 1.0, False: 15.0}  # seconds between writes, on a disk and in a bucket


class Heartbeat:
    """One process's counts, written to its file now and then; for looking at only, a retried bundle counts twice.

    They are written by a thread of their own, which ends when there is nothing to write: whoever counts waits for no
    disk and no bucket.
    """

    def __init__(self, store: Store):
        self._store, self._every = store, _EVERY[store.is_local]
        self._name = f"{FOLDER}/{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        self._counts: Counter[str] = Counter()
        self._changed = self._follows = False
        self._written: float | None = None
        self._lock, self._file = threading.Lock(), threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, value in counts.items():
                self._counts[name] += value
            self._changed = True
            if not self._follows:
                self._follows = True
                threading.Thread(target=self._follow, daemon=True).start()

    def flush(self) -> None:
        """Return when all that was counted is written, for the end of a stage's work."""
        self._write()

    def _follow(self) -> None:
        while True:
            with self._lock:
                if not self._changed:
                    self._follows = False
                    return
                due = 0.0 if self._written is None else self._written + self._every - time.monotonic()
            if due > 0:
                time.sleep(due)
            else:
                self._write(late=self._written is not None)

    def _write(self, *, late: bool = False) -> None:
        """Write what has changed; a `late` write not where the file is gone, because then the job has ended."""
        with self._file:
            with self._lock:
                if not self._changed:
                    return
                self._changed, self._written, text = False, time.monotonic(), json.dumps(self._counts)
            try:
                if late and not self._store.find(self._name):
                    return
                if self._store.is_local:
                    os.makedirs(self._store.path(FOLDER), exist_ok=True)
                self._store.fs.pipe_file(self._store.path(self._name), text.encode())
            except Exception:  # a job does not fail for its progress line
                return


class ProgressLine:
    """A line on a terminal, or now and then a line in a log, that follows a job's counts until the block ends."""

    def __init__(self, store: Store, stream: IO[str] | None = None):
        self._store, self._stream = store, sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._every = max(_EVERY[store.is_local], 0.0 if self._tty else 10.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._started = time.monotonic()
        self._first: tuple[float, int] | None = None  # when images were first seen, and how many
        self._seen = False  # any counts

    def __enter__(self) -> "ProgressLine":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._tty:
            self._stream.write("\r\x1b[K")

    def _follow(self) -> None:
        while not self._ended.wait(self._every):
            line = self.line(totals(self._store), time.monotonic())
            if not line:
                continue
            self._stream.write(f"\r\x1b[K{line}" if self._tty else line + "\n")
            self._stream.flush()

    def line(self, counts: Counter[str], now: float) -> str:
        """The counts as text: how many of how many, images/s since the first, the time left, the rejected.

        Empty where there were counts and are none any more: the job has ended, or a launcher swept an earlier one's.
        """
        if self._seen and not counts:
            return ""
        self._seen = bool(counts)
        if self._first is not None and counts["images"] < self._first[1]:
            self._first = None
        if not counts["images"]:
            line = f"{counts['rows']:,} rows read, {counts['rejected']:,} rejected"
            return line + (f", {counts['planned']:,} images to make" if counts["planned"] else "")
        if self._first is None:
            self._first = (now, counts["images"])
        line = f"{counts['images']:,} of {counts['planned']:,} images"
        elapsed, made = now - self._first[0], counts["images"] - self._first[1]
        if elapsed > 0 and made > 0:
            left = max(0, counts["planned"] - counts["images"]) * elapsed / made
            line += f", {made / elapsed:.2f} images/s, {_clock(left)} left"
        return f"{line}, {counts['rejected']:,} rejected"


def totals(store: Store) -> Counter[str]:
    """The counts of all processes so far; a file that is being written is left out."""
    counts: Counter[str] = Counter()
    try:
        for found in parallel_map(store.read_json, store.find(FOLDER)):
            counts.update(found or {})
    except Exception:  # as in Heartbeat
        pass
    return counts


def is_alive(store: Store) -> bool:
    """Whether a process has told how far it is within the last `_LIVELY` seconds; False where no file says when."""
    for name in filter(_OURS.fullmatch, store.find(FOLDER)):
        with suppress(FileNotFoundError, NotImplementedError):
            told = store.fs.modified(store.path(name))
            if time.time() - told.replace(tzinfo=told.tzinfo or UTC).timestamp() < _LIVELY:
                return True
    return False


def clear(store: Store) -> None:
    """Delete the files of all processes, and their folder where it holds nothing else."""
    store.delete(list(filter(_OURS.fullmatch, store.find(FOLDER))))
    if store.is_local:
        with suppress(OSError):  # it is not there, or not empty
            os.rmdir(store.path(FOLDER))


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"

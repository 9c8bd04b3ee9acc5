"""Text files to records: lines, or a CSV's cells, in bounded memory whatever a file holds."""

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO, NamedTuple

MAX_RECORD = 2**20  # bytes of one record of a text file; a longer one is refused, and read past

csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_RECORD))  # the module's own would refuse an eighth of a record


class RowError(ValueError):
    """A row that cannot be read; one line."""


class _NeverCloses(csv.Error):
    """A quote opens, and does not close within MAX_RECORD bytes."""


class _Line(NamedTuple):
    end: int  # the byte after it
    text: str
    too_long: bool


def _lines(stream: IO[bytes], start: int, stop: int | None) -> Iterator[_Line]:
    """Lines from byte `start` to `stop`, with undecodable bytes as lone surrogates; a long line's rest is skipped.

    The byte order mark that a file may begin with is no part of its first line, whose first cell may be quoted.
    """
    stream.seek(start)
    end = start
    while stop is None or end < stop:
        mark = "" if end else "\ufeff"
        line = stream.readline(MAX_RECORD)
        if not line:
            return
        end += len(line)
        last = line
        while len(last) == MAX_RECORD and not last.endswith(b"\n"):
            last = stream.readline(MAX_RECORD)
            end += len(last)
        yield _Line(end, line.decode("utf-8", "surrogateescape").removeprefix(mark), last is not line)


def records(
    stream: IO[bytes], start: int, stop: int | None, delimiter: str | None
) -> Iterator[tuple[int, list[str] | RowError]]:
    """Records with the byte after each: lines without their end, or a CSV's cells where a delimiter is given."""
    too_long = RowError(f"a line of more than {MAX_RECORD:,} bytes")
    lines = _lines(stream, start, stop)
    if delimiter is None:
        for line in lines:
            yield line.end, too_long if line.too_long else [line.text.rstrip("\r\n")]
        return
    waiting: deque[_Line] = deque()
    while line := waiting.popleft() if waiting else next(lines, None):
        if line.too_long:
            yield line.end, too_long
            continue
        taken = [line]
        try:
            cells = _cells(taken, waiting, lines, delimiter)
            yield taken[-1].end, cells
        except _NeverCloses:
            # The row that cannot be read is its first line alone; whatever its open quote swallowed is read again.
            waiting.extendleft(reversed(taken[1:]))
            yield line.end, RowError("not a row: a quote opens and never closes")
        except csv.Error as error:
            yield taken[-1].end, RowError(f"not a row: {error}")


def _cells(taken: list[_Line], waiting: deque[_Line], lines: Iterator[_Line], delimiter: str) -> list[str]:
    """The cells of the record that begins with `taken[0]`; lines inside its quotes are moved to `taken`.

    Raises:
        csv.Error: they are no row; _NeverCloses where the lines after the first are rows of their own.
    """
    text = taken[0].text
    if '"' not in text:
        return next(csv.reader([text], delimiter=delimiter), [])

    def feed() -> Iterator[str]:
        size = len(text)
        yield text
        while size <= MAX_RECORD:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                break
            taken.append(line)
            if line.too_long:
                break
            size += len(line.text)
            yield line.text
        raise _NeverCloses

    return next(csv.reader(feed(), delimiter=delimiter))

"""Prompt files to rows: found, checked, cut into pieces that workers read alone, read in bounded memory.

A row is a mapping of the file's columns. Text files are cut at byte offsets, Parquet files at row groups, templates at
row numbers, so a piece is a few numbers and any worker may read it.
"""

import io
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from glob import has_magic
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow.parquet as pq

from pipelines import tables
from pipelines.records import RowError, records
from pipelines.storage import retry
from pipelines.templates import Template, TemplateError

PIECE_ROWS = 16_384
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet", ".toml")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class SourceError(ValueError):
    """Prompt files that no job can run on; one line that names the file."""


class Source(NamedTuple):
    """A prompt file; `header` holds a CSV's or TSV's column names, `start` the byte where its rows begin."""

    file: str
    header: tuple[str, ...] = ()
    start: int = 0

    @property
    def suffix(self) -> str:
        return next(suffix for suffix in SUFFIXES if self.file.lower().endswith(suffix))


class Piece(NamedTuple):
    """Rows of one file, the first of them numbered `first_row`: bytes, row groups or rows `start` up to `stop`."""

    source: Source
    start: int
    stop: int
    first_row: int


class Place(NamedTuple):
    """Where a row stands: its file and its number there, from 1, not counting a header."""

    file: str
    row: int


def find(patterns: list[str], prompt_column: str | None = None) -> list[Source]:
    """The files that paths, globs and fsspec URLs name, each looked into, in the order of their names.

    Raises:
        SourceError: nothing matches, a file of another kind, without rows, or without a column of prompts.
    """
    files = dict.fromkeys(file for pattern in patterns for file in expand(pattern))
    return [_look_into(file, prompt_column) for file in files]


def expand(pattern: str) -> list[str]:
    """The paths that a glob matches, sorted; any other path as it is. Raises SourceError where nothing matches."""
    fs, path = fsspec.core.url_to_fs(pattern)
    if not has_magic(path) or fs.exists(path):
        return [pattern]
    found = sorted(map(str, retry(lambda: fs.glob(path))))
    if not found:
        raise SourceError(f"{pattern}: no file matches")
    return [fs.unstrip_protocol(file) if "://" in pattern else file for file in found]


def _look_into(file: str, prompt_column: str | None) -> Source:
    if not file.lower().endswith(SUFFIXES):
        raise SourceError(f"{file}: not a prompt file; allowed are {', '.join(SUFFIXES)}")
    source = Source(file)
    try:
        if source.suffix in _DELIMITERS:
            with _open(file) as stream:
                end, fields = _header(stream, _DELIMITERS[source.suffix])
            if isinstance(fields, RowError):
                raise SourceError(f"{file}: its header cannot be read: {fields}")
            if not _is_text("".join(fields)):
                raise SourceError(f"{file}: its header is not valid UTF-8")
            header = tuple(name.removeprefix("\ufeff").strip() for name in fields)
            if len(set(header)) < len(header):
                raise SourceError(f"{file}: two columns have the same name")
            source = Source(file, header, end)
        piece = next(cut(source, 1), None)
        first = None if piece is None else next(read(piece), None)
    except FileNotFoundError:
        raise SourceError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file}: {str(error).splitlines()[0]}") from None
    if first is None:
        raise SourceError(f"{file}: it holds no prompts")
    row = first[1]
    if isinstance(row, dict):
        try:
            select_prompt(row, prompt_column)
        except RowError as error:
            raise SourceError(f"{file}: {error}") from None
    return source


def _header(stream: IO[bytes], delimiter: str) -> tuple[int, list[str] | RowError]:
    """The first record that is not blank, and the byte after it."""
    end = 0
    for end, fields in records(stream, 0, None, delimiter):
        if isinstance(fields, RowError) or "".join(fields).strip("\ufeff \t\r\n"):
            return end, fields
    return end, []


def select_prompt(row: dict[str, Any], prompt_column: str | None) -> dict[str, Any]:
    """The row with its prompts under `prompt`; the column is matched without case.

    Raises:
        RowError: there is no such column.
    """
    wanted = (prompt_column or "prompt").strip().lower()
    column = next((name for name in row if name.strip().lower() == wanted), None)
    if column is None:
        names = ", ".join(map(repr, row))
        raise RowError(f"no column {prompt_column or 'prompt'!r} among {names}; --prompt-column names the column")
    if wanted == "prompt":
        return row
    # A column called prompt that the user passed over travels on under a name that is no Request field.
    others = {f"{k}_" if k.strip().lower() == "prompt" else k: v for k, v in row.items() if k != column}
    return {"prompt": row[column], **others}


def count(source: Source) -> int:
    """About how many rows the file holds, from its footer or its size."""
    if source.suffix == ".toml":
        return len(_template(source.file))
    if source.suffix == ".parquet":
        with _open(source.file) as stream:
            return pq.ParquetFile(stream).metadata.num_rows
    with _open(source.file) as stream:
        size = stream.seek(0, 2)
        stream.seek(source.start)
        sample = stream.read(2**16)
    return math.ceil(sample.count(b"\n") * (size - source.start) / max(len(sample), 1)) + 1


def cut(source: Source, rows: int = PIECE_ROWS) -> Iterator[Piece]:
    """The file in pieces of `rows` rows, or of whole row groups; together they are the file."""
    if source.suffix == ".toml":
        total = len(_template(source.file))
        for start in range(0, total, rows):
            yield Piece(source, start, min(start + rows, total), start + 1)
        return
    with _open(source.file) as stream:
        if source.suffix == ".parquet":
            first = 1
            metadata = pq.ParquetFile(stream).metadata
            for group in range(metadata.num_row_groups):
                if metadata.row_group(group).num_rows:
                    yield Piece(source, group, group + 1, first)
                first += metadata.row_group(group).num_rows
            return
        start, first, held = source.start, 1, 0
        end = start
        for end, _ in records(stream, start, None, _DELIMITERS.get(source.suffix)):
            held += 1
            if held == rows:
                yield Piece(source, start, end, first)
                start, first, held = end, first + held, 0
        if held:
            yield Piece(source, start, end, first)


def read(piece: Piece) -> Iterator[tuple[Place, dict[str, Any] | RowError]]:
    """The piece's rows in order, each with its place; a row that cannot be read is its error."""
    source = piece.source
    for number, row in enumerate(_rows(piece), piece.first_row):
        yield Place(source.file, number), row


def _rows(piece: Piece) -> Iterator[dict[str, Any] | RowError]:
    source = piece.source
    if source.suffix == ".toml":
        template = _template(source.file)
        yield from (template[i] for i in range(piece.start, piece.stop))
        return
    with _open(source.file) as stream:
        if source.suffix == ".parquet":
            groups = list(range(piece.start, piece.stop))
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024, row_groups=groups):
                yield from tables.rows(batch)
            return
        for _, record in records(stream, piece.start, piece.stop, _DELIMITERS.get(source.suffix)):
            yield record if isinstance(record, RowError) else _row(source, record)


def _row(source: Source, record: list[str]) -> dict[str, Any] | RowError:
    """A text file's record as a row."""
    text = "".join(record)
    if not _is_text(text):
        return RowError("not valid UTF-8")
    if source.suffix == ".txt":
        return {"prompt": record[0].removeprefix("\ufeff")}
    if not record or (source.suffix == ".jsonl" and not text.strip()):
        return RowError("a blank line")
    if source.suffix == ".jsonl":
        try:
            row = json.loads(record[0].removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            return RowError(f"not JSON: {error}")
        return row if isinstance(row, dict) else RowError("not a JSON object")
    if len(record) > len(source.header):
        return RowError(f"{len(record)} cells where the header names {len(source.header)} columns")
    return dict(zip(source.header, record, strict=False))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open(file: str) -> IO[bytes]:
    # Buffered, because the readline of fsspec's own files for buckets takes no limit.
    return retry(lambda: io.BufferedReader(fsspec.open(file, "rb").open()))  # pyright: ignore[reportAttributeAccessIssue]


def _template(file: str) -> Template:
    with _open(file) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        return _parsed(text)
    except TemplateError as error:
        raise SourceError(f"{file}: {error}") from None


_parsed = lru_cache(maxsize=16)(Template.parse)

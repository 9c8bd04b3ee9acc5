"""Prompt files to rows: found, checked, cut into pieces that workers read alone, read in bounded memory.

A row is a mapping of the file's columns. Text files are cut at byte offsets, Parquet files and templates at row
numbers, so a piece is a few numbers and any worker may read it.
"""

import contextlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from glob import has_magic
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import tables
from pipelines.records import MAX_RECORD, RowError, records
from pipelines.storage import parallel_map
from pipelines.templates import Template, TemplateError
from sdjax.console import says_why
from sdjax.retrying import is_absent, retry
from sdjax.training.samples import DataError, json_object
from sdjax.values import PICTURES, RequestError, coerce, is_web, lines, one_line

PIECE_ROWS = 16_384
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet", ".toml")

_READERS = 16  # files that are looked into at once
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class SourceError(ValueError):
    """Prompt files that no job can run on; one line that names the file."""


class Source(NamedTuple):
    """A prompt file; `header` holds a CSV's or TSV's column names, `start` the byte where its rows begin.

    `rows` is about how many it holds, exactly of Parquet and templates; None where nobody has looked. `seed` is where a
    template that names none begins to count.
    """

    file: str
    header: tuple[str, ...] = ()
    start: int = 0
    rows: int | None = None
    seed: int = 0

    @property
    def suffix(self) -> str:
        return next(suffix for suffix in SUFFIXES if self.file.lower().endswith(suffix))


class Piece(NamedTuple):
    """Rows of one file, the first of them numbered `first_row`: bytes or rows `start` up to `stop`."""

    source: Source
    start: int
    stop: int
    first_row: int


class Place(NamedTuple):
    """Where a row stands: its file and its number there, from 1, not counting a header."""

    file: str
    row: int


def find(patterns: list[str], prompt_column: str | None = None, seed: Any = 0) -> list[Source]:
    """The files that paths, globs and fsspec URLs name, each looked into, in the order of their names.

    Of a glob's matches those without rows are left out: jobs that export tables write empty parts.

    seed: the job's own, from which templates that name none count.

    Raises:
        RequestError: a seed that is no whole number.
        SourceError: nothing matches, or nothing with rows; a file of another kind, or without a column of prompts.
    """
    matches = {pattern: expand(pattern) for pattern in patterns}
    files = dict.fromkeys(file for matched in matches.values() for file in matched)
    first = coerce("seed", seed, (int, False))
    looked_into = parallel_map(
        partial(_look_into, prompt_column), (Source(file, seed=first) for file in files), _READERS
    )
    found = dict(zip(files, looked_into, strict=True))
    for pattern, matched in matches.items():
        if not any(found[file].rows for file in matched):
            raise SourceError(f"{pattern}: it holds no prompts")
    return [source for source in found.values() if source.rows]


def expand(pattern: str) -> list[str]:
    """The paths that a glob matches, sorted; any other path as it is. Raises SourceError where nothing matches."""
    fs, path = fsspec.core.url_to_fs(pattern)
    if not has_magic(path) or fs.exists(path):
        return [pattern]
    found = sorted(map(str, retry(lambda: fs.glob(path))))
    if not found:
        raise SourceError(f"{pattern}: no file matches")
    return [fs.unstrip_protocol(file) if "://" in pattern else file for file in found]


def _look_into(prompt_column: str | None, source: Source) -> Source:
    file = source.file
    if not file.lower().endswith(SUFFIXES):
        raise SourceError(f"{file}: not a prompt file; allowed are {', '.join(SUFFIXES)}")
    if not _is_text(file):
        raise SourceError(f"{file!r}: its name is not valid UTF-8, as which manifests keep it; rename it")
    try:
        source, row = _first_row(source)
    except Exception as error:
        if isinstance(error, SourceError) or not (says_why(error) or isinstance(error, pa.ArrowException)):
            raise
        said = "no such file" if is_absent(error) else one_line(error.__cause__ or error)
        raise SourceError(f"{file}: {said}") from None
    if isinstance(row, dict):
        try:
            select_prompt(row, prompt_column)
        except RowError as error:
            raise SourceError(f"{file}: {error}") from None
    return source


def _first_row(source: Source) -> tuple[Source, dict[str, Any] | RowError | None]:
    """The file with what it says of itself, and its first row; of Parquet its columns, without their values."""
    if source.suffix == ".toml":
        template = _template(source)
        return source._replace(rows=len(template)), template[0]
    with _open(source.file) as stream:
        if source.suffix == ".parquet":
            parquet = pq.ParquetFile(stream)
            names = parquet.schema_arrow.names
            _check_names(source.file, names)
            return source._replace(rows=parquet.metadata.num_rows), dict.fromkeys(names)
        delimiter = _DELIMITERS.get(source.suffix)
        if delimiter is not None:
            source = _with_header(source, stream, delimiter)
        _, record = next(records(stream, source.start, None, delimiter), (0, None))
        if record is None:
            return source._replace(rows=0), None
        row = record if isinstance(record, RowError) else _row(source, record)
        return source._replace(rows=_estimate(stream, source.start)), row


def _with_header(source: Source, stream: IO[bytes], delimiter: str) -> Source:
    """The source with its first record that is not blank as its header."""
    end = 0
    for end, fields in records(stream, 0, None, delimiter):
        if isinstance(fields, RowError):
            raise SourceError(f"{source.file}: its header cannot be read: {fields}")
        if not _is_text("".join(fields)):
            raise SourceError(f"{source.file}: its header is not valid UTF-8")
        header = tuple(name.strip() for name in fields)
        if any(header):
            _check_names(source.file, header)
            return source._replace(header=header, start=end)
    return source._replace(start=end)


def _check_names(file: str, columns: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        which = "no name; commas at the end of a line make such" if columns.count("") > 1 else "the same name"
        raise SourceError(f"{file}: two columns have {which}")


def _estimate(stream: IO[bytes], start: int) -> int:
    """About how many lines there are from byte `start`, by those at three places."""
    size = stream.seek(0, 2) - start
    rates = []
    for place in {0, max(size - MAX_RECORD, 0) // 2, max(size - MAX_RECORD, 0)}:
        stream.seek(start + place)
        sample = stream.read(MAX_RECORD)
        rates.append(max(sample.count(b"\n"), 1) / max(len(sample), 1))
    return math.ceil(size * sum(rates) / len(rates))


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
    """About how many rows the file holds."""
    if source.rows is None:
        source, _ = _first_row(source)
    assert source.rows is not None, "it has been looked into"
    return source.rows


def cut(source: Source, rows: int = PIECE_ROWS) -> Iterator[Piece]:
    """The file in pieces of `rows` rows; together they are the file."""
    if source.suffix in (".parquet", ".toml"):
        total = count(source)
        for start in range(0, total, rows):
            yield Piece(source, start, min(start + rows, total), start + 1)
        return
    with _open(source.file) as stream:
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
    """The piece's rows in order, each with its place; a row that cannot be read is its error.

    Raises:
        SourceError: a Parquet file is damaged, so that its rows cannot be told apart.
    """
    source = piece.source
    for number, row in enumerate(_rows(piece), piece.first_row):
        yield Place(source.file, number), row


def pictures(source: Source) -> Iterator[str]:
    """Every picture that a row of the file names; none is looked at."""
    columns = source.header or (_first_row(source)[1] if source.suffix == ".parquet" else None)
    if source.suffix == ".txt" or (isinstance(columns, Iterable) and not any(map(_is_of_pictures, columns))):
        return
    for piece in cut(source):
        for _, row in read(piece):
            if isinstance(row, dict):
                yield from pictures_in(row)


def pictures_in(fields: Mapping[str, Any]) -> Iterator[str]:
    """The pictures that a row, or a job's options, name."""
    for name, value in fields.items():
        if value and _is_of_pictures(name):
            with contextlib.suppress(RequestError):
                yield from lines(coerce(name.strip().lower(), value, (str, True)))


def _is_of_pictures(column: str) -> bool:
    return column.strip().lower() in PICTURES


def _rows(piece: Piece) -> Iterator[dict[str, Any] | RowError]:
    source = piece.source
    if source.suffix == ".toml":
        template = _template(source)
        yield from (template[i] for i in range(piece.start, piece.stop))
        return
    with _open(source.file) as stream:
        if source.suffix == ".parquet":
            try:
                yield from tables.read(stream, piece.start, piece.stop)
            except (OSError, ValueError, pa.ArrowException) as error:  # pyarrow's, which names no file
                raise SourceError(f"{source.file}: it is damaged, or cannot be read: {one_line(error)}") from error
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
            row = json.loads(record[0].removeprefix("\ufeff"), object_pairs_hook=json_object)
        except DataError as error:
            return RowError(str(error))
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
    def opened() -> Any:
        fs, path = fsspec.core.url_to_fs(file)
        if is_web(file) and not is_given_in_parts(file):
            return io.BytesIO(fs.cat_file(path))  # type: ignore[arg-type]
        return fs.open(path, "rb")

    # Buffered, because the readline of fsspec's own files for buckets takes no limit.
    return retry(lambda: io.BufferedReader(opened()))


@lru_cache(maxsize=1024)
def is_given_in_parts(file: str) -> bool:
    """Whether a web server gives a file from within, where pieces begin; a plain one sends all of it each time."""
    try:
        fs, path = fsspec.core.url_to_fs(file)
        with fs.open(path, "rb") as stream:
            stream.seek(1)
            stream.read(1)
    except ValueError:
        return False
    return True


def _template(source: Source) -> Template:
    with _open(source.file) as stream:
        text = stream.read().decode("utf-8-sig")
    try:
        return _parsed(text, source.seed)
    except TemplateError as error:
        raise SourceError(f"{source.file}: {error}") from None


_parsed = lru_cache(maxsize=16)(Template.parse)

"""Parquet files to rows of Python values; a row that is too long or that Python cannot hold is an error of its own."""

from collections.abc import Iterator
from itertools import accumulate
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.records import MAX_RECORD, RowError

_BATCH = 64  # rows that are held at once; a file of a few hundred bytes may repeat a cell of any size in all of them
_BUFFER = 2**23  # bytes of a column that are read at once


def open_parquet(stream: IO[bytes]) -> pq.ParquetFile:
    """The file, to be read by parts of a column; pyarrow's own way holds all of a row group, whatever its size.

    It is read by the caller's thread: Arrow's may outlive a call, and abort a process that ends meanwhile.
    """
    return pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)


def read(stream: IO[bytes], start: int, stop: int) -> Iterator[dict[str, Any] | RowError]:
    """The file's rows `start` up to `stop`, counted from 0. A row group's earlier rows are decoded and passed over."""
    parquet = open_parquet(stream)
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    firsts = [0, *accumulate(sizes)]
    groups = [i for i, size in enumerate(sizes) if firsts[i] < stop and start < firsts[i] + size]
    here = firsts[groups[0]] if groups else 0
    for batch in parquet.iter_batches(_BATCH, groups, use_threads=False):
        low, high = max(start - here, 0), min(stop - here, batch.num_rows)
        if low < high:
            yield from _bounded(batch.slice(low, high - low))
        here += batch.num_rows
        if here >= stop:
            return


def _bounded(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """The batch's rows; one that is longer than a text file's may be is its RowError."""
    for i, column in enumerate(batch.columns):
        if isinstance(column, pa.DictionaryArray):
            batch = batch.set_column(i, batch.schema.names[i], column.dictionary_decode())
    if batch.nbytes <= MAX_RECORD:
        yield from rows(batch)
        return
    for row in (batch.slice(i, 1) for i in range(batch.num_rows)):
        yield from [RowError(f"a row of more than {MAX_RECORD:,} bytes")] if row.nbytes > MAX_RECORD else rows(row)


def rows(batch: pa.RecordBatch) -> list[dict[str, Any] | RowError]:
    """The batch's rows; a row with text that is not UTF-8, or a time that Python does not know, is its RowError."""
    try:
        return _without_nanoseconds(batch).to_pylist()
    except UnicodeDecodeError:
        reason = "not valid UTF-8"
    except (ValueError, OverflowError, LookupError) as error:  # LookupError: of a time zone
        reason = f"a value that cannot be read: {error}"
    if batch.num_rows == 1:
        return [RowError(reason)]
    return [row for i in range(batch.num_rows) for row in rows(batch.slice(i, 1))]


def _without_nanoseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with times in nanoseconds as text: Python's own end at microseconds."""
    for i, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", None) == "ns":
            batch = batch.set_column(i, field.name, batch.column(i).cast(pa.string()))
    return batch

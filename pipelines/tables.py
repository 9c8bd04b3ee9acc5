"""Parquet files to rows of Python values; a row that Python cannot hold is an error of its own."""

from typing import Any

import pyarrow as pa

from pipelines.records import RowError


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

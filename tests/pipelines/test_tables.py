"""Parquet to rows: what Python cannot hold costs its own row."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import tables
from pipelines.records import MAX_RECORD, RowError

SECONDS_OF_YEAR_9999 = 253_370_764_800


class Stream(io.BytesIO):
    """A file that knows the most bytes it was asked for at once."""

    most = 0

    def read(self, size=-1):
        data = super().read(size)
        self.most = max(self.most, len(data))
        return data


@given(
    total=st.integers(0, 60),
    group=st.integers(1, 60),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
    batch=st.integers(1, 20),
)
def test_any_rows_of_any_row_groups_are_read(total, group, start, length, batch):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"n": pa.array(range(total), pa.int64())}), buffer, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BATCH", batch)
        found = [row["n"] for row in tables.read(buffer, start, start + length)]
    assert found == list(range(total))[start : start + length]


def test_a_large_row_group_is_read_by_parts(monkeypatch):
    monkeypatch.setattr(tables, "_BUFFER", 2**16)
    stream = Stream()
    numbers = np.random.default_rng(0).integers(0, 2**62, 200_000)
    pq.write_table(pa.table({"n": numbers}), stream, row_group_size=200_000, use_dictionary=False, compression="none")
    assert [row["n"] for row in tables.read(stream, 199_998, 200_000)] == numbers[-2:].tolist()
    assert stream.most < len(stream.getvalue()) / 2


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_row_longer_than_a_text_file_s_may_be_is_refused_alone(kind):
    buffer = io.BytesIO()
    cells = ["a", "x" * (MAX_RECORD + 1), "y" * (MAX_RECORD - 100), "b"]
    pq.write_table(pa.table({"prompt": pa.array(cells, pa.string()).cast(kind), "n": range(4)}), buffer)
    first, error, *others = tables.read(buffer, 0, 4)
    assert [row["prompt"] for row in (first, *others)] == [cells[0], *cells[2:]]
    assert str(error) == "a row of more than 1,048,576 bytes"


def test_few_rows_are_held_at_once_however_often_a_small_file_repeats_a_cell(monkeypatch):
    buffer, held, real = io.BytesIO(), [], tables._bounded
    monkeypatch.setattr(tables, "_bounded", lambda batch: held.append(batch.nbytes) or real(batch))
    pq.write_table(pa.table({"prompt": ["x" * 2**16] * 1024}), buffer, compression="zstd")
    assert len(buffer.getvalue()) < 4096
    assert sum(row["prompt"] == "x" * 2**16 for row in tables.read(buffer, 0, 1024)) == 1024
    assert max(held) < 2**24


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (pa.date32(), 0, 4_000_000),
        (pa.timestamp("s"), 0, 400_000_000_000),
        (pa.timestamp("us"), 0, -(10**18)),
        (pa.duration("s"), 0, 10**16),
        (pa.struct([("t", pa.date64())]), {"t": 0}, {"t": 10**15}),
    ],
)
def test_a_time_that_python_does_not_know_spoils_its_row_only(kind, good, bad):
    storage = {pa.date32(): pa.int32()}.get(kind)
    column = pa.array([good, bad, good], storage).cast(kind) if storage else pa.array([good, bad, good], kind)
    first, error, last = tables.rows(pa.record_batch({"prompt": ["a", "b", "c"], "t": column}))
    assert (first["prompt"], last["prompt"]) == ("a", "c")
    assert isinstance(error, RowError)
    assert "cannot be read" in str(error)


def test_a_time_zone_that_is_none_spoils_rows_and_no_job():
    batch = pa.record_batch({"prompt": ["a"], "t": pa.array([0], pa.timestamp("us", tz="Mars/Base"))})
    assert isinstance(tables.rows(batch)[0], RowError)


@given(nanoseconds=st.lists(st.integers(0, SECONDS_OF_YEAR_9999), min_size=1, max_size=20))
def test_nanoseconds_come_as_text_and_none_is_lost(nanoseconds):
    batch = pa.record_batch({"prompt": ["a"] * len(nanoseconds), "t": pa.array(nanoseconds, pa.timestamp("ns"))})
    found = [row["t"] for row in tables.rows(batch)]
    assert pa.array(found).cast(pa.timestamp("ns")).cast(pa.int64()).to_pylist() == nanoseconds


READ = """
import os, sys
from pipelines import contact_sheet, image_samples, tables
from pipelines.storage import Store

threads, file = os.listdir("/proc/self/task"), sys.argv[1]
store = Store(os.path.dirname(file))
assert store.read_table("a.parquet").num_rows == 256
with open(file, "rb") as stream:
    assert len(list(tables.read(stream, 0, 256))) == 256
assert len(list(image_samples._rows(file, 0))) == 256
assert len(contact_sheet._rows(contact_sheet._manifest(store, "a.parquet"), 256)) == 256
assert os.listdir("/proc/self/task") == threads
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists a process's threads on Linux")
def test_arrow_reads_in_no_thread_that_could_outlive_the_call(tmp_path):
    columns = {name: ["x"] * 256 for name in ("prompt", "image", "id", "file", "shard", "sampler")}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    subprocess.run([sys.executable, "-c", READ, str(tmp_path / "a.parquet")], check=True, cwd=Path(__file__).parents[2])

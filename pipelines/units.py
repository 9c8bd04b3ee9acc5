"""Rows to units of work: checked, named, deduplicated, rid of what is done, packed.

A row is sent to the shard of the plan that its id names, so that all rows of one id, and the id in a manifest where
its image is made already, meet in one place. A shard holds about `SHARD_ROWS` rows; its units are cut from the rows
sorted by program, length and id. So a plan depends on its input alone, not on the order in which a runner brings it,
and no worker holds more than a shard of it. Only rows move between workers, a few hundred in one compressed element.
"""

import hashlib
import itertools
import json
import math
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import TaggedOutput

from pipelines.progress import Heartbeat
from pipelines.sources import Piece, Place, RowError, Source, cut, read, select_prompt
from pipelines.storage import Store
from sdjax.request import Request, RequestError

SHARD_ROWS = 16_384
COUNTS = "counts"  # the tagged output of each stage's share of the account
NAMESPACE = "sdjax"

_SHOWN = 1_000  # characters of a cell that a rejected row's record keeps


class Planner(Protocol):
    """What planning asks of a model without loading it: `sdjax.spec.Spec`."""

    def resolve(self, request: Request) -> Request: ...
    def id(self, request: Request) -> str: ...
    def program(self, request: Request) -> Any: ...
    def calls(self, request: Request) -> int: ...


class Row(NamedTuple):
    """An image to make."""

    id: str
    program: str  # equal where one compiled program serves; opaque
    calls: int  # network rows that its batch must run for it
    request: Request  # without None where the checkpoint has a default
    extras: dict[str, Any]  # the input's other columns
    place: Place


class Unit(NamedTuple):
    """Images that one worker makes, writes and commits together; the name is a hash of their ids."""

    name: str
    rows: list[Row]


class PackedUnit(NamedTuple):
    """A unit as it travels."""

    name: str
    images: int
    blob: bytes


def pack(value: Any) -> bytes:
    return zlib.compress(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), 1)


def unpack(blob: bytes) -> Any:
    return pickle.loads(zlib.decompress(blob))


def shard_count(rows: int) -> int:
    return max(1, round(rows / SHARD_ROWS))


def shard_of(id: str, shards: int) -> int:
    return int(id[:8], 16) % shards


def unit_name(ids: Iterable[str]) -> str:
    return hashlib.sha256("".join(sorted(ids)).encode()).hexdigest()[:32]


def make_units(rows: Iterable[Row], size: int) -> Iterator[Unit]:
    """The rows, of distinct ids and in any order, in units of one program, at most `size` images and like lengths."""
    ordered = sorted(rows, key=lambda row: (row.program, row.calls, row.id))
    for _, group in itertools.groupby(ordered, key=lambda row: row.program):
        same_program = list(group)
        for start in range(0, len(same_program), size):
            unit = same_program[start : start + size]
            yield Unit(unit_name(row.id for row in unit), unit)


def padded_calls(rows: Iterable[Row], batch: int) -> int:
    """Network rows run for images in this order, `batch` neighbours of one program at a time.

    A batch is always full, and as long as its longest image.
    """
    total = 0
    for _, group in itertools.groupby(rows, key=lambda row: row.program):
        calls = [row.calls for row in group]
        total += sum(batch * max(calls[i : i + batch]) for i in range(0, len(calls), batch))
    return total


class CutFiles(beam.DoFn):
    """Source -> its Pieces."""

    def process(self, element: Source) -> Iterator[Piece]:
        yield from cut(element)


class PlanRows(beam.DoFn):
    """Piece -> (shard, packed rows); what cannot be used goes to rejected/ with its place and the reason."""

    def __init__(self, planner: Planner, defaults: Mapping[str, Any], prompt_column: str | None, shards: int, out: str):
        self._planner, self._defaults, self._prompt_column = planner, dict(defaults), prompt_column
        self._shards, self._store = shards, Store(out)
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("rows", "rejected", "duplicates")}

    def setup(self) -> None:
        self._heartbeat = Heartbeat(self._store)

    def process(self, element: Piece) -> Iterator[Any]:
        started, counts, rejected = time.monotonic(), Counter(), []
        seen: set[str] = set()
        shards: dict[int, list[Row]] = {}
        held = 0
        for place, values in read(element):
            counts["rows"] += 1
            self._heartbeat.add(rows=1)
            try:
                if isinstance(values, RowError):
                    raise values
                row = self._plan(place, values)
            except (RowError, RequestError) as error:
                rejected.append(rejection(place, values, error))
                continue
            if row.id in seen:
                counts["duplicates"] += 1
                continue
            seen.add(row.id)
            shards.setdefault(shard_of(row.id, self._shards), []).append(row)
            held += 1
            if held == SHARD_ROWS:
                yield from ((shard, pack(("rows", rows))) for shard, rows in shards.items())
                shards, held = {}, 0
        yield from ((shard, pack(("rows", rows))) for shard, rows in shards.items())
        if rejected:
            write_rejected(self._store, rejected)
        counts["rejected"] = len(rejected)
        for name, counter in self._counters.items():
            counter.inc(counts[name])
        self._heartbeat.add(rejected=counts["rejected"])
        self._heartbeat.flush()
        yield TaggedOutput(COUNTS, {**counts, "seconds": {"read": time.monotonic() - started}})

    def _plan(self, place: Place, values: dict[str, Any]) -> Row:
        request, extras = Request.from_row(select_prompt(values, self._prompt_column), **self._defaults)
        request = self._planner.resolve(request)
        program = repr(self._planner.program(request))
        return Row(self._planner.id(request), program, self._planner.calls(request), request, extras, place)


class ReadDone(beam.DoFn):
    """Names of manifests -> (shard, packed ids of the images that they commit)."""

    def __init__(self, shards: int, out: str):
        self._shards, self._store = shards, Store(out)

    def process(self, element: list[str]) -> Iterator[tuple[int, bytes]]:
        shards: dict[int, list[str]] = {}
        for name in element:
            table = pq.read_table(pa.BufferReader(self._store.read(name)), columns=["id"])
            for id in table["id"].to_pylist():
                shards.setdefault(shard_of(id, self._shards), []).append(id)
        yield from ((shard, pack(("done", ids))) for shard, ids in shards.items())


class MakeUnits(beam.DoFn):
    """(shard, its packed rows and ids) -> PackedUnits of the images yet to make."""

    def __init__(self, size: int, out: str):
        self._size, self._store = size, Store(out)
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("duplicates", "already_done", "planned")}

    def setup(self) -> None:
        self._heartbeat = Heartbeat(self._store)

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[Any]:
        started, counts = time.monotonic(), Counter()
        rows: dict[str, Row] = {}
        done: set[str] = set()
        for kind, values in map(unpack, element[1]):
            if kind == "done":
                done.update(values)
                continue
            for row in values:
                other = rows.get(row.id)
                counts["duplicates"] += other is not None
                if other is None or row.place < other.place:
                    rows[row.id] = row
        counts["already_done"] = len(rows.keys() & done)
        left = [row for id, row in rows.items() if id not in done]
        counts["planned"] = len(left)
        for unit in make_units(left, self._size):
            yield PackedUnit(unit.name, len(unit.rows), pack(unit))
        for name, counter in self._counters.items():
            counter.inc(counts[name])
        self._heartbeat.add(planned=counts["planned"])
        self._heartbeat.flush()
        yield TaggedOutput(COUNTS, {**counts, "seconds": {"plan": time.monotonic() - started}})


def rejection(place: Place, values: Any, error: Exception) -> dict[str, Any]:
    """A line of rejected/*.jsonl."""
    shown = {_shown(k): _shown(v) for k, v in values.items()} if isinstance(values, dict) else None
    return {"file": place.file, "row": place.row, "reason": " ".join(_shown(str(error)).split()), "values": shown}


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def write_rejected(store: Store, lines: list[dict[str, Any]]) -> None:
    """Write one file of rejected rows, named by its content, so that a repeated piece replaces its own."""
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    store.write(f"rejected/{hashlib.sha256(data).hexdigest()[:32]}.jsonl", data)

"""Rows to units of work: checked, named, deduplicated, rid of what is done, packed.

A row is sent to the shard of the plan that its id names, so that all rows of one id, and the id in a manifest where
its image is made already, meet in one place. A shard holds about `SHARD_ROWS` rows; its units are cut from the rows
sorted by program, length and id. So a plan depends on its input alone, not on the order in which a runner brings it,
and no worker holds more than a shard of its rows, however many the output holds already. Only rows and ids move between
workers, a few hundred in one compressed element.

Rows of a data set whose pictures lie together in large files go one step further: what a shard has left is sent to its
file, and units are cut from neighbours, so that a file is read from end to end.
"""

import hashlib
import itertools
import json
import math
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import TaggedOutput

from pipelines.layout import find
from pipelines.progress import Heartbeat
from pipelines.records import RowError
from pipelines.rejected import UNUSABLE, rejection, write_rejected
from pipelines.sources import Place, select_prompt
from pipelines.storage import Store, parallel_map
from sdjax import inputs
from sdjax.request import Request
from sdjax.values import PICTURES

SHARD_ROWS = 16_384
COUNTS = "counts"  # the tagged output of each stage's share of the account
NAMESPACE = "sdjax"

_MANIFESTS_A_READER = 64
_HELD = 2**26  # characters of rows that a piece's reader holds


class Planner(Protocol):
    """What planning asks of a model without loading it: `sdjax.spec.Spec`."""

    def resolve(self, request: Any) -> Any: ...
    def id(self, request: Any) -> str: ...
    def program(self, request: Any) -> Any: ...
    def calls(self, request: Any) -> int: ...


class Row(NamedTuple):
    """An image to make, or one to encode."""

    id: str
    program: str  # equal where one compiled program serves; opaque
    calls: int  # network rows that its batch must run for it
    request: Any  # the Request, without None where the checkpoint has a default; or the picture to encode
    extras: str  # the input's other columns, as a JSON object
    place: Place


class Unit(NamedTuple):
    """Images that one worker makes, writes and commits together; the name is a hash of their ids as planned."""

    name: str
    rows: list[Row]


def extras_json(extras: dict[str, Any]) -> str:
    """A row's other columns as the manifest keeps them; a number that is not finite, which JSON has none of, is null.

    Raises:
        UnicodeEncodeError, RecursionError: a value that no file can hold.
    """
    text = json.dumps(_finite(extras), ensure_ascii=False, sort_keys=True, default=str, allow_nan=False)
    text.encode()
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def by_length(row: Row) -> Any:
    return row.calls, row.id


def by_place(row: Row) -> Any:
    return row.place


def make_units(rows: Iterable[Row], size: int, order: Callable[[Row], Any] = by_length) -> Iterator[Unit]:
    """The rows, of distinct ids and in any order, in units of one program and at most `size` neighbours in `order`."""
    ordered = sorted(rows, key=lambda row: (row.program, order(row)))
    for _, group in itertools.groupby(ordered, key=lambda row: row.program):
        same_program = list(group)
        for start in range(0, len(same_program), size):
            together = same_program[start : start + size]
            yield Unit(unit_name(row.id for row in together), together)


def padded_calls(rows: Iterable[Row], batch: int) -> int:
    """Network rows run for images in this order, `batch` neighbours of one program at a time.

    A batch is always full, and as long as its longest image.
    """
    total = 0
    for _, group in itertools.groupby(rows, key=lambda row: row.program):
        calls = [row.calls for row in group]
        total += sum(batch * max(calls[i : i + batch]) for i in range(0, len(calls), batch))
    return total


@dataclass(frozen=True)
class PlanRequest:
    """A row of a prompt file, as an image to make."""

    planner: Planner
    defaults: Mapping[str, Any]
    prompt_column: str | None

    def __call__(self, place: Place, values: dict[str, Any]) -> Row:
        """Raises any of `UNUSABLE` for a row that cannot be used."""
        request, extras = Request.from_row(select_prompt(values, self.prompt_column), **self.defaults)
        request = self.planner.resolve(request)
        program = repr(self.planner.program(request))
        return Row(self.planner.id(request), program, self.planner.calls(request), request, extras_json(extras), place)

    def fetches(self, read: tuple[Place, Any]) -> bool:
        """Whether a row that was read names a picture, or the defaults do."""
        if not isinstance(read[1], dict):
            return False
        named = itertools.chain(self.defaults.items(), read[1].items())
        return any(value and name.strip().lower() in PICTURES for name, value in named)


class PlanRows(beam.DoFn):
    """A piece of the input -> (shard, packed rows); what cannot be used goes to rejected/ with place and reason.

    Args:
        read: a piece's rows in order, each with its place; a row that cannot be read is its RowError.
        plan: makes a Row of one, or raises any of `UNUSABLE`.
        shards: of the plan.
        out: the output.
        fetches: whether `plan` waits for a disk or a network with what was read; such rows are planned some at a time.
    """

    def __init__(
        self,
        read: Callable[[Any], Iterable[tuple[Place, Any]]],
        plan: Callable[[Place, Any], Row],
        shards: int,
        out: str,
        fetches: Callable[[tuple[Place, Any]], bool] = lambda _: False,
    ):
        self._read, self._plan, self._shards, self._store = read, plan, shards, Store(out)
        self._fetches = fetches
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("rows", "rejected", "duplicates")}

    def setup(self) -> None:
        self._heartbeat = Heartbeat(self._store)

    def process(self, element: Any) -> Iterator[Any]:
        started, counts, rejected = time.monotonic(), Counter(), []
        seen: set[str] = set()
        shards: dict[int, list[Row]] = {}
        held = size = 0
        with inputs.keeping():  # rows may all have a picture of the job's own
            for place, values, row in parallel_map(self._planned, self._read(element), waits=self._fetches):
                counts["rows"] += 1
                self._heartbeat.add(rows=1)
                if isinstance(row, Exception):
                    rejected.append(rejection(place, values, row))
                    continue
                if row.id in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(row.id)
                shards.setdefault(shard_of(row.id, self._shards), []).append(row)
                held, size = held + 1, size + _text_size(row)
                if held == SHARD_ROWS or size > _HELD:
                    yield from ((shard, ("rows", pack(rows))) for shard, rows in shards.items())
                    shards, held, size = {}, 0, 0
        yield from ((shard, ("rows", pack(rows))) for shard, rows in shards.items())
        write_rejected(self._store, repr(element), rejected)
        counts["rejected"] = len(rejected)
        for name, counter in self._counters.items():
            counter.inc(counts[name])
        self._heartbeat.add(rejected=counts["rejected"])
        yield TaggedOutput(COUNTS, {**counts, "seconds": {"read": time.monotonic() - started}})

    def finish_bundle(self) -> None:
        self._heartbeat.flush()

    def _planned(self, read: tuple[Place, Any]) -> tuple[Place, Any, Row | Exception]:
        """What was read with its Row, or with why there is none."""
        place, values = read
        if isinstance(values, RowError):
            return place, values, values
        try:
            return place, values, self._plan(place, values)
        except UNUSABLE as error:
            return place, values, error


def _text_size(row: Row) -> int:
    """About how many bytes the row's text takes, among which may be pictures."""
    texts = (row.extras, *vars(row.request).values())
    return sum(len(text) for text in texts if isinstance(text, str))


def manifest_batches(out: str) -> Iterator[list[str]]:
    """An output -> the names of its manifests, as many together as one reader takes."""
    names = find(Store(out), "manifest")
    yield from (names[i : i + _MANIFESTS_A_READER] for i in range(0, len(names), _MANIFESTS_A_READER))


def read_done(manifests: list[str], shards: int, out: str) -> Iterator[tuple[int, tuple[str, bytes]]]:
    """Names of manifests -> (shard, packed ids of the images that they commit)."""
    done: dict[int, list[str]] = {}
    for name in manifests:
        for id in Store(out).read_table(name, ["id"])["id"].to_pylist():
            done.setdefault(shard_of(id, shards), []).append(id)
    yield from ((shard, ("done", pack(ids))) for shard, ids in done.items())


class Join(beam.DoFn):
    """(shard, its packed rows and ids) -> what `arrange` makes of the rows yet to make.

    Rows of one id become one, and those that are made already go.
    """

    def __init__(self, out: str, arrange: Callable[[list[Row]], Iterable[Any]]):
        self._store, self._arrange = Store(out), arrange
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("duplicates", "already_done", "planned")}

    def setup(self) -> None:
        self._heartbeat = Heartbeat(self._store)

    def process(self, element: tuple[int, Iterable[tuple[str, bytes]]]) -> Iterator[Any]:
        started, counts = time.monotonic(), Counter()
        rows: dict[str, Row] = {}
        for row in _unpacked(element[1], "rows"):
            other = rows.get(row.id)
            counts["duplicates"] += other is not None
            if other is None or row.place < other.place:
                rows[row.id] = row
        # After the rows: an output may hold far more ids than this job has rows.
        for id in _unpacked(element[1], "done"):
            counts["already_done"] += rows.pop(id, None) is not None
        left = list(rows.values())
        counts["planned"] = len(left)
        for name, counter in self._counters.items():
            counter.inc(counts[name])
        self._heartbeat.add(planned=counts["planned"])
        yield TaggedOutput(COUNTS, {**counts, "seconds": {"plan": time.monotonic() - started}})
        yield from self._arrange(left)

    def finish_bundle(self) -> None:
        self._heartbeat.flush()


def packed_units(rows: Iterable[Row], size: int, order: Callable[[Row], Any] = by_length) -> Iterator[bytes]:
    """Rows -> packed units of them."""
    return map(pack, make_units(rows, size, order))


def by_file(rows: Iterable[Row]) -> Iterator[tuple[str, bytes]]:
    """Rows of pictures -> (file or part of one, packed rows)."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(row.request.part, []).append(row)
    yield from ((part, pack(rows)) for part, rows in files.items())


def units_of_file(file: tuple[str, Iterable[bytes]], size: int) -> Iterator[bytes]:
    """(file or part of one, its packed rows) -> packed units of neighbours."""
    return packed_units(itertools.chain.from_iterable(map(unpack, file[1])), size, by_place)


def _unpacked(packed: Iterable[tuple[str, bytes]], wanted: str) -> Iterator[Any]:
    """The values of one kind, a blob at a time."""
    return itertools.chain.from_iterable(unpack(blob) for kind, blob in packed if kind == wanted)

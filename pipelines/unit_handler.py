"""The ModelHandler of the jobs: a unit made, encoded, written and committed in one stage."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

from apache_beam.metrics.metric import Metrics

from pipelines.handler import SdjaxModelHandler, no_memory
from pipelines.lazy_model import LazyModel
from pipelines.progress import Heartbeat
from pipelines.rejected import read_rejected, rejection, write_rejected
from pipelines.sinks import Encoded, Provenance, Sink, committed, places
from pipelines.storage import Store
from pipelines.units import NAMESPACE, Planner, Row, Unit, padded_calls, unpack
from sdjax import inputs
from sdjax.console import is_out_of_memory
from sdjax.request import Request
from sdjax.retrying import is_of_a_network
from sdjax.values import RequestError, one_line
from sdjax.weights.safetensors import CheckpointError

UNITS_PER_CALL = 4  # one is written while the next is made; only the last of them is waited for
_QUEUED = 4  # images per encoding thread that may wait for it
_FAILURES = 8  # rows of a unit that fail one by one before any is made: the fault is no row's
# More that a call makes where every row could be made after one failed: a host or a device comes and goes.
_ROUNDS = 3


class UnitHandler(SdjaxModelHandler):
    """Packed units to committed ones: makes, encodes and writes in one stage, so that no image leaves it.

    Yields mappings, shares of the account: one for each commit, and one wherever rows are rejected. The devices work on
    while earlier images are encoded by a thread a core and the unit before is written. A unit that is committed already
    is passed over.

    Two workers may be at one unit, and a row may fail at one of them alone. The unit has one name at both, so one
    manifest, and that decides: rows that it lacks are rejected, and the other worker's account follows it. (A unit of
    which one rejects every row has no manifest yet; the other may commit it after that, and counts it otherwise. Where
    both write their rejections at one moment, `rejected/` may lack a row that the manifest lacks; verify finds that.)
    """

    def __init__(self, output: str, sink: Sink, model: Any = None, **options: Any):
        super().__init__(model, max_batch_size=UNITS_PER_CALL, **options)
        self._store, self._sink = Store(output), sink
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("images", "flagged", "units", "rejected")}

    def load_model(self) -> LazyModel:
        return LazyModel(self._load_pipe, Heartbeat(self._store))

    def get_num_bytes(self, batch: Sequence[bytes]) -> int:
        return sum(map(len, batch))

    def run_inference(
        self, batch: Sequence[bytes], model: LazyModel, inference_args: Mapping[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        whole = list(map(unpack, batch))
        # An earlier attempt at a unit that rejected some rows may have committed the others.
        units = [_without(unit, read_rejected(self._store, unit.name)) for unit in whole]
        gone = [len(unit.rows) - len(left.rows) for unit, left in zip(whole, units, strict=True)]
        earlier = [{"rejected": count} for count in gone if count]
        for account in chain(earlier, self._accounts(units, model)):
            for name, counter in self._counters.items():
                counter.inc(account.get(name, 0))
            yield account

    def _accounts(self, units: list[Unit], model: LazyModel, rounds: int = _ROUNDS) -> Iterator[dict[str, Any]]:
        """The units' shares of the account, once they are committed; `rounds` may yet fail for no row's fault."""
        left = yield from self._uncommitted(units)
        if not left:
            return
        failed, is_large = None, False
        try:
            accounts = list(self._make(left, model))
        except RequestError as error:  # such as an image to start from that is gone since the plan was made
            failed = error
        except Exception as error:
            is_large = is_out_of_memory(error) and isinstance(left[0].rows[0].request, Request)
            if not (is_large or rounds) or isinstance(error, (OSError, CheckpointError)) or is_of_a_network(error):
                raise
        else:
            yield from accounts
            return
        # From here on nothing holds what lay on the devices: the traceback of an exception that is handled would.
        if failed is None and len(left) > 1:
            for unit in left:
                yield from self._accounts([unit], model)
            return
        if failed is None:
            [unit] = left
            lines = _too_large(unit, model) if is_large else self._failing(unit, model)
            if lines:
                yield self._reject(unit, lines, model)
            yield from self._accounts([_without(unit, lines)], model, rounds if lines else 0)
            return
        left = yield from self._uncommitted(left)  # a unit may be made before another fails
        kept, found = [], False
        for unit in left:
            lines = sift(unit, model.get().spec)
            if lines:
                found = True
                yield self._reject(unit, lines, model)
            kept.append(_without(unit, lines))
        if left and not found and not rounds:
            raise failed
        yield from self._accounts(kept, model, rounds if found else rounds - 1)

    def _uncommitted(self, units: list[Unit]) -> Generator[dict[str, Any], None, list[Unit]]:
        """Yields the shares of the units that are committed; returns the others that have rows left."""
        left = []
        for unit in units:
            made = committed(self._store, unit)
            if made is not None:
                self._settle(unit)
                yield made
            elif unit.rows:
                left.append(unit)
        return left

    def _reject(self, unit: Unit, lines: list[dict[str, Any]], model: LazyModel) -> dict[str, Any]:
        """Reject rows of a unit beside those that are; returns their share of the account."""
        known = {_place(line): line for line in [*read_rejected(self._store, unit.name), *lines]}
        write_rejected(self._store, unit.name, list(known.values()))
        _heartbeat(model).add(rejected=len(lines))
        return {"rejected": len(lines)}

    def _settle(self, unit: Unit) -> None:
        """Take back rejections of rows that the unit's manifest holds: another worker could make them."""
        lines = read_rejected(self._store, unit.name)
        made = places(self._store, unit) if lines else set()
        left = [line for line in lines if _place(line) not in made]
        if left != lines:
            write_rejected(self._store, unit.name, left)

    def _failing(self, unit: Unit, model: LazyModel) -> list[dict[str, Any]]:
        """The rows that fail where others of the unit are made, as rejections; raises what is no row's fault."""
        pipe, lines, good, waiting = model.get(), [], [], [unit.rows]
        made_by = _provenance(pipe)

        def make(rows: list[Row]) -> None:
            with model.devices_lock:
                for result in pipe.stream([row.request for row in rows]):
                    self._sink.encode(result, made_by)

        while waiting:
            rows = waiting.pop()
            try:
                make(rows)
                good = rows
            except Exception as error:
                if len(rows) > 1:
                    middle = len(rows) // 2
                    waiting += [rows[middle:], rows[:middle]]
                    continue
                lines.append(rejection(rows[0].place, vars(rows[0].request), _failure(error)))
                if not good and len(lines) == min(_FAILURES, len(unit.rows)):
                    raise
        if lines:
            make(good[:1])  # raises where a device has failed since, and the rows after that with it
        return lines

    def _make(self, units: list[Unit], model: LazyModel) -> Iterator[dict[str, Any]]:
        pipe, heartbeat = model.get(first=units[0].rows[0].request), _heartbeat(model)
        started = time.time()
        made_by = _provenance(pipe)
        threads = os.cpu_count() or 1
        rows = [row for unit in units for row in unit.rows]
        padded = padded_calls(rows, pipe.batch_size * len(pipe.devices))
        with inputs.keeping(), ThreadPoolExecutor(threads) as encoders, ThreadPoolExecutor(1) as writer:
            written: list[Future[dict[str, Any]]] = []
            with model.devices_lock:
                results = pipe.stream([row.request for row in rows])
                for unit in units:
                    begun, encoding = time.monotonic(), []
                    queued: deque[Future[Any]] = deque()
                    for _ in unit.rows:
                        result = next(results)
                        future = encoders.submit(_timed, self._sink.encode, result, made_by)
                        queued.append(future)
                        encoding.append(future)
                        if len(queued) > _QUEUED * threads:
                            queued.popleft().result()  # no more pictures in memory than these
                        heartbeat.add(images=1)
                    seconds = time.monotonic() - begun
                    if written:
                        written[-1].result()  # no more units in memory than this one and that one
                    written.append(writer.submit(self._write, unit, encoding, seconds, made_by, model))
            for future in written:
                account = future.result()
                account["seconds"].update(model.take_seconds())
                yield {**account, "padded_calls": padded, "first": started, "last": time.time()}
                padded = 0

    def _write(
        self,
        unit: Unit,
        encoding: list[Future[tuple[float, Encoded]]],
        seconds: float,
        made_by: Provenance,
        model: LazyModel,
    ) -> dict[str, Any]:
        model.check()  # here, where the devices make the next unit meanwhile
        timed = [future.result() for future in encoding]
        images = [image for _, image in timed]
        begun = time.monotonic()
        written = self._sink.write(self._store, unit, images, made_by, seconds)
        theirs = {} if written else committed(self._store, unit) or {}
        self._settle(unit)
        return {
            "images": len(images),
            "units": 1,
            "flagged": sum(bool(image.flags) for image in images),
            "bytes": written,
            **theirs,
            "calls": sum(row.calls for row in unit.rows),
            "seconds": {
                "generate": seconds,
                "encode": sum(spent for spent, _ in timed),
                "write": time.monotonic() - begun,
            },
        }


def sift(unit: Unit, planner: Planner) -> list[dict[str, Any]]:
    """The rows of a unit that can no longer be made, as rejections."""
    rejected = []
    for row in unit.rows:
        try:
            planner.resolve(row.request)
        except RequestError as error:
            rejected.append(rejection(row.place, vars(row.request), error))
    return rejected


def _place(line: dict[str, Any]) -> tuple[str, int]:
    return line["file"], line["row"]


def _without(unit: Unit, lines: list[dict[str, Any]]) -> Unit:
    """The unit, by its name as ever, without the rows that these rejections are of."""
    gone = set(map(_place, lines))
    return unit._replace(rows=[row for row in unit.rows if row.place not in gone])


def _failure(error: Exception) -> Exception:
    """Why a row cannot be made."""
    if isinstance(error, RequestError):
        return error
    return RequestError(f"it cannot be made: {type(error).__name__}: {one_line(error)}")


def _provenance(pipe: Any) -> Provenance:
    return Provenance(pipe.spec.name, pipe.spec.fingerprint, pipe.devices.devices[0].device_kind)


def _too_large(unit: Unit, model: LazyModel) -> list[dict[str, Any]]:
    """The rows of a unit that no device has memory for, as rejections."""
    pipe = model.get(first=None)  # raises where it is the model itself that finds no room
    return [rejection(row.place, vars(row.request), no_memory(pipe, row.request)) for row in unit.rows]


def _heartbeat(model: LazyModel) -> Heartbeat:
    assert model.heartbeat is not None, "it is from UnitHandler.load_model"
    return model.heartbeat


def _timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    begun = time.monotonic()
    value = call(*args)
    return time.monotonic() - begun, value

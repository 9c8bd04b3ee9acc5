"""Stable Diffusion as a Beam ModelHandler, for any pipeline; and the one that makes and writes whole units."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

from apache_beam.metrics.metric import Metrics
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from pipelines.progress import Heartbeat
from pipelines.sinks import Encoded, Provenance, Sink, committed
from pipelines.storage import Store
from pipelines.units import (
    NAMESPACE,
    PackedUnit,
    Planner,
    Unit,
    as_unit,
    padded_calls,
    read_rejected,
    rejection,
    unpack,
    write_rejected,
)
from sdjax.console import is_out_of_memory
from sdjax.request import Request
from sdjax.values import RequestError
from sdjax.weights.safetensors import CheckpointError

UNITS_PER_CALL = 4  # one is written while the next is made; only the last of them is waited for
_QUEUED = 4  # images per encoding thread that may wait for it
_ROUNDS = 3  # more that a call makes where every picture is there again after one failed: a host comes and goes


def load_stable_diffusion(model: Any, *, compilation_cache: str | None = None, **options: Any) -> Any:
    """`sdjax.StableDiffusion.from_pretrained`, imported where it is called: a launcher needs no devices.

    Args:
        model: a checkpoint's folder, hub id or URL, or its `Spec`; None for the bundled one.
        compilation_cache: folder or bucket in which all workers keep compiled programs; None: the user's cache folder.
    """
    from sdjax import compile_cache
    from sdjax.generate import StableDiffusion
    from sdjax.parts import BUNDLED

    compile_cache.use(compilation_cache)
    return StableDiffusion.from_pretrained(model or BUNDLED, **options)


class _Clock:
    """Seconds by kind. Apart from the model, because jax keeps its listeners for ever."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._lock, self._listens = threading.Lock(), False

    def listen(self) -> None:
        """From now on."""
        from jax import monitoring  # here, because a launcher needs no devices

        if not self._listens:
            monitoring.register_event_duration_secs_listener(self.heard)
        self._listens = True

    def heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.add("compile", duration_secs)

    def add(self, kind: str, seconds: float) -> None:
        with self._lock:  # programs are compiled in threads
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds since last asked."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return taken


class LazyModel:
    """A pipe that is loaded when first asked for, once for all threads, so that a job with nothing to do loads none."""

    def __init__(self, load: Callable[..., Any], heartbeat: Heartbeat | None = None):
        self._load, self._lock, self._pipe = load, threading.Lock(), None
        self._checking, self._checked = threading.Lock(), False
        self.heartbeat = heartbeat
        self.devices = threading.Lock()  # held by the thread that feeds the devices
        self._clock = _Clock()

    def get(self, **options: Any) -> Any:
        """The pipe; `options` go to `load`, where that is still to be done."""
        with self._lock:
            if self._pipe is None:
                self._clock.listen()
                started = time.monotonic()
                self._pipe = self._load(**options)
                self._clock.add("load", time.monotonic() - started)
            return self._pipe

    def check(self) -> None:
        """Raise CheckpointError where the files are not those that the fingerprint names; looks once.

        They may have been replaced since the job was planned, perhaps on another machine.
        """
        with self._checking:
            spec = self.get().spec
            if not self._checked and spec.hashed() != spec.fingerprint:
                raise CheckpointError(
                    f"the files of {spec.name} were replaced since the job began; put the old ones back, or run it "
                    "again to make its rows with those that are there now"
                )
            self._checked = True

    def take_seconds(self) -> dict[str, float]:
        """Seconds of loading, and of compiling, a part of it meanwhile, since last asked."""
        return self._clock.take()


class SdjaxModelHandler(ModelHandler[Request | str, PredictionResult, LazyModel]):
    """Requests, or prompts as text, to images:

        images = requests | RunInference(SdjaxModelHandler("gs://models/sd15", dtype="bfloat16"))

    Each `PredictionResult` holds the example as given, and as its inference the `sdjax.generate.Result`, or the
    `RequestError` of an example that cannot be honoured: a bad one does not touch the others. The model is loaded once
    a process, when the first batch comes, and shared by its threads.

    Args:
        model: folder, hub id or fsspec URL of a checkpoint, or its `Spec`; None for the bundled one.
        dtype: of parameters and activations.
        batch_size: images that one device runs at once; None for the model's default.
        max_batch_size: examples that Beam hands over at a time; several device batches, so that devices stay fed.
        load: makes the pipe from the model and the options; must be picklable.
        options: others that `load` takes.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        dtype: str = "float32",
        batch_size: int | None = None,
        max_batch_size: int = 64,
        load: Callable[..., Any] = load_stable_diffusion,
        **options: Any,
    ):
        super().__init__(min_batch_size=max_batch_size, max_batch_size=max_batch_size)
        self._model, self._load = model, load
        self._options = {"dtype": dtype, "batch_size": batch_size, **options}

    def load_model(self) -> LazyModel:
        return LazyModel(self._load_pipe)

    def _load_pipe(self, **options: Any) -> Any:
        return self._load(self._model, **self._options, **options)

    def run_inference(
        self, batch: Sequence[Request | str], model: LazyModel, inference_args: Mapping[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        pipe = model.get()
        inferences: list[Any] = []
        good: list[Request] = []
        for example in batch:
            try:
                request = Request(prompt=example) if isinstance(example, str) else example
                good.append(pipe.spec.resolve(request))
                inferences.append(None)
            except RequestError as error:
                inferences.append(error)
        with model.devices:
            results = iter(_made(pipe, good))
        for example, error in zip(batch, inferences, strict=True):
            inference = next(results) if error is None else error
            yield PredictionResult(example, inference, pipe.spec.fingerprint)

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Bytes of text; Beam's default would pickle every batch to know."""
        return sum(len(x if isinstance(x, str) else x.prompt) for x in batch)

    def get_metrics_namespace(self) -> str:
        return NAMESPACE


class _Asked(NamedTuple):
    """A unit to make, the name that it came with, and which of its rows have been rejected."""

    name: str
    unit: Unit
    rejected: list[dict[str, Any]]


class UnitHandler(SdjaxModelHandler):
    """PackedUnits to committed units: makes, encodes and writes in one stage, so that no image leaves it.

    Yields one mapping a unit: its share of the account. The devices work on while earlier images are encoded by a
    thread a core and the unit before is written. A unit that is committed already is passed over.
    """

    def __init__(self, output: str, sink: Sink, model: Any = None, **options: Any):
        super().__init__(model, max_batch_size=UNITS_PER_CALL, **options)
        self._store, self._sink = Store(output), sink
        self._counters = {name: Metrics.counter(NAMESPACE, name) for name in ("images", "flagged", "units", "rejected")}

    def load_model(self) -> LazyModel:
        return LazyModel(self._load_pipe, Heartbeat(self._store))

    def get_num_bytes(self, batch: Sequence[PackedUnit]) -> int:
        return sum(len(unit.blob) for unit in batch)

    def run_inference(
        self, batch: Sequence[PackedUnit], model: LazyModel, inference_args: Mapping[str, Any] | None = None
    ) -> Iterable[dict[str, Any]]:
        asked = list(map(self._asked, batch))
        earlier = [{"rejected": len(one.rejected)} for one in asked if one.rejected]
        for account in chain(earlier, self._accounts([one for one in asked if one.unit.rows], model)):
            for name, counter in self._counters.items():
                counter.inc(account.get(name, 0))
            yield account

    def _asked(self, packed: PackedUnit) -> _Asked:
        """A unit without the rows that an earlier attempt at it rejected: it may have committed the others."""
        unit, rejected = unpack(packed.blob), read_rejected(self._store, packed.name)
        gone = {(line["file"], line["row"]) for line in rejected}
        return _Asked(packed.name, as_unit([row for row in unit.rows if row.place not in gone]), rejected)

    def _accounts(self, asked: list[_Asked], model: LazyModel, rounds: int = _ROUNDS) -> Iterator[dict[str, Any]]:
        """The units' shares of the account, once they are committed; `rounds` may yet fail for no row's fault."""
        left = yield from self._uncommitted(asked)
        if not left:
            return
        failed = None
        try:
            accounts = list(self._make([one.unit for one in left], model))
        except RequestError as error:  # such as an image to start from that is gone since the plan was made
            failed = error
        except Exception as error:
            if not (is_out_of_memory(error) and isinstance(left[0].unit.rows[0].request, Request)):
                raise
        else:
            yield from accounts
            return
        # From here on nothing holds what lay on the devices: the traceback of an exception that is handled would.
        if failed is None:
            if len(left) > 1:
                for one in left:
                    yield from self._accounts([one], model)
            else:
                yield self._reject(left[0], _too_large(left[0].unit, model), model)
            return
        left = yield from self._uncommitted(left)  # a unit may be made before another fails
        kept, found = [], False
        for one in left:
            unit, rejected = sift(one.unit, model.get().spec)
            if rejected:
                found = True
                yield self._reject(one, rejected, model)
            if unit.rows:
                kept.append(one._replace(unit=unit))
        if left and not found and not rounds:
            raise failed
        yield from self._accounts(kept, model, rounds if found else rounds - 1)

    def _uncommitted(self, asked: list[_Asked]) -> Generator[dict[str, Any], None, list[_Asked]]:
        """Yields the shares of the units that are committed; returns the others."""
        left = []
        for one in asked:
            made = committed(self._store, one.unit.name)
            if made is None:
                left.append(one)
            else:
                yield made
        return left

    def _reject(self, one: _Asked, lines: list[dict[str, Any]], model: LazyModel) -> dict[str, Any]:
        """Reject rows of a unit; returns their share of the account."""
        one.rejected.extend(lines)
        write_rejected(self._store, one.name, one.rejected)
        _heartbeat(model).add(rejected=len(lines))
        return {"rejected": len(lines)}

    def _make(self, units: list[Unit], model: LazyModel) -> Iterator[dict[str, Any]]:
        pipe, heartbeat = model.get(first=units[0].rows[0].request), _heartbeat(model)
        started = time.time()
        made_by = Provenance(pipe.spec.name, pipe.spec.fingerprint, pipe.devices.devices[0].device_kind)
        threads = os.cpu_count() or 1
        rows = [row for unit in units for row in unit.rows]
        padded = padded_calls(rows, pipe.batch_size * len(pipe.devices))
        with ThreadPoolExecutor(threads) as encoders, ThreadPoolExecutor(1) as writer:
            written: list[Future[dict[str, Any]]] = []
            with model.devices:
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
        return {
            "images": len(images),
            "units": 1,
            "flagged": sum(bool(image.flags) for image in images),
            "bytes": written,
            "calls": sum(row.calls for row in unit.rows),
            "seconds": {
                "generate": seconds,
                "encode": sum(spent for spent, _ in timed),
                "write": time.monotonic() - begun,
            },
        }


def sift(unit: Unit, planner: Planner) -> tuple[Unit, list[dict[str, Any]]]:
    """The unit without the rows that can no longer be made, under its new name, and those rows as rejections."""
    rows, rejected = [], []
    for row in unit.rows:
        try:
            planner.resolve(row.request)
            rows.append(row)
        except RequestError as error:
            rejected.append(rejection(row.place, vars(row.request), error))
    return as_unit(rows), rejected


def _too_large(unit: Unit, model: LazyModel) -> list[dict[str, Any]]:
    """The rows of a unit that no device has memory for, as rejections."""
    pipe = model.get(first=None)  # raises where it is the model itself that finds no room
    return [rejection(row.place, vars(row.request), _no_memory(pipe, row.request)) for row in unit.rows]


def _no_memory(pipe: Any, request: Request) -> RequestError:
    size = f"{request.width}x{request.height} at a batch of {pipe.batch_size}"
    return RequestError(f"a device has no memory for {size}; give a smaller size, or --batch-size")


def _heartbeat(model: LazyModel) -> Heartbeat:
    assert model.heartbeat is not None, "it is from UnitHandler.load_model"
    return model.heartbeat


def _made(pipe: Any, requests: list[Request]) -> list[Any]:
    """A result for each request; the RequestError of one whose picture is gone by now, or that is too large."""
    try:
        return pipe.generate(requests)
    except RequestError as error:
        failed = error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = _no_memory(pipe, requests[0])
    # From here on nothing holds what lay on the devices: the traceback of an exception that is handled would.
    if len(requests) == 1:
        return [failed]
    middle = len(requests) // 2
    return _made(pipe, requests[:middle]) + _made(pipe, requests[middle:])


def _timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    begun = time.monotonic()
    value = call(*args)
    return time.monotonic() - begun, value

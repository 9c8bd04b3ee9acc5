"""Stable Diffusion as a Beam ModelHandler, for any pipeline; and the one that makes and writes whole units."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
    padded_calls,
    rejection,
    unit_name,
    unpack,
    write_rejected,
)
from sdjax.request import Request
from sdjax.values import RequestError

UNITS_PER_CALL = 4  # one is written while the next is made; only the last of them is waited for
_QUEUED = 4  # images per encoding thread that may wait for it


def load_stable_diffusion(model: Any, *, compilation_cache: str | None = None, **options: Any) -> Any:
    """`sdjax.StableDiffusion.from_pretrained`, imported where it is called: a launcher needs no devices.

    Args:
        model: a checkpoint's folder, hub id or URL, or its `Spec`; None for the bundled one.
        compilation_cache: folder or bucket in which all workers keep compiled programs; None: the user's cache folder.
    """
    from sdjax import compile_cache
    from sdjax.generate import BUNDLED, StableDiffusion

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
        units, heartbeat = [unpack(packed.blob) for packed in batch], model.heartbeat
        assert heartbeat is not None  # from `load_model`
        while units:
            left = []
            for unit in units:
                made = committed(self._store, unit.name)
                if made is None:
                    left.append(unit)
                else:
                    yield made
            try:
                made_now = list(self._make(left, model, heartbeat)) if left else []
            except RequestError:  # such as an image to start from that is gone since the plan was made
                units, rejected = sift(left, model.get().spec)
                if not rejected:
                    raise
                write_rejected(self._store, rejected)
                self._counters["rejected"].inc(len(rejected))
                heartbeat.add(rejected=len(rejected))
                yield {"rejected": len(rejected)}
            else:
                yield from made_now
                return

    def _make(self, units: list[Unit], model: LazyModel, heartbeat: Heartbeat) -> Iterator[dict[str, Any]]:
        pipe = model.get(first=units[0].rows[0].request)
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
                    written.append(writer.submit(self._write, unit, encoding, seconds, made_by))
            for future in written:
                account = future.result()
                for name in ("images", "flagged", "units"):
                    self._counters[name].inc(account[name])
                account["seconds"].update(model.take_seconds())
                yield {**account, "padded_calls": padded, "first": started, "last": time.time()}
                padded = 0
        heartbeat.flush()

    def _write(
        self, unit: Unit, encoding: list[Future[tuple[float, Encoded]]], seconds: float, made_by: Provenance
    ) -> dict[str, Any]:
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


def sift(units: list[Unit], planner: Planner) -> tuple[list[Unit], list[dict[str, Any]]]:
    """The units without the rows that can no longer be made, under their new names, and those rows as rejections."""
    kept, rejected = [], []
    for unit in units:
        rows = []
        for row in unit.rows:
            try:
                planner.resolve(row.request)
                rows.append(row)
            except RequestError as error:
                rejected.append(rejection(row.place, vars(row.request), error))
        if rows:
            kept.append(Unit(unit_name(row.id for row in rows), rows))
    return kept, rejected


def _made(pipe: Any, requests: list[Request]) -> list[Any]:
    """A result for each request; the RequestError of one whose picture is gone since it was checked."""
    try:
        return pipe.generate(requests)
    except RequestError as error:
        if len(requests) == 1:
            return [error]
        middle = len(requests) // 2
        return _made(pipe, requests[:middle]) + _made(pipe, requests[middle:])


def _timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    begun = time.monotonic()
    value = call(*args)
    return time.monotonic() - begun, value

"""A model that a worker loads when it has something to make, and how long that took."""

import threading
import time
from collections.abc import Callable
from typing import Any

from pipelines.progress import Heartbeat
from sdjax.weights.safetensors import CheckpointError


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
        self.devices_lock = threading.Lock()  # held by the thread that feeds the devices
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

"""Devices that wait for each program and note how long it took."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sdjax.parallel import Devices
from sdjax.planning.compiled import Memory


class Stopwatch(Devices):
    """Local devices that run a program at a time.

    compiling: seconds that each program took to trace and compile, by the name of its function in `sdjax.programs`.
    running: seconds of each of its calls; `host copy` is fetching pixels.
    blocking: whether to wait for each; where not, calls are not timed.
    memory: bytes of its arguments, results and temporaries on a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compiling: dict[str, float] = defaultdict(float)
        self.running: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, int] = {}
        self.blocking = True

    def join(self, array: jax.Array) -> np.ndarray:
        started = time.perf_counter()
        whole = super().join(array)
        self.running["host copy"].append(time.perf_counter() - started)
        return whole

    def pmap(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        mapped = super().pmap(function, **options)

        def call(*arguments: Any) -> Any:
            if not self.blocking:
                return mapped(*arguments)
            jax.block_until_ready(arguments)
            started = time.perf_counter()
            result = jax.block_until_ready(mapped(*arguments))
            self.running[_name(function)].append(time.perf_counter() - started)
            return result

        return call

    def compile(self, function: Callable[..., Any], lowered: Any) -> Any:
        started = time.perf_counter()
        compiled = super().compile(function, lowered)
        self.compiling[_name(function)] += time.perf_counter() - started
        found = compiled.memory_analysis()
        if found is not None:
            memory = Memory.of(found)
            self.memory[_name(function)] = max(self.memory.get(_name(function), 0), memory.total - memory.code)
        return compiled


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "func", function).__name__

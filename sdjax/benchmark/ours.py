"""One batch size of one checkpoint on this machine, stage by stage."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sdjax import compile_cache, images
from sdjax.benchmark.stopwatch import Stopwatch
from sdjax.generate import StableDiffusion
from sdjax.planning.chips import CHIPS
from sdjax.planning.record import record
from sdjax.request import Request

_PEAKS = {
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v5p": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
    "NVIDIA L4": 121e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}
"""Dense bfloat16 operations a second that makers state, by the words that the device's kind begins with."""


@dataclass(frozen=True)
class Measured:
    """Seconds, but where a name says otherwise; medians over the repeats.

    load: from files to the devices; first and again.
    compile_cold, compile_warm: by program, with an empty compilation cache and with what the first left there.
    stages: by program, of a batch with nothing beside it; then `host copy`, and `encode` of its images to PNG.
    unet_call: one of the network's calls within `advance`, for one of a request's prompts.
    images_per_second: of whole batches, on all devices, with the host's work beside theirs.
    flops_per_image: products and convolutions.
    peak_flops: of all devices in a second, and `peak_is` whose: their makers' or a large product's.
    peak_bytes: of a device, and `bytes_are` what: the most that it held, or where none counts its largest program.
    program_bytes: of a program's arguments, results and temporaries on a device, by program.
    """

    batch_size: int
    devices: int
    load: tuple[float, float]
    compile_cold: dict[str, float]
    compile_warm: dict[str, float]
    stages: dict[str, float]
    unet_call: float
    images_per_second: float
    flops_per_image: float
    peak_flops: float
    peak_is: str
    peak_bytes: int
    bytes_are: str
    program_bytes: dict[str, int]

    @property
    def share_of_peak(self) -> float:
        return self.flops_per_image * self.images_per_second / self.peak_flops


def measure(source: str, request: Request, *, batch_size: int, dtype: str, repeats: int, cache: Path) -> Measured:
    """Measure a checkpoint on all local devices.

    Args:
        request: what every image of a batch is like; they differ in their seeds.
        batch_size: images a device.
        cache: an empty folder for compiled programs.
    """
    compile_cache.use(cache, least_seconds=0)
    watch, again = Stopwatch(), Stopwatch()
    pipe, load = _timed(lambda: _load(source, dtype, batch_size, watch))
    count = batch_size * len(watch)
    batch = [pipe.spec.resolve(replace(request, seed=request.seed + i)) for i in range(count)]
    pipe.generate(batch)
    watch.running.clear()
    results = [pipe.generate(batch) for _ in range(repeats)][-1]
    stages = {name: _median(taken, repeats) for name, taken in watch.running.items()}
    encoding = [_timed(lambda result=result: images.encode(result.pixels))[1] for result in results]
    watch.blocking = False
    _, seconds = _timed(lambda: pipe.generate(batch * (repeats + 1)))
    peak_bytes, bytes_are = _peak_bytes(watch)
    del pipe

    jax.clear_caches()
    pipe, reload = _timed(lambda: _load(source, dtype, batch_size, again))
    pipe.generate(batch)
    recorded = record(pipe.spec, batch[0], 1)
    peak_flops, peak_is = _peak_flops(watch.devices[0].device_kind, dtype)
    calls = sum(int(program.asked.sum()) for program in recorded if program.asked is not None)
    return Measured(
        batch_size=batch_size,
        devices=len(watch),
        load=(load, reload),
        compile_cold=dict(watch.compiling),
        compile_warm=dict(again.compiling),
        stages={**stages, "encode": sum(encoding)},
        unet_call=stages["advance"] / calls,
        images_per_second=count * (repeats + 1) / seconds,
        flops_per_image=sum(program.flops for program in recorded),
        peak_flops=len(watch) * peak_flops,
        peak_is=peak_is,
        peak_bytes=peak_bytes,
        bytes_are=bytes_are,
        program_bytes=dict(watch.memory),
    )


def _median(taken: list[float], batches: int) -> float:
    """Of what a batch takes, each of which makes as many calls."""
    calls = len(taken) // batches
    return statistics.median(sum(taken[i * calls : (i + 1) * calls]) for i in range(batches))


def _load(source: str, dtype: str, batch_size: int, watch: Stopwatch) -> StableDiffusion:
    return StableDiffusion.from_pretrained(source, dtype=dtype, batch_size=batch_size, devices=watch)


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def _peak_bytes(watch: Stopwatch) -> tuple[int, str]:
    """Of the greediest device, and what they are."""
    stats = [device.memory_stats() for device in watch.devices]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats), "peak memory"
    return max(watch.memory.values()), "largest program"


def _peak_flops(kind: str, dtype: str) -> tuple[float, str]:
    """Operations that one device could do in a second, and by what."""
    stated = [(len(name), peak) for name, peak in _PEAKS.items() if re.match(rf"{name}\b", kind)]
    if stated:
        return max(stated)[1], "the bfloat16 peak"
    side = 2048
    a = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    seconds = min(_timed(lambda: product(a, a).block_until_ready())[1] for _ in range(5))
    return 2 * side**3 / seconds, f"a large {dtype} product"

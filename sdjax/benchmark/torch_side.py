"""The same checkpoint, prompts and steps in diffusers."""

import ctypes
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

from sdjax.request import Request


def measure(
    folder: Path, request: Request, *, batch_size: int, dtype: str, repeats: int, compiled: bool
) -> dict[str, float]:
    """Median seconds of a batch, of one UNet call and of decoding, in torch, eager or by torch.compile.

    `calls` are of the UNet in a batch. `UNet bytes` and `decode bytes` are of the network's parameters and of what its
    greediest call held beside what was there before; on a CPU that is told of a process in which nothing else has run,
    and of Linux alone.

    Args:
        folder: the checkpoint, in the diffusers layout.
        request: complete; its sampler is the checkpoint's own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.set_verbosity_error()
    pipe: Any = DiffusionPipeline.from_pretrained(
        folder, dtype=getattr(torch, dtype), safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.forward = torch.compile(pipe.unet.forward)
    seconds: dict[str, list[float]] = defaultdict(list)
    held: dict[str, list[int]] = defaultdict(list)
    for network, method, name in ((pipe.unet, "forward", "UNet"), (pipe.vae, "decode", "decode")):
        watched = _watched(getattr(network, method), seconds[name], held[name], device)
        setattr(network, method, watched)

    def batch() -> None:
        pipe(
            [request.prompt] * batch_size,
            negative_prompt=[request.negative_prompt or ""] * batch_size,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
        )

    batch()
    for noted in (*seconds.values(), *held.values()):
        noted.clear()
    timed = _watched(batch, seconds["batch"], [], device)
    for _ in range(repeats):
        timed()
    bytes_of = {"UNet": _parameters(pipe.unet), "decode": _parameters(pipe.vae.decoder)}
    memory = {f"{name} bytes": bytes_of[name] + max(grown) for name, grown in held.items() if grown}
    calls = len(seconds["UNet"]) / repeats
    return {name: statistics.median(taken) for name, taken in seconds.items()} | {"calls": calls, **memory}


def _parameters(network: torch.nn.Module) -> int:
    """Bytes."""
    return sum(parameter.nbytes for parameter in network.parameters())


def _watched(function: Callable[..., Any], seconds: list[float], held: list[int], device: str) -> Callable[..., Any]:
    """A function that notes the seconds of each of its calls, and by how many bytes what is held grew meanwhile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = _held(device, since_now=True)
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if before is not None and (peak := _held(device)) is not None:
            held.append(peak - before)
        return result

    return call


def _held(device: str, *, since_now: bool = False) -> int | None:
    """The most bytes held since the last `since_now`; None where nobody counts."""
    if device == "cuda":
        if since_now:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return None
    if since_now:
        ctypes.CDLL(None).malloc_trim(0)  # else a call would take what earlier ones gave back, unseen
        (process / "clear_refs").write_text("5")  # proc(5): the peak is set to what is resident
    lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

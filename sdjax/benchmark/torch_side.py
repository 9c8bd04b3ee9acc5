"""The same checkpoint, prompts and steps in diffusers."""

import ctypes
import functools
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from sdjax.request import Request


def measure(
    source: str, request: Request, *, batch_size: int, dtype: str, repeats: int, compiled: bool
) -> dict[str, float]:
    """Median seconds of a batch, of one UNet call and of decoding, in torch, eager or by torch.compile.

    `calls` are of the UNet in a batch. `UNet bytes` and `decode bytes` are of the network's parameters and of what its
    greediest call held beside what was there before; on a CPU that is told of a process in which nothing else has run,
    and of Linux alone.

    Args:
        source: a folder in the diffusers layout, or a hub id, at a revision too (`org/name@revision`).
        request: complete; its sampler is the checkpoint's own.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of checkpoints older than today's defaults
    folder = Path(source).expanduser()
    name, _, revision = (str(folder), "", "") if folder.is_dir() else source.partition("@")
    plain = {"safety_checker": None, "requires_safety_checker": False}
    pipe: Any = DiffusionPipeline.from_pretrained(name, revision=revision or None, dtype=getattr(torch, dtype), **plain)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.forward = torch.compile(pipe.unet.forward)

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
    with _noting(pipe, functools.partial(_grown, device=device)) as grown:
        batch()
    with _noting(pipe, functools.partial(_timed, device=device)) as seconds:
        seconds["batch"] = [_timed(batch, device)[1] for _ in range(repeats)]
    bytes_of = {"UNet": _parameters(pipe.unet), "decode": _parameters(pipe.vae.decoder)}
    return {
        **{name: statistics.median(taken) for name, taken in seconds.items()},
        "calls": len(seconds["UNet"]) / repeats,
        **{f"{name} bytes": bytes_of[name] + max(found) for name, found in grown.items() if None not in found},
    }


def _parameters(network: torch.nn.Module) -> int:
    """Bytes."""
    return sum(parameter.nbytes for parameter in network.parameters())


@contextmanager
def _noting(pipe: Any, watch: Callable[..., tuple[Any, Any]]) -> Iterator[dict[str, list[Any]]]:
    """What `watch` finds at each call of the networks meanwhile: it returns a call's result, and what is noted."""
    noted: dict[str, list[Any]] = defaultdict(list)
    networks = ((pipe.unet, "forward", "UNet"), (pipe.vae, "decode", "decode"))
    own = [getattr(network, method) for network, method, _ in networks]

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result, found = watch(functools.partial(function, *args, **kwargs))
            noted[name].append(found)
            return result

        return call

    for (network, method, name), function in zip(networks, own, strict=True):
        setattr(network, method, watched(function, name))
    yield noted
    for (network, method, _), function in zip(networks, own, strict=True):
        setattr(network, method, function)


def _timed(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Its result, and the seconds that it took."""
    started = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def _grown(function: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """Its result, and by how many bytes what is held grew meanwhile; None where nobody counts."""
    before = _held(device, since_now=True)
    result = function()
    after = _held(device)
    return result, None if before is None or after is None else after - before


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

"""The same checkpoint, prompts and steps in diffusers."""

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
    for owner, method, name in ((pipe.unet, "forward", "UNet call"), (pipe.vae, "decode", "decode")):
        setattr(owner, method, _timed(getattr(owner, method), seconds[name], device))

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
    for taken in seconds.values():
        taken.clear()
    timed = _timed(batch, seconds["batch"], device)
    for _ in range(repeats):
        timed()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _timed(function: Callable[..., Any], into: list[float], device: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        if device == "cuda":
            torch.cuda.synchronize()
        into.append(time.perf_counter() - started)
        return result

    return call

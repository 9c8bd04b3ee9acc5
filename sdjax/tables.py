"""The sampler tables of a resolved request: its run's, its second pass's, and that of the refiner that ends it."""

import functools
from typing import Any

from sdjax import sampling
from sdjax.request import Request
from sdjax.values import numbers

_make = functools.lru_cache(maxsize=1024)(sampling.make_table)


def run(schedule: sampling.Schedule, request: Request, *, edits: bool, all_steps: bool) -> sampling.Table:
    """The request's own run, up to where a refiner takes over.

    edits: whether a picture is what the network is told, not where the run starts.  all_steps: see `make_table`.
    """
    end = None if request.denoising_end == 1 else request.denoising_end
    return _of(schedule, request, _strength(request, edits), denoising_end=end, all_steps=all_steps)


def second_pass(schedule: sampling.Schedule, request: Request, *, all_steps: bool) -> sampling.Table:
    """The run from the enlarged first image."""
    try:
        return _of(schedule, request, request.hires_strength, all_steps=all_steps)
    except sampling.SamplingError as error:
        raise sampling.SamplingError(f"{error}".replace("strength=", "hires_strength=", 1)) from None


def refiner(schedule: sampling.Schedule, request: Request) -> sampling.Table:
    """The refiner's run over its own schedule, from where the base's run stops."""
    return _of(schedule, request, _strength(request, False), denoising_start=request.denoising_end)


def _strength(request: Request, edits: bool) -> float | None:
    if request.image is None or edits or (request.is_masked and request.strength == 1):
        return None  # noise alone, as in diffusers: what is known comes in by the mask
    return request.strength


def _of(schedule: sampling.Schedule, request: Request, strength: float | None, **part: Any) -> sampling.Table:
    """part: which of the steps; see `make_table`."""
    return _make(
        schedule,
        sampler=request.sampler,
        num_inference_steps=request.num_inference_steps,
        sigmas=tuple(numbers(request.sigmas) or ()) or request.sigmas,
        timesteps=tuple(numbers(request.timesteps) or ()) or None,
        rho=request.rho,
        eta=request.eta,
        order=request.solver_order,
        strength=strength,
        **part,
    )

"""The sampler tables of a resolved request: its run's, its second pass's, and that of the refiner that ends it."""

import functools

from sdjax import sampling
from sdjax.request import Request
from sdjax.values import numbers

_FIELDS = ("sampler", "num_inference_steps", "sigmas", "timesteps", "rho", "eta", "solver_order")


def run(schedule: sampling.Schedule, request: Request, *, edits: bool, all_steps: bool) -> sampling.Table:
    """The request's own run, up to where a refiner takes over.

    edits: whether a picture is what the network is told, not where the run starts.  all_steps: see `make_table`.
    """
    end = request.denoising_end
    return _of(schedule, request, _strength(request, edits), end=None if end == 1 else end, all_steps=all_steps)


def second_pass(schedule: sampling.Schedule, request: Request, *, all_steps: bool) -> sampling.Table:
    """The run from the enlarged first image."""
    try:
        return _of(schedule, request, request.hires_strength, all_steps=all_steps)
    except sampling.SamplingError as error:
        raise sampling.SamplingError(f"{error}".replace("strength=", "hires_strength=", 1)) from None


def refiner(schedule: sampling.Schedule, request: Request) -> sampling.Table:
    """The refiner's run over its own schedule, from where the base's run stops."""
    return _of(schedule, request, _strength(request, False), start=request.denoising_end)


def _strength(request: Request, edits: bool) -> float | None:
    if request.image is None or edits or (request.is_masked and request.strength == 1):
        return None  # noise alone, as in diffusers: what is known comes in by the mask
    return request.strength


def _of(
    schedule: sampling.Schedule,
    request: Request,
    strength: float | None,
    *,
    start: float | None = None,
    end: float | None = None,
    all_steps: bool = False,
) -> sampling.Table:
    return _table(schedule, *(getattr(request, name) for name in _FIELDS), strength, start, end, all_steps)


@functools.lru_cache(maxsize=1024)
def _table(
    schedule: sampling.Schedule,
    sampler: str,
    steps: int,
    sigmas: str,
    timesteps: str | None,
    rho: float | None,
    eta: float,
    order: int | None,
    strength: float | None,
    denoising_start: float | None,
    denoising_end: float | None,
    all_steps: bool,
) -> sampling.Table:
    return sampling.make_table(
        schedule,
        sampler=sampler,
        num_inference_steps=steps,
        sigmas=numbers(sigmas) or sigmas,
        timesteps=numbers(timesteps),
        rho=rho,
        eta=eta,
        order=order,
        strength=strength,
        denoising_start=denoising_start,
        denoising_end=denoising_end,
        all_steps=all_steps,
    )

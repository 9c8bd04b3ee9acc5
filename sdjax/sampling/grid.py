"""Which noise levels a run visits: timestep spacings and sigma schedules."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.schedule import SPACINGS, Schedule
from sdjax.sampling.trace import Level

CLEAN = Level(0.0, 1.0, 0.0)
_LEAST, _MOST = 1e-4, 1e4  # of listed sigmas: the tables are float32

# Sabour et al. 2024 (arXiv 2404.14507), the ten-step schedules optimised for Stable Diffusion 1.5 and for SDXL.
_AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


@dataclass(frozen=True)
class Grid:
    """What a sampler's diffusers class decides about the levels of a run.

    kind: "k", k-diffusion's (Euler, Heun, DPM2, LMS): timesteps may be fractional, and Karras and its like span the
            ratios of the spaced timesteps.
        "dpm", DPM-Solver's (DPM++, UniPC, DEIS, SA-Solver): whole timesteps that stop a step short of clean, and Karras
            and its like span the whole schedule.
        "train", DDIM's (DDPM, PLMS): training timesteps only; sigma schedules are not defined.
        "distilled", LCM's (TCD): those of the training timesteps that the student was distilled at.
    spacing: timestep_spacing where the config has none.  heeds_spacing: whether it looks at the config's at all.
    final: where the run ends: "config" (its final_sigmas_type), "zero", or "least" (the least training sigma).
    bounded: whether the least, under Karras and its like, is the config's sigma_min where it has one.
    switches: the sigma schedules that it knows switches for, the stronger first; it ignores the others' keys, which a
        config keeps of the class that the checkpoint had before.
    clips: whether it looks at lambda_min_clipped.
    whole: whether the network is told whole timesteps under Karras sigmas.
    scaled: whether the run starts from sigma * noise (unless the spacing is leading) rather than from noise.
    """

    kind: str
    spacing: str = "linspace"
    heeds_spacing: bool = True
    final: str = "config"
    bounded: bool = False
    switches: tuple[str, ...] = ("karras", "exponential", "beta")
    clips: bool = False
    whole: bool = False
    scaled: bool = False


def karras(n: int, low: float, high: float, rho: float = 7.0) -> Float64[np.ndarray, " n"]:
    """Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), n) ** rho


def exponential(n: int, low: float, high: float) -> Float64[np.ndarray, " n"]:
    """Even in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), n))


def polyexponential(n: int, low: float, high: float, rho: float = 1.0) -> Float64[np.ndarray, " n"]:
    """k-diffusion's: log sigma falls as a ramp to the power rho; at 1 it is `exponential`."""
    return np.exp(np.linspace(1, 0, n) ** rho * (math.log(high) - math.log(low)) + math.log(low))


def beta(n: int, low: float, high: float) -> Float64[np.ndarray, " n"]:
    """Lee et al. 2024 (arXiv 2407.12173), quantiles of Beta(0.6, 0.6), over sigma as diffusers does."""
    from scipy.special import betaincinv  # late: SciPy is a tenth of the time that importing sdjax takes

    return low + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, n)) * (high - low)


def kl_optimal(n: int, low: float, high: float) -> Float64[np.ndarray, " n"]:
    """Sabour et al. 2024 (arXiv 2404.14507), eq. 12: even in arctan sigma."""
    return np.tan(np.linspace(math.atan(high), math.atan(low), n))


def ays(n: int, low: float, high: float, points: Sequence[float] = _AYS) -> Float64[np.ndarray, " n"]:
    """Align Your Steps, log-linear between its eleven points; the ends are its own."""
    return np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(points)), np.log(points)))[:-1]


SIGMAS = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
    "lu": exponential,
    "kl_optimal": kl_optimal,
    "ays": ays,
    "ays_sdxl": functools.partial(ays, points=_AYS_SDXL),
}
"""Sigma schedules by name: (steps, least, greatest) -> falling ratios, without the final one."""
NAMES = (*SPACINGS, "sgm_uniform", *SIGMAS)
"""Every name that `sigmas` may be."""
_WITH_RHO = ("karras", "polyexponential")
_SWITCHES = {
    "karras": "use_karras_sigmas",
    "lu": "use_lu_lambdas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}


def default_sigmas(schedule: Schedule, grid: Grid) -> str:
    """The sigma schedule that the config switches on; "" where it leaves that to the spacing, or the grid has none."""
    switched = [name for name in grid.switches if schedule.option(_SWITCHES[name], False)]
    rivals = [_SWITCHES[name] for name in switched if name != "lu"]
    if len(rivals) > 1:
        raise SamplingError(f"only one of {', '.join(rivals)} can be true")
    return switched[0] if switched else ""


def levels(
    schedule: Schedule,
    grid: Grid,
    n: int,
    *,
    sigmas: str | Sequence[float],
    timesteps: Sequence[float] | None,
    rho: float | None,
    spacing: str,
    share: float = 1.0,
) -> list[Level]:
    """The n levels where the network is called and the last one, where the run ends.

    sigmas: "", a name of NAMES, or falling ratios.  timesteps: falling, or None.  spacing: where neither says it.
    share: of the timesteps of distillation, from the least noisy on, that the n are taken from.
    Raises SamplingError for names, lists and numbers of steps that give no falling levels.
    """
    if isinstance(sigmas, str) and sigmas not in ("", *NAMES):
        raise SamplingError(f"unknown sigmas {sigmas!r}; use one of {', '.join(NAMES)}, or a falling list")
    if rho is not None and (sigmas not in _WITH_RHO or not rho > 0):
        raise SamplingError(f"rho={rho} is for sigmas {' or '.join(_WITH_RHO)}, and more than 0")
    if grid.kind in ("train", "distilled"):
        visited = _train_levels(schedule, grid, n, sigmas, timesteps, spacing, share)
    else:
        t, ratios = _free_levels(schedule, grid, n, sigmas, timesteps, rho, spacing)
        final = schedule.option("final_sigmas_type", "zero") if grid.final == "config" else grid.final
        least = schedule.ratios[0]
        if grid.bounded and isinstance(sigmas, str) and sigmas in SIGMAS:
            least = schedule.option("sigma_min", least)
        if ratios[-1] <= least * (1 + 1e-9):  # Karras and its like reach it with their last call, but for rounding
            least = ratios[-1]
        visited = [*map(Level.at, t, ratios), CLEAN if final == "zero" else Level.at(0.0, least)]
    for i, (before, after) in enumerate(itertools.pairwise(level.ratio for level in visited)):
        if not (before > after or (i == n - 1 and before == after)):
            raise SamplingError(f"sigmas must fall at every step, but {after:.6g} follows {before:.6g} ({n} steps)")
    return visited


def _free_levels(
    schedule: Schedule,
    grid: Grid,
    n: int,
    sigmas: str | Sequence[float],
    timesteps: Sequence[float] | None,
    rho: float | None,
    spacing: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and ratios of the calls, between the training timesteps too."""
    table = schedule.ratios
    index = np.arange(len(table))
    if not isinstance(sigmas, str):
        ratios = np.array(sigmas, np.float64)
        for beyond in ratios[~((ratios >= _LEAST) & (ratios <= _MOST))]:
            raise SamplingError(f"sigmas must lie in {_LEAST:g} to {_MOST:g}, which {beyond:g} does not")
        return schedule.timestep_of(ratios), ratios
    if sigmas in SIGMAS:
        ends = table
        if grid.kind == "k":
            ends = np.interp(_spaced(schedule, grid, n, spacing), index, table)
        low, high = schedule.option("sigma_min", ends.min()), schedule.option("sigma_max", ends.max())
        if min(low, high) < _LEAST:
            raise SamplingError(f"sigmas={sigmas} needs {_LEAST:g} or more of sigma_min={low:g} and sigma_max={high:g}")
        with np.errstate(over="ignore", invalid="ignore"):  # of the values that are refused below
            ratios = SIGMAS[sigmas](n, np.float64(low), np.float64(high), **({} if rho is None else {"rho": rho}))
        if not np.all((ratios > 0) & (ratios < np.inf)):
            raise SamplingError(f"sigmas={sigmas} has no values at rho={rho}; use a larger one")
        t = schedule.timestep_of(ratios)
        if sigmas in ("karras", "lu") and grid.whole:
            t = np.round(t)
        elif sigmas in ("exponential", "beta") and grid.kind == "dpm":
            t = np.floor(t)
        return t, ratios
    if timesteps is not None:
        t = np.asarray(timesteps, np.float64)
        if not np.all((t >= 0) & (t <= index[-1])):
            raise SamplingError(f"timesteps must lie in 0 to {index[-1]}")
    elif sigmas == "sgm_uniform":
        t = np.linspace(index[-1], 0, n + 1)[:-1]
    else:
        t = _spaced(schedule, grid, n, spacing)
    return t, np.interp(t, index, table)


def _train_levels(
    schedule: Schedule,
    grid: Grid,
    n: int,
    sigmas: str | Sequence[float],
    timesteps: Sequence[float] | None,
    spacing: str,
    share: float,
) -> list[Level]:
    """Levels at training timesteps, and clean."""
    if not isinstance(sigmas, str) or sigmas not in ("", *SPACINGS):
        what = repr(sigmas) if isinstance(sigmas, str) else "a list"
        known = ", ".join(SPACINGS)
        raise SamplingError(f"sigmas={what} is not defined for samplers over training timesteps; use {known}")
    if timesteps is not None:
        t = np.asarray(timesteps)
    elif grid.kind == "distilled" and sigmas == "":
        t = _distilled(schedule, n, share)
    else:
        t = _spaced(schedule, grid, n, spacing)
    if not np.all((t >= 0) & (t < schedule.num_train_timesteps) & (t == np.floor(t))):
        raise SamplingError(f"timesteps must be whole, 0 to {schedule.num_train_timesteps - 1}")
    return [*(train_level(schedule, int(i)) for i in t), CLEAN]


def train_level(schedule: Schedule, t: int) -> Level:
    """The level of a training timestep."""
    alpha2 = float(schedule.alphas_cumprod[t])
    return Level(float(t), math.sqrt(alpha2), math.sqrt(1 - alpha2))


def _spaced(schedule: Schedule, grid: Grid, n: int, spacing: str) -> np.ndarray:
    """Falling timesteps: "linspace", "leading" or "trailing" (Lin et al. 2023, table 2), as each kind rounds them."""
    total, offset = schedule.num_train_timesteps, schedule.option("steps_offset", 0)
    last, extra = total, int(grid.kind == "dpm")
    if grid.clips:
        lambdas = -np.log(schedule.ratios)[::-1]
        last = total - int(np.searchsorted(lambdas, schedule.option("lambda_min_clipped", -math.inf)))
    if spacing == "linspace":
        t = np.linspace(0, last - 1, n + extra)[::-1][:n]
    elif spacing == "leading":
        t = (np.arange(n + extra) * (last // (n + extra)))[::-1][:n] + offset
    else:
        t = np.round(np.arange(last, 0, -total / n)[:n]) - 1
    t = t.astype(np.float64)
    return t if grid.kind == "k" else np.round(t)


def _distilled(schedule: Schedule, n: int, share: float) -> np.ndarray:
    """n of a share of the original_inference_steps of Luo et al. 2023 (arXiv 2310.04378), evenly from the last."""
    original = schedule.option("original_inference_steps", 50)
    stride, most = schedule.num_train_timesteps // original, int(original * share)
    if n > most:
        left = f"{most}, the share {share:g} of " if share < 1 else ""
        raise SamplingError(
            f"num_inference_steps={n} is more than {left}the {original} (original_inference_steps) of distillation"
        )
    falling = (np.arange(1, most + 1) * stride - 1)[::-1]
    return falling[np.floor(np.linspace(0, most, n, endpoint=False)).astype(int)]

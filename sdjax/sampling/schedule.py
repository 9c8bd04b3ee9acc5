"""The noise schedule of a checkpoint: what scheduler_config.json says, as numbers in float64.

Every diffusers scheduler for Stable Diffusion writes the same keys; each reads some of them. `Schedule` keeps what
belongs to the model (alphas, prediction type) and hands the rest to whichever sampler asks: see `Schedule.option`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from sdjax.sampling.errors import SamplingError

CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "IPNDMScheduler": "ipndm",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "KDPM2DiscreteScheduler": "dpm_2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "SASolverScheduler": "sa_solver",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "uni_pc",
}
"""The sampler of each diffusers scheduler class."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("linspace", "leading", "trailing")

# Where a class's defaults for the betas are not DDPM's.
_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_KARRAS_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_LCM_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASS_BETAS = {
    "HeunDiscreteScheduler": _KARRAS_BETAS,
    "KDPM2DiscreteScheduler": _KARRAS_BETAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS_BETAS,
    "DPMSolverSDEScheduler": _KARRAS_BETAS,
    "LCMScheduler": _LCM_BETAS,
    "TCDScheduler": _LCM_BETAS,
}

# Values that no table can express, or that belong to other kinds of model; None stands for a missing key.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": (None, *PREDICTION_TYPES),
    "timestep_spacing": (None, *SPACINGS),
    "thresholding": (None, False),
    "clip_sample": (None, False),
    "use_flow_sigmas": (None, False),
    "use_dynamic_shifting": (None, False),
    "interpolation_type": (None, "linear"),
    "timestep_type": (None, "discrete"),
    "final_sigmas_type": (None, "zero", "sigma_min"),
    "algorithm_type": (None, "dpmsolver++", "sde-dpmsolver++", "deis", "data_prediction"),
}

# Numbers: whether whole, the least, and the greatest.
_NUMBERS = {
    "num_train_timesteps": (True, 2, 100_000),
    "steps_offset": (True, 0, 100_000),
    "original_inference_steps": (True, 1, 100_000),
    "beta_start": (False, 0, 1),
    "beta_end": (False, 0, 1),
    "sigma_min": (False, 0, 10_000),
    "sigma_max": (False, 0, 10_000),
    "lambda_min_clipped": (False, -math.inf, 10_000),
    "timestep_scaling": (False, 0, 100_000),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """A model's noise schedule, and its scheduler's settings.

    alphas_cumprod: [T] float64, falling; the share of the image in the variance at each training timestep. The last is
        exactly 0 after a zero-terminal-SNR rescale (Lin et al. 2023, arXiv 2305.08891).
    prediction_type: "epsilon", "v_prediction" or "sample".
    config: scheduler_config.json as it was read.
    """

    alphas_cumprod: Float64[np.ndarray, " T"]
    prediction_type: str
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """Reads scheduler_config.json. Raises SamplingError naming the first key whose value is not supported.

        A missing clip_sample means False, whatever the diffusers class defaults to: clipping a latent to [-1, 1] is
        never right.
        """
        name = config.get("_class_name")
        if name not in (None, *CLASSES):
            raise SamplingError(f"_class_name={name!r} is not supported; supported are {', '.join(CLASSES)}")
        for key, allowed in _ALLOWED.items():
            if config.get(key) not in allowed:
                raise SamplingError(f"{key}={config[key]!r} is not supported; use one of {allowed[1:]}")
        if config.get("variance_type") in ("learned", "learned_range"):
            raise SamplingError(
                f"variance_type={config['variance_type']!r} is not supported; the variance must be fixed"
            )
        for key, (whole, least, most) in _NUMBERS.items():
            value = config.get(key)
            if value is not None and not (type(value) in (int, int if whole else float) and least <= value <= most):
                kind = "whole number" if whole else "number"
                raise SamplingError(f"{key}={value!r} is not supported; it must be a {kind}, {least} to {most}")
        given = {key: value for key, value in config.items() if value is not None}
        return cls(
            alphas_cumprod=_alphas_cumprod({**_BETAS, **_CLASS_BETAS.get(str(name), {}), **given}),
            prediction_type=config.get("prediction_type") or "epsilon",
            config=dict(config),
        )

    def option(self, key: str, default: Any) -> Any:
        """The config's value for `key`, or `default` where it is missing or null.

        The default is that of the scheduler class that the sampler follows, as it would be after
        `OtherScheduler.from_config(config)` in diffusers.
        """
        value = self.config.get(key)
        return default if value is None else value

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def ratios(self) -> Float64[np.ndarray, " T"]:
        """sigma / alpha at each training timestep, rising (k-diffusion's sigmas).

        Where the last alpha is zero it is replaced by 2^-12, as in diffusers, so that the ratio is finite (4096).
        """
        alphas = self.alphas_cumprod.astype(np.float32)
        if alphas[-1] == 0:
            alphas[-1] = 2.0**-24
        return np.sqrt((1 - alphas) / alphas).astype(np.float64)

    def timestep_of(self, ratio: float | Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
        """The (fractional) timestep of each ratio, log-linear between neighbours, clipped to the schedule's ends."""
        logs = np.log(self.ratios.astype(np.float32))
        return np.asarray(np.interp(np.log(np.maximum(ratio, 1e-10)), logs, np.arange(len(logs))))


def _alphas_cumprod(config: Mapping[str, Any]) -> Float64[np.ndarray, " T"]:
    """In float32 where diffusers is: its rounding moves 1 - alpha by parts in 10^5 near t = 0, and images with it."""
    steps, kind = config.get("num_train_timesteps", 1000), config["beta_schedule"]
    start, end, trained = config["beta_start"], config["beta_end"], config.get("trained_betas")
    if trained is not None:
        try:
            with np.errstate(over="ignore"):  # of betas that are refused below
                betas = np.asarray(trained, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise SamplingError("trained_betas is no list of numbers; leave it out, or give one a timestep") from None
        if betas.shape != (steps,):
            raise SamplingError(f"trained_betas has shape {betas.shape}; num_train_timesteps asks for ({steps},)")
    elif kind == "linear":
        betas = _linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2"
        raise SamplingError(f"beta_schedule={kind!r} is not supported; use one of {known}, or trained_betas")
    if not np.all((1 - betas > 0) & (1 - betas < 1)):
        raise SamplingError("betas must lie strictly between 0 and 1, by 1e-7 or more")
    alphas = _running_product(1 - betas)
    to_zero = bool(config.get("rescale_betas_zero_snr"))
    if to_zero:
        with np.errstate(divide="ignore", invalid="ignore"):  # of betas that are refused below
            roots = np.sqrt(alphas)
            alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
            betas = 1 - np.append(alphas[:1], alphas[1:] / alphas[:-1])
        alphas = _running_product(1 - betas)
    noisy = alphas[:-1] if to_zero else alphas
    if not np.all((noisy >= np.finfo(np.float32).tiny) & (noisy < 1)):
        raise SamplingError("betas leave no image, or no noise, at some timestep; they must be further from 0 or 1")
    return alphas.astype(np.float64)


def _linspace(start: float, end: float, steps: int) -> np.ndarray:
    """torch's in float32: from both ends to the middle, each value rounded once."""
    low, high, up = np.float32(start), np.float32(end), np.arange(steps)
    step = np.float64((high - low) / np.float32(steps - 1))
    return np.where(up < steps // 2, low + step * up, high - step * up[::-1]).astype(np.float32)


def _running_product(alphas: np.ndarray) -> np.ndarray:
    """torch's cumprod: rounded to float32 only where it is stored."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)

"""A network with a known answer, and ways to run a sampler on it: a table in NumPy, diffusers' class in torch."""

import inspect
import math
import sys
from unittest import mock

import numpy as np
import torch

from sdjax.sampling import Schedule, Table
from sdjax.sampling.noise import TorchGenerator, torch_latent, torch_step_noise

SHAPE = (4, 6, 4)  # height, width, channels
SD15 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def config(prediction="epsilon", **changes):
    return {**SD15, "prediction_type": prediction, **changes}


class Toy:
    """The exact denoiser of images that are +1 or -1, each blurred by a Gaussian of 0.6, under any prediction type.

    Like a real network it is told x and t only; between whole timesteps the noise level is interpolated.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.ratios = schedule.ratios

    def level(self, t):
        """alpha and sigma at a timestep: the inverse of Schedule.timestep_of."""
        ratio = np.exp(np.interp(t, np.arange(len(self.ratios)), np.log(self.ratios.astype(np.float32))))
        alpha = 1 / np.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def image(self, x, alpha, sigma, tanh=np.tanh):
        blur = 0.6**2
        total = alpha**2 * blur + sigma**2
        mean = tanh(alpha * x / total)
        return (alpha * blur * x + sigma**2 * mean) / total

    def __call__(self, x, t):
        alpha, sigma = self.level(t)
        image = self.image(x, alpha, sigma)
        if self.schedule.prediction_type == "sample":
            return image
        eps = (x - alpha * image) / sigma
        return eps if self.schedule.prediction_type == "epsilon" else alpha * eps - sigma * image


def run_table(table: Table, network, start, noise=None):
    """A table in NumPy at the precision of `start`."""
    x, outputs, noises = start, [], []
    for r in range(table.calls):
        outputs.insert(0, table.a[r] * x + table.b[r] * network(x, table.t[r]))
        noises.insert(0, np.zeros_like(x) if noise is None else noise[r])
        x = table.cx[r] * x
        x = x + sum(c * m for c, m in zip(table.cm[r], outputs, strict=False))
        x = x + sum(c * z for c, z in zip(table.cn[r], noises, strict=False))
    return x


def torch_run(table: Table, network, seed=0, image=None):
    """A table with "torch" noise, in float64 NumPy."""
    generator = TorchGenerator(seed)
    start = table.start_noise * torch_latent(generator, SHAPE).astype(np.float64)
    if image is not None:
        start = start + table.start_signal * image
    return run_table(table, network, start, np.stack(list(torch_step_noise(table, generator, SHAPE))))


def diffusers_run(scheduler, network, n, seed=0, strength=None, image=None, timesteps=None, sigmas=None, **step):
    """What StableDiffusion(Img2Img)Pipeline does around the network, in torch float64 where the class allows."""
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=timesteps)
    elif sigmas is not None:
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler.set_timesteps(n)
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            setattr(scheduler, name, value.double())
    generator = torch.Generator("cpu").manual_seed(seed)
    height, width, channels = SHAPE
    noise = torch.randn((1, channels, height, width), generator=generator).double()
    steps = scheduler.timesteps
    begin = 0 if strength is None else max(n - min(int(n * strength), n), 0) * scheduler.order
    steps = steps[begin:]
    if hasattr(scheduler, "set_begin_index"):  # without it some classes begin late where the first timestep is repeated
        scheduler.set_begin_index(begin)
    if strength is None:
        x = noise * float(scheduler.init_noise_sigma)
    else:
        x = scheduler.add_noise(torch.from_numpy(image).permute(2, 0, 1)[None], noise, steps[:1])
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = generator
    # Pipelines sample in float32: so are their draws, whatever the precision here.
    with mock.patch.object(sys.modules[type(scheduler).__module__], "randn_tensor", _draw, create=True):
        for t in steps:
            seen = scheduler.scale_model_input(x, t)
            out = network(seen.double().permute(0, 2, 3, 1)[0].numpy(), float(t))
            x = scheduler.step(torch.from_numpy(out).permute(2, 0, 1)[None], t, x, **step).prev_sample
    return x.double().permute(0, 2, 3, 1)[0].numpy()


def _draw(shape, generator=None, device=None, dtype=None, layout=None):
    return torch.randn(shape, generator=generator).to(dtype)


def relative(actual, expected):
    """The largest difference over the largest value."""
    assert np.all(np.isfinite(expected))
    assert np.all(np.isfinite(actual))
    return np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), math.ulp(1.0))

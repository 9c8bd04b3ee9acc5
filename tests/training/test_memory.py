"""What a run holds on a device beside its UNet: large pictures as latents and in sheets, and a sheet's networks."""

import gc
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sdjax.config import VAEConfig
from sdjax.models import tiling
from sdjax.models.vae import AutoencoderKL
from sdjax.sampling.schedule import Schedule
from sdjax.training import config, latents, objective, sheet
from sdjax.training.loop import Run
from sdjax.training.networks import flat
from tests.training.runs import ONE, write

VAE = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
SIDE = 512


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL(VAEConfig.from_dict(VAE), rngs=nnx.Rngs(0))


class UNet(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))

    def __call__(self, x, t, context):
        return self.w * x


def gradient(vae, params, pixels):
    """Of a step of a UNet that takes no memory."""
    count = len(pixels)
    modules, schedule = {"vae": vae, "unet": UNet()}, Schedule.from_config({})
    loss = objective.denoising(modules, schedule, config.Diffusion(), scaling_factor=0.5, batch_size=count)
    batch = {"pixels": pixels, "place": jnp.arange(count), "context": jnp.zeros((count, 1, 1))}
    total = lambda trained: loss(trained, {"vae": params}, batch, jax.random.key(0))[0].sum()  # noqa: E731
    return jax.grad(total)({"unet": {"w": jnp.ones(())}})["unet"]["w"]


@pytest.mark.parametrize("function", [latents.moments, sheet.reconstructed, gradient])
def test_large_pictures_take_the_memory_of_one(vae, function):
    def temporaries(count):
        pixels = jax.ShapeDtypeStruct((count, SIDE, SIDE, 3), np.uint8)
        lowered = jax.jit(partial(function, vae)).lower(flat(vae), pixels)
        found: Any = lowered.compile().memory_analysis()
        return found.temp_size_in_bytes

    layer, picture = (SIDE * SIDE * channels * 4 for channels in (16, 3))
    few, many = temporaries(5), temporaries(20)
    assert few > layer
    assert many - few < 15 * 2 * picture


def test_latents_and_sheets_of_one_picture_at_a_time_are_those_of_the_batch(vae, monkeypatch):
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)), jnp.uint8)
    functions = [latents.moments, sheet.reconstructed, gradient]
    whole = [jax.jit(partial(function, vae))(flat(vae), pixels) for function in functions]
    monkeypatch.setattr(tiling, "SLICED", 16 * 16)
    for function, expected in zip(functions, whole, strict=True):
        made = jax.jit(partial(function, vae))(flat(vae), pixels)
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def test_a_sheet_lets_go_of_its_networks(tmp_path, monkeypatch):
    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    class Pipe:
        def __init__(self, spec, networks, *_):
            self.networks = networks

        def generate(self, requests):
            assert set(self.networks) == {"unet", "vae", "text_encoder"}
            return [SimpleNamespace(image=Image.new("RGB", (16, 16))) for _ in requests]

    monkeypatch.setattr(sheet, "StableDiffusion", Pipe)
    run = Run(config.load(write(tmp_path, prompts=["a red circle"])), ONE)
    run.state = run.state._replace(step=np.int32(1))
    made = sheet.Sheet(run)
    gc.collect()  # what other tests left may be collected at any time
    before = held()
    for step in (1, 2):
        made.write(step)
        assert (tmp_path / "run" / "sheets" / f"{step:06d}.png").exists()
        assert held() == before

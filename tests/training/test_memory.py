"""What a run holds on a device beside its UNet: large pictures as latents and in sheets, and a sheet's networks."""

import dataclasses
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
from sdjax.parallel import Devices
from sdjax.sampling.schedule import Schedule
from sdjax.training import config, latents, loop, objective, sheet
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

    def __call__(self, x, t, context, added):
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


def test_all_devices_share_the_latents_of_a_data_set(vae, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    networks, shapes, moments = SimpleNamespace(params={"vae": flat(vae)}, modules={"vae": vae}), [], latents.moments
    task = SimpleNamespace(task="unet")
    monkeypatch.setattr(latents, "moments", lambda *given: shapes.append(given[-1].shape) or moments(*given))
    one, all_ = (
        latents._encoder(SimpleNamespace(config=task, networks=networks, devices=devices))(pixels)
        for devices in (ONE, Devices())
    )
    assert shapes == [(8, 16, 16, 3), (1, 16, 16, 3)]
    np.testing.assert_allclose(all_, one, rtol=1e-4, atol=1e-5)


def held():
    """Bytes on the devices."""
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("start", ["made", "read"])
def test_a_run_that_has_not_begun_holds_no_device(tmp_path, start):
    """Networks that no step reads, and what Adam keeps, would else take gigabytes of the first device."""
    settings = config.load(write(tmp_path, prompts=["a red circle"]))
    if start == "read":
        begun = Run(settings, ONE)
        begun.state = begun.state._replace(step=np.int32(1))
        begun.export(tmp_path / "model")
        settings = dataclasses.replace(settings, init=str(tmp_path / "model"), model=config.Model())
        del begun
    gc.collect()
    before = held()
    run = Run(settings, ONE)
    gc.collect()
    assert held() == before
    for leaf in jax.tree.leaves((run.networks.params, run.state)):
        assert isinstance(leaf, np.ndarray)


def test_devices_get_the_networks_that_steps_read(tmp_path):
    """Here latents are made before the first step, and the text encoder is trained."""
    settings = config.load(write(tmp_path))
    assert not Run(settings, ONE).frozen
    frozen = dataclasses.replace(settings.diffusion, train_text_encoder=False)
    assert Run(dataclasses.replace(settings, diffusion=frozen), ONE).frozen.keys() == {"text_encoder"}
    shown = dataclasses.replace(settings, data=dataclasses.replace(settings.data, cache_latents=False))
    assert Run(shown, ONE).frozen.keys() == {"vae"}


def test_a_sheet_lets_go_of_its_networks(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_that_are_not_trained_are_held_as_they_compute(tmp_path, monkeypatch, dtype):
    """But for the VAE, which in half precision may overflow."""
    held = {}

    def make_step(*_, **__):
        def step(state, frozen, batch):
            held.update({name: {leaf.dtype.name for leaf in own.values()} for name, own in frozen.items()})
            raise InterruptedError

        return step

    monkeypatch.setattr(loop, "make_step", make_step)
    path = write(tmp_path, cache="false")
    path.write_text(path.read_text().replace("train_text_encoder = true", "train_text_encoder = false"))
    run = Run(dataclasses.replace(config.load(path), dtype=dtype), ONE)
    with pytest.raises(InterruptedError):
        run.train()
    assert held == {"text_encoder": {dtype}, "vae": {"float32"}}

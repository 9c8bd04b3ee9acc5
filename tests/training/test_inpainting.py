"""UNets that paint inside masks: what they are told in training is what they are told when a picture is made."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax.batch import Pictures
from sdjax.canvas import Canvas
from sdjax.generate import StableDiffusion
from sdjax.models import tiling
from sdjax.models.unet import UNet2DCondition
from sdjax.request import Request
from sdjax.training import config, lora, masks
from sdjax.training.config import TrainConfigError
from sdjax.training.loop import Run
from sdjax.training.networks import bind, flat
from tests import checkpoints
from tests.training.runs import ONE

SIDE, PICTURES = 32, 4
CALL = UNet2DCondition.__call__


@pytest.fixture(scope="module", params=["SD", "SDXL"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    make = {"SD": checkpoints.pipeline, "SDXL": checkpoints.pipeline_xl}[request.param]
    checkpoints.saved(folder, make, unet={"in_channels": 9})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red circle")
    return folder


def settings(folder, model, pictures, **changes):
    shared = {"task": "unet", "output": str(folder / "run"), "init": str(model), "steps": 2, "batch_size": PICTURES}
    data = config.Data(folder=str(pictures), size=SIDE)
    return config.Train(**{**shared, "data": data, "lora": config.Lora(rank=2), **changes})


def test_masks_are_rectangles_or_whole():
    drawn = np.asarray(jax.jit(masks.draw, static_argnums=(2, 3))(jax.random.key(0), jnp.arange(800), 24, 32))[..., 0]
    assert drawn.shape == (800, 24, 32)
    whole = drawn.all((1, 2))
    assert 0.2 < whole.mean() < 0.3
    covered = drawn[~whole].mean((1, 2))
    assert 0.1 < covered.mean() < 0.4
    assert (covered > 0).mean() > 0.97  # the least rectangle at an edge may cover no pixel's centre
    rows, columns = drawn[~whole].mean((0, 2)), drawn[~whole].mean((0, 1))
    assert min(rows.min(), columns.min()) > 0.05  # anywhere, the borders too
    one = masks.draw(jax.random.key(0), jnp.array([17]), 24, 32)
    np.testing.assert_array_equal(one[0, ..., 0], drawn[17])  # whatever the company


def test_the_unet_is_told_what_it_is_told_when_a_picture_is_made(model, pictures, tmp_path):
    """The mask at the latent's size and the latent of what it leaves, as `generate` has them of the same picture."""
    run, seen = Run(settings(tmp_path, model, pictures), ONE), {}
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], next(run._batches(0, None)))
    params, key = jax.tree.map(jnp.asarray, run.networks.params), jax.random.key(3)

    def recorded(unet, x, t, *told):
        seen.update(x=x)
        return CALL(unet, x, t, *told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DCondition, "__call__", recorded)
        losses, _ = run._objective()(run.state.params, params, batch, key)
    assert np.isfinite(losses).all()
    *_, key_mask, key_known = jax.random.split(key, 6)
    mask = np.asarray(masks.draw(key_mask, batch["place"], SIDE, SIDE))[..., 0]
    canvases = [
        Canvas(image, np.uint8(255) * own, Image.fromarray(image), None, (0, 0, SIDE, SIDE), (SIDE, SIDE), True)
        for image, own in zip(np.asarray(batch["pixels"]), mask, strict=True)
    ]
    made = Pictures(canvases, (SIDE, SIDE), SIDE // seen["x"].shape[1])
    np.testing.assert_array_equal(seen["x"][..., 4:5], made.mask)
    vae = bind(run.networks.modules["vae"], params["vae"])
    mean, logvar = tiling.encode(vae, jnp.asarray(made.unmasked))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key_known, batch["place"])
    noise = jax.vmap(lambda each: jax.random.normal(each, mean.shape[1:]))(keys)
    known = (mean + jnp.exp(0.5 * logvar) * noise) * vae.config.scaling_factor
    np.testing.assert_allclose(seen["x"][..., 5:], known, atol=1e-5)


@pytest.mark.parametrize("model", ["SDXL"], indirect=True)
def test_a_lora_of_one_is_trained_and_paints(model, pictures, tmp_path):
    run = Run(settings(tmp_path, model, pictures), ONE)
    assert run.train()
    run.export(tmp_path / "lora")
    pipe = StableDiffusion.from_pretrained(model, loras=[tmp_path / "lora"], devices=jax.devices()[:1])
    joined = lora.joined(run.networks.params, run.state.ema)
    for key, leaf in flat(pipe._networks["unet"]).items():
        np.testing.assert_allclose(leaf[0], joined["unet"][key], rtol=1e-5, atol=1e-6, err_msg=key)
    picture = np.asarray(Image.open(pictures / "0.png"))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 16:] = 255
    [result] = pipe.generate([Request(prompt="a", image=picture, mask_image=mask, strength=1, num_inference_steps=2)])
    np.testing.assert_array_equal(result.pixels[:, :16], picture[:, :16])


def test_the_whole_model_is_one_that_diffusers_paints_with(model, pictures, tmp_path):
    run = Run(settings(tmp_path, model, pictures, lora=config.Lora()), ONE)
    run.state = run.state._replace(step=np.int32(1))
    run.export(tmp_path / "model")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    kind = "XLInpaint" if "text_encoder_2" in run.networks.modules else "Inpaint"
    assert type(theirs).__name__ == f"StableDiffusion{kind}Pipeline"


def test_latents_without_masks_are_refused(model, pictures, tmp_path):
    data = config.Data(folder=str(pictures), size=SIDE, cache_latents=True)
    with pytest.raises(TrainConfigError, match=r"data\.cache_latents does not go with a UNet that paints inside masks"):
        Run(settings(tmp_path, model, pictures, data=data), ONE)
    prompted = settings(tmp_path, model, pictures, sheet_prompts=("a cat",))
    with pytest.raises(TrainConfigError, match="sheet_prompts: this checkpoint paints inside masks"):
        Run(prompted, ONE)

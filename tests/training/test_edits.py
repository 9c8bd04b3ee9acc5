"""UNets that edit by instruction: what they are told in training is what they are told when a picture is made."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import programs
from sdjax.models.unet import UNet2DCondition
from sdjax.spec import Spec
from sdjax.training import config
from sdjax.training.config import TrainConfigError
from sdjax.training.data import Scenes, open_source
from sdjax.training.loader import Loader
from sdjax.training.loop import Run
from sdjax.training.networks import bind
from sdjax.weights.safetensors import CheckpointError
from tests import checkpoints
from tests.training import pairs
from tests.training.runs import ONE

CALL = UNet2DCondition.__call__


def settings(folder, model, pictures, **changes):
    widened = config.Diffusion(in_channels=8, caption_dropout=0.0)
    return pairs.settings(folder, model, pictures, **{"task": "unet", "diffusion": widened, **changes})


def test_the_unet_is_told_what_it_is_told_when_a_picture_is_edited(model, pictures, tmp_path):
    run, seen = Run(settings(tmp_path, model, pictures), ONE), {}
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], next(run._batches(0, None)))
    assert not batch["is_unseen"].any()
    batch["is_unseen"] = jnp.array([False, True, False, False])
    params = jax.tree.map(jnp.asarray, run.networks.params)

    def recorded(unet, x, t, *told):
        seen.update(x=x)
        return CALL(unet, x, t, *told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DCondition, "__call__", recorded)
        losses, _ = run._objective()({}, params, batch, jax.random.key(3))
    assert np.isfinite(losses).all()
    order = [np.asarray(open_source(run.config.data, conditioned=True).conditioning(i)) for i in range(pairs.COUNT)]
    given = np.asarray(batch["conditioning"])
    assert sorted(map(bytes, given)) == sorted(map(bytes, order))
    vae = bind(run.networks.modules["vae"], params["vae"])
    mean = np.array(programs.encode_mean(vae, jnp.asarray(given) / 127.5 - 1, tiled=None))
    mean[1] = 0
    np.testing.assert_allclose(seen["x"][..., 4:], mean, atol=1e-5)


def test_a_model_that_draws_becomes_one_that_edits(model, pictures, tmp_path):
    """Its UNet is widened, begins as it was, and is exported as one that diffusers edits with."""
    run = Run(settings(tmp_path, model, pictures), ONE)
    kernel = run.state.params["unet"]["conv_in.kernel"]
    assert kernel.shape[2] == 8
    assert not kernel[:, :, 4:].any()
    plain = Run(pairs.settings(tmp_path / "plain", model, pictures, task="unet"), ONE).state.params["unet"]
    np.testing.assert_array_equal(kernel[:, :, :4], plain["conv_in.kernel"])
    run.state = run.state._replace(step=np.int32(1))
    run.export(tmp_path / "model")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    xl = "XL" if "text_encoder_2" in run.networks.modules else ""
    assert type(theirs).__name__ == f"StableDiffusion{xl}InstructPix2PixPipeline"
    assert Spec(tmp_path / "model").family.edits


@pytest.mark.parametrize("model", ["SD"], indirect=True)
def test_it_is_trained_and_shown(model, pictures, tmp_path):
    shown = {"sheet_prompts": ("a red circle",), "sheet_images": (str(pictures / "from" / "1.png"),)}
    run = Run(settings(tmp_path, model, pictures, **shown), ONE)
    assert run.train()
    assert np.abs(run.state.params["unet"]["conv_in.kernel"][:, :, 4:]).min(axis=(0, 1, 3)).all()
    assert (tmp_path / "run" / "sheets" / "000002.png").exists()


def test_captions_and_pictures_are_dropped_as_often_as_asked():
    """As in diffusers' trainer: a part without a caption, as much without a picture, half of that without both."""
    loader = Loader(
        Scenes(8, 64), 64, 0, images=False, captions=True, caption_dropout=0.2, workers=1, conditioning=True
    )
    batches = [loader.batch(step) for step in range(20)]
    empty, unseen = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("empty", "is_unseen"))
    for found, wanted in ((empty, 0.2), (unseen, 0.2), (empty & unseen, 0.1)):
        assert abs(found.mean() - wanted) < 0.03
    assert batches[0].conditioning.shape == (64, 8, 8, 3)


@pytest.mark.parametrize("model", ["SD"], indirect=True)
def test_what_does_not_go_together_is_refused(model, pictures, tmp_path):
    data = config.Data(folder=str(pictures), size=pairs.SIDE, cache_latents=True)
    with pytest.raises(TrainConfigError, match=r"data\.cache_latents does not go with a UNet that edits pictures"):
        Run(settings(tmp_path, model, pictures, data=data), ONE)
    with pytest.raises(TrainConfigError, match="in_channels 8, to edit pictures by instruction, or 9, to paint"):
        Run(settings(tmp_path, model, pictures, diffusion=config.Diffusion(in_channels=7)), ONE)
    inpainting = tmp_path / "inpainting"
    checkpoints.saved(inpainting, unet={"in_channels": 9})
    with pytest.raises(CheckpointError, match=r"conv_in.weight has shape \[32, 9, 3, 3\]; the configuration makes it"):
        Run(settings(tmp_path, inpainting, pictures), ONE)

"""A ControlNet is begun and trained as diffusers does it, and what is exported controls what is drawn."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.generate import StableDiffusion
from sdjax.models.unet import UNet2DCondition
from sdjax.request import Request
from sdjax.training import config, controlnet, identity
from sdjax.training.config import TrainConfigError
from sdjax.training.loop import Run, check_replaceable
from sdjax.training.networks import flat
from sdjax.training.samples import DataError
from sdjax.weights.safetensors import CheckpointError
from tests import checkpoints
from tests.training import pairs
from tests.training.runs import ONE

UNSEEN = UNet2DCondition.__call__
FRESH = "controlnet_cond_embedding."


def settings(folder, model, pictures, **changes):
    return pairs.settings(folder, model, pictures, **{"task": "controlnet", **changes})


def theirs(run, folder):
    """The run's ControlNet, read by diffusers."""
    controlnet.save(folder, run.networks, run.networks.params["controlnet"])
    return diffusers.ControlNetModel.from_pretrained(folder)


def shaken(run):
    """The ControlNet's parameters with noise on them, so that its last layers say something."""
    rng = np.random.default_rng(1)
    params = run.networks.params["controlnet"]
    return {name: leaf + rng.normal(0, 0.05, leaf.shape).astype(np.float32) for name, leaf in params.items()}


def test_one_begins_as_diffusers_begins_it(model, pictures, tmp_path):
    made = theirs(Run(settings(tmp_path, model, pictures), ONE), tmp_path / "controlnet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    channels = made.config.conditioning_embedding_out_channels
    assert channels == [16, 32]  # of a VAE that halves each side once; 16, 32, 96, 256 of Stable Diffusion's
    wanted = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    for name in wanted.config.keys() - {"_use_default_values", "_name_or_path"}:
        expected = wanted.config[name]
        found = made.config[name]
        as_list = list(expected) if isinstance(expected, tuple) else expected
        assert (list(found) if isinstance(found, tuple) else found) == as_list, name
    ours = made.state_dict()
    for name, tensor in wanted.state_dict().items():
        if not name.startswith(FRESH) or "conv_out" in name:
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
        elif name.endswith("weight"):  # as PyTorch begins a convolution
            assert 0.8 < ours[name].std() / tensor.std() < 1.25, name


def test_the_loss_is_that_of_diffusers_trainer(model, pictures, tmp_path):
    """The same noisy latents through diffusers' networks, put together as its trainers do."""
    run, seen = Run(settings(tmp_path, model, pictures), ONE), {}
    run.networks.params["controlnet"] = shaken(run)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0, 0], next(run._batches(0, None)))
    params = jax.tree.map(jnp.asarray, run.networks.params)
    trained, frozen = {"controlnet": params.pop("controlnet")}, params

    def recorded(unet, x, t, context, added, **residuals):
        seen.update(x=x, t=t, context=context, added=added)
        seen["output"] = UNSEEN(unet, x, t, context, added, **residuals)
        return seen["output"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DCondition, "__call__", recorded)
        losses, _ = run._objective()(trained, frozen, batch, jax.random.key(3))
    assert np.isfinite(losses).all()

    net = theirs(run, tmp_path / "controlnet")
    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    x, t, context = (torch.tensor(np.asarray(seen[name])) for name in ("x", "t", "context"))
    told = {"encoder_hidden_states": context}
    if seen["added"] is not None:
        told["added_cond_kwargs"] = {name: torch.tensor(np.asarray(value)) for name, value in seen["added"].items()}
    image = torch.tensor(np.asarray(batch["conditioning"])).permute(0, 3, 1, 2) / 255  # the trainer's ToTensor
    with torch.no_grad():
        x = x.permute(0, 3, 1, 2)
        skips, middle = net(x, t, controlnet_cond=image, return_dict=False, **told)
        plain = unet(x, t, **told).sample
        residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        output = unet(x, t, **told, **residuals).sample
    assert (output - plain).abs().max() > 0.01
    np.testing.assert_allclose(seen["output"], output.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("model", ["SDXL"], indirect=True)
def test_a_run_leaves_what_controls(model, pictures, tmp_path):
    """On latents made beforehand, with a sheet drawn under the ControlNet on the way."""
    whole = settings(
        tmp_path,
        model,
        pictures,
        data=config.Data(folder=str(pictures), size=pairs.SIDE, cache_latents=True),
        optimizer=config.Optimizer(learning_rate=1e-2),
        sheet_prompts=("a red circle",),
        sheet_images=(str(pictures / "from" / "0.png"),),
        sheet_every=2,
        remat=True,
    )
    run = Run(whole, ONE)
    assert "vae" not in run.frozen
    before = run.state.params["controlnet"]
    assert run.train()
    assert (tmp_path / "run" / "sheets" / "000002.png").exists()
    assert run.state.params.keys() == {"controlnet"}
    last = {name for name in before if name.startswith(("controlnet_down", "controlnet_mid"))}
    moved = {name for name in before if np.any(before[name] != run.state.params["controlnet"][name])}
    assert last <= moved
    run.export(tmp_path / "controlnet")
    run.export(tmp_path / "controlnet")  # in place of the one that is there
    pipe = StableDiffusion.from_pretrained(model, controlnets=[tmp_path / "controlnet"], devices=jax.devices()[:1])
    for name, leaf in flat(pipe._networks["controlnet_0"]).items():
        np.testing.assert_allclose(leaf[0], run.state.ema["controlnet"][name], atol=1e-7, err_msg=name)
    asked = {"prompt": "a", "num_inference_steps": 2, "control_image": str(pictures / "from" / "0.png")}
    given, left = pipe.generate([Request(**asked, controlnet_conditioning_scale=scale) for scale in ("8", "0")])
    assert np.any(given.pixels != left.pixels)


@pytest.mark.parametrize("model", ["SD"], indirect=True)
def test_one_goes_on_from_another(model, pictures, tmp_path):
    first = Run(settings(tmp_path, model, pictures), ONE)
    for name, leaf in {"first": first.networks.params["controlnet"], "second": shaken(first)}.items():
        controlnet.save(tmp_path / name, first.networks, leaf)
    asked = settings(tmp_path, model, pictures, controlnet=config.ControlNet(init=str(tmp_path / "second")))
    run = Run(asked, ONE)
    for name, leaf in shaken(first).items():
        np.testing.assert_allclose(run.state.params["controlnet"][name], leaf, atol=1e-7, err_msg=name)
    run.state = run.state._replace(step=np.int32(1))
    run.checkpoints.save(run.state)
    identity.write(run.folder, run._made)
    assert int(Run(asked, ONE).state.step) == 1
    again = dataclasses.replace(asked, controlnet=config.ControlNet(init=str(tmp_path / "first")))
    with pytest.raises(TrainConfigError, match="holds the checkpoints of a run with another init"):
        Run(again, ONE)
    edited = json.loads((tmp_path / "second" / "config.json").read_text())
    edited["conditioning_embedding_out_channels"] = [16, 32, 96]
    (tmp_path / "second" / "config.json").write_text(json.dumps(edited))
    with pytest.raises(CheckpointError, match=r"second does not fit .*: its pixels a latent are 4, the model's 2"):
        Run(asked, ONE)


@pytest.mark.parametrize("model", ["SD"], indirect=True)
def test_what_cannot_be_trained_is_refused(model, pictures, tmp_path):
    inpainting = tmp_path / "inpainting"
    checkpoints.saved(inpainting, unet={"in_channels": 9})
    with pytest.raises(TrainConfigError, match=r"the UNet of .*inpainting is told a picture already"):
        Run(settings(tmp_path, inpainting, pictures), ONE)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(pictures / "0.png", alone)
    (alone / "0.txt").write_text("a red circle")
    with pytest.raises(DataError, match=r"needs a metadata.jsonl that says each image's conditioning_image_file_name"):
        Run(settings(tmp_path, model, alone), ONE)
    lost = settings(tmp_path, model, pictures, sheet_prompts=("a",), sheet_images=(str(tmp_path / "lost.png"),))
    with pytest.raises(TrainConfigError, match=r"sheet_prompts: control_image .*lost.png"):
        Run(lost, ONE)
    with pytest.raises(TrainConfigError, match="model holds something other than a ControlNet"):
        check_replaceable(model, settings(tmp_path, model, pictures))
    with pytest.raises(TrainConfigError, match="unet holds something other than a ControlNet"):
        check_replaceable(model / "unet", settings(tmp_path, model, pictures))

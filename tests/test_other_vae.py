"""A VAE in place of the checkpoint's own, tiny ones too, and VAEs in strips: diffusers' images on the same weights."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.latents import LatentSpec
from sdjax import Request, StableDiffusion
from sdjax.encode import Encoder
from sdjax.spec import Spec
from sdjax.weights.checkpoint import CheckpointError
from tests import checkpoints, torch_models
from tests.test_image_guided import PHOTO, difference

TEXT = Request(prompt="a red circle", seed=3, num_inference_steps=4, width=48, height=32, sampler="ddim", noise="torch")
IMAGE = dataclasses.replace(TEXT, image=PHOTO, strength=0.7)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    """diffusers' tiny autoencoder of random weights, and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("vae") / "taesd"
    network = torch_models.torch_tiny(torch_models.TINY, 4)
    network.save_pretrained(folder)
    return network, folder


def theirs(kind, pipeline, request, **options):
    made = kind(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    return np.asarray(
        made(
            request.prompt,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            **options,
        ).images[0]
    )


def test_images_of_a_tiny_autoencoder_are_those_of_diffusers(tiny, taesd, tmp_path):
    network, folder = taesd
    pipeline = checkpoints.pipeline()
    pipeline.vae = network
    pipe = StableDiffusion.from_pretrained(tiny, vae=folder, devices=jax.devices()[:1])
    from_text, from_image = (result.pixels for result in pipe.generate([TEXT, IMAGE]))
    expected = theirs(diffusers.StableDiffusionPipeline, pipeline, TEXT, width=48, height=32)
    assert difference(from_text, expected) <= 2
    image = Image.fromarray(PHOTO).resize((48, 32), Image.Resampling.LANCZOS)
    expected = theirs(diffusers.StableDiffusionImg2ImgPipeline, pipeline, IMAGE, image=image, strength=0.7)
    assert difference(from_image, expected) <= 2
    assert from_text.std() > 10

    pipe.save_pretrained(tmp_path / "saved")
    saved = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert isinstance(saved.vae, diffusers.AutoencoderTiny)
    assert Spec(tmp_path / "saved").configs["vae"] == pipe.spec.configs["vae"]
    assert pipe.spec.fingerprint != Spec(tiny).fingerprint


def test_images_are_the_same_in_strips(tiny):
    whole, strips = (
        StableDiffusion.from_pretrained(tiny, vae_tiling=tiling, devices=jax.devices()[:1]) for tiling in (None, True)
    )
    for one, other in zip(whole.generate([TEXT, IMAGE]), strips.generate([TEXT, IMAGE]), strict=True):
        assert difference(one.pixels, other.pixels) <= 1
        assert one.id == other.id


@pytest.mark.parametrize(
    ("make", "config", "sides"),
    [
        (torch_models.torch_tiny, {"latent_channels": 16}, "its latent channels are 16, the model's 4"),
        (
            torch_models.torch_tiny,
            {
                **{f"{part}_block_out_channels": [8, 8, 8] for part in ("encoder", "decoder")},
                **{f"num_{part}_blocks": [1, 1, 1] for part in ("encoder", "decoder")},
            },
            "its pixels a latent are 4, the model's 2",
        ),
        (torch_models.torch_vae, {"scaling_factor": 0.13025}, "its latents' scales are 0.13025, the model's 0.18215"),
    ],
)
def test_a_vae_of_other_latents_is_refused_with_both_sides(make, config, sides, tiny, tmp_path):
    usual = torch_models.VAE if make is torch_models.torch_vae else torch_models.TINY
    make(usual | config).save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=f"vae does not fit .*tiny: {sides}"):
        Spec(tiny, vae=tmp_path / "vae")


def test_a_tiny_vae_is_not_encoded_with_to_be_trained_on(tiny, tmp_path):
    torch_models.torch_tiny(torch_models.TINY).save_pretrained(tmp_path / "vae")
    spec = Spec(tiny, vae=tmp_path / "vae")
    with pytest.raises(CheckpointError, match="the VAE of tiny is an AutoencoderTiny"):
        Encoder.from_pretrained(spec)
    with pytest.raises(CheckpointError, match="the VAE of tiny is an AutoencoderTiny"):
        LatentSpec(spec, None)


@pytest.mark.parametrize("option", ["vae", "controlnets"])
def test_what_is_no_networks_folder_is_refused(option, tiny, tmp_path):
    for source, message in ((tiny, "holds no config.json"), (tmp_path / "a.safetensors", "a.safetensors")):
        with pytest.raises(CheckpointError, match=message):
            Spec(tiny, **{option: [source] if option == "controlnets" else source})

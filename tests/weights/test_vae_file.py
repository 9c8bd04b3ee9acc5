"""VAEs in single files of the original layout: the tensors and images of their folders."""

import dataclasses
import pickle

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from sdjax import Request, StableDiffusion
from sdjax.config import VAEConfig
from sdjax.models.vae import AutoencoderKL
from sdjax.spec import Spec
from sdjax.weights import checkpoint
from sdjax.weights.safetensors import CheckpointError
from sdjax.weights.single_file import VAEFile
from tests import torch_models
from tests.test_image_guided import PHOTO
from tests.weights import original

TEXT = Request(prompt="a red circle", seed=3, num_inference_steps=3, width=48, height=32)
REQUESTS = [TEXT, dataclasses.replace(TEXT, image=PHOTO, strength=0.7)]
SCALES = {"scaling_factor": 0.13025, "force_upcast": False, "sample_size": 32}


def renamed(made, prefix=""):
    """The tensors of a VAE of diffusers as its original code names them."""
    return {f"{prefix}{key}": tensor for key, tensor in original.vae(dict(made.config), made.state_dict()).items()}


@pytest.mark.parametrize("name", ["1", "1 deeper"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_file_is_the_folder_that_it_would_be(name, prefix, tmp_path):
    made = torch_models.torch_vae(original.SAMPLES[name].vae | SCALES)
    tensors = renamed(made, prefix) | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    safetensors.torch.save_file(tensors, tmp_path / "vae.safetensors")
    found = VAEFile(tmp_path / "vae.safetensors", SCALES)
    config = VAEConfig.from_dict(found.json("", "config.json"))
    assert config == VAEConfig.from_dict(dict(made.config))
    arrays = checkpoint.tensors_of(checkpoint.fill(AutoencoderKL(config, rngs=None), found.tensors(""), what=name))
    theirs = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{k.removeprefix(prefix)}": t for k, t in tensors.items()}, dict(made.config)
    )
    assert arrays.keys() == theirs.keys() == made.state_dict().keys()
    for key, array in arrays.items():
        assert np.array_equal(array, theirs[key].numpy().reshape(array.shape)), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Another VAE for the tiny checkpoint, as a folder and as files."""
    folder = tmp_path_factory.mktemp("vae")
    made = torch_models.torch_vae(original.VAE)
    made.save_pretrained(folder / "vae")
    safetensors.torch.save_file(renamed(made), folder / "vae.safetensors")
    torch.save({"state_dict": renamed(made)}, folder / "vae.ckpt")
    return folder


def test_a_file_makes_the_images_of_its_folder(tiny, folder):
    pipes = [
        StableDiffusion.from_pretrained(tiny, vae=folder / name, allow_pickle=True, devices=jax.devices()[:1])
        for name in ("vae", "vae.safetensors", "vae.ckpt")
    ]
    expected, *others = ([result.pixels for result in pipe.generate(REQUESTS)] for pipe in pipes)
    for images in others:
        assert np.array_equal(images, expected)
    own = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1]).generate(REQUESTS)
    assert not np.array_equal(own[0].pixels, expected[0])
    assert len({pipe.spec.fingerprint for pipe in pipes}) == len(pipes)
    spec = pipes[1].spec
    assert pickle.loads(pickle.dumps(spec)).fingerprint == spec.fingerprint


def test_it_is_saved_as_a_folder(tiny, folder, tmp_path):
    pipe = StableDiffusion.from_pretrained(tiny, vae=folder / "vae.safetensors", devices=jax.devices()[:1])
    pipe.save_pretrained(tmp_path / "saved")
    saved, made = (diffusers.AutoencoderKL.from_pretrained(path / "vae") for path in (tmp_path / "saved", folder))
    assert saved.config["scaling_factor"] == made.config["scaling_factor"]
    for key, tensor in made.state_dict().items():
        assert torch.equal(saved.state_dict()[key], tensor), key


def test_what_is_no_vae_or_of_other_latents_is_refused(tiny, folder, tmp_path):
    tensors = safetensors.torch.load_file(folder / "vae.safetensors")

    def refused(tensors, model=tiny, **options):
        safetensors.torch.save_file(tensors, tmp_path / "it.safetensors")
        with pytest.raises(CheckpointError) as error:
            Spec(model, vae=tmp_path / "it.safetensors", **options)
        assert "\n" not in str(error.value)
        assert str(tmp_path / "it.safetensors") in str(error.value)
        return str(error.value)

    own = safetensors.torch.load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert "is no VAE in the original layout; one in diffusers' is a folder" in refused(own)
    lacking = {key: tensor for key, tensor in tensors.items() if key != "encoder.conv_in.weight"}
    assert "is a VAE that lacks encoder.conv_in.weight" in refused(lacking)
    wide = torch_models.torch_vae(original.VAE | {"latent_channels": 16})
    assert "its latent channels are 16, the model's 4" in refused(renamed(wide))
    with pytest.raises(CheckpointError, match="is a pickle, a format that can carry code; with allow_pickle"):
        Spec(tiny, vae=folder / "vae.ckpt")
    with pytest.raises(CheckpointError, match=r"it is a VAE; give it as vae \(--vae\)"):
        Spec(folder / "vae.safetensors")
    torch_models.torch_tiny(torch_models.TINY, 4).save_pretrained(tmp_path / "taesd")
    saved = tmp_path / "saved"
    StableDiffusion.from_pretrained(tiny, vae=tmp_path / "taesd", devices=jax.devices()[:1]).save_pretrained(saved)
    assert "nor does the model's tiny autoencoder" in refused(tensors, saved)

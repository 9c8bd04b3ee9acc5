"""ControlNets in single files, in the original layout and in diffusers': the tensors and images of their folders."""

import dataclasses
import functools
import json
import pickle

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.controlnets.controlnet import ControlNetModel

from sdjax import StableDiffusion, describe
from sdjax.config import ControlNetConfig
from sdjax.models.controlnet import ControlNet
from sdjax.spec import Spec
from sdjax.weights import checkpoint, families, ldm
from sdjax.weights.safetensors import CheckpointError
from sdjax.weights.single_file import ControlNetFile
from tests import checkpoints
from tests.test_controls import ONE, difference, network
from tests.weights import original
from tests.weights.test_single_file import FULL_XL

TOLD = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 20 + 6 * 256}
SAMPLES = {name: original.SAMPLES[name] for name in ("1", "1 deeper", "2")}
SAMPLES["XL"] = original.SAMPLES["XL"]._replace(unet=original.SAMPLES["XL"].unet | TOLD)
PUBLISHED = {
    "1": {"cross_attention_dim": 768},
    "2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "XL": {key: value for key, value in FULL_XL.items() if key != "up_block_types"},
}
# The smaller ones of SDXL: without layers in their transformers, or without transformers.
PUBLISHED["XL, no layers"] = PUBLISHED["XL"] | {"transformer_layers_per_block": [0, 0, 0]}
PUBLISHED["XL, layers in the middle"] = PUBLISHED["XL"] | {"transformer_layers_per_block": [0, 0, 1]}
PUBLISHED["XL, no attention"] = PUBLISHED["XL"] | {
    "down_block_types": ["DownBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
}
SIZED = dataclasses.replace(ONE, sampler="euler", num_inference_steps=3)


def net(sample):
    """A random ControlNet of diffusers for a sample's UNet."""
    pixels = {"conditioning_embedding_out_channels": [4, 8, 8][: len(sample.vae["block_out_channels"])]}
    return network(5, original.torch_models.torch_unet(sample.unet), **pixels)


def renamed(state, config):
    """The tensors of a ControlNet as its original code names them."""
    table = ldm.controlnet(ControlNetConfig.from_dict(config))
    return {f"{table[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": tensor for key, tensor in state.items()}


def config_of(made):
    """What a ControlNet of diffusers saves."""
    return json.loads(made.to_json_string())


def normal(config):
    """A configuration with its values for each block spread out."""
    values = dataclasses.asdict(config)
    for key in ("transformer_layers_per_block", "attention_head_dim"):
        del values[key]
    return values | {"down": config.down_stages, "mid": config.mid_stage}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_in_either_layout_is_the_folder_that_it_would_be(name, tmp_path):
    made = net(SAMPLES[name])
    state, config = made.state_dict(), config_of(made)
    files = {"original": renamed(state, config), "diffusers": state}
    files["with a prefix"] = {f"control_model.{key}": tensor for key, tensor in files["original"].items()}
    files["with a prefix"] |= {"model.diffusion_model.out.2.bias": torch.ones(4), "betas": torch.ones(3)}
    for kind, tensors in files.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{kind}.safetensors")
        found = ControlNetFile(tmp_path / f"{kind}.safetensors")
        ours = ControlNetConfig.from_dict(found.json("", "config.json"))
        assert normal(ours) == normal(ControlNetConfig.from_dict(config)), kind
        arrays = checkpoint.tensors_of(checkpoint.fill(ControlNet(ours, rngs=None), found.tensors(""), what=kind))
        assert arrays.keys() == state.keys()
        for key, array in arrays.items():
            assert np.array_equal(array, state[key].numpy().reshape(array.shape)), (kind, key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_one_is_read_as_diffusers_reads_it(name):
    with torch.device("meta"):
        made = ControlNetModel(**PUBLISHED[name])
    config, state = config_of(made), made.state_dict()
    file = renamed(state, config)
    theirs = convert_controlnet_checkpoint(dict(file), config)
    left = {key for key in state if key.startswith("add_embedding.")}  # which their converter passes over
    assert theirs.keys() == state.keys() - left
    assert all(tensor is state[key] for key, tensor in theirs.items())
    expected = ControlNetConfig.from_dict(config)
    for tensors in (file, state):
        found = families.recognise_controlnet({key: tuple(tensor.shape) for key, tensor in tensors.items()}, "canny")
        assert normal(ControlNetConfig.from_dict(found.files["config.json"])) == normal(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Stable Diffusion 1, and beside it a ControlNet as a folder and as files."""
    folder = tmp_path_factory.mktemp("controlled")
    save(folder, "1")
    return folder


def save(folder, name):
    """A sample as the folder `model`, and its ControlNet as the folder `canny` and as files."""
    sample = SAMPLES[name]
    texts = dict(zip(("text", "text_2"), (config for _, config in sample.text.values()), strict=False))
    make = checkpoints.pipeline_xl if name == "XL" else checkpoints.pipeline
    checkpoints.saved(folder / "model", make, unet=sample.unet, vae=sample.vae, **texts)
    made = net(sample)
    made.save_pretrained(folder / "canny")
    state, tensors = made.state_dict(), renamed(made.state_dict(), config_of(made))
    safetensors.torch.save_file(state, folder / "diffusers.safetensors")
    safetensors.torch.save_file(tensors, folder / "canny.safetensors")
    torch.save({f"control_model.{key}": tensor for key, tensor in tensors.items()}, folder / "canny.pth")


@pytest.mark.parametrize("name", ["1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2", "XL"))])
def test_a_file_makes_the_image_of_its_folder(name, folder, tmp_path):
    if name != "1":
        folder = tmp_path
        save(folder, name)
    load = functools.partial(StableDiffusion.from_pretrained, folder / "model", devices=jax.devices()[:1])
    nets = ("canny", "canny.safetensors", "diffusers.safetensors", "canny.pth")
    pipes = [load(controlnets=[folder / path], allow_pickle=path.endswith(".pth")) for path in nets]
    expected, *images = (pipe.generate([SIZED])[0].pixels for pipe in pipes)
    for image in images:
        assert np.array_equal(image, expected)
    free = dataclasses.replace(SIZED, control_image=None)
    assert difference(expected, pipes[0].generate([free])[0].pixels) > 20
    assert len({pipe.spec.fingerprint for pipe in pipes}) == len(pipes)


def test_every_byte_of_a_file_is_in_the_fingerprint(folder, tmp_path):
    tensors = safetensors.torch.load_file(folder / "canny.safetensors")
    tensors["zero_convs.0.0.bias"][0] += 1
    safetensors.torch.save_file(tensors, tmp_path / "canny.safetensors")
    specs = [Spec(folder / "model", controlnets=[path / "canny.safetensors"]) for path in (folder, tmp_path)]
    assert pickle.loads(pickle.dumps(specs[0])).fingerprint == specs[0].fingerprint != specs[1].fingerprint
    assert "controlnet_0: " in describe.describe(specs[0])


def test_a_controlnet_for_shuffled_pictures_is_known_by_its_name(folder, tmp_path):
    path = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    path.symlink_to(folder / "canny.safetensors")
    pools = [ControlNetFile(file).json("", "config.json")["global_pool_conditions"] for file in (path, path.resolve())]
    assert pools == [True, False]


def test_what_is_no_controlnet_or_of_another_model_is_refused(folder, tmp_path):
    tensors = safetensors.torch.load_file(folder / "canny.safetensors")

    def refused(path, model="model"):
        with pytest.raises(CheckpointError) as error:
            Spec(folder / model, controlnets=[path])
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        return str(error.value)

    def changed(**changes):
        kept = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
        safetensors.torch.save_file(kept, tmp_path / "it.safetensors")
        return tmp_path / "it.safetensors"

    assert "is a pickle, a format that can carry code; with allow_pickle" in refused(folder / "canny.pth")
    assert "is no file" in refused(tmp_path / "none.safetensors")
    assert "is no ControlNet; one has keys input_hint_block" in refused(
        folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert "lacks middle_block.1.proj_in.weight" in refused(changed(**{"middle_block.1.proj_in.weight": None}))
    assert "is a ControlNet Union, which is not supported" in refused(changed(task_embedding=torch.zeros(6, 32)))
    assert "give the whole ControlNet" in refused(changed(lora_controlnet=torch.zeros(1)))
    made = network(0, original.torch_models.torch_unet(SAMPLES["1"].unet), cross_attention_dim=40)
    safetensors.torch.save_file(made.state_dict(), tmp_path / "wide.safetensors")
    sides = "32x1x40, 64x1x40, the model's 32x1x32, 64x1x32"
    assert sides in refused(tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"it is a ControlNet; give it as controlnets \(--controlnet\)"):
        Spec(folder / "canny.safetensors")

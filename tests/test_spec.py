"""What a checkpoint promises without its weights: what it refuses, what it warns of, and what it calls an image."""

import dataclasses
import json
import pickle
import shutil

import pytest

from sdjax import Request, RequestError
from sdjax.spec import Spec
from sdjax.weights.checkpoint import CheckpointError
from tests import checkpoints

RED = Request(prompt="a red circle", seed=3, num_inference_steps=5, width=48, height=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'; there are ddim,"),
        ({"sampler": "ddim", "sigmas": "karras"}, "karras"),
        ({"sampler": "euler", "sigmas": "wavy"}, "wavy"),
        ({"hires_scale": 1.05}, "hires_scale=1.05 makes no larger image: sides are multiples of 8"),
        ({"sampler": "deis", "sigmas": "14.6,5,-1"}, "sigmas must lie in 0.0001 to 10000, which -1 does not"),
        ({"clip_skip": 2}, "clip_skip=2 leaves no layer; the text encoder has 2"),
    ],
)
def test_what_the_checkpoint_cannot_make_is_refused_in_one_line(tiny, changes, message):
    with pytest.raises(RequestError) as refused:
        Spec(tiny).resolve(dataclasses.replace(RED, **changes))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "key", "value", "message"),
    [
        ("unet", "out_channels", 8, "the UNet gives 8 channels, the VAE's latents have 4"),
        ("vae", "out_channels", 4, "the VAE takes 3 channels and gives 4; an image has 3"),
        ("unet", "cross_attention_dim", [32, 64], "the UNet attends to 64 channels, the text encoder gives 32"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(tiny, tmp_path, config, key, value, message):
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / config / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=message):
        Spec(folder)


def test_a_width_of_text_a_block_is_one(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"cross_attention_dim": [config["cross_attention_dim"]] * 2}))
    assert Spec(folder).name == "model"


def test_a_distilled_model_s_sampler_on_another_is_warned_of_once(tiny, caplog):
    spec = Spec(tiny)
    for _ in range(2):
        spec.resolve(dataclasses.replace(RED, sampler="lcm", seed=5))
    spec.resolve(RED)
    assert [record.getMessage() for record in caplog.records] == [
        "sampler=lcm is for models distilled for it, which tiny does not say that it is"
    ]


def test_a_model_that_is_told_its_guidance_takes_no_list_and_no_warning(tmp_path, caplog):
    checkpoints.saved(tmp_path / "model", unet={"time_cond_proj_dim": 8})
    spec = Spec(tmp_path / "model")
    spec.resolve(dataclasses.replace(RED, sampler="lcm"))
    assert not caplog.records
    with pytest.raises(RequestError, match="is told one guidance_scale for all steps"):
        spec.resolve(dataclasses.replace(RED, guidance_scales=[5, 4, 3, 2, 1]))


def test_ids_are_of_the_request_and_the_model(tiny):
    spec = Spec(tiny)
    there = pickle.loads(pickle.dumps(spec))
    a, b = (spec.resolve(Request(prompt="a", seed=seed)) for seed in (0, 1))
    assert spec.id(a) != spec.id(b)
    assert spec.id(a) == there.id(there.resolve(Request(prompt="a")))
    assert spec.id(a) != Spec(tiny, dtype="bfloat16").id(a)
    assert json.loads(b.canonical())["width"] == 32

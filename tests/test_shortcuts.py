"""Faster, not quite the same pictures: those that the methods' own packages make of diffusers, in any company."""

import dataclasses
import itertools
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tomesd
import torch
from DeepCache import DeepCacheSDHelper

from sdjax import Request, RequestError, StableDiffusion
from sdjax.batch import fresh_rows
from sdjax.models.controlnet import ControlNet
from sdjax.models.token_merging import merging
from sdjax.models.unet import UNet2DCondition
from tests import checkpoints
from tests.test_controls import network
from tests.test_generate import CHECKPOINTS, difference, theirs

RED = Request(
    prompt="a red circle",
    negative_prompt="cat",
    seed=3,
    num_inference_steps=7,
    width=48,
    height=32,
    sampler="ddim",
    noise="torch",
)
REUSES, MERGES = dataclasses.replace(RED, cache_interval=3), dataclasses.replace(RED, token_merging_ratio=0.5)


@pytest.fixture(scope="module")
def pipe(tiny):
    return StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1], batch_size=2)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_reused_features_give_the_image_of_deepcache(name, tmp_path):
    changes = {key: value for key, value in CHECKPOINTS[name].items() if key != "scheduler"}
    pipeline = checkpoints.saved(tmp_path / "model", **changes)
    helper = DeepCacheSDHelper(pipe=pipeline)
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])
    exact, *reused = pipe.generate([RED, *(dataclasses.replace(RED, cache_interval=count) for count in (3, 7))])
    for result in reused:
        helper.set_params(cache_interval=result.request.cache_interval, cache_branch_id=0)
        helper.enable()
        expected = theirs(pipeline, tmp_path / "model", RED, "DDIMScheduler")
        helper.disable()
        assert difference(result.pixels, expected) <= 2
        assert difference(result.pixels, exact.pixels) > 2


def test_merged_tokens_give_the_image_of_tomesd(tmp_path):
    pipeline = checkpoints.saved(tmp_path / "model")
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            parameter *= 5 if re.search(r"attn1.to_(q|k|out)", name) else 1  # random weights attend to little
    pipeline.unet.save_pretrained(tmp_path / "model" / "unet")
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])
    exact, *merged = pipe.generate([RED, MERGES, dataclasses.replace(MERGES, token_merging_ratio=0.7)])
    for result in merged:
        tomesd.apply_patch(pipeline, ratio=result.request.token_merging_ratio, use_rand=False)
        expected = theirs(pipeline, tmp_path / "model", RED, "DDIMScheduler")
        tomesd.remove_patch(pipeline)
        assert difference(result.pixels, expected) <= 2
        assert difference(result.pixels, exact.pixels) > 2


@pytest.mark.parametrize(("size", "ratio"), itertools.product([(8, 8), (7, 5), (2, 2), (1, 6)], [0.0, 0.3, 0.75]))
def test_merging_is_that_of_tomesd(size, ratio):
    height, width = size
    x = np.random.default_rng(0).normal(size=(3, height * width, 16)).astype(np.float32)
    merge, unmerge = merging(jnp.asarray(x), size, ratio)
    count = int(x.shape[1] * ratio) * (min(size) > 1)  # tomesd fails where it has nothing to merge into
    theirs, back = tomesd.merge.bipartite_soft_matching_random2d(
        torch.from_numpy(x), width, height, 2, 2, count, no_rand=True
    )
    expected = theirs(torch.from_numpy(x))
    # The order of its tokens is its own; what counts is what each position gets back.
    assert merge(jnp.asarray(x)).shape == expected.shape
    np.testing.assert_allclose(unmerge(merge(jnp.asarray(x))), back(expected), atol=1e-5)


def test_each_image_of_a_batch_has_its_own_interval(pipe, compilations):
    requests = [
        dataclasses.replace(REUSES, cache_interval=interval, guidance_scale=scale, sampler=sampler, **changes)
        for interval, scale, sampler, changes in [
            (2, 7.5, "ddim", {}),
            (3, 4.0, "heun", {"guidance_start": 0.3, "guidance_end": 0.6}),
            (5, 1.0, "dpmpp_2m", {"num_inference_steps": 11}),
            (7, 2.0, "euler_ancestral", {"guidance_rescale": 0.5}),
        ]
    ]
    together = pipe.generate(requests)
    assert len({pipe.spec.program(result.request) for result in together}) == 1
    compilations()
    for request, result in zip(requests, together, strict=True):
        assert np.array_equal(pipe.generate([request])[0].pixels, result.pixels)
    assert compilations() == 0


@pytest.mark.parametrize("called", [(UNet2DCondition, "deep"), (ControlNet, "__call__")])
def test_deep_features_and_what_is_added_to_them_are_made_as_often_as_asked_for(called, tiny, tmp_path, monkeypatch):
    made, function = [], getattr(*called)

    def counted(self, x, *rest):
        jax.debug.callback(lambda _: made.append(1), x)
        return function(self, x, *rest)

    monkeypatch.setattr(*called, counted)
    network(5, diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")).save_pretrained(tmp_path)
    pipe = StableDiffusion.from_pretrained(tiny, controlnets=[tmp_path], devices=jax.devices()[:1])
    request = dataclasses.replace(REUSES, control_image=np.zeros((32, 48, 3), np.uint8))
    for interval in (2, 3, 100):
        made.clear()
        pipe.generate([dataclasses.replace(request, cache_interval=interval)])
        jax.effects_barrier()
        assert len(made) == 2 * -(-7 // interval)


def test_features_are_not_kept_over_calls_that_were_left_out(pipe):
    request = pipe.spec.resolve(dataclasses.replace(REUSES, num_inference_steps=6, sampler="ddim"))
    table = pipe.spec.table(request)
    weights = np.ones((1, 8, 2), np.float32)
    weights[0, 2, 1] = 0
    expected = np.zeros((1, 8, 2), bool)
    expected[0, [0, 3], :] = True
    assert np.array_equal(fresh_rows([request], [table], weights), expected)
    weights[0, 3, 1] = 0
    expected[0, 3:5, 1] = False, True
    assert np.array_equal(fresh_rows([request], [table], weights), expected)


def test_a_prompt_that_is_asked_for_its_spread_alone_has_features_of_its_own(pipe):
    """guidance_rescale asks the first prompt's half, also where the prompt's weight is 0."""
    request = dataclasses.replace(
        REUSES, prompt="a red circle :0 AND a blue star", guidance_rescale=0.7, num_inference_steps=1
    )
    exact, kept = (pipe.generate([dataclasses.replace(request, cache_interval=n)])[0].pixels for n in (1, 2))
    assert np.array_equal(exact, kept)


def test_a_controlnet_that_pools_adds_to_kept_features(tiny, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    network(5, unet, global_pool_conditions=True).save_pretrained(tmp_path)
    pipe = StableDiffusion.from_pretrained(tiny, controlnets=[tmp_path], devices=jax.devices()[:1])
    request = dataclasses.replace(REUSES, control_image=np.full((32, 48, 3), 200, np.uint8), num_inference_steps=1)
    exact, kept = (pipe.generate([dataclasses.replace(request, cache_interval=n)])[0].pixels for n in (1, 2))
    assert np.array_equal(exact, kept)


@pytest.mark.parametrize("shortcut", ["cache_interval=1001", "cache_interval=0", "token_merging_ratio=0.9"])
def test_what_is_out_of_range_is_refused(shortcut):
    name, value = shortcut.split("=")
    with pytest.raises(RequestError, match=f"{name}=.* is out of range"):
        Request.from_row({"prompt": "a", name: value})

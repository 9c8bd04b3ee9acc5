"""Finished pixels: what is odd about them, their size, and the second pass at a larger one."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch

from sdjax import Request, RequestError, StableDiffusion
from sdjax.images import parameters
from sdjax.postprocess import oddities, resize
from sdjax.sampling import noise as draws

RED = Request(prompt="a red circle", seed=3, num_inference_steps=5, width=48, height=32)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe(tiny):
    return StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])


def test_black_and_flat_images_are_told_from_others():
    assert oddities(PIXELS) == []
    assert oddities(PIXELS // 64) == ["black"]
    assert oddities(np.full_like(PIXELS, 200)) == ["flat"]
    assert oddities(np.full_like(PIXELS, (250, 10, 90)) + PIXELS % 3) == ["flat"]
    corner = np.full_like(PIXELS, 0)
    corner[:6, :6] = 255
    assert oddities(corner) == []


def test_a_size_is_width_by_height_and_resized_by_lanczos():
    assert resize(PIXELS, None) is PIXELS
    assert resize(PIXELS, "31x7").shape == (7, 31, 3)
    edge = np.full((16, 32, 3), 64, np.uint8)
    edge[:, 16:] = 192
    enlarged = resize(edge, "128x64")
    # Lanczos overshoots on both sides of an edge, where bilinear stays between them.
    assert enlarged.min() < 60
    assert enlarged.max() > 196
    assert (enlarged[:, 0] == 64).all()
    assert (enlarged[:, -1] == 192).all()


def test_a_flat_image_is_flagged_and_a_size_is_heeded(tiny, pipe):
    broken = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])
    kernel = broken._networks["vae"].decoder.conv_out.kernel
    kernel[...] = kernel[...] * 0
    small = dataclasses.replace(RED, resize="20x30", prompt="red " * 80, prompt_language="plain")
    flat, fine = broken.generate([small])[0], pipe.generate([small])[0]
    assert flat.flags == ("flat", "truncated")
    assert fine.flags == ("truncated",)
    assert flat.pixels.shape == fine.pixels.shape == (30, 20, 3)
    whole = pipe.generate([dataclasses.replace(small, resize=None)])[0]
    assert np.array_equal(fine.pixels, resize(whole.pixels, "20x30"))


@pytest.mark.parametrize("noise", ["jax", "torch"])
def test_a_second_pass_is_an_image_from_the_enlarged_first(pipe, noise, monkeypatch):
    first = dataclasses.replace(RED, width=24, height=16, noise=noise)
    both = dataclasses.replace(first, hires_scale=2, hires_strength=0.5)
    seen = []
    (result,) = pipe.stream([both], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 7), (7, 7)]
    assert pipe.spec.calls(result.request) == 7
    program = pipe.spec.program(result.request)
    assert (program.final_width, program.final_height) == (48, 32)
    enlarged = resize(pipe.generate([first])[0].pixels, "48x32")
    second = dataclasses.replace(RED, image=enlarged, strength=0.5, noise=noise)
    if noise == "jax":  # of a seed that no request has, beside which the first pass's are other values
        same = pipe.generate([second])[0].pixels
        monkeypatch.setattr(draws, "keys", lambda seeds, keys=draws.keys: keys([2 << 32 | seed for seed in seeds]))
        assert np.abs(result.pixels.astype(int) - same).max() > 20
    difference = np.abs(result.pixels.astype(int) - pipe.generate([second])[0].pixels)
    assert difference.mean() < 1.5  # the first is rounded to eight bits on the longer way
    assert difference.max() < 20


def test_a_second_pass_from_the_latent_is_that_of_diffusers(tiny, pipe):
    first = dataclasses.replace(RED, width=24, height=16, noise="torch", sampler="ddim")
    (result,) = pipe.generate([dataclasses.replace(first, hires_scale=2, hires_upscaler="latent")])
    assert "Hires upscaler: Latent" in parameters(result.request, "tiny")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    asked = {"prompt": RED.prompt, "num_inference_steps": 5, "guidance_scale": 7.5}

    def made(kind, output_type, **options):
        pipeline = kind(**theirs.components, requires_safety_checker=False)
        generator = torch.Generator().manual_seed(RED.seed)
        return pipeline(**asked, **options, generator=generator, output_type=output_type).images

    latents = made(diffusers.StableDiffusionPipeline, "latent", width=24, height=16)
    latents = torch.nn.functional.interpolate(latents, scale_factor=2, mode="bilinear")
    (expected,) = made(diffusers.StableDiffusionImg2ImgPipeline, "pil", image=latents, strength=0.7)
    assert np.abs(result.pixels.astype(int) - np.asarray(expected)).max() <= 2


def test_ways_to_enlarge_mix_in_a_batch(tiny):
    pair = StableDiffusion.from_pretrained(tiny, batch_size=2, devices=jax.devices()[:1])
    first = dataclasses.replace(RED, width=24, height=16, hires_scale=2)
    requests = [first, dataclasses.replace(first, hires_upscaler="latent")]
    together = pair.generate(requests)
    assert np.abs(together[0].pixels.astype(int) - together[1].pixels).max() > 20
    for request, result in zip(requests, together, strict=True):
        np.testing.assert_array_equal(pair.generate([request])[0].pixels, result.pixels)


def test_a_second_pass_that_cannot_be_is_refused(pipe):
    with pytest.raises(RequestError, match="hires_scale=3 makes a side longer than 4096"):
        pipe.spec.resolve(dataclasses.replace(RED, width=1400, hires_scale=3))
    with pytest.raises(RequestError, match=r"^hires_strength=0\.1 of 5 steps leaves no step"):
        pipe.spec.resolve(dataclasses.replace(RED, hires_strength=0.1, hires_scale=2))

"""Stable Diffusion XL's refiner as the second stage of its base: diffusers' images on the same weights and seed."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdjax import Request, RequestError, StableDiffusion
from sdjax.sampling import Schedule, make_table
from sdjax.spec import Spec
from sdjax.weights.checkpoint import CheckpointError
from tests import checkpoints
from tests.sampling.toy import SHAPE, Toy, config, run_table
from tests.test_image_guided import MASK, PHOTO, difference

TEXT = Request(
    prompt="a red circle", seed=3, num_inference_steps=6, width=48, height=32, noise="torch", denoising_end=0.6
)
REQUESTS = [
    (TEXT, "EulerDiscreteScheduler"),
    (dataclasses.replace(TEXT, sampler="euler_ancestral", negative_prompt="cat"), "EulerAncestralDiscreteScheduler"),
    (dataclasses.replace(TEXT, sampler="dpmpp_2m", guidance_scale=1), "DPMSolverMultistepScheduler"),
    (
        dataclasses.replace(TEXT, sampler="ddim", image=PHOTO, strength=0.9, aesthetic_score=7),
        "DDIMScheduler",
    ),
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A base and a refiner of diffusers, and the folders that they are saved in."""
    folders = [tmp_path_factory.mktemp("xl") / name for name in ("base", "refiner")]
    leading = checkpoints.scheduler("EulerDiscreteScheduler", timestep_spacing="leading")  # as published
    base = checkpoints.saved(folders[0], checkpoints.pipeline_xl, scheduler=leading)
    refiner = checkpoints.saved(
        folders[1],
        checkpoints.pipeline_xl,
        seed=5,
        scheduler=leading,
        kind=diffusers.StableDiffusionXLImg2ImgPipeline,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    refiner.vae = base.vae
    return base, refiner, folders


def theirs(base, refiner, request, scheduler):
    generator = torch.Generator().manual_seed(request.seed)
    kinds = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionXLImg2ImgPipeline
    first = {"width": request.width, "height": request.height}
    if request.image is not None:
        kinds = kinds[1], kinds[1]
        image = Image.fromarray(PHOTO).resize((request.width, request.height), Image.Resampling.LANCZOS)
        first = {"image": image, "strength": request.strength}
    made = [kind(**part.components, add_watermarker=False) for kind, part in zip(kinds, (base, refiner), strict=True)]
    made[1].register_to_config(requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    for pipeline in made:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
    shared = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "generator": generator,
    }
    latents = made[0](**shared, **first, denoising_end=request.denoising_end, output_type="latent").images
    refined = made[1](
        **shared, image=latents, denoising_start=request.denoising_end, aesthetic_score=request.aesthetic_score
    )
    return np.asarray(refined.images[0])


@pytest.mark.slow
def test_images_are_those_of_diffusers(both, compilations):
    base, refiner, folders = both
    pipe = StableDiffusion.from_pretrained(folders[0], refiner=folders[1], devices=jax.devices()[:1])
    results = [result.pixels for result in pipe.generate([request for request, _ in REQUESTS])]
    for pixels, (request, scheduler) in zip(results, REQUESTS, strict=True):
        assert difference(pixels, theirs(base, refiner, request, scheduler)) <= 2, request
    compilations()
    unrefined, other = pipe.generate(
        [dataclasses.replace(TEXT, denoising_end=1), dataclasses.replace(TEXT, denoising_end=0.5)]
    )
    assert compilations() == 0
    alone = StableDiffusion.from_pretrained(folders[0], devices=jax.devices()[:1])
    assert difference(unrefined.pixels, alone.generate([dataclasses.replace(TEXT, denoising_end=None)])[0].pixels) == 0
    assert len({pixels.tobytes() for pixels in (results[0], unrefined.pixels, other.pixels)}) == 3


def theirs_inside(base, refiner, request, scheduler):
    """diffusers' image inside a mask where one run of its inpainting changes networks on the way.

    Its two pipelines in a row would hand over what the mask keeps without noise, and go on with another noise than the
    base had.
    """
    made = diffusers.StableDiffusionXLInpaintPipeline(**base.components, add_watermarker=False)
    made.scheduler = getattr(diffusers, scheduler).from_config(base.scheduler.config, clip_sample=False)
    made.set_progress_bar_config(disable=True)
    states, negative, pooled, negative_pooled = refiner.encode_prompt(
        request.prompt, negative_prompt=request.negative_prompt
    )
    size = request.height, request.width, 0, 0
    scores = request.negative_aesthetic_score, request.aesthetic_score
    told = {
        "prompt_embeds": torch.cat([negative, states]),
        "add_text_embeds": torch.cat([negative_pooled, pooled]),
        "add_time_ids": torch.tensor([[*size, score] for score in scores]),
    }
    cutoff = round(1000 * (1 - request.denoising_end))

    def change(pipeline, i, t, state):
        times = pipeline.scheduler.timesteps
        if t < cutoff or (following := times[times < t]).numel() == 0 or following[0] >= cutoff:
            return {}
        pipeline.unet = refiner.unet
        return told

    result = made(
        request.prompt,
        negative_prompt=request.negative_prompt,
        image=Image.fromarray(PHOTO),
        mask_image=Image.fromarray(MASK),
        width=request.width,
        height=request.height,
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=[],
    )
    assert made.unet is refiner.unet
    return np.asarray(result.images[0])


@pytest.mark.slow
def test_images_inside_a_mask_are_those_of_diffusers(both):
    base, refiner, folders = both
    pipe = StableDiffusion.from_pretrained(folders[0], refiner=folders[1], devices=jax.devices()[:2])
    inside = dataclasses.replace(TEXT, image=PHOTO, mask_image=MASK, overlay=False)
    cases = [
        (dataclasses.replace(inside, strength=1.0), "EulerDiscreteScheduler"),
        (dataclasses.replace(inside, strength=0.8, negative_prompt="cat", sampler="ddim"), "DDIMScheduler"),
        (
            dataclasses.replace(inside, strength=1.0, sampler="euler_ancestral", aesthetic_score=9),
            "EulerAncestralDiscreteScheduler",
        ),
    ]
    for result, (request, scheduler) in zip(pipe.generate([request for request, _ in cases]), cases, strict=True):
        assert difference(result.pixels, theirs_inside(base, refiner, request, scheduler)) <= 2, request


@pytest.mark.slow
def test_a_lora_and_a_textual_inversion_change_the_base_alone(both, tmp_path):
    base, refiner, folders = both
    torch.manual_seed(0)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    changed = diffusers.StableDiffusionXLPipeline.from_pretrained(folders[0])
    weight = changed.unet.get_submodule(module).weight
    up, down = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
    weight.data += up @ down
    lora = {f"unet.{module}.lora_B.weight": up, f"unet.{module}.lora_A.weight": down}
    learned = {
        "clip_l": torch.randn(2, changed.text_encoder.config.hidden_size),
        "clip_g": torch.randn(2, changed.text_encoder_2.config.hidden_size),
    }
    for vectors, suffix in zip(learned.values(), ("", "_2"), strict=True):
        parts = {name: getattr(changed, f"{name}{suffix}") for name in ("tokenizer", "text_encoder")}
        changed.load_textual_inversion(vectors, token="<thing>", **parts)
    for name, tensors in (("lora", lora), ("learned", learned)):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    request = dataclasses.replace(TEXT, prompt="a red <thing>")
    pipe = StableDiffusion.from_pretrained(
        folders[0],
        refiner=folders[1],
        loras=[tmp_path / "lora.safetensors"],
        textual_inversions=[(tmp_path / "learned.safetensors", "<thing>")],
        devices=jax.devices()[:1],
    )
    pixels = pipe.generate([request])[0].pixels
    assert difference(pixels, theirs(changed, refiner, request, "EulerDiscreteScheduler")) <= 2
    assert difference(pixels, theirs(base, refiner, request, "EulerDiscreteScheduler")) > 5


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm_2", "lcm"])
@pytest.mark.parametrize("strength", [None, 0.9])
def test_the_two_tables_of_a_run_are_the_whole_one(sampler, strength):
    """Of methods without a history, where the second stage is the same network."""
    schedule = Schedule.from_config(config("epsilon"))
    made = {"sampler": sampler, "num_inference_steps": 12, "strength": strength}
    whole = make_table(schedule, **made)
    first = make_table(schedule, **made, denoising_end=0.7)
    second = make_table(schedule, **made, denoising_start=0.7)
    assert (second.start_signal, second.start_noise) == (1, 0)
    assert np.array_equal(np.concatenate([first.step, second.step]), whole.step)
    assert first.steps == second.steps == whole.steps
    network, generator = Toy(schedule), np.random.default_rng(0)
    start, noise = generator.normal(size=SHAPE), generator.normal(size=(whole.calls, *SHAPE))
    expected = run_table(whole, network, start, noise)
    middle = run_table(first, network, start, noise)
    assert np.abs(run_table(second, network, middle, noise[first.calls :]) - expected).max() < 1e-12


def test_what_a_request_and_a_checkpoint_say(both, tiny):
    _, _, (base, refiner) = both
    spec = Spec(base, refiner=refiner)
    request = spec.resolve(dataclasses.replace(TEXT, denoising_end=None, num_inference_steps=10))
    assert request.denoising_end == 0.8
    assert (spec.table(request).calls, spec.refiner_table(request).calls, spec.calls(request)) == (8, 2, 10)
    unrefined = dataclasses.replace(request, denoising_end=1)
    assert (spec.calls(unrefined), spec.program(unrefined).refiner) == (10, ())
    assert spec.fingerprint != Spec(base).fingerprint
    for changes, message in (
        ({"denoising_end": 0.9999}, "denoising_end=0.9999 leaves the refiner no step of 10"),
        ({"denoising_end": 0.0001}, "denoising_end=0.0001 leaves the base no step of 10"),
        ({"sampler": "plms"}, "plms takes its first step twice"),
        ({"hires_scale": 2}, "hires_scale does not go with a refiner"),
    ):
        with pytest.raises(RequestError, match=message):
            spec.resolve(dataclasses.replace(request, **changes))
    with pytest.raises(RequestError, match="denoising_end is for a refiner, and none is loaded"):
        Spec(base).resolve(TEXT)
    with pytest.raises(CheckpointError, match="base is no refiner"):
        Spec(base, refiner=base)
    with pytest.raises(CheckpointError, match="the refiner refiner goes with Stable Diffusion XL's base, which tiny"):
        Spec(tiny, refiner=refiner)

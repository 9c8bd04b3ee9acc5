"""Images from images and inside masks: diffusers' on the same weights and seed, in the same programs as from text."""

import dataclasses
import pickle

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import Request, RequestError, StableDiffusion, programs, sampling
from sdjax.sampling import scan
from sdjax.spec import Spec
from tests import checkpoints

RNG = np.random.default_rng(5)
PHOTO = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 7, 3), np.uint8)).resize((60, 40), Image.Resampling.BICUBIC)
)
MASK = np.zeros((40, 60), np.uint8)
MASK[9:30, 17:41] = 255
TEXT = Request(prompt="a red circle", seed=3, num_inference_steps=5, width=48, height=32)
IMAGE = dataclasses.replace(TEXT, image=PHOTO, strength=0.7)
INPAINT = dataclasses.replace(IMAGE, mask_image=MASK)


@pytest.fixture(scope="module")
def pipe(tiny):
    return StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])


def theirs(pipeline, folder, request, scheduler, mask=None, **config):
    """diffusers' image for a request with torch's noise, as uint8."""
    kind = diffusers.StableDiffusionImg2ImgPipeline if mask is None else diffusers.StableDiffusionInpaintPipeline
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    scheduler = getattr(diffusers, scheduler).from_pretrained(folder / "scheduler", **config)
    theirs = kind(**parts, scheduler=scheduler, **extra)
    theirs.set_progress_bar_config(disable=True)
    size, image = (request.width, request.height), Image.fromarray(PHOTO)
    if mask is None:
        options = {"image": image.resize(size, Image.Resampling.LANCZOS)}
    else:
        options = {"image": image, "mask_image": Image.fromarray(mask), "width": size[0], "height": size[1]}
        options["padding_mask_crop"] = request.padding_mask_crop
    made = theirs(
        request.prompt,
        strength=request.strength,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pil",
        **options,
    )
    return np.asarray(made.images[0])


def difference(a, b):
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


FROM_IMAGE = [
    ("ddim", "DDIMScheduler", {}, IMAGE),
    ("ddim", "DDIMScheduler", {}, dataclasses.replace(IMAGE, strength=1, eta=0.5)),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, dataclasses.replace(IMAGE, seed=9, strength=0.45)),
    ("heun", "HeunDiscreteScheduler", {}, dataclasses.replace(IMAGE, guidance_scale=1)),
    (
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True},
        dataclasses.replace(IMAGE, sigmas="karras", num_inference_steps=8),
    ),
]


def test_an_image_from_an_image_is_that_of_diffusers(tiny, pipe):
    pipeline = checkpoints.pipeline()
    requests = [dataclasses.replace(r, sampler=sampler, noise="torch") for sampler, _, _, r in FROM_IMAGE]
    for result, (sampler, scheduler, config, request) in zip(pipe.generate(requests), FROM_IMAGE, strict=True):
        expected = theirs(pipeline, tiny, request, scheduler, **config)
        assert difference(result.pixels, expected) <= 2, (sampler, request)
        assert result.pixels.std() > 10


INSIDE = [
    ("ddim", "DDIMScheduler", INPAINT),
    ("ddim", "DDIMScheduler", dataclasses.replace(INPAINT, strength=1, eta=0.5)),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", dataclasses.replace(INPAINT, seed=4, guidance_scale=1)),
    ("euler", "EulerDiscreteScheduler", dataclasses.replace(INPAINT, strength=1)),
    ("heun", "HeunDiscreteScheduler", INPAINT),
]


@pytest.mark.parametrize("channels", [4, 9])
def test_an_image_inside_a_mask_is_that_of_diffusers(channels, tiny, pipe, tmp_path):
    pipeline = checkpoints.pipeline(unet={"in_channels": channels})
    if channels == 9:
        tiny = tmp_path / "inpainting"
        pipeline.save_pretrained(tiny)
        checkpoints.edit(tiny / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
        pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])
    cases = INSIDE if channels == 4 else INSIDE[:3]
    requests = [dataclasses.replace(r, sampler=sampler, noise="torch", overlay=False) for sampler, _, r in cases]
    for result, (sampler, scheduler, request) in zip(pipe.generate(requests), cases, strict=True):
        expected = theirs(pipeline, tiny, request, scheduler, MASK)
        assert difference(result.pixels, expected) <= 2, (sampler, request)
    cropped = dataclasses.replace(requests[0], overlay=True, padding_mask_crop=3)
    result = pipe.generate([cropped])[0]
    assert difference(result.pixels, theirs(pipeline, tiny, cropped, "DDIMScheduler", MASK)) <= 2
    assert np.array_equal(result.pixels[MASK == 0], PHOTO[MASK == 0])
    if channels == 9:
        with pytest.raises(RequestError, match="paints inside masks; give image and mask_image"):
            pipe.spec.resolve(TEXT)


def test_the_untouched_part_is_exact_and_the_rest_is_new(pipe):
    same_size = dataclasses.replace(INPAINT, image=PHOTO[:32, :48], mask_image=MASK[:32, :48])
    grown = dataclasses.replace(IMAGE, image=PHOTO[:29, :42], outpaint="left=6,top=2", width=None, height=None)
    inside, outside = pipe.generate([same_size, grown])
    kept = MASK[:32, :48] == 0
    assert np.array_equal(inside.pixels[kept], PHOTO[:32, :48][kept])
    assert np.abs(inside.pixels[~kept].astype(int) - PHOTO[:32, :48][~kept]).mean() > 10
    assert (outside.request.width, outside.request.height) == (48, 32)
    assert outside.pixels.shape == (31, 48, 3)
    assert np.array_equal(outside.pixels[2:, 6:], PHOTO[:29, :42])
    assert outside.pixels[:, :6].std() > 5


def test_text_image_and_mask_rows_share_a_program_and_a_batch(tiny, pipe, compilations):
    wide = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:2], batch_size=2)
    requests = [TEXT, IMAGE, INPAINT, dataclasses.replace(IMAGE, noise="torch", strength=0.3, seed=1)]
    alone = [wide.generate([request])[0] for request in requests]
    compilations()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0], [1, 3, 0]):
        for i, result in zip(order, wide.generate([requests[i] for i in order]), strict=True):
            assert result.id == alone[i].id
            assert np.array_equal(result.pixels, alone[i].pixels), (order, i)
    assert compilations() == 0
    assert len({pipe.spec.program(pipe.spec.resolve(request)) for request in requests}) == 1


def test_an_idle_mask_costs_nothing(pipe):
    unet = jax.tree.map(lambda array: array[0], pipe._networks["unet"])
    latents, text = jnp.zeros((1, 16, 24, 4)), jnp.zeros((1, 2, 77, 32))
    tables = sampling.stack([pipe.spec.table(pipe.spec.resolve(TEXT))], 5)
    keys, zero = np.zeros((1, 2), np.uint32), np.zeros(1, np.float32)
    given = scan.Given(np.zeros((1, 5, 16, 24, 4), np.float32), np.zeros(1, bool))

    def flops(known):
        rows = programs.Rows(tables, np.ones((1, 5, 2), np.float32))
        lowered = jax.jit(programs.advance, static_argnames="last_is_told").lower(
            programs.Flat(*jax.tree.flatten(unet)),
            scan.begin(latents, ()),
            programs.Conditions(text),
            rows,
            keys,
            zero,
            given,
            known,
            None,
            None,
            last_is_told=True,
        )
        return lowered.cost_analysis()["flops"]

    masked = flops(scan.Known(latents, latents, latents[..., :1]))
    assert flops(None) < masked < 1.0001 * flops(None)


def test_variations_differ_by_seed_and_strength_and_start_from_the_image(pipe):
    sweep = [dataclasses.replace(IMAGE, strength=s, seed=i, num_inference_steps=10) for s in (0.1, 0.9) for i in (0, 1)]
    near, other, far, _ = (result.pixels.astype(int) for result in pipe.generate(sweep))
    assert np.abs(near - other).max() > 0
    assert np.abs(near - other).mean() < 0.7 * np.abs(near - far).mean()


def test_the_content_names_the_request_and_not_the_path(tiny, tmp_path):
    spec = Spec(tiny)
    for name in ("a.png", "b.png"):
        Image.fromarray(PHOTO).save(tmp_path / name)
    Image.fromarray(PHOTO[::-1].copy()).save(tmp_path / "c.png")
    a, b, c = (spec.resolve(dataclasses.replace(IMAGE, image=tmp_path / f"{name}.png")) for name in "abc")
    assert spec.id(a) == spec.id(b) != spec.id(c)
    assert spec.resolve(a) == a
    assert pickle.loads(pickle.dumps(spec)).id(a) == spec.id(a)
    assert spec.id(spec.resolve(TEXT)) != spec.id(a)
    # A resolved request still says where its picture lies, and a changed one is not taken for it.
    Image.fromarray(PHOTO[:, ::-1].copy()).save(tmp_path / "a.png")
    for read in (spec.prepare, spec.resolve):
        with pytest.raises(RequestError, match=r"image .* has changed"):
            read(a)
    assert spec.resolve(a, read=False) == a
    masked = dataclasses.replace(b, mask_image=MASK)
    assert spec.resolve(masked, read=False) == spec.resolve(masked) != masked


def test_the_size_is_the_image_s_unless_one_is_given(tiny):
    spec = Spec(tiny)

    def size(**fields):
        request = spec.resolve(Request(prompt="a", image=PHOTO, **fields))
        return request.width, request.height

    assert size() == (56, 40)
    assert size(width=32) == (32, 40)
    assert size(mask_image=MASK, padding_mask_crop=8) == (32, 32)
    with pytest.raises(RequestError, match="image has 1x40 pixels; a side needs 8"):
        spec.resolve(Request(prompt="a", image=PHOTO[:, :1]))
    with pytest.raises(RequestError, match=r"use at least 0\.2"):
        spec.resolve(dataclasses.replace(IMAGE, strength=0.1))


@torch.no_grad()
def test_an_image_edited_by_instruction_is_that_of_diffusers(tmp_path):
    pipeline = checkpoints.pipeline(unet={"in_channels": 8})
    pipeline.save_pretrained(tmp_path / "edit")
    checkpoints.edit(tmp_path / "edit" / "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline")
    pipe = StableDiffusion.from_pretrained(tmp_path / "edit", devices=jax.devices()[:2])  # half of which is filled up
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_pretrained(tmp_path / "edit" / "scheduler")
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    image = Image.fromarray(PHOTO[:32, :48])
    for scales in ({}, {"guidance_scale": 3, "image_guidance_scale": 4}, {"guidance_scale": 1}):
        request = dataclasses.replace(
            TEXT, image=image, sampler="euler_ancestral", negative_prompt="cat", noise="torch", **scales
        )
        options = {"guidance_scale": request.guidance_scale, "image_guidance_scale": request.image_guidance_scale}
        expected = theirs(
            request.prompt,
            image=image,
            negative_prompt="cat",
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(3),
            **options,
        ).images[0]
        assert difference(pipe.generate([request])[0].pixels, np.asarray(expected)) <= 2, scales
    with pytest.raises(RequestError, match="edits images; give image"):
        pipe.spec.resolve(TEXT)

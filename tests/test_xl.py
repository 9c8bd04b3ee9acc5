"""Stable Diffusion XL: diffusers' images on the same weights and seed, from text, from images and inside masks."""

import dataclasses
import shutil

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdjax import Request, RequestError, StableDiffusion
from sdjax.batch import time_ids
from sdjax.spec import Spec
from sdjax.weights.checkpoint import CheckpointError
from tests import checkpoints
from tests.test_image_guided import MASK, PHOTO, difference

TEXT = Request(prompt="a red circle", seed=3, num_inference_steps=4, width=48, height=32, noise="torch")
SIZED = {
    "original_size": (64, 512),
    "crops_coords_top_left": (3, 40),
    "target_size": (100, 90),
    "negative_original_size": (30, 20),
    "negative_crops_coords_top_left": (7, 9),
    "negative_target_size": (20, 30),
}
CHECKPOINTS = {
    "base": {},
    "deep transformers, small second encoder": {
        "unet": {
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 3],
            "attention_head_dim": [2, 4, 8],
        },
        "text": {"hidden_size": 40},
        "text_2": {"hidden_size": 32, "num_hidden_layers": 3, "eos_token_id": 2},
        "force_zeros_for_empty_prompt": False,
    },
    "v_prediction, eight-pixel VAE": {
        "vae": {
            "block_out_channels": [16, 16, 32, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "force_upcast": False,
        },
        "text": {"num_hidden_layers": 4},
        "scheduler": checkpoints.scheduler("DDIMScheduler", prediction_type="v_prediction"),
        "seed": 7,
    },
}
HEAVY = [pytest.param(name, marks=[pytest.mark.slow] * (name != "base")) for name in CHECKPOINTS]
REQUESTS = [
    (TEXT, {}),
    (dataclasses.replace(TEXT, negative_prompt="", guidance_scale=3, seed=2**32 - 1), {}),
    (dataclasses.replace(TEXT, prompt_2="cat cat", negative_prompt="cat", negative_prompt_2="red"), {}),
    (dataclasses.replace(TEXT, guidance_rescale=0.7, clip_skip=1, negative_prompt="cat", **SIZED), SIZED),
    (dataclasses.replace(TEXT, guidance_scale=1, prompt="red " * 100, prompt_language="plain"), {}),
]


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl") / "model"
    checkpoints.saved(folder, checkpoints.pipeline_xl)
    return folder


def theirs(pipeline, folder, request, kind, scheduler=None, **options):
    """The image that a kind of diffusers' pipeline makes of `pipeline`'s networks for a request, as uint8."""
    config = json_config(folder)
    name = scheduler or config["_class_name"]
    with_settings = {key: value for key, value in pipeline.config.items() if key.startswith(("force_", "requires_"))}
    if "Img2Img" not in kind.__name__ and "Inpaint" not in kind.__name__:
        with_settings.pop("requires_aesthetics_score", None)
    made = kind(**pipeline.components, **with_settings, add_watermarker=False)
    made.scheduler = getattr(diffusers, name).from_config(config, clip_sample=False)
    made.set_progress_bar_config(disable=True)
    if "InstructPix2Pix" not in kind.__name__:
        options["clip_skip"] = request.clip_skip or None
    images = made(
        request.prompt,
        prompt_2=request.prompt_2,
        negative_prompt=request.negative_prompt,
        negative_prompt_2=request.negative_prompt_2,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
        **options,
    ).images
    return (images[0] * 255).round().astype(np.uint8)


def json_config(folder):
    return diffusers.EulerDiscreteScheduler.load_config(folder / "scheduler")


@pytest.mark.parametrize("name", HEAVY)
def test_images_are_those_of_diffusers(name, tmp_path):
    folder = tmp_path / "model"
    pipeline = checkpoints.saved(folder, checkpoints.pipeline_xl, **CHECKPOINTS[name])
    pipe = StableDiffusion.from_pretrained(folder, devices=jax.devices()[:1])
    for result, (request, options) in zip(pipe.generate([r for r, _ in REQUESTS]), REQUESTS, strict=True):
        size = {"width": request.width, "height": request.height}
        expected = theirs(pipeline, folder, request, diffusers.StableDiffusionXLPipeline, **size, **options)
        assert difference(result.pixels, expected) <= 2, request
        assert result.pixels.std() > 10, "a picture of nothing compares nothing"

    image = Image.fromarray(PHOTO)
    from_image = dataclasses.replace(TEXT, image=PHOTO, strength=0.7, negative_prompt="cat", original_size=(40, 60))
    inside = dataclasses.replace(from_image, mask_image=MASK, overlay=False, sampler="euler_ancestral", seed=5)
    results = pipe.generate([from_image, inside])
    expected = theirs(
        pipeline,
        folder,
        from_image,
        diffusers.StableDiffusionXLImg2ImgPipeline,
        image=image.resize((48, 32), Image.Resampling.LANCZOS),
        strength=0.7,
        original_size=(40, 60),
    )
    assert difference(results[0].pixels, expected) <= 2
    masked = {"image": image, "mask_image": Image.fromarray(MASK), "width": 48, "height": 32}
    expected = theirs(
        pipeline,
        folder,
        inside,
        diffusers.StableDiffusionXLInpaintPipeline,
        "EulerAncestralDiscreteScheduler",
        strength=0.7,
        original_size=(40, 60),
        **masked,
    )
    assert difference(results[1].pixels, expected) <= 2


LAYERS = {  # that the LoRA changes, with how kohya's names of them begin
    "unet": ("lora_unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
    "text_encoder": ("lora_te1", "text_model.encoder.layers.0.self_attn.q_proj"),
    "text_encoder_2": ("lora_te2", "text_model.encoder.layers.1.mlp.fc1"),
}


def test_a_lora_and_a_textual_inversion_make_diffusers_image(tmp_path):
    pipeline = checkpoints.saved(tmp_path / "xl", checkpoints.pipeline_xl)
    plain = theirs(pipeline, tmp_path / "xl", TEXT, diffusers.StableDiffusionXLPipeline, width=48, height=32)
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for component, (prefix, layer) in LAYERS.items():
        # transformers 5 has dropped the prefix of the encoder without a projection.
        own = layer.removeprefix("text_model.") if component == "text_encoder" else layer
        weight = getattr(pipeline, component).get_submodule(own).weight
        up, down = (torch.randn(*size, generator=generator) for size in ((len(weight), 4), (4, weight.shape[1])))
        name = f"{prefix}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
        with torch.no_grad():
            weight += 0.5 * 2 / 4 * up @ down
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors")
    vectors = {name: 3 * torch.randn(2, width, generator=generator) for name, width in (("clip_l", 32), ("clip_g", 40))}
    safetensors.torch.save_file(vectors, tmp_path / "thing.safetensors")
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, f"{part}{suffix}") for part in ("tokenizer", "text_encoder")}
        pipeline.load_textual_inversion(vectors[name], token="<thing>", **parts)

    pipe = StableDiffusion.from_pretrained(
        tmp_path / "xl",
        loras=[(tmp_path / "lora.safetensors", 0.5)],
        textual_inversions=[(tmp_path / "thing.safetensors", "<thing>")],
        devices=jax.devices()[:1],
    )
    request = dataclasses.replace(TEXT, prompt="a <thing> red circle", negative_prompt="cat")
    few = dataclasses.replace(request, guidance_scale=1)
    cases = [  # and as LoRAs that were distilled for a few steps are used
        (request, None),
        (dataclasses.replace(few, sampler="lcm"), "LCMScheduler"),
        (dataclasses.replace(few, sampler="tcd", eta=0.3), "TCDScheduler"),
    ]
    kind = diffusers.StableDiffusionXLPipeline
    for result, (asked, scheduler) in zip(pipe.generate([asked for asked, _ in cases]), cases, strict=True):
        expected = theirs(pipeline, tmp_path / "xl", asked, kind, scheduler, width=48, height=32)
        assert difference(result.pixels, expected) <= 2, asked
        assert difference(result.pixels, plain) > 10


def test_requests_of_all_kinds_share_a_program_and_know_no_company(xl, compilations):
    wide = StableDiffusion.from_pretrained(xl, devices=jax.devices()[:2], batch_size=2)
    requests = [
        TEXT,
        dataclasses.replace(TEXT, noise="jax", negative_prompt="cat", prompt_2="cat", original_size="64x64"),
        dataclasses.replace(TEXT, image=PHOTO, sampler="euler_ancestral", crops_coords_top_left="0,16"),
        dataclasses.replace(TEXT, image=PHOTO, mask_image=MASK, guidance_scale=1, clip_skip=1),
    ]
    alone = [wide.generate([request])[0] for request in requests]
    compilations()
    for order in ([0, 1, 2, 3], [3, 1, 0], [2, 0]):
        for i, result in zip(order, wide.generate([requests[i] for i in order]), strict=True):
            assert result.id == alone[i].id
            assert np.array_equal(result.pixels, alone[i].pixels), (order, i)
    assert compilations() == 0
    assert len({result.id for result in alone}) == len(requests)


def test_long_weighted_prompts_reach_both_encoders(xl):
    request = Request(prompt="(red:1.5) circle", prompt_2="cat BREAK circle")
    spec = Spec(xl)
    text = spec.text(request)
    assert text.ids.shape == (2, 2, 2, 77)
    assert set(text.weights[0].ravel()) == {np.float32(1), np.float32(1.5)}
    assert set(text.weights[1].ravel()) == {np.float32(1)}
    assert text.ids[0, 0, 0, -1] != 0 == text.ids[1, 0, 0, -1]  # each pads as its tokenizer does
    with pytest.raises(RequestError, match="prompt joins 1 prompts by AND, prompt_2 joins 2; give as many"):
        spec.resolve(Request(prompt="red", prompt_2="red AND cat"))


def test_sizes_are_those_that_are_sampled_unless_others_are_told():
    sized = dataclasses.replace(TEXT, original_size="512x64", negative_crops_coords_top_left=(1, 2))
    told = time_ids([TEXT, sized], (32, 48), 1, 2, refines=False)
    assert told[0].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert told[1].tolist() == [[64, 512, 0, 0, 32, 48], [64, 512, 1, 2, 32, 48]]
    assert time_ids([sized], (32, 48), 1, 2, refines=True)[0].tolist() == [[64, 512, 0, 0, 6], [64, 512, 1, 2, 2.5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_2": "cat"}, "prompt_2 is for Stable Diffusion XL, which this checkpoint is not"),
        ({"original_size": (8, 8)}, "original_size is for Stable Diffusion XL"),
    ],
)
def test_what_another_family_has_not_is_refused(tiny, changes, message):
    with pytest.raises(RequestError, match=message):
        Spec(tiny).resolve(dataclasses.replace(TEXT, **changes))


def test_parts_that_are_no_pair_are_refused(xl, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(xl, copy)
    checkpoints.edit(copy / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(CheckpointError, match="the UNet is told 68 numbers of prompt and size, text_encoder_2 and 5"):
        Spec(copy)
    checkpoints.edit(copy / "model_index.json", text_encoder=[None, None], requires_aesthetics_score=False)
    with pytest.raises(CheckpointError, match="the UNet attends to 72 channels, the text encoder gives 40"):
        Spec(copy)


def test_the_vae_computes_in_float32_where_float16_would_overflow(xl):
    half = StableDiffusion.from_pretrained(xl, dtype="float16", devices=jax.devices()[:1])
    vae = half._networks["vae"]
    assert np.dtype(vae.decoder.conv_in.dtype) == np.float32
    assert vae.decoder.conv_in.kernel.dtype == np.float16
    exact = StableDiffusion.from_pretrained(xl, devices=jax.devices()[:1]).generate([TEXT])[0]
    error = np.square(half.generate([TEXT])[0].pixels.astype(float) - exact.pixels).mean()
    assert 10 * np.log10(255**2 / error) > 35

"""Requests that nobody chose, of any sampler and field that diffusers has too: each makes diffusers' image."""

import json
import random
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import Request, StableDiffusion
from sdjax.sampling.schedule import CLASSES
from tests import checkpoints
from tests.test_image_guided import difference

SIZES = [(48, 32), (32, 48), (64, 64)]
PROMPTS = ["a red circle", "cat", " , (very) [odd] text: 1.3", "RED  circle", "at " * 90, "ünïcode ☃ cat", "c a t"]
SPACINGS, SWITCHES = ("linspace", "leading", "trailing"), ("karras", "exponential", "beta")
# Without sigma schedules.
PLAIN = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler")
SCHEDULERS = (
    *PLAIN,
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    "UniPCMultistepScheduler",
)
SPACED = {*SCHEDULERS} - {"DPMSolverSinglestepScheduler"}  # whose class heeds no spacing
KINDS = {"text": "", "image": "Img2Img", "mask": "Inpaint"}


def parts(scheduler: str, sigmas: str, asked: dict[str, Any], mode: str) -> bool:
    """Where this library parts from diffusers on purpose: see docs/samplers.md."""
    one_step = asked["num_inference_steps"] == 1
    return (
        (scheduler == "LMSDiscreteScheduler" and mode != "text")
        or (scheduler == "KDPM2DiscreteScheduler" and mode == "mask")
        or (scheduler == "DEISMultistepScheduler" and sigmas in SWITCHES and one_step)
    )


def drawn(rng: random.Random, is_xl: bool, mode: str) -> dict[str, Any]:
    """Fields that diffusers' call has too."""

    def perhaps(name: str, *values: Any) -> dict[str, Any]:
        return {name: rng.choice(values)} if rng.random() < 0.4 else {}

    asked = {
        "prompt": rng.choice(PROMPTS),
        "num_inference_steps": rng.choice([1, 2, 3, 5, 8]),
        "guidance_scale": rng.choice([0.0, 1.0, 1.5, 7.5, 14.0]),
        **perhaps("negative_prompt", "", *PROMPTS),
        **perhaps("clip_skip", 1),
    }
    if mode == "text" or is_xl:
        asked |= perhaps("guidance_rescale", 0.3, 1.0)
    if is_xl:
        asked |= perhaps("prompt_2", *PROMPTS) | perhaps("original_size", (100, 1024), (512, 64))
        asked |= perhaps("crops_coords_top_left", (16, 0), (0, 5)) | perhaps("target_size", (100, 64), (512, 512))
    if "negative_prompt" in asked and is_xl:
        asked |= perhaps("negative_prompt_2", "cat", "circle")
    if mode != "text":
        least = 1 / asked["num_inference_steps"]
        asked["strength"] = rng.choice([s for s in (0.2, 0.5, 0.8, 1.0) if s >= least])
    return asked


def pictures(rng: random.Random, mode: str, width: int, height: int) -> dict[str, Any]:
    """What an image is made from, and where."""
    if mode == "text":
        return {}
    colours = np.array([[[rng.randrange(256) for _ in "rgb"] for _ in range(7)] for _ in range(5)], np.uint8)
    image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "image":
        return {"image": image}
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.randrange(height - 8), rng.randrange(width - 8)
    mask[top : top + rng.randrange(4, height), left : left + rng.randrange(4, width)] = 255
    return {"image": image, "mask_image": Image.fromarray(mask)}


def pipeline(base: Any, folder: Path, mode: str, scheduler: str, sigmas: str) -> Any:
    """diffusers' for a mode, with `base`'s networks and another scheduler."""
    xl = "XL" if "XL" in type(base).__name__ else ""
    made = getattr(diffusers, f"StableDiffusion{xl}{KINDS[mode]}Pipeline").from_pipe(base)
    made.set_progress_bar_config(disable=True)
    # From the file, which has what the class in memory knows to be its defaults, and leaves to another class.
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    if sigmas:
        config |= {"timestep_spacing": sigmas} if sigmas in SPACINGS else {f"use_{sigmas}_sigmas": True}
    made.scheduler = getattr(diffusers, scheduler).from_config(config)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("is_xl", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_request_makes_diffusers_image(is_xl, seed, tmp_path):
    rng = random.Random(seed)
    linear, depths = is_xl or rng.random() < 0.5, rng.choice([1, [2, 1]])
    base = checkpoints.saved(
        tmp_path,
        checkpoints.pipeline_xl if is_xl else checkpoints.pipeline,
        scheduler=checkpoints.scheduler("DDIMScheduler", prediction_type=rng.choice(["epsilon", "v_prediction"])),
        unet={"transformer_layers_per_block": depths, "use_linear_projection": linear},
        seed=seed,
        **({"force_zeros_for_empty_prompt": rng.random() < 0.5} if is_xl else {}),
    )
    requests, expected = [], []
    while len(requests) < 30:
        mode, scheduler, (width, height) = rng.choice(["text", *KINDS]), rng.choice(SCHEDULERS), rng.choice(SIZES)
        sigmas = rng.choice(("", *(SPACINGS if scheduler in SPACED else ()), *(() if scheduler in PLAIN else SWITCHES)))
        asked = drawn(rng, is_xl, mode) | pictures(rng, mode, width, height)
        if parts(scheduler, sigmas, asked, mode):
            continue
        if scheduler == "DDIMScheduler":
            asked["eta"] = rng.choice([0.0, 0.4, 1.0])
        image_seed = rng.choice([0, 12345, 2**31, 2**32 - 1])
        made = pipeline(base, tmp_path, mode, scheduler, sigmas)(
            **asked,
            **({} if mode == "image" else {"width": width, "height": height}),
            generator=torch.Generator().manual_seed(image_seed),
            output_type="pil",
        )
        expected.append(np.asarray(made.images[0]))
        asked |= {"sampler": CLASSES[scheduler], "sigmas": sigmas or None, "seed": image_seed, "noise": "torch"}
        asked |= {"width": width, "height": height, "prompt_language": "plain", "overlay": False}
        requests.append(Request(**asked))
    pipe = StableDiffusion.from_pretrained(tmp_path, devices=jax.devices()[:2], batch_size=2)
    for result, image in zip(pipe.generate(requests), expected, strict=True):
        assert difference(result.pixels, image) <= 2, result.request
    assert sum(image.std() > 10 for image in expected) > 25, "pictures of nothing compare nothing"

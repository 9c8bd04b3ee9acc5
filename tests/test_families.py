"""Families beside the plain ones, each with diffusers' image on the same weights and seed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import Request, RequestError, StableDiffusion
from sdjax.spec import Spec
from tests import checkpoints
from tests.test_image_guided import MASK, PHOTO, difference

SIZE = {"width": 48, "height": 32}
IMAGE = {"image": Image.fromarray(PHOTO).resize((48, 32), Image.Resampling.LANCZOS)}
INSIDE = {**IMAGE, "mask_image": Image.fromarray(MASK[:32, :48])}
TRAILING = {"timestep_spacing": "trailing"}

# What makes a checkpoint's networks, in each family.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "small": {},
    "three levels": {
        "unet": {
            "block_out_channels": [16, 32, 32],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": [2, 4, 4],
            "layers_per_block": 2,
        },
        "vae": {"block_out_channels": [16, 32], "layers_per_block": 2},
        "text": {"num_hidden_layers": 3, "hidden_act": "gelu"},
        "seed": 7,
    },
    "v_prediction, eight-pixel VAE": {
        "unet": {"block_out_channels": [16, 32], "use_linear_projection": True, "transformer_layers_per_block": [1, 2]},
        "vae": {
            "block_out_channels": [16, 16, 16, 32],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text": {"hidden_size": 40},
        "scheduler": {"prediction_type": "v_prediction"},
        "seed": 11,
    },
}


class Asked(NamedTuple):
    """An image to ask both for. fields: of the Request; shared: of the Request and of diffusers' call.

    scheduler: diffusers' class and settings in place of the checkpoint's.
    """

    shared: Mapping[str, Any] = {}
    fields: Mapping[str, Any] = {}
    scheduler: tuple[str, dict[str, Any]] | None = None


class Family(NamedTuple):
    """kind: of diffusers' pipelines. scheduler: the checkpoint's. unet: what its configuration adds."""

    kind: str
    scheduler: str
    asked: list[Asked]
    unet: Mapping[str, Any] = {}
    settings: Mapping[str, Any] = {}
    tokens: Mapping[str, str] = {}


CAT = {"negative_prompt": "cat"}
FAMILIES = {
    "SD 2 and SD-Turbo": Family(
        "StableDiffusion",
        "DDIMScheduler",
        [
            Asked(),
            Asked({**CAT, "guidance_scale": 3.0}),
            Asked(
                {"num_inference_steps": 1, "guidance_scale": 0.0},
                {"sampler": "euler", "sigmas": "trailing"},
                ("EulerDiscreteScheduler", TRAILING),
            ),
        ],
        unet={"use_linear_projection": True},
        tokens={"pad_token": "!"},
    ),
    "SD from an image": Family(
        "StableDiffusionImg2Img",
        "DDIMScheduler",
        [Asked({**IMAGE, "strength": 0.8}), Asked({**IMAGE, **CAT, "strength": 0.5})],
    ),
    "SD inside a mask": Family(
        "StableDiffusionInpaint",
        "DDIMScheduler",
        [Asked({**INSIDE, "strength": 1.0}), Asked({**INSIDE, **CAT, "strength": 0.6})],
    ),
    "SD inpainting": Family(
        "StableDiffusionInpaint",
        "PNDMScheduler",
        [Asked({**INSIDE, "strength": 1.0}), Asked({**INSIDE, **CAT, "strength": 0.6})],
        unet={"in_channels": 9},
    ),
    "SD 2 inpainting": Family(
        "StableDiffusionInpaint",
        "PNDMScheduler",
        [Asked({**INSIDE, "strength": 1.0}), Asked({**INSIDE, **CAT, "strength": 0.6})],
        unet={"in_channels": 9, "use_linear_projection": True},
        tokens={"pad_token": "!"},
    ),
    "InstructPix2Pix": Family(
        "StableDiffusionInstructPix2Pix",
        "EulerAncestralDiscreteScheduler",
        [Asked(IMAGE), Asked({**IMAGE, **CAT, "image_guidance_scale": 3.0})],
        unet={"in_channels": 8},
    ),
    "LCM": Family(
        "LatentConsistencyModel",
        "LCMScheduler",
        [Asked({"guidance_scale": 8.5}), Asked({"guidance_scale": 1.0, "num_inference_steps": 2})],
        unet={"time_cond_proj_dim": 10},
    ),
    "LCM from an image": Family(
        "LatentConsistencyModelImg2Img",
        "LCMScheduler",
        [Asked({**IMAGE, "strength": 0.5}), Asked({**IMAGE, "strength": 0.8, "num_inference_steps": 2})],
        unet={"time_cond_proj_dim": 10},
    ),
    "LCM inside a mask": Family(
        "StableDiffusionInpaint",
        "LCMScheduler",
        [Asked({**INSIDE, "strength": 0.5}), Asked({**INSIDE, "strength": 1.0, "num_inference_steps": 3})],
        unet={"time_cond_proj_dim": 10},
    ),
    "SDXL LCM from an image": Family(
        "StableDiffusionXLImg2Img",
        "LCMScheduler",
        [Asked({**IMAGE, "strength": 0.5}), Asked({**IMAGE, "strength": 0.8})],
        unet={"time_cond_proj_dim": 10},
    ),
    "SDXL Turbo, Lightning and Hyper": Family(
        "StableDiffusionXL",
        "EulerDiscreteScheduler",
        [
            Asked(
                {"num_inference_steps": 1, "guidance_scale": 0.0},
                {"sampler": "euler_ancestral", "sigmas": "trailing"},
                ("EulerAncestralDiscreteScheduler", TRAILING),
            ),
            Asked(
                {"num_inference_steps": 4, "guidance_scale": 0.0},
                {"sigmas": "trailing"},
                ("EulerDiscreteScheduler", TRAILING),
            ),
            Asked(
                {"num_inference_steps": 3, "guidance_scale": 0.0, "eta": 0.5}, {"sampler": "tcd"}, ("TCDScheduler", {})
            ),
        ],
    ),
    "SDXL inpainting": Family(
        "StableDiffusionXLInpaint",
        "EulerDiscreteScheduler",
        [Asked({**INSIDE, "strength": 1.0}), Asked({**INSIDE, **CAT, "strength": 0.6})],
        unet={"in_channels": 9},
    ),
    "SDXL InstructPix2Pix": Family(
        "StableDiffusionXLInstructPix2Pix",
        "EulerDiscreteScheduler",
        [Asked(IMAGE), Asked({**IMAGE, **CAT, "image_guidance_scale": 3.0})],
        unet={"in_channels": 8},
    ),
    "SDXL refiner": Family(
        "StableDiffusionXLImg2Img",
        "EulerDiscreteScheduler",
        [
            Asked({**IMAGE, "strength": 0.8}),
            Asked({**IMAGE, **CAT, "strength": 0.8, "aesthetic_score": 3.0, "negative_aesthetic_score": 7.0}),
        ],
        settings={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
}
FAST = [
    ("LCM", "small"),
    ("LCM from an image", "small"),
    ("LCM inside a mask", "small"),
    ("SDXL refiner", "small"),
    ("SD inpainting", "small"),  # nine channels
]  # what runs without -m slow, beside the plain families' own tests
CASES = [
    pytest.param(family, configuration, marks=[pytest.mark.slow] * ((family, configuration) not in FAST))
    for family in FAMILIES
    for configuration in CONFIGURATIONS
]


def saved(family: Family, configuration: dict[str, Any], folder) -> Any:
    """diffusers' pipeline of such networks, and its checkpoint in a folder."""
    kind = getattr(diffusers, f"{family.kind}Pipeline")
    changes = configuration | {"unet": {**configuration.get("unet", {}), **family.unet}}
    changes["scheduler"] = checkpoints.scheduler(family.scheduler, **configuration.get("scheduler", {}))
    if "XL" in family.kind:
        return checkpoints.saved(folder, checkpoints.pipeline_xl, kind=kind, **changes, **family.settings)
    plain = checkpoints.pipeline(**changes, tokens=family.tokens)
    if "time_cond_proj_dim" in family.unet:  # random weights alone hardly heed the scale
        with torch.no_grad():
            plain.unet.time_embedding.cond_proj.weight.mul_(30)
    made = kind(**plain.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(("name", "configuration"), CASES)
def test_a_family_makes_diffusers_images(name, configuration, tmp_path):
    family = FAMILIES[name]
    theirs = saved(family, CONFIGURATIONS[configuration], tmp_path / "model")
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])
    own, images = theirs.scheduler, []
    for shared, fields, scheduler in family.asked:
        shared = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 7.5, **shared}
        result = pipe.generate([Request(seed=3, noise="torch", overlay=False, **SIZE, **shared, **fields)])[0]
        theirs.scheduler = own
        if scheduler is not None:
            theirs.scheduler = getattr(diffusers, scheduler[0]).from_config(own.config, **scheduler[1])
        has_size = "image" not in shared or family.kind.endswith(("Inpaint", "XLInstructPix2Pix"))
        size = SIZE if has_size else {}
        generator = torch.Generator().manual_seed(3)
        expected = theirs(**shared, **size, generator=generator, output_type="pil").images[0]
        assert difference(result.pixels, np.asarray(expected)) <= 2, (shared, fields)
        assert result.pixels.std() > 10, "a picture of nothing compares nothing"
        images.append(result.pixels)
    assert difference(*images[:2]) > 10, "what is asked for is heard"


def test_what_a_refiner_cannot_do_is_refused(tmp_path):
    saved(FAMILIES["SDXL refiner"], {}, tmp_path / "refiner")
    with pytest.raises(RequestError, match="this checkpoint refines images; give image"):
        Spec(tmp_path / "refiner").resolve(Request(prompt="a red circle"))


def test_bfloat16_is_close_on_the_bundled_model():
    requests = [Request(prompt=prompt, seed=3, num_inference_steps=10) for prompt in ("a red circle", "a blue square")]
    exact, half = (
        StableDiffusion.from_pretrained(dtype=dtype, devices=jax.devices()[:1]).generate(requests)
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(exact, half, strict=True):
        assert one.id != other.id
        error = np.square(one.pixels.astype(float) - other.pixels).mean()
        assert 10 * np.log10(255**2 / error) > 35

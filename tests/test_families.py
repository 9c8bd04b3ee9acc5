"""Families beside the plain ones, each with diffusers' image on the same weights and seed."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from sdjax import Request, RequestError, StableDiffusion
from tests import checkpoints
from tests.test_image_guided import PHOTO, difference

SIZE = {"width": 48, "height": 32}


def test_a_consistency_model_is_told_its_guidance(tmp_path):
    pipeline = checkpoints.pipeline(unet={"time_cond_proj_dim": 10}, scheduler=checkpoints.scheduler("LCMScheduler"))
    with torch.no_grad():  # random weights alone hardly heed the scale
        pipeline.unet.time_embedding.cond_proj.weight.mul_(30)
    pipeline.save_pretrained(tmp_path / "lcm")
    checkpoints.edit(tmp_path / "lcm" / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    pipe = StableDiffusion.from_pretrained(tmp_path / "lcm", devices=jax.devices()[:1])
    theirs = diffusers.LatentConsistencyModelPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    images = []
    for scale in (8.5, 1.0):
        request = Request(
            prompt="a red circle", seed=3, num_inference_steps=4, guidance_scale=scale, noise="torch", **SIZE
        )
        result = pipe.generate([request])[0]
        assert result.request.sampler == "lcm"
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 4, "guidance_scale": scale, "generator": generator}
        expected = theirs("a red circle", output_type="pil", **options, **SIZE).images[0]
        assert difference(result.pixels, np.asarray(expected)) <= 2, scale
        images.append(result.pixels)
    assert difference(*images) > 20, "the scale is heard"


def test_the_refiner_alone_makes_diffusers_image(tmp_path):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    settings = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    pipeline = checkpoints.saved(tmp_path / "refiner", checkpoints.pipeline_xl, kind=kind, **settings)
    pipe = StableDiffusion.from_pretrained(tmp_path / "refiner", devices=jax.devices()[:1])
    image = Image.fromarray(PHOTO).resize((48, 32), Image.Resampling.LANCZOS)
    scores = {"aesthetic_score": 3.0, "negative_aesthetic_score": 7.0}
    for told in ({}, {"negative_prompt": "cat", **scores}):
        request = Request(prompt="a red circle", seed=3, num_inference_steps=5, image=image, noise="torch", **told)
        expected = pipeline(
            "a red circle",
            image=image,
            strength=request.strength,
            guidance_scale=request.guidance_scale,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(3),
            output_type="pil",
            **told,
        ).images[0]
        assert difference(pipe.generate([request])[0].pixels, np.asarray(expected)) <= 2, told
    with pytest.raises(RequestError, match="this checkpoint refines images; give image"):
        pipe.spec.resolve(Request(prompt="a red circle"))

"""What a plan is made for beside model, device and steps; its JSON says it, and jobs are compared with it. No JAX."""

from argparse import Namespace
from dataclasses import fields
from typing import Any

from sdjax.request import Request
from sdjax.values import OF_CONTROLS, PICTURES, lines

# Fields that do not change which programs run, nor how often, and the steps.
_FREE = {
    *("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "seed", "num_inference_steps", "guidance_rescale"),
    *("image_guidance_scale", "rho", "eta", "original_size", "crops_coords_top_left", "target_size"),
    *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size", "aesthetic_score"),
    *("negative_aesthetic_score", "overlay", "resize", "clip_skip", "noise", *OF_CONTROLS),
    *(f"{name}_sha256" for name in PICTURES),
}
_PARTS = ("controlnet", "refiner", "vae", "vae_tiling")


def asked(request: Request, options: Namespace) -> dict[str, Any]:
    """The fields of a request that are not at their defaults, and how many parts of a kind the options add to a model.

    Pictures are counted; guidance_scale is named only where it leaves guidance out, as 1.
    """
    found = {field.name: getattr(request, field.name) for field in fields(Request) if field.name not in _FREE}
    found |= {name: len(lines(found[name])) or None for name in PICTURES}
    if request.guidance_scale > 1:
        del found["guidance_scale"]
    else:
        found["guidance_scale"] = 1.0
    if request.hires_scale == 1:
        del found["hires_strength"], found["hires_upscaler"]
    found = {name: value for name, value in found.items() if value != getattr(Request, name)}
    given = {name: getattr(options, name) for name in _PARTS}
    return found | {name: len(value) if isinstance(value, list) else 1 for name, value in given.items() if value}

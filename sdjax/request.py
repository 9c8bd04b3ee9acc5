"""What a user may ask for: one `Request` an image, checked when made, read from a row of a prompt file."""

import hashlib
import json
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from sdjax.values import (
    MAX_STEPS,
    OF_CONTROLS,
    OF_STEPS,
    PICTURES,
    SIZE,
    RequestError,
    check_text,
    coerce,
    numbers,
    shown,
    size_of,
)

MAX_SIDE = 4096
MAX_SEED = 2**32 - 1

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
"""A picture as a path, an fsspec URL, a Pillow image, or uint8 [height, width(, 1, 3 or 4)]."""
Pair: TypeAlias = str | Sequence[int]
"""A size as diffusers' (height, width) or as text, `1024x768`, width first; a corner as (top, left) or `0,16`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to make. A field left as None takes the checkpoint's default.

    Args:
        prompt: what to show, at most 10,000 characters; it may be empty where `image` or `control_image` is given.
        negative_prompt: what to stay away from; used where guidance_scale > 1. None is the empty text, or for a
            checkpoint that says force_zeros_for_empty_prompt zeros in place of the empty text's states.
        prompt_2, negative_prompt_2: what the second text encoder of Stable Diffusion XL reads; None is the same as the
            first does.
        seed: 0 to 2**32 - 1; all of the request's noise comes from it.
        num_inference_steps: sampler steps, 1 to 1000; as many as sigmas or timesteps list, where they are lists.
        guidance_scale: classifier-free guidance (https://arxiv.org/abs/2207.12598), 0 to 100; 1 or less runs the
            conditional network alone, as diffusers does. Of prompts joined by AND all run, and the negative one as well
            where their weights do not add up to 1.
        guidance_start, guidance_end: the share of the steps from which and until which guidance_scale holds, 0 to 1;
            outside the conditional network alone runs (https://arxiv.org/abs/2404.07724). They, negative_prompt and
            guidance_rescale are nothing to a model that is told the guidance (a full LCM).
        guidance_scales: a guidance_scale for each of the steps in place of the one for all, such as `9,7.5,5`; where an
            image leaves out steps, the last of them count.
        guidance_rescale: share of the rescaled guidance of https://arxiv.org/abs/2305.08891 (section 3.4), 0 to 1.
        image_guidance_scale: for a checkpoint that edits by instruction (https://arxiv.org/abs/2211.09800): how closely
            to keep to `image`, 1 to 100.
        sampler: k-diffusion's name (`dpmpp_2m`); `sdjax.sampling` lists them.
        sigmas: noise schedule of the sampler: a name (`karras`), or falling sigmas in k-diffusion's scale
            (`14.6,6,2,0.5`), each of which is a call; a final 0 is none.
        timesteps: falling timesteps of the sampler's calls (`999,750,500,250`), in place of sigmas.
        rho: bend of karras sigmas (7 where None) and of polyexponential ones (1).
        solver_order: of a sampler that has several, 1 to 4.
        eta: share of fresh noise in ddim and tcd, 0 to 1.
        width, height: pixels, multiples of 8, 8 to 4096.
        original_size, crops_coords_top_left, target_size: what Stable Diffusion XL is told of the picture's history
            (https://arxiv.org/abs/2307.01952, section 2.2): its size before it was resized and cropped, where it was
            cropped, and its size then. A size left as None is the one that is sampled.
        negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for the negative prompt;
            None is what the prompt has.
        aesthetic_score, negative_aesthetic_score: what its refiner is told of the picture's worth, 0 to 10.
        image: a picture to start from; without width and height its own size is made, rounded down to what the model
            can make. Once in a Request it is text: a picture in memory becomes a `data:` URL of a PNG.
        image_sha256: what the image file's SHA-256 must be, in hex; `Spec.resolve` finds it where None. It names the
            request in place of the path.
        mask_image: a picture of any size, fitted to the image: white is repainted, black stays. Edges between are
            where the two are blended; the sampler repaints where the mask is at least half white.
        mask_image_sha256: as image_sha256.
        padding_mask_crop: repaint only the part around the mask, with this margin in pixels, at the full width and
            height, and paste it back into the image.
        overlay: put the image's own pixels back where the mask is black, exactly; false keeps what the VAE made there.
        outpaint: grow the canvas of `image`: margins in pixels (`left=128,top=64`) or a size (`768x512`) around its
            middle. The image's own pixels stay exactly.
        strength: how far from `image` to go, above 0 and up to 1; nothing to a checkpoint that edits by instruction.
        control_image: where ControlNets are loaded, a picture for each, in their order, several as a list, also in text
            (`["a.png", "b.png"]`); fitted to width and height, and cut as the image is by padding_mask_crop. Without
            `image`, width and height the first one's size is made. Once in a Request it is text, a line for each.
        control_image_sha256: as image_sha256, with commas between several.
        controlnet_conditioning_scale: how much each ControlNet counts, a number for all or one for each (`1,0.5`), 0
            to 100.
        control_guidance_start, control_guidance_end: the shares of the network's calls from which and until which each
            ControlNet counts, 0 to 1: a number for all, or one for each.
        guess_mode: control the conditional half of guidance alone, and the outer skips less: for empty prompts.
        denoising_end: where a refiner is loaded, the share of the noise that the base takes off before the refiner goes
            on, above 0; 1 leaves the refiner out. None is 0.8.
        hires_scale: above 1, make a second pass at this many times the size, from the first one's enlarged image.
        hires_upscaler: what enlarges it: `lanczos` its pixels, or `latent` its latent (bilinearly; it is softer, and
            wants a hires_strength above 0.5).
        hires_strength: the second pass's strength.
        resize: the size to bring the finished image to by Lanczos, such as `640x360`.
        cache_interval: make the UNet's deep features anew at one of so many of its calls, and between take those of
            before (https://arxiv.org/abs/2312.00858): faster, and not quite the same picture. 1 never does.
        token_merging_ratio: the share of the image's tokens that attend together with others like them, at the finest
            resolution that attends (https://arxiv.org/abs/2303.17604), 0 to 0.75: faster, not quite the same.
        clip_skip: how many of the text encoder's last layers to leave out for the prompt, 0 to 11; the negative prompt
            keeps them all, as in diffusers.
        prompt_language: `a1111`, in which brackets weigh words, AND joins prompts, and a long prompt is encoded in
            chunks (`sdjax.prompts` describes it); `compel`, its words and weights (`sdjax.compel`); or `plain`, in
            which all is text and a long prompt is cut.
        noise: `jax`, or `torch` for the draws that torch's CPU generator makes from the same seed.

    Raises:
        RequestError: a value of the wrong type or out of its range.
    """

    prompt: str
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    seed: int = 0
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    guidance_scales: str | Sequence[float] | None = None
    guidance_rescale: float = 0.0
    image_guidance_scale: float = 1.5
    sampler: str | None = None
    sigmas: str | Sequence[float] | None = None
    timesteps: str | Sequence[float] | None = None
    rho: float | None = None
    solver_order: int | None = None
    eta: float = 0.0
    width: int | None = None
    height: int | None = None
    original_size: Pair | None = None
    crops_coords_top_left: Pair = "0,0"
    target_size: Pair | None = None
    negative_original_size: Pair | None = None
    negative_crops_coords_top_left: Pair | None = None
    negative_target_size: Pair | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    image: Picture | None = None
    image_sha256: str | None = None
    mask_image: Picture | None = None
    mask_image_sha256: str | None = None
    padding_mask_crop: int | None = None
    overlay: bool = True
    outpaint: str | None = None
    strength: float = 0.8
    control_image: Picture | Sequence[Picture] | None = None
    control_image_sha256: str | None = None
    controlnet_conditioning_scale: str | float | Sequence[float] = "1"
    control_guidance_start: str | float | Sequence[float] = "0"
    control_guidance_end: str | float | Sequence[float] = "1"
    guess_mode: bool = False
    denoising_end: float | None = None
    hires_scale: float = 1.0
    hires_upscaler: str = "lanczos"
    hires_strength: float = 0.7
    resize: str | None = None
    cache_interval: int = 1
    token_merging_ratio: float = 0.0
    clip_skip: int = 0
    prompt_language: str = "a1111"
    noise: str = "jax"

    def __post_init__(self) -> None:
        values = vars(self)
        for name, value in values.items():
            if value is not _DEFAULTS[name]:  # most are, in each of millions of rows
                object.__setattr__(self, name, coerce(name, value, _TYPES[name]))
        if not self.prompt.strip() and self.image is None and self.control_image is None:
            raise RequestError(_EMPTY)
        for name in _PROMPTS:
            check_text(name, getattr(self, name) or "")
        self._check_lists()
        for name, (low, high) in _RANGES.items():
            value = values[name]
            if name not in OF_CONTROLS and value is not None and not low <= value <= high:
                raise RequestError(f"{name}={value} is out of range; allowed is {low} to {high}")
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and side % 8:
                raise RequestError(
                    f"{name}={side} is not a multiple of 8; the nearest is {max(8, round(side / 8) * 8)}"
                )
        if self.guidance_start > self.guidance_end:
            raise RequestError(f"guidance_start={self.guidance_start:g} is above guidance_end={self.guidance_end:g}")
        for name in ("strength", "denoising_end", "hires_strength"):
            if getattr(self, name) == 0:
                raise RequestError(f"{name}=0 leaves no step to run; allowed is above 0 and up to 1")
        if self.hires_scale > 1 and self.is_masked:
            raise RequestError("hires_scale would enlarge what mask_image and outpaint keep; leave it out")
        size = "1x1" if self.resize is None else self.resize
        if not (SIZE.fullmatch(size) and all(1 <= side <= MAX_SIDE for side in size_of(size))):
            raise RequestError(f"resize={shown(size)} is no size; give one such as '640x360'")
        if self.resize is not None:
            object.__setattr__(self, "resize", _ZEROS.sub("", size))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise RequestError(f"{name}={shown(value)} is unknown; allowed are {' and '.join(map(repr, allowed))}")
        for name, needed in _NEEDS.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise RequestError(f"{name} is given without {needed}, which it needs")
        if self.outpaint is not None:
            if self.mask_image is not None:
                raise RequestError("outpaint makes its own mask; leave out mask_image, or repaint in a second request")
            sides = [margin.partition("=")[0] for margin in self.outpaint.split(",")]
            is_margins = _MARGINS.fullmatch(self.outpaint) and len(set(sides)) == len(sides)
            if not (SIZE.fullmatch(self.outpaint) or is_margins):
                raise RequestError(
                    f"outpaint={shown(self.outpaint)} is not understood; give margins such as 'left=128,top=64', or "
                    "a size such as '768x512'"
                )
            object.__setattr__(self, "outpaint", ",".join(sorted(_ZEROS.sub("", self.outpaint).split(","))))

    def _check_lists(self) -> None:
        """Lists of numbers: that they are some, and as many as there are steps."""
        for name in ("timesteps", "guidance_scales"):
            text = getattr(self, name)
            if text is not None and numbers(text) is None:
                raise RequestError(f"{name}={shown(text)} is no list of numbers; give one such as '9,5,1'")
        sigmas, timesteps, scales = (numbers(getattr(self, name)) for name in OF_STEPS)
        if sigmas and timesteps:
            raise RequestError("sigmas and timesteps are both lists; give one of them")
        if listed := timesteps or sigmas:
            if sigmas and sigmas[-1] == 0:  # a final sigma of 0 is no step
                object.__setattr__(self, "sigmas", str(self.sigmas).rpartition(",")[0] or None)
                listed = listed[:-1]
            object.__setattr__(self, "num_inference_steps", len(listed))
        if scales and len(scales) != self.num_inference_steps:
            raise RequestError(
                f"guidance_scales lists {len(scales)} numbers for num_inference_steps={self.num_inference_steps}"
            )
        low, high = _RANGES["guidance_scale"]
        for scale in scales or ():
            if not low <= scale <= high:
                raise RequestError(f"guidance_scales={scale:g} is out of range; allowed is {low} to {high}")
        for name in OF_CONTROLS:
            (low, high), text = _RANGES[name], getattr(self, name)
            if not all(low <= number <= high for number in numbers(text) or (-1,)):
                raise RequestError(f"{name}={shown(text)} is out of range; allowed is {low} to {high}")
        starts, ends = (numbers(getattr(self, f"control_guidance_{side}")) or [] for side in ("start", "end"))
        for start, end in zip(starts * len(ends), ends * len(starts), strict=True):  # one may be for all
            if start > end:
                raise RequestError(f"control_guidance_start={start:g} is above control_guidance_end={end:g}")

    @classmethod
    def from_row(cls, row: Mapping[str, Any], **defaults: Any) -> tuple["Request", dict[str, Any]]:
        """The request in a row of a prompt file, and the row's other columns.

        Columns are matched to fields without case; numbers may be text, as in a CSV; empty cells and nulls take the
        field's default (from `defaults` where it has one).

        Raises:
            RequestError: a value that its field does not allow, no prompt, or two columns for one field.
        """
        values: dict[str, Any] = dict(defaults)
        extras: dict[str, Any] = {}
        seen: set[str] = set()
        for column, value in row.items():
            name = column.strip().lower()
            if name not in _TYPES:
                extras[column] = value
                continue
            if name in seen:
                raise RequestError(f"two columns are named {name!r}; a field takes one")
            seen.add(name)
            empty = value is None or (isinstance(value, float) and math.isnan(value)) or (value == "") is True
            if not empty:
                values[name] = value
        prompt = values.get("prompt", "")
        if not isinstance(prompt, str):
            raise RequestError(f"prompt is {type(prompt).__name__}; it takes text")
        if not prompt.strip():  # also where a picture is given: in a file it is more likely to be missing
            raise RequestError(_EMPTY)
        return cls(**values), extras

    @property
    def is_masked(self) -> bool:
        """Whether a part of the picture is to stay as it is."""
        return self.mask_image is not None or self.outpaint is not None

    def canonical(self) -> str:
        """The request as JSON with sorted keys: equal text exactly where the requests ask for the same.

        Fields at their default are left out, so that the text stays when a later version adds a field; so is a picture
        whose content is known by its hash: where it lies is no part of what is asked.
        """
        return _canonical(vars(self))


def id_of(fingerprint: str, values: Mapping[str, Any]) -> str:
    """The name of the image that the model of a fingerprint makes of a complete request, given as its fields' values.

    It is 32 hex digits of a hash of both.
    """
    return hashlib.sha256(f"{fingerprint} {_canonical(values)}".encode()).hexdigest()[:32]


def _canonical(values: Mapping[str, Any]) -> str:
    asked = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
    for name in PICTURES:
        if f"{name}_sha256" in asked:
            del asked[name]
    return json.dumps(asked, sort_keys=True, ensure_ascii=True, allow_nan=False)


_EMPTY = "prompt is empty; give the text of the picture"
_DEFAULTS = {field.name: field.default for field in fields(Request)}


_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED),
    "num_inference_steps": (1, MAX_STEPS),
    "guidance_scale": (0, 100),
    "guidance_start": (0, 1),
    "guidance_end": (0, 1),
    "guidance_rescale": (0, 1),
    "image_guidance_scale": (1, 100),
    "eta": (0, 1),
    "solver_order": (1, 4),
    "width": (8, MAX_SIDE),
    "height": (8, MAX_SIDE),
    "aesthetic_score": (0, 10),
    "negative_aesthetic_score": (0, 10),
    "padding_mask_crop": (0, MAX_SIDE),
    "strength": (0, 1),
    "controlnet_conditioning_scale": (0, 100),
    "control_guidance_start": (0, 1),
    "control_guidance_end": (0, 1),
    "denoising_end": (0, 1),
    "hires_scale": (1, 4),
    "hires_strength": (0, 1),
    "cache_interval": (1, MAX_STEPS),
    "token_merging_ratio": (0, 0.75),
    "clip_skip": (0, 11),
}
_CHOICES = {
    "hires_upscaler": ("lanczos", "latent"),
    "prompt_language": ("a1111", "compel", "plain"),
    "noise": ("jax", "torch"),
}
_NEEDS = {
    "negative_prompt_2": "negative_prompt",
    "image_sha256": "image",
    "mask_image": "image",
    "mask_image_sha256": "mask_image",
    "control_image_sha256": "control_image",
    "padding_mask_crop": "mask_image",
    "outpaint": "image",
}
_MARGINS = re.compile(r"((left|top|right|bottom)=\d{1,5}(,|$))+(?<!,)")
_ZEROS = re.compile(r"(?<!\d)0+(?=\d)")  # that a number begins with


def _field_type(hint: Any) -> tuple[type, bool]:
    """The plain type of a field's annotation, the first of several, and whether None is allowed."""
    if get_origin(hint) is types.UnionType:
        kinds = get_args(hint)
        return kinds[0], type(None) in kinds
    return hint, False


_TYPES: dict[str, tuple[type, bool]] = {
    name: _field_type(hint) for name, hint in get_type_hints(Request).items() if not name.startswith("_")
}


def field_types() -> dict[str, type]:
    """Each Request field's name and plain type, in order: what the command lines are built from."""
    return {name: kind for name, (kind, _) in _TYPES.items()}

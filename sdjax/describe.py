"""What a checkpoint is, in words: read from its configurations and its files' headers, not from its weights."""

import math
from typing import Any

from sdjax import sampling
from sdjax.family import can_be_refined
from sdjax.request import Request
from sdjax.spec import Spec
from sdjax.weights.lora import CONTEXT_WIDTHS


def describe(spec: Spec) -> str:
    """Lines about a checkpoint: its kind, its parts and their sizes, a request's defaults, what can be added to it."""
    unet, family = spec.configs["unet"], spec.family
    lines = [f"{spec.name}: {spec.checkpoint.index['_class_name'].removesuffix('Pipeline')}", "", "parts"]
    total = 0
    for name in spec.configs:
        entries = spec.entries(name).values()
        count = sum(math.prod(entry.shape) for entry in entries)
        stored = ", ".join(sorted({entry.dtype.name for entry in entries if len(entry.shape) > 1}))
        total += sum(entry.end - entry.start for entry in entries)
        lines.append(f"  {name}: {count / 1e6:,.1f} million parameters, stored as {stored}")
    lines.append(f"  together {total / 2**30:.2f} GiB")
    lines += ["", "defaults", *(f"  {name}: {value}" for name, value in _defaults(spec).items())]
    width = unet.down_stages[0].context_dim
    known = f", as {CONTEXT_WIDTHS[width]} does" if width in CONTEXT_WIDTHS else ""
    tokens = " and ".join(str(spec.configs[name].hidden_size) for name in family.text_encoders)
    controls = f"ControlNets of block_out_channels {list(unet.block_out_channels)} that attend to {width}"
    needs = "an image and a mask" if family.inpaints else "an image" if family.edits or family.refines else "nothing"
    return "\n".join(
        [
            *lines,
            "",
            "goes with",
            f"  LoRAs for a UNet that attends to {width} channels{known}",
            f"  {'no ControlNets' if family.edits else controls}",
            f"  {'a refiner' if can_be_refined(family) else 'no refiner'}",
            f"  textual inversions of {tokens} numbers",
            f"  requests, which beside a prompt need {needs}",
        ]
    )


def _defaults(spec: Spec) -> dict[str, Any]:
    """What a request that says nothing gets, as far as it depends on the checkpoint or is asked for most."""
    (width, height), blank = spec.default_size, Request(prompt="any")
    return {
        "sampler": sampling.default_sampler(spec.schedule),
        "num_inference_steps": blank.num_inference_steps,
        "guidance_scale": blank.guidance_scale,
        "size": f"{width}x{height}, in multiples of {spec.multiple}",
        "prediction_type": spec.schedule.prediction_type,
    }

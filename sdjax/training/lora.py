"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): two small factors trained beside each kernel that stays.

Those of attention's projections, as in diffusers' trainers. Factors are named and laid out as in the files that
diffusers writes: `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], whose product is added to a kernel as it
is. They lie among what is trained under their network's name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdjax.training.networks import Params
from sdjax.weights.lora import NAMES
from sdjax.weights.safetensors import write_tensors

FILE = NAMES[0]

_A, _B = "lora_A.weight", "lora_B.weight"
_KERNEL = re.compile(r"(.*\.(?:to_[qkv]|to_out\.0|[qkv]_proj|out_proj)\.)kernel")


def start(params: Params, rank: int, rng: np.random.Generator) -> Params:
    """Return factors in float32 that add nothing yet: A is normal with a deviation of 1 / rank, B is zero."""
    factors = {}
    for name, kernel in sorted(params.items()):
        if match := _KERNEL.fullmatch(name):
            into, out = kernel.shape
            factors[match[1] + _A] = rng.standard_normal((rank, into), np.float32) / rank
            factors[match[1] + _B] = np.zeros((out, rank), np.float32)
    return factors


def joined(frozen: Mapping[str, Params], trained: Mapping[str, Params]) -> dict[str, Params]:
    """Return all networks' parameters: trained ones in place of frozen ones, or their factors' products added to those.

    The sums are float32, whatever the frozen parameters are.
    """
    return {**frozen, **{name: _joined(frozen.get(name, {}), params) for name, params in trained.items()}}


def _joined(base: Params, params: Params) -> Params:
    modules = [name.removesuffix(_A) for name in params if name.endswith(_A)]
    if not modules:
        return params
    return base | {
        f"{module}kernel": base[f"{module}kernel"] + (params[module + _B] @ params[module + _A]).T for module in modules
    }


def save(folder: Path, factors: Mapping[str, Params], dtype: str | None = None) -> None:
    """Write factors, by their networks, as the file that diffusers calls a LoRA, into a new folder."""
    tensors = {
        f"{network}.{name}": np.ascontiguousarray(factor, dtype)
        for network, params in factors.items()
        for name, factor in params.items()
    }
    folder.mkdir(parents=True)
    write_tensors(folder / FILE, tensors)

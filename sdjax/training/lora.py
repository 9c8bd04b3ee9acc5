"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): two small factors trained beside each kernel that stays.

Those of attention's projections, as in diffusers' trainers. Factors are named and laid out as in the files that
diffusers writes: `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]. They lie among what is trained under their
network's name.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sdjax.config import CLIPTextConfig, UNetConfig
from sdjax.models.layers import Change, Linear
from sdjax.training.config import Train, TrainConfigError
from sdjax.training.networks import Networks, Params
from sdjax.weights.lora import NAMES, Lora
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


def resume(factors: dict[str, Params], networks: Networks, config: Train) -> dict[str, Params]:
    """Return factors with those of the LoRA in `lora.init`, whose scale goes into B, in place of those it has too.

    Raises:
        TrainConfigError: it is of another rank, or changes what no factor here does.
        CheckpointError: it cannot be read, or is for another model.
    """
    kinds = {name: UNetConfig if name == "unet" else CLIPTextConfig for name in ("unet", *networks.text_encoders)}
    configs = {name: kind.from_dict(networks.configs[name]) for name, kind in kinds.items()}
    assert config.lora.init is not None
    read = Lora(config.lora.init, 1, configs, what=str(config.init), allow_pickle=config.allow_ckpt)
    found = {name: dict(own) for name, own in factors.items()}
    for network in configs:
        for key, delta in read.deltas(network).items():
            a, b = (key.removesuffix("weight") + name for name in (_A, _B))
            own = found.get(network, {})
            if delta.factors.keys() != {"up", "down"} or delta.magnitude is not None:
                raise TrainConfigError(
                    f"{config.lora.init} is no plain LoRA at {network}.{key}; only such a one goes on"
                )
            if a not in own:
                raise TrainConfigError(f"{config.lora.init} changes {network}.{key}, which this run does not train")
            if len(delta.factors["down"]) != config.lora.rank:
                rank = len(delta.factors["down"])
                raise TrainConfigError(f"{config.lora.init} has rank {rank}; lora.rank is {config.lora.rank}")
            down, up = (delta.factors[name].astype(np.float32) for name in ("down", "up"))
            own[a], own[b] = down.reshape(own[a].shape), up.reshape(own[b].shape) * np.float32(delta.scale)
    networks.init = f"{networks.init} {read.file.hashed()}"
    return found


class _Factor(nnx.Module):
    def __init__(self, *shape: int) -> None:
        self.weight = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


class _Adapted(Linear):
    """A layer whose output is that of its kernel and, beside it, that of its factors, each rounded by itself."""

    def __init__(self, linear: Linear, rank: int) -> None:
        self.dtype, self.kernel, self.bias = linear.dtype, linear.kernel, linear.bias
        into, out = linear.kernel.shape
        self.lora_A, self.lora_B = _Factor(rank, into), _Factor(out, rank)

    def project(
        self, x: Float[Array, "*batch rows"], *, rows: Change | None = None, columns: Change | None = None
    ) -> Float[Array, "*batch columns"]:
        into, out = self.lora_A.weight[...], self.lora_B.weight[...].T
        if rows is not None:
            into = rows(into)
        if columns is not None:
            out = columns(out)
        between = x.astype(self.dtype) @ into.T.astype(self.dtype)
        return super().project(x, rows=rows, columns=columns) + between @ out.astype(self.dtype)


def adapted(module: nnx.Module, rank: int) -> Any:
    """The network, without parameters, with places for factors beside each kernel that has some."""
    module = nnx.merge(*nnx.split(module))
    for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if _KERNEL.fullmatch(".".join(map(str, path))):
            *parents, name, _ = path
            parent: Any = functools.reduce(_part, parents, module)
            made = _Adapted(_part(parent, name), rank)
            if isinstance(name, int):
                parent[name] = made
            else:
                setattr(parent, str(name), made)
    return module


def _part(module: Any, name: Any) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


def joined(frozen: Mapping[str, Params], trained: Mapping[str, Params]) -> dict[str, Params]:
    """All networks' parameters as other programs have them: of those with factors, kernels with the products added.

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

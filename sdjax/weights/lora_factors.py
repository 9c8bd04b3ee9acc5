"""The arithmetic of LoRAs: what factors of each kind make of a tensor.

LoCon (https://arxiv.org/abs/2309.14859), its middle factor, LoHa and LoKr are other products of factors than a LoRA's;
LyCORIS adds whole tensors too, also of norms. A DoRA (https://arxiv.org/abs/2402.09353) gives what is made of a tensor
other lengths.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Delta(NamedTuple):
    """What a LoRA makes of one tensor, kept as the factors of the product that it adds.

    shape: of the product, as a matrix [out, anything].
    scale: of the product, as the LoRA was trained.
    weight: how much of the whole change counts.
    magnitude: of a DoRA, the lengths that the sum has along its other axes, [out, 1, ...] or [1, in, ...].
    """

    factors: dict[str, np.ndarray]
    shape: tuple[int, ...]
    scale: float
    weight: float
    magnitude: np.ndarray | None = None

    def product(self) -> np.ndarray:
        """The product in float32."""
        found, _ = _product({role: factor.astype(np.float32) for role, factor in self.factors.items()}, np)
        return found * np.float32(self.scale)

    def change(self, tensor: np.ndarray) -> np.ndarray:
        """The changed tensor, in float32. Raises ValueError where it is of another shape."""
        if math.prod(self.shape) != tensor.size or self.shape[0] != tensor.shape[0]:
            raise ValueError(f"would add {list(self.shape)}; the checkpoint's is {list(tensor.shape)}")
        added = self.product().reshape(tensor.shape)
        if self.magnitude is not None:
            out, into, *_ = *tensor.shape, 1
            lengths = self.magnitude.astype(np.float32).reshape(*self.magnitude.shape[:2], -1)
            if lengths.shape not in ((out, 1, 1), (1, into, 1)):
                raise ValueError(f"has magnitudes {list(self.magnitude.shape)} for {list(tensor.shape)}")
            made = (tensor + added).reshape(out, into, -1)
            axes = (1, 2) if lengths.shape[1] == 1 else (0, 2)
            norms = np.sqrt(np.square(made).sum(axes, keepdims=True)) + np.finfo(np.float32).eps
            added = (made * (lengths / norms)).reshape(tensor.shape) - tensor
        return tensor + np.float32(self.weight) * added


@functools.lru_cache(maxsize=1024)
def shape_and_rank(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[tuple[int, ...], int]:
    """The shape of what factors make, as a matrix, and their rank, from each one's role and shape alone."""
    factors = {role: jax.ShapeDtypeStruct(shape, np.float32) for role, shape in shapes}
    rank = 0

    def product(factors: Mapping[str, Any]) -> Any:
        nonlocal rank
        found, rank = _product(factors, jnp)
        return found

    return jax.eval_shape(product, factors).shape, rank


def _product(factors: Mapping[str, Any], xp: Any) -> tuple[Any, int]:
    """The change that factors stand for, as [out, anything], and their rank; 0 where they are whole.

    xp: numpy, or jax.numpy for factors of which only the shapes are known.
    """
    if set(factors) == {"diff"}:
        return _flat(factors["diff"]), 0
    if "up" in factors:
        up, down = (factors[name] for name in ("up", "down"))
        if set(factors) == {"up", "down"}:
            if up.ndim == 4 and up.shape[2:] != (1, 1):
                raise ValueError("an up factor that is no 1x1 convolution")
            return _flat(up) @ _flat(down), len(down)
        if set(factors) == {"up", "down", "mid"}:
            mid, rank = factors["mid"], len(down)
            return _flat(xp.einsum("oa,abkl,bi->oikl", _flat(up), mid, _flat(down), optimize=True)), rank
    kind = "hada" if "hada_w1_b" in factors else "lokr"
    one, two = (_half(factors, f"{kind}_{{}}{i}", xp) for i in (1, 2))
    ranks = [len(factors[f"{kind}_w{i}_b"]) for i in (1, 2) if f"{kind}_w{i}_b" in factors]
    return (one * two if kind == "hada" else xp.kron(one, two)), ranks[0] if ranks else 0


def _half(factors: Mapping[str, Any], name: str, xp: Any) -> Any:
    """One of the two matrices of LoHa and LoKr: whole, a product of two, or of two around a core."""
    if name.format("w") in factors:
        return _flat(factors[name.format("w")])
    a, b = factors[f"{name.format('w')}_a"], factors[f"{name.format('w')}_b"]
    core = factors.get(name.format("t"))
    return a @ _flat(b) if core is None else _flat(xp.einsum("ij...,ip,jr->pr...", core, a, b, optimize=True))


def _flat(array: Any) -> Any:
    return array.reshape(len(array), -1)

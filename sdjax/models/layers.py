"""Layers that the UNet, the VAE and the text encoder share.

Attribute names are those of the PyTorch state dicts, so that a module's path is its checkpoint key. Leaves keep
Flax's names and layouts: `kernel` ([in, out] or [height, width, in, out]), `scale`, `bias` and `embedding`, where
PyTorch says `weight` for all but `bias`.

Every module takes `dtype` (of the computation), `param_dtype` (of the stored parameters) and `rngs`. With `rngs=None`
nothing is initialised: parameters are `jax.ShapeDtypeStruct`s, which is how a checkpoint loader builds a model in
milliseconds. Images are NHWC. Statistics, softmax and timestep embeddings are float32 whatever `dtype` is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdjax.models.attention import attention, flash_attention, kernel_heads, wants_more_heads
from sdjax.models.convolution import Padding, convolution_of_doubled, convolution_of_parts, split_as


def _gelu(x: Array) -> Array:
    """As PyTorch computes it: `jax.nn.gelu` has erfc, which is several times as long, in place of erf."""
    y = x.astype(jnp.float32)
    return (y * (1 + jax.lax.erf(y * math.sqrt(0.5))) / 2).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "gelu": _gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}

# The variance PyTorch's Linear and Conv2d start with, which is what published Stable Diffusion trainings started from.
_kernel_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_table_init = jax.nn.initializers.normal(0.02)


# Traced once for each shape, which makes nnx.eval_shape quick too.
@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _draw(init: Callable[..., Array], key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return init(key, shape, dtype)


def _param(
    init: Callable[..., Array] | float, shape: tuple[int, ...], param_dtype: DTypeLike, rngs: nnx.Rngs | None
) -> nnx.Param:
    """A parameter drawn by `init`, or filled with it where it is a number."""
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, param_dtype))
    if callable(init):
        return nnx.Param(_draw(init, rngs.params(), shape, param_dtype))
    return nnx.Param(jnp.full(shape, init, param_dtype))


Change: TypeAlias = Callable[[Array], Array]
"""Of an array along its last axis."""


def _project(x: Array, kernel: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    y = x.astype(dtype) @ kernel.astype(dtype)
    return y if bias is None else y + bias.astype(dtype)


class Linear(nnx.Module):
    """x @ kernel + bias over the last axis."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        self.dtype = dtype
        self.kernel = _param(_kernel_init, (in_features, out_features), param_dtype, rngs)
        self.bias = _param(0.0, (out_features,), param_dtype, rngs) if bias else None

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        return self.project(x)

    def project(
        self, x: Float[Array, "*batch rows"], *, rows: Change | None = None, columns: Change | None = None
    ) -> Float[Array, "*batch columns"]:
        """The output of a kernel of which `rows` or `columns` makes other rows, or other columns, bias included.

        Both are functions of an array along its last axis.
        """
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        if rows is not None:
            kernel = rows(kernel.T).T
        if columns is not None:
            kernel, bias = columns(kernel), None if bias is None else columns(bias)
        return _project(x, kernel, bias, self.dtype)

    def split(self, x: Float[Array, "*batch in"], count: int) -> list[Float[Array, "*batch part"]]:
        """The output in equal parts.

        A product each: a TPU joins what follows to each of them. A GPU would copy each part of the kernel before.
        """

        def whole(x: Array, kernel: Array, bias: Array | None) -> list[Array]:
            return jnp.split(_project(x, kernel, bias, self.dtype), count, axis=-1)

        def parts(x: Array, kernel: Array, bias: Array | None) -> list[Array]:
            kernels = jnp.split(kernel, count, axis=-1)
            biases = [None] * count if bias is None else jnp.split(bias, count)
            return [_project(x, *each, self.dtype) for each in zip(kernels, biases, strict=True)]

        bias = None if self.bias is None else self.bias[...]
        return jax.lax.platform_dependent(x, self.kernel[...], bias, cuda=whole, default=parts)


class Conv(nnx.Module):
    """A square 2D convolution; `padding`, ((top, bottom), (left, right)), by default keeps the size at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        self.dtype = dtype
        self.stride = stride
        half = kernel_size // 2
        self.padding = ((half, half), (half, half)) if padding is None else padding
        self.kernel = _param(_kernel_init, (kernel_size, kernel_size, in_channels, out_channels), param_dtype, rngs)
        self.bias = _param(0.0, (out_channels,), param_dtype, rngs) if bias else None

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch out_height out_width out"]:
        return self.of_parts([x])

    def of_parts(
        self, parts: Sequence[Float[Array, "batch height width _"]]
    ) -> Float[Array, "batch out_height out_width out"]:
        """Of an image whose channels come in parts."""
        parts, kernel = [part.astype(self.dtype) for part in parts], self.kernel[...].astype(self.dtype)
        return self._biased(convolution_of_parts(parts, kernel, stride=self.stride, padding=self.padding))

    def of_doubled(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch 2*height 2*width out"]:
        """Of the image with every pixel twice along both sides; for a 3x3 kernel of stride 1 that keeps the size."""
        return self._biased(convolution_of_doubled(x.astype(self.dtype), self.kernel[...].astype(self.dtype)))

    def _biased(self, y: Array) -> Array:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embed(nnx.Module):
    """Rows of a table; starts from a normal distribution of deviation 0.02, as CLIP does."""

    def __init__(self, rows: int, features: int, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.dtype = dtype
        self.embedding = _param(_table_init, (rows, features), param_dtype, rngs)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        return self.embedding[...][ids].astype(self.dtype)


class _Norm(nnx.Module):
    def __init__(self, channels: int, eps: float, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.dtype = dtype
        self.eps = eps
        self.scale = _param(1.0, (channels,), param_dtype, rngs)
        self.bias = _param(0.0, (channels,), param_dtype, rngs)

    def _affine(self, parts: Sequence[Array], mean: Array, variance: Array) -> list[Array]:
        scale = jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        bias = self.bias[...].astype(jnp.float32)
        return [
            ((part.astype(jnp.float32) - m) * s + b).astype(self.dtype)
            for part, m, s, b in zip(parts, *(split_as(y, parts) for y in (mean, scale, bias)), strict=True)
        ]


def _moments(parts: Sequence[Array], mean_of: Callable[[Sequence[Array]], Array]) -> tuple[Array, Array]:
    """Mean and variance of channels that come in parts, in float32.

    The variance takes a second pass over them. Of bfloat16 one is enough, and fuses with the operation before: what the
    mean of squares less the square of the mean loses in float32 is below bfloat16's own rounding.
    """
    wide = [part.astype(jnp.float32) for part in parts]
    mean = mean_of(wide)
    if parts[0].dtype == jnp.bfloat16:
        return mean, jnp.maximum(mean_of([jnp.square(part) for part in wide]) - jnp.square(mean), 0)
    return mean, mean_of([jnp.square(part - m) for part, m in zip(wide, split_as(mean, parts), strict=True)])


class LayerNorm(_Norm):
    """Normalisation over the last axis, with statistics in float32."""

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        return self._affine([x], *_moments([x], lambda parts: parts[0].mean(-1, keepdims=True)))[0]


class Statistics(NamedTuple):
    """What a GroupNorm normalises by."""

    mean: Float[Array, "batch 1 channels"]
    variance: Float[Array, "batch 1 channels"]


class GroupNorm(_Norm):
    """Normalisation over all positions of each group of channels, with statistics in float32.

    `flax.nnx.GroupNorm` reduces over an awkward layout; here the positions of every channel are reduced first, and the
    [batch, channels] sums grouped after.
    """

    def __init__(self, groups: int, channels: int, eps: float, **kw: Any):
        super().__init__(channels, eps, **kw)
        self.groups = groups

    def _group_mean(self, parts: Sequence[Float[Array, "batch positions _"]]) -> Float[Array, "batch 1 channels"]:
        means = jnp.concatenate([part.mean(1) for part in parts], axis=-1)
        batch, channels = means.shape
        means = means.reshape(batch, self.groups, channels // self.groups).mean(-1)
        return jnp.repeat(means, channels // self.groups, axis=-1)[:, None]

    def statistics(self, *parts: Float[Array, "batch *positions _"]) -> Statistics:
        """Each channel's mean and variance over its group; of channels in parts, those of all after one another."""
        return Statistics(*_moments([_flat(part) for part in parts], self._group_mean))

    def __call__(
        self, x: Float[Array, "batch *positions channels"], given: Statistics | None = None
    ) -> Float[Array, "batch *positions channels"]:
        """given: what to normalise by, in place of x's own statistics."""
        return self.of_parts([x], given)[0]

    def of_parts(
        self, parts: Sequence[Float[Array, "batch *positions _"]], given: Statistics | None = None
    ) -> list[Float[Array, "batch *positions _"]]:
        """Of channels in parts."""
        made = self._affine([_flat(part) for part in parts], *(self.statistics(*parts) if given is None else given))
        return [y.reshape(part.shape) for y, part in zip(made, parts, strict=True)]


def _flat(x: Float[Array, "batch *positions channels"]) -> Float[Array, "batch count channels"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
    """Multi-head attention of tokens over `context`, by default over themselves (diffusers' Attention)."""

    def __init__(self, channels: int, context_dim: int, heads: int, *, bias: bool = False, **kw: Any):
        self.heads = heads
        self.to_q = Linear(channels, channels, bias=bias, **kw)
        self.to_k = Linear(context_dim, channels, bias=bias, **kw)
        self.to_v = Linear(context_dim, channels, bias=bias, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])

    def __call__(
        self, x: Float[Array, "batch tokens channels"], context: Float[Array, "batch keys context"] | None = None
    ) -> Float[Array, "batch tokens channels"]:
        context = x if context is None else context
        dim = x.shape[2] // self.heads
        if wants_more_heads(x.shape[1], context.shape[1], self.to_q.dtype, self.heads, dim):
            return jax.lax.platform_dependent(x, context, tpu=self._with_more_heads, default=self._as_they_are)
        return self._as_they_are(x, context)

    def _as_they_are(self, x: Array, context: Array) -> Array:
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(q, k, v).reshape(x.shape))

    def _with_more_heads(self, x: Array, context: Array) -> Array:
        """As many and as wide as the TPU's kernel takes them: projections' columns, and to_out's rows, are padded."""
        dim = x.shape[2] // self.heads
        heads, width = kernel_heads(self.heads, dim)

        def more(leaf: Array) -> Array:
            apart = leaf.reshape(*leaf.shape[:-1], self.heads, dim)
            room = [(0, 0)] * (leaf.ndim - 1) + [(0, heads - self.heads), (0, width - dim)]
            return jnp.pad(apart, room).reshape(*leaf.shape[:-1], -1)

        def made(linear: Linear, y: Array) -> Array:
            y = linear.project(y, columns=more)
            return y.reshape(*y.shape[:2], heads, width)

        y: Any = flash_attention(made(self.to_q, x), made(self.to_k, context), made(self.to_v, context), dim)
        return self.to_out[0].project(y.reshape(*y.shape[:2], -1), rows=more)


def timestep_embedding(
    t: Float[Array, " n"], dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "n dim"]:
    """Sinusoids of `t` in float32 (DDPM, https://arxiv.org/abs/2006.11239), cosines first if `flip_sin_to_cos`."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers on a timestep's sinusoids, to which `cond_proj` of an optional condition is added."""

    def __init__(self, in_channels: int, channels: int, *, act_fn: str, cond_dim: int | None = None, **kw: Any):
        self.act_fn = act_fn
        self.linear_1 = Linear(in_channels, channels, **kw)
        self.cond_proj = None if cond_dim is None else Linear(cond_dim, in_channels, bias=False, **kw)
        self.linear_2 = Linear(channels, channels, **kw)

    def __call__(
        self, x: Float[Array, "batch in"], condition: Float[Array, "batch cond"] | None = None
    ) -> Float[Array, "batch channels"]:
        if condition is not None:
            if self.cond_proj is None:
                raise ValueError("this network takes no timestep_cond: its config has no time_cond_proj_dim")
            x = x + self.cond_proj(condition)
        return self.linear_2(ACTIVATIONS[self.act_fn](self.linear_1(x)))

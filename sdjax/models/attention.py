"""Softmax attention, by what suits the platform that a program is compiled for.

- CPU: mapped over heads and chunks of queries, so that scores stay in the cache.
- GPU: cuDNN's flash attention, through JAX; what it does not take, in chunks of queries of many heads.
- TPU: a Pallas kernel, in which scores never leave the chip's vector memory.
"""

import functools
import importlib.util
import math
import pkgutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

_Attention = Callable[[Array, Array, Array], Array]

FEW = 512  # tokens whose scores are few
# On a CPU a chunk's products should be large, or packing their operands costs more than they do: 1024 queries over 4096
# keys take 0.85 of the time of 512, and all queries over a prompt's 77 keys half of it.
QUERY_CHUNK, CHUNK_SCORES = 1024, 2**21
GPU_SCORES = 2**28  # a gibibyte of them, in as few steps as that allows: a GPU does little in one of a single head
# Of the kernel's steps, by the TPU compiler's schedules: all of 4096 keys in one step keep a v5e's multipliers busy 95%
# of the time, 1024 keys a step 70%; fewer queries than fill TILE_SCORES, or than 1024, lose up to a fifth.
KEY_TILE, QUERY_TILE, TILE_SCORES = 4096, 1024, 2**21
_LANES, _HALF = 128, 64  # of a TPU's registers, and the width of heads of which two share them


def attention(
    q: Float[Array, "batch queries heads dim"],
    k: Float[Array, "batch keys heads dim"],
    v: Float[Array, "batch keys heads dim"],
    *,
    causal: bool = False,
    keep: Bool[Array, "batch keys"] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(q k^T / sqrt(dim)) v for each head, the softmax in float32, never holding all scores of a large image.

    This is the one place that chooses an implementation. On a GPU half-precision heads of up to 128 go to cuDNN. FEW
    queries are scored directly, as is `causal` attention (query i sees keys up to i) and that to some keys only,
    `keep`, both for short text. More go to chunks, but on a TPU directly to few keys, and to many by `flash_attention`
    where heads are bfloat16 and up to 256 wide.
    """
    if keep is not None:
        return direct_attention(q, k, v, causal=causal, keep=keep)
    on: dict[str, _Attention] = {}
    default: _Attention = functools.partial(direct_attention, causal=causal)
    if not causal and q.shape[1] > FEW:
        on["tpu"], default = _on_tpu, chunked_attention
        if _has_cuda():
            on["cuda"] = functools.partial(chunked_attention, most_scores=GPU_SCORES)
    if _has_cudnn() and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        flash = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
        is_even = q.shape[1] % 2 == k.shape[1] % 2 == 0
        on["cuda"] = flash if is_even else _differentiated_as(default, flash)
    return lax.platform_dependent(q, k, v, **on, default=default) if on else default(q, k, v)


def _differentiated_as(other: _Attention, flash: _Attention) -> _Attention:
    """`flash`, with the gradient of `other`: JAX refuses cuDNN's for an odd number of tokens, such as a prompt's 77."""

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return flash(q, k, v)

    attend.defvjp(functools.partial(jax.vjp, other), lambda vjp, gradient: vjp(gradient))
    return attend


@functools.cache
def _has_cuda() -> bool:
    """Whether JAX's plugin for CUDA is installed."""
    plugins = importlib.util.find_spec("jax_plugins")
    places = plugins.submodule_search_locations if plugins else None
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(places or []))


@functools.cache
def _has_cudnn() -> bool:
    """Whether cuDNN's attention can be asked for: it is there, or it could not be traced, and no GPU is too old for it.

    It needs Ampere's tensor cores (https://docs.nvidia.com/deeplearning/cudnn, "Attention").
    """
    if not _has_cuda():
        return False
    head = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), head, head, head)
    except RuntimeError:
        return False
    return all(float(device.compute_capability) >= 8 for device in jax.local_devices() if device.platform == "gpu")


def _on_tpu(q: Array, k: Array, v: Array) -> Array:
    if k.shape[1] <= FEW:  # the text: its few scores stay in vector memory without a kernel
        return direct_attention(q, k, v)
    return (flash_attention if _fits(q.dtype, q.shape[-1]) else chunked_attention)(q, k, v)


def _fits(dtype: DTypeLike, dim: int) -> bool:
    return jnp.dtype(dtype) == jnp.bfloat16 and dim <= 2 * _LANES


def wants_more_heads(queries: int, keys: int, dtype: DTypeLike, heads: int, dim: int) -> bool:
    """Whether `attention` on a TPU would add to the heads what the products before it can make at no cost."""
    return min(queries, keys) > FEW and _fits(dtype, dim) and kernel_heads(heads, dim) != (heads, dim)


def direct_attention(q: Array, k: Array, v: Array, *, causal: bool = False, keep: Array | None = None) -> Array:
    """Every score at once."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], k.shape[1], dtype=bool), scores, -jnp.inf)
    if keep is not None:
        scores = jnp.where(keep[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def chunked_attention(q: Array, k: Array, v: Array, dim: int | None = None, most_scores: int = 0) -> Array:
    """The scores of some queries at a time, of one head or of as many as make `most_scores`.

    dim: of the heads, where zeros fill the rest of their width.
    """
    batch, queries, heads, width = q.shape
    chunks = -(-queries // max(QUERY_CHUNK, CHUNK_SCORES // k.shape[1]))
    size = -(-queries // chunks)
    q = jnp.pad(q, ((0, 0), (0, chunks * size - queries), (0, 0), (0, 0)))
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width) for x in (q, k, v))

    @jax.checkpoint  # without it the backward pass would keep every chunk's scores
    def chunk(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp((scores - top) / math.sqrt(dim or width))
        values = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        # Divided last, there is far less to divide.
        return (values / weights.sum(-1, keepdims=True)).astype(v.dtype)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        return lax.map(lambda part: chunk(part, k, v), q.reshape(chunks, size, width))

    at_once = most_scores // (size * k.shape[1]) or None
    out = lax.map(head, (q, k, v), batch_size=at_once).reshape(batch, heads, chunks * size, width)
    return out.transpose(0, 2, 1, 3)[:, :queries]


def _kernel(q_ref, k_ref, v_ref, out_ref, top_ref, sum_ref, acc_ref, *, keys: int, dim: int):
    """One tile of queries meets one tile of keys: powers of 2 over the greatest score so far, their sum, and values.

    All are [tokens, lanes], the lanes those of one head or of several. Each head's scores are of all lanes, where the
    others' queries are 0: that costs no more, as the multipliers are so wide. Of its values it keeps its own.

    top_ref, sum_ref: float32 [heads, queries, lanes], all lanes alike; they and acc_ref live through a row of the grid.
    """
    step, tile = pl.program_id(3), k_ref.shape[0]

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    lane = lax.broadcasted_iota(jnp.int32, q_ref.shape, 1)
    for head in range(top_ref.shape[0]):
        own = (head * dim <= lane) & (lane < (head + 1) * dim)
        q = jnp.where(own, q_ref[...], 0)
        scores = lax.dot_general(q, k_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if keys % tile:
            place = step * tile + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(place < keys, scores, -jnp.inf)
        top = jnp.maximum(top_ref[head], scores.max(-1, keepdims=True))
        kept = jnp.exp2(top_ref[head] - top)
        weights = jnp.exp2(scores - top[:, :1])
        values = jnp.dot(weights.astype(v_ref.dtype), v_ref[...], preferred_element_type=jnp.float32)
        top_ref[head] = top
        sum_ref[head] = kept * sum_ref[head] + weights.sum(-1, keepdims=True)
        acc_ref[...] = jnp.where(own, kept[:, :1] * acc_ref[...] + values, acc_ref[...])

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = sum_ref[0][:, :1]
        for head in range(1, sum_ref.shape[0]):
            total = jnp.where(lane < head * dim, total, sum_ref[head][:, :1])
        out_ref[...] = (acc_ref[...] / total).astype(out_ref.dtype)


def _tile(length: int, most: int) -> int:
    """The size of equal tiles of at most `most`, in whole lanes, that cover `length` with the least over."""
    count = -(-length // (most // _LANES * _LANES))
    return -(-length // (count * _LANES)) * _LANES


def kernel_heads(heads: int, dim: int) -> tuple[int, int]:
    """As many heads, and as wide, as the kernel takes as they come: they fill the lanes, one by one or two together."""
    return (heads + heads % 2, _HALF) if dim <= _HALF else (heads, -(-dim // _LANES) * _LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def flash_attention(q: Array, k: Array, v: Array, dim: int | None = None) -> Array:
    """A TPU kernel (https://arxiv.org/abs/2205.14135): scores are made, weighed and used tile by tile, on the chip.

    Gradients are those of `chunked_attention`.  dim: of the heads, where zeros fill the rest of their width.
    """
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    scaled = (q.astype(jnp.float32) * (math.log2(math.e) / math.sqrt(dim or width))).astype(q.dtype)
    # Heads stay side by side, as the products before and after have them: to bring them apart takes long.
    places, room = kernel_heads(heads, width)
    together = max(1, _LANES // room)
    lanes = together * room
    wide = lanes // _LANES  # the wider the heads, the fewer of their rows fit
    k_tile = _tile(keys, KEY_TILE // wide)
    scores = TILE_SCORES if keys <= k_tile else TILE_SCORES // 4 * 3  # or a v4's 16 MiB of vector memory are short
    q_tile = _tile(queries, min(QUERY_TILE, scores // (k_tile * wide)))

    def filled(x: Array, tile: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, places - heads), (0, room - width)))
        return x.reshape(*x.shape[:2], -1)

    q, k, v = filled(scaled, q_tile), filled(k, k_tile), filled(v, k_tile)
    of_queries = pl.BlockSpec((None, q_tile, lanes), lambda image, group, i, j: (image, i, group))
    of_keys = pl.BlockSpec((None, k_tile, lanes), lambda image, group, i, j: (image, j, group))
    statistics = pltpu.VMEM((together, q_tile, _LANES), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, keys=keys, dim=room),
        grid=(batch, q.shape[2] // lanes, q.shape[1] // q_tile, k.shape[1] // k_tile),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[statistics, statistics, pltpu.VMEM((q_tile, lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name=f"flash_attention_{room}",
    )(q, k, v)
    return out[:, :queries].reshape(batch, queries, places, room)[:, :, :heads, :width]


def _forward(q: Array, k: Array, v: Array, dim: int | None) -> tuple[Array, tuple[Array, Array, Array]]:
    return flash_attention(q, k, v, dim), (q, k, v)


def _backward(dim: int | None, inputs: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    return jax.vjp(functools.partial(chunked_attention, dim=dim), *inputs)[1](gradient)


flash_attention.defvjp(_forward, _backward)

"""The one loop that runs every sampler."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from sdjax.sampling import noise
from sdjax.sampling.table import Tables
from sdjax.sampling.trace import HISTORY, NOISES

Network = Callable[
    [Int[Array, ""], Float[Array, "B H W C"], Float[Array, " B"], Any, Any], tuple[Float[Array, "B H W C"], Any]
]
"""(half, x, t, told, kept) -> the network's output, and what it keeps for the next call of the same half.

half 0 is the conditional one; it is traced: index stacked contexts with it. told: the row's part of `advance`'s.
"""

ASKED = "asked"
"""The scope of the conditional that calls the network or leaves it out."""


class Known(NamedTuple):
    """An image of which only a part is painted anew (inpainting)."""

    image: Float[Array, "B H W C"]
    noise: Float[Array, "B H W C"]
    mask: Float[Array, "B H W 1"]  # 1 where to paint, 0 where the image stays


class Given(NamedTuple):
    """Step noise from the host, for the requests that use it instead of what their keys give."""

    noise: Float[Array, "B R H W C"]
    used: Bool[Array, " B"]


class State(NamedTuple):
    """A run between two rows: what `advance` takes and returns."""

    latents: Float[Array, "B H W C"]
    outputs: tuple[Float[Array, "B H W C"], ...]  # the newest first
    noises: tuple[Float[Array, "B H W C"], ...]
    row: Int[Array, ""]
    kept: Any  # what the network keeps, [N, ...]; () where that is nothing


def begin(latents: Float[Array, "B H W C"], kept: Any) -> State:
    """The state before the first row, from start latents. kept: what the network has from no call; () is nothing."""
    latents = latents.astype(jnp.float32)
    empty = jnp.zeros_like(latents)
    return State(latents, (empty,) * HISTORY, (empty,) * NOISES, jnp.zeros((), jnp.int32), kept)


def advance(
    network: Network,
    tables: Tables,
    state: State,
    *,
    keys: UInt32[Array, "B 2"],
    weights: Float[Array, "B R N"],
    rescale: Float[Array, " B"],
    given: Given | None = None,
    known: Known | None = None,
    told: Any = None,
) -> State:
    """Runs the next rows of a batch of tables; after the last, `latents` are what the VAE decodes, in float32.

    A run may be cut into calls anywhere: the rows of `tables`, `weights` and `given` are those that follow `state.row`.

    At each row the network's guided output is the sum over N halves of weights * output. A half is called for the whole
    batch where any active row's weight for it is not zero, and else costs nothing: rows past a table's end, and the
    unconditional half at guidance 1, are free where all of the batch agrees. Every call has the batch's full shape, so
    an image does not depend on its company.

    keys: `noise.keys`, for rows that use noise.  rescale: guidance_rescale, 0 to 1 (Lin et al. 2023, section 3.4).
    known: what to blend in after every row.  told: arrays [B, R, ...], or a tree of them, for the network.
    """
    shape = state.latents.shape[1:]
    step_noise = None if given is None else given.noise
    by_row = jax.tree.map(lambda column: jnp.moveaxis(jnp.asarray(column), 1, 0), (tables, weights, step_noise, told))

    def row(state: State, inputs):
        x, outputs, noises, index, kept = state
        table, weight, fixed, told = inputs
        weight = jnp.where(table.active[:, None], weight, 0)
        rescaled = jnp.where(table.active, rescale, 0)
        out, kept = _guided(lambda half, kept: network(half, x, table.t, told, kept), x, weight, rescaled, kept)
        outputs = (_scale(table.a, x) + _scale(table.b, out), *outputs[:-1])
        fresh = lax.cond(
            jnp.any(table.uses_noise),
            lambda: noise.jax_latents(keys, noise.ROWS + index, shape),
            lambda: jnp.zeros_like(x),
        )
        if given is not None:
            fresh = jnp.where(given.used[:, None, None, None], fixed, fresh)
        noises = (fresh, *noises[:-1])
        x = _scale(table.cx, x)
        for j in range(HISTORY):
            x = x + _scale(table.cm[:, j], outputs[j])
        for j in range(NOISES):
            x = x + _scale(table.cn[:, j], noises[j])
        if known is not None:
            there = _scale(table.signal, known.image) + _scale(table.noise, known.noise)
            mask = jnp.where(table.active[:, None, None, None], known.mask, 1)
            x = mask * x + (1 - mask) * there
        return State(x, outputs, noises, index + 1, kept), None

    return lax.scan(row, state, by_row)[0]


def _scale(factor: Float[Array, " B"], x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return factor[:, None, None, None] * x


def _guided(
    network: Callable[[Int[Array, ""], Any], tuple[Float[Array, "B H W C"], Any]],
    x: Float[Array, "B H W C"],
    weights: Float[Array, "B N"],
    rescale: Float[Array, " B"],
    kept: Any,
) -> tuple[Float[Array, "B H W C"], Any]:
    """The weighted sum of the network's halves at x, a call each; zero where all weights are. And what they keep."""

    def half(carry, inputs):
        total, conditional = carry
        h, weight, kept = inputs

        def call():
            out, new = network(h, kept)
            return out.astype(jnp.float32), new

        needed = (weight != 0) | ((h == 0) & (rescale > 0))
        with jax.named_scope(ASKED):
            out, kept = lax.cond(jnp.any(needed), call, lambda: (jnp.zeros_like(x), kept))
        # A half that an image has no weight for must not reach it, whatever is in there.
        total = total + jnp.where((weight != 0)[:, None, None, None], _scale(weight, out), 0)
        return (total, jnp.where(h == 0, out, conditional)), kept

    halves = jnp.arange(weights.shape[1])
    (total, conditional), kept = lax.scan(half, (jnp.zeros_like(x),) * 2, (halves, weights.T, kept))
    ratio = jnp.std(conditional, (1, 2, 3), ddof=1) / jnp.std(total, (1, 2, 3), ddof=1)
    factor = jnp.where(rescale > 0, rescale * ratio + 1 - rescale, 1)
    return _scale(factor, total), kept

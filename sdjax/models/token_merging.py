"""Token merging: an image's tokens that are nearly alike attend as one (https://arxiv.org/abs/2303.17604)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Change = Callable[[Array], Array]


def merging(x: Float[Array, "batch tokens channels"], size: tuple[int, int], ratio: float) -> tuple[Change, Change]:
    """How to make fewer of the tokens of an image of height and width, and as many again of what becomes of them.

    The first token of each 2x2 stays. Of the others as many as `ratio` of all tokens, those at the least angle to one
    that stays, are averaged into that one, and get back what becomes of it.
    """
    height, width = size
    batch, tokens, _ = x.shape
    is_target = np.zeros(size, bool)
    is_target[: height // 2 * 2 : 2, : width // 2 * 2 : 2] = True
    order = np.argsort(~is_target.ravel(), kind="stable")
    targets, sources = np.split(order, [is_target.sum()])
    count = min(len(sources), int(tokens * ratio))
    if count == 0 or len(targets) == 0:
        return lambda x: x, lambda x: x

    metric = x.astype(jnp.float32)
    metric = metric / jnp.linalg.norm(metric, axis=-1, keepdims=True)
    likeness = jnp.einsum("bsc,btc->bst", metric[:, sources], metric[:, targets])
    closest, rank = likeness.argmax(-1), jnp.argsort(-likeness.max(-1), axis=-1, stable=True)
    merged, alone = rank[:, :count], rank[:, count:]  # places in `sources`
    into = jnp.take_along_axis(closest, merged, axis=1)
    rows = lax.broadcasted_iota(jnp.int32, (batch, 1), 0)

    def merge(x: Array) -> Array:
        from_, to = x[:, sources], x[:, targets].astype(jnp.float32)
        joined = to.at[rows, into].add(from_[rows, merged].astype(jnp.float32))
        sizes = jnp.ones(to.shape[:2]).at[rows, into].add(1)[..., None]
        return jnp.concatenate([from_[rows, alone], (joined / sizes).astype(x.dtype)], axis=1)

    def unmerge(x: Array) -> Array:
        kept, to = jnp.split(x, [alone.shape[1]], axis=1)
        back = jnp.zeros((batch, len(sources), x.shape[-1]), x.dtype)
        back = back.at[rows, alone].set(kept).at[rows, merged].set(to[rows, into])
        return jnp.concatenate([to, back], axis=1)[:, np.argsort(order)]

    return merge, unmerge

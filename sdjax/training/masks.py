"""Masks that an inpainting UNet is trained on, each a function of its example's place in the whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_WHOLE = 0.25  # of pictures are repainted whole, as when Stable Diffusion's own inpainting model was trained
_MOST = 4  # rectangles of another mask
_SIDES = 0.1, 0.6  # of a rectangle, the least and the most, as parts of the picture's


def draw(key: Any, places: Int[Array, " batch"], height: int, width: int) -> Bool[Array, "batch {height} {width} 1"]:
    """Up to four rectangles anywhere, or all of the picture; what is to be repainted is true."""

    def one(place: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, place), 4)
        centres = jax.random.uniform(keys[0], (2, _MOST, 1))
        sides = jax.random.uniform(keys[1], (2, _MOST, 1), minval=_SIDES[0], maxval=_SIDES[1])
        counted = jnp.arange(_MOST) <= jax.random.randint(keys[2], (), 0, _MOST)
        rows, columns = (
            jnp.abs((jnp.arange(length) + 0.5) / length - centre) < side / 2
            for length, centre, side in zip((height, width), centres, sides, strict=True)
        )
        rectangles = rows[:, :, None] & columns[:, None, :] & counted[:, None, None]
        return (rectangles.any(0) | (jax.random.uniform(keys[3]) < _WHOLE))[..., None]

    return jax.vmap(one)(places)

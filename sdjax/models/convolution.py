"""Two-dimensional convolution, by what suits the platform that a program is compiled for.

XLA's convolutions on a CPU take up to twice torch's time. There, float32 ones of 3x3 between many channels are made of
products: those of large images by Winograd's minimal filtering, F(2x2, 3x3), which multiplies 16 times where
convolution multiplies 36 times (Lavin & Gray, https://arxiv.org/abs/1509.09308); those of small ones, whose time goes
into reading the kernel, as one product with each pixel's neighbourhood. Its rounding errors, about 2e-6 of the
result, are twice those of a plain convolution.

For a TPU XLA cuts the images of a small batch into pieces, and by the compiler's estimates moves data for longer than
it multiplies. There such convolutions are sums of products, or those of strips that are cut before.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]

_SAME: Padding = ((1, 1), (1, 1))
_CHANNELS = 128  # on both sides, from which products pay
_LARGE = 512  # pixels made of an image from which unfolding does not pay
_TILES = 4096  # 2x2 outputs filtered at once: what is between the steps stays small, and costs no time
_BATCH = 8  # images, or strips of them, that the TPU compiler does not cut
_SMALL = 64  # pixels of an image that it does not cut in any batch
_PIXELS = 2**14  # of a batch whose sums a TPU holds in vector memory


def convolution(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "size size in out"],
    *,
    stride: int = 1,
    padding: Padding,
) -> Float[Array, "batch out_height out_width out"]:
    """The convolution of images with a square kernel; `padding` is ((top, bottom), (left, right))."""

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    if kernel.shape[:2] == (1, 1) and stride == 1:
        return x @ kernel[0, 0]
    if kernel.shape[:2] != (3, 3) or min(kernel.shape[2:]) < _CHANNELS:
        return plain(x, kernel)
    is_usual = stride == 1 and padding == _SAME
    on_cpu = on_tpu = plain
    if x.dtype == jnp.float32 and x.shape[1] * x.shape[2] < _LARGE * stride**2:
        on_cpu = functools.partial(unfolded, stride=stride, padding=padding)
    elif x.dtype == jnp.float32 and is_usual:
        on_cpu = filtered
    if is_usual and x.shape[0] < _BATCH and x.shape[1] * x.shape[2] > _SMALL:
        on_tpu = summed if x.shape[0] * x.shape[1] * x.shape[2] <= _PIXELS else in_strips
    return lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=on_tpu, default=plain)


def unfolded(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"], *, stride: int, padding: Padding
) -> Float[Array, "batch out_height out_width out"]:
    """A 3x3 convolution as the product of the pixels' neighbourhoods with the kernel."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    seen = [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(9 * kernel.shape[2], -1)


def summed(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"]
) -> Float[Array, "batch height width out"]:
    """A 3x3 convolution, padded to the same size, as the float32 sum of a product for each place of the kernel."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), *_SAME, (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3)]
    seen = (padded[:, i : i + height, j : j + width] for i, j in places)
    factors = (kernel[place] for place in places)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return functools.reduce(jnp.add, map(product, seen, factors)).astype(x.dtype)


def in_strips(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"]
) -> Float[Array, "batch height width out"]:
    """A 3x3 convolution, padded to the same size, of strips of the images as a batch of at least _BATCH."""
    batch, height, width, channels = x.shape
    counts = range(-(-_BATCH // batch), 2 * _BATCH + 1)
    count = next((count for count in counts if height % count == 0), 1)
    strips = x.reshape(batch, count, height // count, width, channels)
    # Each with the last row of the one above and the first of the one below.
    above = jnp.pad(strips[:, :-1, -1:], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    below = jnp.pad(strips[:, 1:, :1], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    strips = jnp.concatenate([above, strips, below], axis=2).reshape(batch * count, -1, width, channels)
    y = lax.conv_general_dilated(strips, kernel, (1, 1), ((0, 0), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y.reshape(batch, height, width, -1)


def filtered(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"]
) -> Float[Array, "batch height width out"]:
    """A 3x3 convolution, padded to the same size, by minimal filtering of tiles of 2x2 outputs, some rows at a time."""
    batch, height, width, _ = x.shape
    tall, wide = -(-height // 2), -(-width // 2)  # in tiles
    rows = -(-tall // -(-batch * tall * wide // _TILES))  # in a strip
    strips = -(-tall // rows)
    padded = jnp.pad(x, ((0, 0), (1, 1 + 2 * rows * strips - height), (1, 1 + 2 * wide - width), (0, 0)))
    factors = _both_ways(_of_kernel, kernel)

    def strip(number: Array, made: Array) -> Array:
        part = lax.dynamic_slice_in_dim(padded, 2 * rows * number, 2 * rows + 2, axis=1)
        seen = [[part[:, i : i + 2 * rows - 1 : 2, j : j + 2 * wide - 1 : 2] for j in range(4)] for i in range(4)]
        pairs = zip(_both_ways(_of_input, seen), factors, strict=True)
        products = [[tile @ factor for tile, factor in zip(*pair, strict=True)] for pair in pairs]
        outputs = jnp.stack([jnp.stack(row, axis=3) for row in _both_ways(_of_products, products)], axis=2)
        outputs = outputs.reshape(batch, 2 * rows, 2 * wide, -1)
        return lax.dynamic_update_slice_in_dim(made, outputs, 2 * rows * number, axis=1)

    unmade = jnp.zeros((batch, 2 * rows * strips, 2 * wide, kernel.shape[3]), x.dtype)
    return lax.fori_loop(0, strips, strip, unmade)[:, :height, :width]


def _both_ways(transform: Callable[[Sequence[Array]], Sequence[Array]], grid: Any) -> list[Sequence[Array]]:
    """A map of the columns of a grid of arrays, then of the rows of what that gives."""
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


# The three maps of F(2, 3), the paper's section 4.1.
def _of_kernel(g: Sequence[Array]) -> Sequence[Array]:
    return g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]


def _of_input(d: Sequence[Array]) -> Sequence[Array]:
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _of_products(m: Sequence[Array]) -> Sequence[Array]:
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]

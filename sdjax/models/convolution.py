"""Two-dimensional convolution, by what suits the platform that a program is compiled for.

XLA's convolutions on a CPU take up to twice torch's time. There, float32 ones of 3x3 between many channels are made of
products: those of large images by Winograd's minimal filtering, F(2x2, 3x3), which multiplies 16 times where
convolution multiplies 36 times (Lavin & Gray, https://arxiv.org/abs/1509.09308); those of small ones, whose time goes
into reading the kernel, as one product with each pixel's neighbourhood. Its rounding errors, about 2e-6 of the
result, are twice those of a plain convolution.

For a TPU XLA cuts the images of a small batch into pieces, and by the compiler's estimates moves data for longer than
it multiplies. There such convolutions are sums of products, or those of strips that are cut before.

Of an image whose every pixel is doubled, two of three neighbours along a side are one pixel, so that their factors can
be added before: a TPU multiplies 24 times where convolution multiplies 36 times, minimal filtering on a CPU 9 times.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
_Map = Callable[[Sequence[Array]], Sequence[Array]]

_SAME: Padding = ((1, 1), (1, 1))
_CHANNELS = 128  # on both sides, from which products pay
_LARGE = 512  # pixels made of an image from which unfolding does not pay
_TILES = 4096  # 2x2 outputs filtered at once: what is between the steps stays small, and costs no time
_BATCH = 8  # images, or strips of them, that the TPU compiler does not cut
_SMALL = 64  # pixels of an image that it does not cut in any batch
_PIXELS = 2**14  # of a batch whose sums a TPU holds in vector memory
_APART = 2**16  # pixels of a batch below _BATCH from which another convolution costs a TPU less than to join parts


def convolution(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "size size in out"],
    *,
    stride: int = 1,
    padding: Padding,
) -> Float[Array, "batch out_height out_width out"]:
    """The convolution of images with a square kernel; `padding` is ((top, bottom), (left, right))."""
    plain = functools.partial(_plain, stride=stride, padding=padding)
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
    if is_usual:
        on_tpu = functools.partial(_on_tpu, padding=padding)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=on_tpu, default=plain)


def convolution_of_parts(
    parts: Sequence[Float[Array, "batch height width _"]],
    kernel: Float[Array, "size size in out"],
    *,
    stride: int = 1,
    padding: Padding,
) -> Float[Array, "batch out_height out_width out"]:
    """`convolution` of images whose channels come in parts: on a TPU, of large batches, the sum of the parts' own."""
    whole = functools.partial(convolution, stride=stride, padding=padding)

    def apart(*parts: Array) -> Array:
        return functools.reduce(jnp.add, map(whole, parts, split_as(kernel, parts, axis=2)))

    def joined(*parts: Array) -> Array:
        return whole(jnp.concatenate(parts, axis=-1), kernel)

    batch, height, width, _ = parts[0].shape
    is_small = batch < _BATCH and batch * height * width < _APART
    if len(parts) == 1 or is_small:
        return joined(*parts)
    return lax.platform_dependent(*parts, tpu=apart, default=joined)


def split_as(x: Array, parts: Sequence[Array], axis: int = -1) -> list[Array]:
    """x, cut along an axis into as many channels as each of the parts has."""
    ends = itertools.accumulate(part.shape[-1] for part in parts[:-1])
    return jnp.split(x, list(ends), axis) if len(parts) > 1 else [x]


def convolution_of_doubled(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"]
) -> Float[Array, "batch 2*height 2*width out"]:
    """The 3x3 convolution, padded to the same size, of `doubled` images."""

    def plain(x: Array, kernel: Array) -> Array:
        return _plain(doubled(x), kernel, padding=_SAME)

    if min(kernel.shape[2:]) < _CHANNELS:
        return plain(x, kernel)
    on_cpu = functools.partial(filtered, is_doubled=True) if x.dtype == jnp.float32 else plain
    return lax.platform_dependent(x, kernel, cpu=on_cpu, tpu=row_pairs, default=plain)


def doubled(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch 2*height 2*width channels"]:
    """Every pixel twice along both sides."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def _plain(x: Array, kernel: Array, *, stride: int = 1, padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _on_tpu(x: Array, kernel: Array, padding: Padding) -> Array:
    """A convolution of stride 1 whose padding keeps the size."""
    batch, height, width, _ = x.shape
    if batch >= _BATCH or height * width <= _SMALL:
        return _plain(x, kernel, padding=padding)
    return (summed if batch * height * width <= _PIXELS else in_strips)(x, kernel, padding)


def unfolded(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"], *, stride: int, padding: Padding
) -> Float[Array, "batch out_height out_width out"]:
    """A 3x3 convolution as the product of the pixels' neighbourhoods with the kernel."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    seen = [x[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(9 * kernel.shape[2], -1)


def summed(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "rows columns in out"], padding: Padding
) -> Float[Array, "batch height width out"]:
    """A convolution, padded to the same size, as the float32 sum of a product for each place of the kernel."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    places = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    seen = (padded[:, i : i + height, j : j + width] for i, j in places)
    factors = (kernel[place] for place in places)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return functools.reduce(jnp.add, map(product, seen, factors)).astype(x.dtype)


def in_strips(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "rows columns in out"], padding: Padding
) -> Float[Array, "batch height width out"]:
    """A convolution, padded to the same size, of strips of the images as a batch of at least _BATCH."""
    batch, height, width, channels = x.shape
    counts = range(-(-_BATCH // batch), 2 * _BATCH + 1)
    count = next((count for count in counts if height % count == 0), 1)
    rows = height // count
    strips = x.reshape(batch, count, rows, width, channels)
    (top, bottom), sides = padding
    # Each with the last rows of the one above and the first of the one below.
    above = jnp.pad(strips[:, :-1, rows - top :], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
    below = jnp.pad(strips[:, 1:, :bottom], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    strips = jnp.concatenate([above, strips, below], axis=2).reshape(batch * count, -1, width, channels)
    return _plain(strips, kernel, padding=((0, 0), sides)).reshape(batch, height, width, -1)


def row_pairs(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"]
) -> Float[Array, "batch 2*height 2*width out"]:
    """`convolution_of_doubled`, of images doubled along their rows alone: a convolution for each row of a pair."""
    wide = jnp.repeat(x, 2, axis=2)
    upper = jnp.stack([kernel[0], kernel[1] + kernel[2]])
    lower = jnp.stack([kernel[0] + kernel[1], kernel[2]])
    made = [_on_tpu(wide, upper, ((1, 0), (1, 1))), _on_tpu(wide, lower, ((0, 1), (1, 1)))]
    # Rows between the other's, as a sum that XLA joins to the convolution, where it would copy what is stacked.
    zero = jnp.zeros((), x.dtype)
    among = (lax.pad(y, zero, ((0, 0, 0), (i, 1 - i, 1), (0, 0, 0), (0, 0, 0))) for i, y in enumerate(made))
    return functools.reduce(jnp.add, among)


def filtered(
    x: Float[Array, "batch height width in"], kernel: Float[Array, "3 3 in out"], *, is_doubled: bool = False
) -> Float[Array, "batch out_height out_width out"]:
    """By minimal filtering of tiles of 2x2 outputs, some rows at a time, a 3x3 convolution padded to the same size.

    is_doubled: `convolution_of_doubled`, of which a tile is made of a pixel and its neighbours.
    """
    batch, height, width, _ = x.shape
    step, of_kernel, of_input, of_products = (1, *_DOUBLED_MAPS) if is_doubled else (2, *_MAPS)
    tall, wide = -(-height // step), -(-width // step)  # in tiles
    rows = -(-tall // -(-batch * tall * wide // _TILES))  # in a strip
    strips = -(-tall // rows)
    padded = jnp.pad(x, ((0, 0), (1, 1 + step * rows * strips - height), (1, 1 + step * wide - width), (0, 0)))
    factors = _both_ways(of_kernel, kernel)
    places = range(step + 2)  # along a side of what a tile sees

    def strip(number: Array, made: Array) -> Array:
        part = lax.dynamic_slice_in_dim(padded, step * rows * number, step * rows + 2, axis=1)
        seen = [
            [part[:, i : i + step * (rows - 1) + 1 : step, j : j + step * (wide - 1) + 1 : step] for j in places]
            for i in places
        ]
        pairs = zip(_both_ways(of_input, seen), factors, strict=True)
        products = [[tile @ factor for tile, factor in zip(*pair, strict=True)] for pair in pairs]
        outputs = jnp.stack([jnp.stack(row, axis=3) for row in _both_ways(of_products, products)], axis=2)
        outputs = outputs.reshape(batch, 2 * rows, 2 * wide, -1)
        return lax.dynamic_update_slice_in_dim(made, outputs, 2 * rows * number, axis=1)

    unmade = jnp.zeros((batch, 2 * rows * strips, 2 * wide, kernel.shape[3]), x.dtype)
    return lax.fori_loop(0, strips, strip, unmade)[:, : height * 2 // step, : width * 2 // step]


def _both_ways(transform: _Map, grid: Any) -> list[Sequence[Array]]:
    """A map of the columns of a grid of arrays, then of the rows of what that gives."""
    columns = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


# Of a kernel, of what a tile sees and of their products, by F(2, 3), the paper's section 4.1.
_MAPS: tuple[_Map, _Map, _Map] = (
    lambda g: (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]),
    lambda d: (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]),
    lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3]),
)
# The same where d[1] and d[2] are one pixel: the third product is none, and the second's halves are whole.
_DOUBLED_MAPS: tuple[_Map, _Map, _Map] = (
    lambda g: (g[0], g[0] + g[1] + g[2], g[2]),
    lambda d: (d[0] - d[1], d[1], d[1] - d[2]),
    lambda m: (m[0] + m[1], m[1] - m[2]),
)

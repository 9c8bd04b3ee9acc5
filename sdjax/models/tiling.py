"""Autoencoders on large images in little memory: one image at a time, and the wide layers in strips of rows.

Unlike tiles that are blended where they overlap, strips give the whole image's values: each is computed with the rows
around it that its convolutions see, and every norm uses the statistics of the whole image, which a pass over the strips
has gathered. Only the input and the output of a residual block are held whole; a decoder takes twice the arithmetic.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sdjax.models.layers import ACTIVATIONS, GroupNorm, Statistics
from sdjax.models.resnet import ResnetBlock
from sdjax.models.tiny import AutoencoderTiny
from sdjax.models.vae import AutoencoderKL, Decoder, Encoder

Autoencoder = AutoencoderKL | AutoencoderTiny
Layer = Callable[[Array], Array]

SLICED = 2**20
"""Pixels in a batch above which its images are encoded and decoded one at a time."""
TILED = 2**21
"""Pixels in an image above which that is done in strips."""

_ROWS = 64  # of a layer's input in a strip, at most
_HALO = 4  # rows on each side; the convolutions of a resampling and a residual block see three


def decode(
    vae: Autoencoder, z: Float[Array, "batch latent_h latent_w latent"], *, tiling: bool | None = None
) -> Float[Array, "batch height width out"]:
    """`vae.decode(z)`; `tiling` says whether in strips, None leaves it to the size."""
    pixels = z.shape[1] * z.shape[2] * vae.config.downscale**2
    if pixels > TILED if tiling is None else tiling:
        return _by_image(lambda one: _decode_in_strips(vae, one), z)
    return _by_image(vae.decode, z) if len(z) * pixels > SLICED else vae.decode(z)


def encode(
    vae: Autoencoder, x: Float[Array, "batch height width in"], *, tiling: bool | None = None
) -> tuple[Float[Array, "batch latent_h latent_w latent"], Float[Array, "batch latent_h latent_w latent"]]:
    """`vae.encode(x)` in the same way. Strips need sides that are multiples of `vae.config.downscale`."""
    pixels = x.shape[1] * x.shape[2]
    if pixels > TILED if tiling is None else tiling:
        return _by_image(lambda one: _encode_in_strips(vae, one), x)
    return _by_image(vae.encode, x) if len(x) * pixels > SLICED else vae.encode(x)


def _by_image(function: Callable, batch: Array):
    """`function` of a batch, called for one image at a time."""
    mapped = lax.map(lambda image: function(image[None]), batch)
    return jax.tree.map(lambda array: array[:, 0], mapped)


def _decode_in_strips(vae: Autoencoder, z: Array) -> Array:
    if isinstance(vae, AutoencoderTiny):
        return _map_rows(vae.decode, z, halo=_reach(vae.config.num_decoder_blocks))
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.unquantised(z)))
    for i, block in enumerate(decoder.up_blocks):
        for j, resnet in enumerate(block.resnets):
            # The enlarged layer is the widest of all: it is made anew for each strip.
            grown = i > 0 and j == 0
            x = _resnet(resnet, x, decoder.up_blocks[i - 1].upsamplers[0] if grown else _same)
    return _out(decoder, x)


def _encode_in_strips(vae: Autoencoder, x: Array) -> tuple[Array, Array]:
    if isinstance(vae, AutoencoderTiny):
        side = vae.config.downscale
        halo = side * _reach(vae.config.num_encoder_blocks[::-1])
        latents = _map_rows(lambda strip: vae.encode(strip)[0], x, halo=halo, step=side)
        return latents, jnp.full_like(latents, -jnp.inf)
    encoder = vae.encoder
    for i, block in enumerate(encoder.down_blocks):
        for j, resnet in enumerate(block.resnets):
            x = _resnet(resnet, x, encoder.conv_in if i == j == 0 else _same)
        for downsampler in block.downsamplers:
            x = _map_rows(downsampler, x, step=2)
    return vae.posterior(_out(encoder, encoder.mid_block(x)))


def _same(x: Array) -> Array:
    return x


def _reach(blocks: Sequence[int]) -> int:
    """How many latents to each side a pixel of a tiny autoencoder depends on; `blocks` from the latents outwards."""
    return math.ceil(sum((3 * count + 2) / 2**i for i, count in enumerate(blocks)))


def _resnet(block: ResnetBlock, source: Array, lift: Layer) -> Array:
    """`block(lift(source))`."""
    act = ACTIVATIONS[block.act_fn]
    first = _statistics(block.norm1, lift, source)

    def hidden(x: Array) -> Array:
        return block.conv1(act(block.norm1(x, first)))

    second = _statistics(block.norm2, lambda strip: hidden(lift(strip)), source)

    def whole(strip: Array) -> Array:
        x = lift(strip)
        y = block.conv2(act(block.norm2(hidden(x), second)))
        return y + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    return _map_rows(whole, source)


def _out(network: Encoder | Decoder, x: Array) -> Array:
    """The last norm and convolution."""
    given = _statistics(network.conv_norm_out, _same, x)
    return _map_rows(lambda strip: network.conv_out(jax.nn.silu(network.conv_norm_out(strip, given))), x)


def _map_rows(layer: Layer, x: Array, *, halo: int = _HALO, step: int = 1) -> Array:
    """layer(x) of an image, strip by strip; strips start at multiples of `step`, the layer's stride.

    They are of one size, so that the last ones lie over each other where it does not divide the height.
    """
    height = x.shape[1]
    count = -(-height // (_ROWS * step))
    rows = -(-height // (count * step)) * step
    size = min(rows + 2 * -(-halo // step) * step, height)

    def strip(i: Array) -> tuple[Array, Array]:
        """The layer's output of a strip, and at which of its rows that begins."""
        first = jnp.minimum(i * rows, height - rows)
        start = jnp.clip(first - (size - rows) // 2, 0, height - size)
        y = layer(lax.dynamic_slice_in_dim(x, start, size, 1))
        skipped, kept = (first - start) * y.shape[1] // size, rows * y.shape[1] // size
        return lax.dynamic_slice_in_dim(y, skipped, kept, 1), first * y.shape[1] // size

    part, _ = jax.eval_shape(strip, jax.ShapeDtypeStruct((), jnp.int32))
    # A constant to start from would be kept beside the result, to be shared by all the loops of a network.
    start = jnp.broadcast_to(x.ravel()[0].astype(part.dtype), (1, height * part.shape[1] // rows, *part.shape[2:]))
    return lax.fori_loop(0, count, lambda i, whole: lax.dynamic_update_slice_in_dim(whole, *strip(i), 1), start)


def _statistics(norm: GroupNorm, layer: Layer, x: Array) -> Statistics:
    """norm.statistics(layer(x)), by rows: they are of one size, so the variance is theirs and their means'."""

    def of_rows(strip: Array) -> Array:
        return jnp.stack(norm.statistics(layer(strip)[0]), axis=1)[None]

    means, variances = jnp.moveaxis(_map_rows(of_rows, x)[0], 1, 0)
    mean = means.mean(0, keepdims=True)
    return Statistics(mean, (variances + jnp.square(means - mean)).mean(0, keepdims=True))

"""TAESD and TAESDXL, the tiny autoencoders, with the state-dict keys of diffusers' AutoencoderTiny.

They have no attention and no norms: a small part of the time and memory of the autoencoders whose latents they share.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import AutoencoderTinyConfig
from sdjax.models.convolution import doubled
from sdjax.models.layers import ACTIVATIONS, Conv


class TinyBlock(nnx.Module):
    """Three 3x3 convolutions around a residual, a ReLU at last (diffusers' AutoencoderTinyBlock)."""

    def __init__(self, channels: int, act_fn: str, **kw: Any):
        act = ACTIVATIONS[act_fn]
        convs = [Conv(channels, channels, **kw) for _ in range(3)]
        self.conv = nnx.List([convs[0], act, convs[1], act, convs[2]])

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        y = x
        for layer in self.conv:
            y = layer(y)
        return ACTIVATIONS["relu"](x + y)


class TinyEncoder(nnx.Module):
    """Images to latents."""

    def __init__(self, config: AutoencoderTinyConfig, **kw: Any):
        channels = config.encoder_block_out_channels[0]
        layers: list[Any] = [Conv(config.in_channels, channels, **kw)]
        for i, count in enumerate(config.num_encoder_blocks):
            if i:
                layers.append(Conv(channels, channels, stride=2, bias=False, **kw))
            layers += [TinyBlock(channels, config.act_fn, **kw) for _ in range(count)]
        self.layers = nnx.List([*layers, Conv(channels, config.latent_channels, **kw)])

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch latent_h latent_w latent"]:
        x = (x + 1) / 2
        for layer in self.layers:
            x = layer(x)
        return x


class TinyDecoder(nnx.Module):
    """Latents, smoothly limited to -3..3, to images."""

    def __init__(self, config: AutoencoderTinyConfig, **kw: Any):
        channels = config.decoder_block_out_channels[0]
        layers: list[Any] = [Conv(config.latent_channels, channels, **kw), ACTIVATIONS[config.act_fn]]
        for i, count in enumerate(config.num_decoder_blocks):
            if i:
                layers += [doubled, Conv(channels, channels, bias=False, **kw)]
            layers += [TinyBlock(channels, config.act_fn, **kw) for _ in range(count)]
        self.layers = nnx.List([*layers, Conv(channels, config.out_channels, **kw)])

    def __call__(self, z: Float[Array, "batch latent_h latent_w latent"]) -> Float[Array, "batch height width out"]:
        x = jnp.tanh(z / 3) * 3
        for layer in self.layers:
            x = layer(x)
        return 2 * x - 1


class AutoencoderTiny(nnx.Module):
    """Images in -1..1 to latents and back, as `AutoencoderKL` does it, but for latents that are not drawn at random."""

    def __init__(
        self,
        config: AutoencoderTinyConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        kw = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.encoder = TinyEncoder(config, **kw)
        self.decoder = TinyDecoder(config, **kw)

    def encode(
        self, x: Float[Array, "batch height width in"]
    ) -> tuple[Float[Array, "batch latent_h latent_w latent"], Float[Array, "batch latent_h latent_w latent"]]:
        """The latents of images `x`, and a log-variance of minus infinity: this encoder is sure.

        Each side of the latents is the image's over config.downscale, rounded up.
        """
        latents = self.encoder(x)
        return latents, jnp.full_like(latents, -jnp.inf)

    def decode(self, z: Float[Array, "batch latent_h latent_w latent"]) -> Float[Array, "batch height width out"]:
        """Images of latents `z`, about -1..1 but not limited to it; sides are the latents' times config.downscale."""
        return self.decoder(z)

"""The KL autoencoder of latent diffusion (https://arxiv.org/abs/2112.10752), with diffusers' state-dict keys."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import VAEConfig
from sdjax.models.layers import Attention, Conv, GroupNorm
from sdjax.models.resnet import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every norm; no config field sets it


def _resnet(config: VAEConfig, in_channels: int, channels: int, **kw: Any) -> ResnetBlock:
    return ResnetBlock(in_channels, channels, groups=config.norm_num_groups, eps=EPS, act_fn=config.act_fn, **kw)


class SpatialAttention(Attention):
    """Self-attention over the positions of an image, with one head and a residual."""

    def __init__(self, channels: int, groups: int, **kw: Any):
        super().__init__(channels, channels, 1, bias=True, **kw)
        self.group_norm = GroupNorm(groups, channels, EPS, **kw)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(tokens).reshape(x.shape)


class DownBlock(nnx.Module):
    """Resnets, then half the size if `downsample`. The convolution pads below and to the right only."""

    def __init__(self, config: VAEConfig, in_channels: int, channels: int, *, downsample: bool, **kw: Any):
        inputs = [in_channels] + [channels] * (config.layers_per_block - 1)
        self.resnets = nnx.List([_resnet(config, size, channels, **kw) for size in inputs])
        self.downsamplers = nnx.List([Downsample(channels, padding=((0, 1), (0, 1)), **kw)] if downsample else [])

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch new_height new_width out"]:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """Resnets, one more than in a DownBlock, then twice the size if `upsample`."""

    def __init__(self, config: VAEConfig, in_channels: int, channels: int, *, upsample: bool, **kw: Any):
        inputs = [in_channels] + [channels] * config.layers_per_block
        self.resnets = nnx.List([_resnet(config, size, channels, **kw) for size in inputs])
        self.upsamplers = nnx.List([Upsample(channels, **kw)] if upsample else [])

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch new_height new_width out"]:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nnx.Module):
    """Two resnets with attention between them where the config has it."""

    def __init__(self, config: VAEConfig, channels: int, **kw: Any):
        self.resnets = nnx.List([_resnet(config, channels, channels, **kw) for _ in range(2)])
        attend = config.mid_block_add_attention
        self.attentions = nnx.List([SpatialAttention(channels, config.norm_num_groups, **kw)] if attend else [])

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images to the parameters of the latents' distribution."""

    def __init__(self, config: VAEConfig, **kw: Any):
        channels = config.block_out_channels
        self.conv_in = Conv(config.in_channels, channels[0], **kw)
        sizes = zip((channels[0], *channels), channels, strict=False)
        self.down_blocks = nnx.List(
            [DownBlock(config, *size, downsample=i < len(channels) - 1, **kw) for i, size in enumerate(sizes)]
        )
        self.mid_block = MidBlock(config, channels[-1], **kw)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS, **kw)
        self.conv_out = Conv(channels[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch latent_h latent_w moments"]:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))  # SiLU whatever act_fn is, as in diffusers


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: VAEConfig, **kw: Any):
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, channels[0], **kw)
        self.mid_block = MidBlock(config, channels[0], **kw)
        sizes = zip((channels[0], *channels), channels, strict=False)
        self.up_blocks = nnx.List(
            [UpBlock(config, *size, upsample=i < len(channels) - 1, **kw) for i, size in enumerate(sizes)]
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], EPS, **kw)
        self.conv_out = Conv(channels[-1], config.out_channels, **kw)

    def __call__(self, z: Float[Array, "batch latent_h latent_w latent"]) -> Float[Array, "batch height width out"]:
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images in -1..1 to Gaussian latents and back; scaling the latents is the caller's business."""

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        kw = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        moments = 2 * config.latent_channels
        self.config = config
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)
        self.quant_conv = Conv(moments, moments, 1, **kw) if config.use_quant_conv else None
        self.post_quant_conv = (
            Conv(config.latent_channels, config.latent_channels, 1, **kw) if config.use_post_quant_conv else None
        )

    def encode(
        self, x: Float[Array, "batch height width in"]
    ) -> tuple[Float[Array, "batch latent_h latent_w latent"], Float[Array, "batch latent_h latent_w latent"]]:
        """Mean and log-variance of the latents of images `x`, the latter limited to -30..20 as in diffusers.

        Each side of the latents is the image's over config.downscale, rounded down.
        """
        return self.posterior(self.encoder(x))

    def posterior(
        self, moments: Float[Array, "batch latent_h latent_w moments"]
    ) -> tuple[Float[Array, "batch latent_h latent_w latent"], Float[Array, "batch latent_h latent_w latent"]]:
        """`encode`'s result from the encoder's output."""
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "batch latent_h latent_w latent"]) -> Float[Array, "batch height width out"]:
        """Images of latents `z`, about -1..1 but not limited to it; sides are the latents' times config.downscale."""
        return self.decoder(self.unquantised(z))

    def unquantised(
        self, z: Float[Array, "batch latent_h latent_w latent"]
    ) -> Float[Array, "batch latent_h latent_w latent"]:
        """The decoder's input from latents."""
        return z if self.post_quant_conv is None else self.post_quant_conv(z)

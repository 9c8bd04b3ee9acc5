"""ControlNet (https://arxiv.org/abs/2302.05543), with the state-dict keys of diffusers' ControlNetModel.

A copy of the UNet's way down that also sees a picture (edges, a pose, depth), and says what the UNet is to add to its
skips.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sdjax.config import ControlNetConfig
from sdjax.models.layers import Conv
from sdjax.models.unet import DownPath, skip_channels


class ConditioningEmbedding(nnx.Module):
    """A picture to a feature map at the size of the latents: pairs of convolutions, the second of each of stride 2."""

    def __init__(self, config: ControlNetConfig, **kw: Any):
        channels = config.conditioning_embedding_out_channels
        self.conv_in = Conv(config.conditioning_channels, channels[0], **kw)
        self.blocks = nnx.List([])
        for size, wider in itertools.pairwise(channels):
            self.blocks += [Conv(size, size, **kw), Conv(size, wider, stride=2, **kw)]
        self.conv_out = Conv(channels[-1], config.block_out_channels[0], **kw)

    def __call__(self, image: Float[Array, "batch height width cond"]) -> Float[Array, "batch h w channels"]:
        x = jax.nn.silu(self.conv_in(image))
        for conv in self.blocks:
            x = jax.nn.silu(conv(x))
        return self.conv_out(x)


class ControlNet(DownPath):
    """What to add to the skips and to the middle of a UNet of the same widths."""

    config: ControlNetConfig

    def __init__(
        self,
        config: ControlNetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
        remat: bool = False,
    ):
        kw: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs, "dtype": dtype}
        super().__init__(config, remat=remat, **kw)
        self.controlnet_cond_embedding = ConditioningEmbedding(config, **kw)
        self.controlnet_down_blocks = nnx.List([Conv(size, size, 1, **kw) for size in skip_channels(config)])
        self.controlnet_mid_block = Conv(config.block_out_channels[-1], config.block_out_channels[-1], 1, **kw)

    def embed(self, image: Float[Array, "batch height width cond"]) -> Float[Array, "batch h w channels"]:
        """What the network sees of a control image, RGB in 0..1; the same at every step, so call it once."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            image = image[..., ::-1]
        return self.controlnet_cond_embedding(image)

    def __call__(
        self,
        x: Float[Array, "batch h w in"],
        t: Float[Array, " batch"],
        context: Float[Array, "batch keys context"],
        condition: Float[Array, "batch h w channels"],
        scale: Float[Array, " batch"],
        guess_mode: Bool[Array, " batch"],
        added_cond: Mapping[str, Array] | None = None,
    ) -> tuple[list[Array], Array]:
        """The UNet's `down_block_additional_residuals` and `mid_block_additional_residual`.

        Args:
            x, t, context, added_cond: as the UNet takes them.
            condition: from `embed`.
            scale: how much to add (controlnet_conditioning_scale).
            guess_mode: where true, `scale` falls to a tenth from the middle to the outermost skip, which leaves
                a network that is not told of the picture's content in words room to guess it.
        """
        temb = self.embed_time(t, added_cond, None)
        middle, skips = self.down(self.conv_in(x) + condition, temb, context)
        convs = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        pool, residuals = self.config.global_pool_conditions, []
        ramp = jnp.ones(len(convs)) if pool else jnp.logspace(-1, 0, len(convs))
        scales = scale[:, None] * jnp.where(guess_mode[:, None], ramp, 1)
        for i, (conv, skip) in enumerate(zip(convs, (*skips, middle), strict=True)):
            residual = conv(skip) * scales[:, i, None, None, None].astype(self.dtype)
            residuals.append(residual.mean((1, 2), keepdims=True) if pool else residual)
        return residuals[:-1], residuals[-1]

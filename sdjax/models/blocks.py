"""The blocks of the UNet and of ControlNets: resnets, and transformers over an image's positions.

State-dict keys are those of diffusers' UNet2DConditionModel.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from sdjax.config import DownConfig, Stage, UNetConfig
from sdjax.models.layers import (
    ACTIVATIONS,
    Attention,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
)
from sdjax.models.resnet import Downsample, ResnetBlock, Upsample
from sdjax.models.token_merging import merging


class GEGLU(nnx.Module):
    """A linear layer whose second half gates its first (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, channels: int, hidden: int, **kw: Any):
        self.proj = Linear(channels, 2 * hidden, **kw)

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch hidden"]:
        x, gate = self.proj.split(x, 2)
        return x * ACTIVATIONS["gelu"](gate)


def _dropout(x: Array) -> Array:
    """Holds the place of diffusers' dropout, so that what follows keeps its index; no published model drops."""
    return x


class FeedForward(nnx.Module):
    """GEGLU and a linear layer."""

    def __init__(self, channels: int, **kw: Any):
        self.net = nnx.List([GEGLU(channels, 4 * channels, **kw), _dropout, Linear(4 * channels, channels, **kw)])

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Self-attention (to the context too if only_cross_attention), attention to the context, feed-forward.

    Attributes:
        token_merging_ratio: share of the tokens of which self-attention makes fewer, 0 to 0.75.
    """

    def __init__(self, stage: Stage, **kw: Any):
        channels = stage.channels
        self.token_merging_ratio = 0.0
        self.only_cross_attention = stage.only_cross_attention
        self.norm1 = LayerNorm(channels, 1e-5, **kw)
        self.attn1 = Attention(
            channels, stage.context_dim if stage.only_cross_attention else channels, stage.heads, **kw
        )
        self.norm2 = LayerNorm(channels, 1e-5, **kw)
        self.attn2 = Attention(channels, stage.context_dim, stage.heads, **kw)
        self.norm3 = LayerNorm(channels, 1e-5, **kw)
        self.ff = FeedForward(channels, **kw)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        context: Float[Array, "batch keys context"],
        size: tuple[int, int],
    ) -> Float[Array, "batch tokens channels"]:
        """size: height and width, of which the tokens are the positions."""
        merge, unmerge = merging(x, size, self.token_merging_ratio)
        x = x + unmerge(self.attn1(merge(self.norm1(x)), context if self.only_cross_attention else None))
        x = x + self.attn2(self.norm2(x), context)
        # Flat, or on a CPU XLA joins the norm and the product after it in one loop, which takes 1.4 times as long.
        flat = x.reshape(-1, x.shape[-1])
        return (flat + self.ff(self.norm3(flat))).reshape(x.shape)


# Values of a transformer's input that are handled at once. What is made of more does not stay in a TPU's vector memory,
# and products of few channels wait for what they read and write: a v5e takes 1.3 times as long, a v6e 1.4 (estimates).
VALUES_AT_ONCE = 6 * 2**20


def _images_at_once(shape: tuple[int, ...]) -> int:
    """Of a batch [batch, height, width, channels], in equal parts."""
    batch, *image = shape
    return max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * math.prod(image) <= VALUES_AT_ONCE))


class Transformer(nnx.Module):
    """Transformer blocks over an image's positions, between two projections (diffusers' Transformer2DModel)."""

    def __init__(self, config: DownConfig, stage: Stage, depth: int, **kw: Any):
        channels = stage.channels
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6, **kw)
        # Equal but for the shape of the stored kernel.
        self.proj_in, self.proj_out = (
            Linear(channels, channels, **kw) if config.use_linear_projection else Conv(channels, channels, 1, **kw)
            for _ in range(2)
        )
        self.transformer_blocks = nnx.List([TransformerBlock(stage, **kw) for _ in range(depth)])

    def __call__(
        self, x: Float[Array, "batch height width channels"], context: Float[Array, "batch keys context"]
    ) -> Float[Array, "batch height width channels"]:
        if _images_at_once(x.shape) == x.shape[0]:
            return self._whole(x, context)
        return jax.lax.platform_dependent(x, context, tpu=self._in_parts, default=self._whole)

    def _in_parts(self, x: Array, context: Array) -> Array:
        images = _images_at_once(x.shape)
        parts = (y.reshape(-1, images, *y.shape[1:]) for y in (x, context))
        return jax.lax.map(lambda part: self._whole(*part), tuple(parts)).reshape(x.shape)

    def _whole(self, x: Array, context: Array) -> Array:
        tokens = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            tokens = block(tokens, context, (x.shape[1], x.shape[2]))
        return x + self.proj_out(tokens.reshape(x.shape))


class Block(nnx.Module):
    """The resnets of a stage, `inputs` their input channels, and a transformer after each where the stage attends."""

    def __init__(
        self, config: DownConfig, stage: Stage, inputs: Sequence[int], output_scale_factor: float = 1.0, **kw: Any
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    in_channels,
                    stage.channels,
                    time_channels=4 * config.block_out_channels[0],
                    groups=config.norm_num_groups,
                    eps=config.norm_eps,
                    act_fn=config.act_fn,
                    scale_shift=config.resnet_time_scale_shift == "scale_shift",
                    output_scale_factor=output_scale_factor,
                    **kw,
                )
                for in_channels in inputs
            ]
        )
        self.attentions = nnx.List([Transformer(config, stage, depth, **kw) for depth in stage.depths])


class DownBlock(Block):
    """CrossAttnDownBlock2D and DownBlock2D; returns its output and what the up path will take."""

    def __init__(self, config: DownConfig, stage: Stage, in_channels: int, *, downsample: bool, **kw: Any):
        super().__init__(config, stage, [in_channels] + [stage.channels] * (stage.layers - 1), **kw)
        self.downsamplers = nnx.List([Downsample(stage.channels, **kw)] if downsample else [])

    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
    ) -> tuple[Float[Array, "batch new_height new_width channels"], list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """UNetMidBlock2DCrossAttn, a resnet, a transformer and a resnet; and UNetMidBlock2D, a resnet."""

    def __init__(self, config: DownConfig, stage: Stage, **kw: Any):
        inputs = [stage.channels] * (len(stage.depths) + 1)
        super().__init__(config, stage, inputs, config.mid_block_scale_factor, **kw)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
    ) -> Float[Array, "batch height width channels"]:
        x = self.resnets[0](x, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, context), temb)
        return x


class UpBlock(Block):
    """CrossAttnUpBlock2D and UpBlock2D; joins one of `skips` to each resnet's input and grows to `size` at last."""

    def __init__(self, config: UNetConfig, stage: Stage, inputs: Sequence[int], *, upsample: bool, **kw: Any):
        super().__init__(config, stage, inputs, **kw)
        self.upsamplers = nnx.List([Upsample(stage.channels, **kw)] if upsample else [])

    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        skips: Sequence[Float[Array, "batch height width _"]],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
        size: tuple[int, int] | None = None,
        *,
        first: int = 0,
    ) -> Float[Array, "batch new_height new_width channels"]:
        """`first` is the layer to begin from; there are as many as `skips`."""
        for i, skip in enumerate(skips, first):
            x = self.resnets[i](x, temb, skip)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, size)
        return x

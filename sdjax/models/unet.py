"""The text-conditional UNet of Stable Diffusion 1, 2 and XL (https://arxiv.org/abs/2112.10752, https://arxiv.org/abs/2307.01952).

State-dict keys are those of diffusers' UNet2DConditionModel. `DownPath` is also what a ControlNet is made of.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.config import DownConfig, UNetConfig
from sdjax.models.blocks import DownBlock, MidBlock, UpBlock
from sdjax.models.layers import (
    ACTIVATIONS,
    Conv,
    GroupNorm,
    TimestepEmbedding,
    timestep_embedding,
)


def skip_channels(config: DownConfig) -> list[int]:
    """Channels of each array that goes from the down path to the up path; a ControlNet adds a residual to each."""
    channels = [config.block_out_channels[0]]
    for i, stage in enumerate(config.down_stages):
        channels += [stage.channels] * (stage.layers + (i < len(config.down_stages) - 1))
    return channels


def make_up_blocks(config: UNetConfig, **kw: Any) -> nnx.List:
    """The up path of a UNet."""
    blocks = nnx.List([])
    skips = skip_channels(config)
    channels = config.block_out_channels[-1]
    for i, stage in enumerate(config.up_stages):
        before = [channels] + [stage.channels] * (stage.layers - 1)
        inputs = [size + skips.pop() for size in before]
        blocks.append(UpBlock(config, stage, inputs, upsample=i < len(config.up_stages) - 1, **kw))
        channels = stage.channels
    return blocks


class DownPath(nnx.Module):
    """What a UNet and a ControlNet share: time and size conditions, conv_in, down blocks and middle block.

    `remat` recomputes each block in the backward pass and so trades time for memory in training; values are the same.
    """

    def __init__(
        self,
        config: DownConfig,
        *,
        conv_in_kernel: int = 3,
        time_cond_proj_dim: int | None = None,
        dtype: DTypeLike,
        remat: bool = False,
        **kw: Any,
    ):
        kw["dtype"] = dtype
        channels = config.block_out_channels
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.conv_in = Conv(config.in_channels, channels[0], conv_in_kernel, **kw)
        self.time_embedding = TimestepEmbedding(
            channels[0], 4 * channels[0], act_fn=config.act_fn, cond_dim=time_cond_proj_dim, **kw
        )
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None  # the config has checked
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, 4 * channels[0], act_fn="silu", **kw
            )
        last = len(channels) - 1
        inputs = (channels[0], *channels)
        self.down_blocks = nnx.List(
            [
                DownBlock(config, stage, inputs[i], downsample=i < last, **kw)
                for i, stage in enumerate(config.down_stages)
            ]
        )
        self.mid_block = None if config.mid_stage is None else MidBlock(config, config.mid_stage, **kw)

    def run(self, block: Any, *args: Any, **static: Any) -> Any:
        """block(*args, **static), under `remat` recomputed in the backward pass."""
        if not self.remat:
            return block(*args, **static)
        return jax.checkpoint(lambda block, *args: block(*args, **static))(block, *args)

    def embed_time(
        self,
        t: Float[Array, " batch"],
        added_cond: Mapping[str, Array] | None,
        timestep_cond: Float[Array, "batch cond"] | None,
    ) -> Float[Array, "batch time"]:
        """The vector that every resnet is conditioned on. Raises ValueError if a condition is missing or surplus."""
        config = self.config
        wave = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        sinusoids = timestep_embedding(t, config.block_out_channels[0], **wave)
        temb = self.time_embedding(sinusoids.astype(self.dtype), timestep_cond)
        wanted = {"text_embeds", "time_ids"} if config.addition_embed_type == "text_time" else set()
        if set(added_cond or ()) != wanted:
            raise ValueError(f"added_cond has keys {sorted(added_cond or ())}; this network takes {sorted(wanted)}")
        if added_cond:
            assert config.addition_time_embed_dim is not None  # the config has checked
            ids = timestep_embedding(added_cond["time_ids"].reshape(-1), config.addition_time_embed_dim, **wave)
            parts = [added_cond["text_embeds"].astype(jnp.float32), ids.reshape(len(t), -1)]
            temb = temb + self.add_embedding(jnp.concatenate(parts, axis=-1).astype(self.dtype))
        return temb

    def down(
        self,
        x: Float[Array, "batch height width channels"],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
    ) -> tuple[Float[Array, "batch mid_height mid_width mid_channels"], list[Array]]:
        """From conv_in's output `x` through the middle block: its output, and one array for each of `skip_channels`."""
        skips = [x]
        for block in self.down_blocks:
            x, new = self.run(block, x, temb, context)
            skips += new
        if self.mid_block is not None:
            x = self.run(self.mid_block, x, temb, context)
        return x, skips


class UNet2DCondition(DownPath):
    """Predicts noise, velocity or image from a noisy latent; which of them, the checkpoint's scheduler config says."""

    config: UNetConfig

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
        remat: bool = False,
    ):
        kw: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs, "dtype": dtype}
        super().__init__(
            config,
            conv_in_kernel=config.conv_in_kernel,
            time_cond_proj_dim=config.time_cond_proj_dim,
            remat=remat,
            **kw,
        )
        self.up_blocks = make_up_blocks(config, **kw)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, config.block_out_channels[0], config.norm_eps, **kw)
        self.conv_out = Conv(config.block_out_channels[0], config.out_channels, config.conv_out_kernel, **kw)

    def __call__(
        self,
        x: Float[Array, "batch height width in"],
        t: Float[Array, " batch"],
        context: Float[Array, "batch keys context"],
        added_cond: Mapping[str, Array] | None = None,
        *,
        timestep_cond: Float[Array, "batch cond"] | None = None,
        down_block_additional_residuals: Sequence[Array] | None = None,
        mid_block_additional_residual: Array | None = None,
    ) -> Float[Array, "batch height width out"]:
        """The prediction for latents `x`, of any size, at timesteps `t` (fractions too) under text states `context`.

        `added_cond` is SDXL's {"text_embeds": [batch, pooled], "time_ids": [batch, 6] (the refiner's: 5)};
        `timestep_cond` is LCM's guidance embedding. The residuals are a ControlNet's: one for each array of
        `skip_channels`, and one for the middle block's output. Raises ValueError for a missing or surplus condition.
        """
        temb = self.embed_time(t, added_cond, timestep_cond)
        x = self.embed(x)
        residuals = down_block_additional_residuals or ()
        deep = self.deep(x, temb, context, residuals[1:], mid_block_additional_residual)
        return self.outer(x, temb, context, deep, residuals[0] if residuals else None)

    def merging(self, ratio: float) -> "UNet2DCondition":
        """The same parameters, with tokens merged at the finest resolution that attends; see `token_merging_ratio`."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        attending = [i for i, stage in enumerate(self.config.down_stages) if stage.depths]
        for i in attending[:1]:
            for block in (copy.down_blocks[i], copy.up_blocks[-1 - i]):
                for transformer in block.attentions:
                    for layer in transformer.transformer_blocks:
                        layer.token_merging_ratio = ratio
        return copy

    def embed(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch height width channels"]:
        """What the blocks begin from."""
        return self.conv_in(2 * x - 1 if self.config.center_input_sample else x)

    def deep(
        self,
        x: Float[Array, "batch height width channels"],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
        residuals: Sequence[Array] = (),
        middle: Array | None = None,
    ) -> Float[Array, "batch height width channels"]:
        """All blocks but the outermost layer: what changes little from step to step (https://arxiv.org/abs/2312.00858).

        residuals, middle: a ControlNet's, without the outermost.
        """
        x, (_, *skips) = self.down(x, temb, context)
        if residuals:
            skips = [skip + more for skip, more in zip(skips, residuals, strict=True)]
        if middle is not None:
            x = x + middle
        for block in self.up_blocks:
            count = len(block.resnets) - (block is self.up_blocks[-1])
            taken, skips = skips[len(skips) - count :][::-1], skips[: len(skips) - count]
            size = skips[-1].shape[1:3] if skips else None
            x = self.run(block, x, taken, temb, context, size=size)
        return x

    def outer(
        self,
        x: Float[Array, "batch height width channels"],
        temb: Float[Array, "batch time"],
        context: Float[Array, "batch keys context"],
        deep: Float[Array, "batch height width channels"],
        residual: Float[Array, "batch height width channels"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """The outermost layer, on `deep`, and the way out.  residual: a ControlNet's outermost."""
        skip = x if residual is None else x + residual
        block = self.up_blocks[-1]
        x = self.run(block, deep, [skip], temb, context, first=len(block.resnets) - 1)
        return self.conv_out(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(x)))

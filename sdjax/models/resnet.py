"""Resnets, and the convolutions that halve and double an image's sides: what the UNet and the VAE are mostly made of.

Names and layouts are as in `layers`.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sdjax.models.convolution import Padding, doubled
from sdjax.models.layers import ACTIVATIONS, Conv, GroupNorm, Linear


class ResnetBlock(nnx.Module):
    """Two normalised 3x3 convolutions around a residual, the time embedding between them (diffusers' ResnetBlock2D).

    `time_channels=None` leaves the time out; `scale_shift` applies it as a scale and a shift after the second norm,
    not as a sum before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None = None,
        groups: int,
        eps: float,
        act_fn: str,
        scale_shift: bool = False,
        output_scale_factor: float = 1.0,
        **kw: Any,
    ):
        self.act_fn = act_fn
        self.scale_shift = scale_shift
        self.output_scale_factor = output_scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps, **kw)
        self.conv1 = Conv(in_channels, out_channels, **kw)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels * (2 if scale_shift else 1), **kw)
        self.norm2 = GroupNorm(groups, out_channels, eps, **kw)
        self.conv2 = Conv(out_channels, out_channels, **kw)
        self.conv_shortcut = Conv(in_channels, out_channels, 1, **kw) if in_channels != out_channels else None

    def __call__(
        self,
        x: Float[Array, "batch height width _"],
        temb: Float[Array, "batch time"] | None = None,
        skip: Float[Array, "batch height width _"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """skip: the last of the input's channels, where x has not them all."""
        act = ACTIVATIONS[self.act_fn]
        parts = [x] if skip is None else [x, skip]
        y = self.conv1.of_parts([act(part) for part in self.norm1.of_parts(parts)])
        if temb is None:
            y = self.norm2(y)
        else:
            time = self.time_emb_proj(act(temb))[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                y = self.norm2(y) * (1 + scale) + shift
            else:
                y = self.norm2(y + time)
        y = self.conv2(act(y))
        x = jnp.concatenate(parts, axis=-1) if self.conv_shortcut is None else self.conv_shortcut.of_parts(parts)
        return (x + y) / self.output_scale_factor


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2; `padding` as in Conv, around the image unless given."""

    def __init__(self, channels: int, *, padding: Padding | None = None, **kw: Any):
        self.conv = Conv(channels, channels, stride=2, padding=padding, **kw)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch half_h half_w channels"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel doubled along both sides, cropped to `size`, and a 3x3 convolution.

    Cropping is what nearest-neighbour interpolation to an odd `size` = 2 n - 1 amounts to.
    """

    def __init__(self, channels: int, **kw: Any):
        self.conv = Conv(channels, channels, **kw)

    def __call__(
        self, x: Float[Array, "batch height width channels"], size: tuple[int, int] | None = None
    ) -> Float[Array, "batch new_height new_width channels"]:
        if size is None or size == (2 * x.shape[1], 2 * x.shape[2]):
            return self.conv.of_doubled(x)
        return self.conv(doubled(x)[:, : size[0], : size[1]])

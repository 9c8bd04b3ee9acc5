"""config.json of the autoencoders."""

import dataclasses
from typing import Any, ClassVar

from sdjax.config.base import ACTIVATIONS, MAX_LAYERS, Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(Config):
    """config.json of diffusers' AutoencoderKL."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] | None = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    inert: ClassVar[dict[str, Any]] = {"shift_factor": None, "latents_mean": None, "latents_std": None}

    def __post_init__(self) -> None:
        self._counts("in_channels", "out_channels", "latent_channels", "norm_num_groups")
        self._counts("layers_per_block", most=MAX_LAYERS)
        self._positive("scaling_factor")
        self._flags("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        self._size("sample_size")
        self._one_of("act_fn", ACTIVATIONS)
        self._channels()
        self._kinds("down_block_types", "DownEncoderBlock2D")
        self._kinds("up_block_types", "UpDecoderBlock2D")

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(Config):
    """config.json of diffusers' AutoencoderTiny.

    Blocks of other widths than the first do not fit together in diffusers either.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    force_upcast: ClassVar[bool] = False
    inert: ClassVar[dict[str, Any]] = {
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }
    # What latents are limited to when stored as bytes; a copy of decoder_block_out_channels; and what diffusers sets
    # to false whatever the file says.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("latent_magnitude", "latent_shift", "block_out_channels", "force_upcast")
    )

    def __post_init__(self) -> None:
        self._counts("in_channels", "out_channels", "latent_channels")
        self._positive("scaling_factor")
        self._one_of("act_fn", ACTIVATIONS)
        self._counts_list(*(f"{part}_block_out_channels" for part in ("encoder", "decoder")))
        self._counts_list(*(f"num_{part}_blocks" for part in ("encoder", "decoder")), most=MAX_LAYERS)
        levels = len(self.num_encoder_blocks)
        for part in ("encoder", "decoder"):
            channels, key = getattr(self, f"{part}_block_out_channels"), f"{part}_block_out_channels"
            self._require(len(set(channels)) == 1, key, "one number, repeated")
            self._require(len(channels) == levels, key, f"as long as num_encoder_blocks ({levels})")
        self._require(len(self.num_decoder_blocks) == levels, "num_decoder_blocks", f"{levels} numbers")

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

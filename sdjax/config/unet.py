"""config.json of the UNet and of the ControlNets beside it."""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from sdjax.config.base import ACTIVATIONS, MAX_COUNT, MAX_LAYERS, Config, is_count, is_layers


class Stage(NamedTuple):
    """One resolution of a UNet.

    `depths` holds the number of transformer layers after each resnet and is empty where the stage has no attention.
    """

    channels: int
    layers: int
    depths: tuple[int, ...]
    heads: int
    context_dim: int
    only_cross_attention: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownConfig(Config):
    """What the configs of a UNet and of a ControlNet share: conditions, the way down and the middle.

    `attention_head_dim` is the *number* of attention heads: diffusers misnamed it and files keep the name.
    `upcast_attention` is accepted and has no effect: attention scores and their softmax are float32 here in any case.
    """

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"

    inert: ClassVar[dict[str, Any]] = {
        "addition_embed_type_num_heads": 64,
        "class_embed_type": None,
        "downsample_padding": 1,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "num_class_embeds": None,
    }
    # diffusers' EMAModel saves its own settings into the network's config.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup")
    )

    def __post_init__(self) -> None:
        self._counts("in_channels", "norm_num_groups")
        self._positive("norm_eps", "mid_block_scale_factor")
        self._flags("flip_sin_to_cos", "use_linear_projection")
        self._require(self.upcast_attention in (True, False, None), "upcast_attention", "true, false or null")
        self._optional_counts("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        self._one_of("act_fn", ACTIVATIONS)
        self._one_of("resnet_time_scale_shift", ("default", "scale_shift"))
        self._one_of("addition_embed_type", ("text_time", None))
        self._one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))
        blocks = self._channels()
        self._kinds("down_block_types", "CrossAttnDownBlock2D", "DownBlock2D")
        self._require(self.block_out_channels[0] % 2 == 0, "block_out_channels", "even in its first entry")
        half = self.block_out_channels[0] // 2
        self._as_float("freq_shift")
        self._require(self.freq_shift < half, "freq_shift", f"a number below {half}")
        if self.addition_embed_type == "text_time":
            self._counts("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        for key, is_item, most in (
            ("layers_per_block", is_layers, MAX_LAYERS),
            ("cross_attention_dim", is_count, MAX_COUNT),
            ("attention_head_dim", is_count, MAX_COUNT),
        ):
            allowed = f"a positive integer up to {most:,} or a list of {blocks}"
            self._require(self._fits(key, is_item, blocks), key, allowed)
        self._require(
            self._fits("only_cross_attention", lambda v: isinstance(v, bool), blocks),
            "only_cross_attention",
            f"a boolean or a list of {blocks}",
        )
        heads = self._spread("attention_head_dim")
        self._require(
            all(c % h == 0 for c, h in zip(self.block_out_channels, heads, strict=True)),
            "attention_head_dim",
            "divisors of block_out_channels (it counts heads)",
        )
        depths, key = self._spread("transformer_layers_per_block"), "transformer_layers_per_block"
        self._require(len(depths) == blocks, key, f"a whole number or a list of {blocks}")
        self._require(
            all(map(_are_depths, depths, self._spread("layers_per_block"))),
            key,
            f"whole numbers up to {MAX_LAYERS}, or lists with one for each of a block's layers",
        )

    def _optional_counts(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self, key)
            self._require(value is None or is_count(value), key, f"a positive integer up to {MAX_COUNT:,} or null")

    def _fits(self, key: str, is_item: Any, blocks: int) -> bool:
        value = getattr(self, key)
        return is_item(value) or (isinstance(value, tuple) and len(value) == blocks and all(map(is_item, value)))

    def _spread(self, key: str) -> tuple[Any, ...]:
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def _stages(self, kinds: tuple[str, ...], depths: Iterable[int | tuple[int, ...]], extra: int) -> tuple[Stage, ...]:
        """Stages from the outermost resolution inwards, each with `extra` layers more than layers_per_block."""
        stages = []
        for i, (kind, depth) in enumerate(zip(kinds, depths, strict=True)):
            layers = self._spread("layers_per_block")[i] + extra
            stages.append(
                Stage(
                    channels=self.block_out_channels[i],
                    layers=layers,
                    depths=()
                    if not kind.startswith("CrossAttn")
                    else depth
                    if isinstance(depth, tuple)
                    else (depth,) * layers,
                    heads=self._spread("attention_head_dim")[i],
                    context_dim=self._spread("cross_attention_dim")[i],
                    only_cross_attention=self._spread("only_cross_attention")[i],
                )
            )
        return tuple(stages)

    @property
    def down_stages(self) -> tuple[Stage, ...]:
        """The down blocks in the order they run."""
        return self._stages(self.down_block_types, self._spread("transformer_layers_per_block"), 0)

    @property
    def mid_stage(self) -> Stage | None:
        """The middle block, which where it attends does so to its own tokens too; None where there is none."""
        if self.mid_block_type is None:
            return None
        depth = self._spread("transformer_layers_per_block")[-1]
        depth = depth[0] if isinstance(depth, tuple) else depth
        depths = (depth,) if self.mid_block_type == "UNetMidBlock2DCrossAttn" else ()
        heads, context_dim = self._spread("attention_head_dim")[-1], self._spread("cross_attention_dim")[-1]
        return Stage(self.block_out_channels[-1], 1, depths, heads, context_dim, False)


def _is_depth(value: Any) -> bool:
    """Whether it is a number of transformer layers; of none, as in the small ControlNets of SDXL, projections stay."""
    return is_layers(value) or (type(value) is int and value == 0)


def _are_depths(value: Any, layers: int) -> bool:
    return _is_depth(value) or (isinstance(value, tuple) and len(value) == layers and all(map(_is_depth, value)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(DownConfig):
    """config.json of diffusers' UNet2DConditionModel, as far as Stable Diffusion 1, 2 and XL and their variants go."""

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    center_input_sample: bool = False
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    inert: ClassVar[dict[str, Any]] = DownConfig.inert | {
        "attention_type": "default",
        "class_embeddings_concat": False,
        "cross_attention_norm": None,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "mid_block_only_cross_attention": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._counts("out_channels", "conv_in_kernel", "conv_out_kernel")
        self._flags("center_input_sample")
        self._optional_counts("time_cond_proj_dim")
        for key in ("conv_in_kernel", "conv_out_kernel"):
            self._require(getattr(self, key) % 2 == 1, key, "odd")
        self._size("sample_size")
        self._kinds("up_block_types", "CrossAttnUpBlock2D", "UpBlock2D")
        self._check_up_depths()

    def _check_up_depths(self) -> None:
        key, blocks = "reverse_transformer_layers_per_block", len(self.block_out_channels)
        depths = self.reverse_transformer_layers_per_block
        if depths is None:
            self._require(
                all(map(_is_depth, self._spread("transformer_layers_per_block"))),
                "transformer_layers_per_block",
                f"without lists inside unless {key} is given",
            )
            return
        ups = [count + 1 for count in reversed(self._spread("layers_per_block"))]
        self._require(isinstance(depths, tuple) and len(depths) == blocks, key, f"null or a list of {blocks}")
        self._require(
            all(map(_are_depths, depths, ups)),
            key,
            f"whole numbers up to {MAX_LAYERS}, or lists with one for each of an up block's layers",
        )

    @property
    def up_stages(self) -> tuple[Stage, ...]:
        """The up blocks in the order they run: the innermost resolution first."""
        reverse = self.reverse_transformer_layers_per_block
        depths = self._spread("transformer_layers_per_block") if reverse is None else reverse[::-1]
        return self._stages(self.up_block_types[::-1], depths, 1)[::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(DownConfig):
    """config.json of diffusers' ControlNetModel (https://arxiv.org/abs/2302.05543).

    The first of `conditioning_embedding_out_channels` is at the size of the condition, each further one at half.
    """

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._counts("conditioning_channels", "cross_attention_dim")
        self._counts("layers_per_block", most=MAX_LAYERS)
        self._counts_list("conditioning_embedding_out_channels")
        self._one_of("controlnet_conditioning_channel_order", ("rgb", "bgr"))
        self._flags("global_pool_conditions")
        self._require(self.mid_block_type is not None, "mid_block_type", "a middle block")

    @property
    def downscale(self) -> int:
        """Pixels of the condition per latent along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

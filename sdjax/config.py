"""The networks' config.json files as strict dataclasses.

Field names and defaults are those of diffusers (UNet2DConditionModel, AutoencoderKL) and transformers
(CLIPTextConfig), because a config file may leave out any field. A value that the networks here cannot honour raises
ConfigError; so does a key nobody knows. Keys that those libraries write but that select features this package does
not have are accepted at the value that switches them off.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
TEXT_ACTIVATIONS = ("quick_gelu", "gelu")


class ConfigError(ValueError):
    """A config.json value that is not supported; the message names the key, the value and what is allowed."""


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


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Config:
    """What the three configs share: reading a JSON object strictly, and checks whose errors name their key."""

    inert: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    sample_size: int | tuple[int, int] | None
    block_out_channels: tuple[int, ...]
    norm_num_groups: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The config that the JSON object `config` describes. Raises ConfigError."""
        names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        for key, value in config.items():
            if key in names or key in cls.ignored or key.startswith("_"):
                continue
            if key not in cls.inert:
                raise ConfigError(f"{cls.__name__}: unknown key {key}={value!r}")
            if _tuples(value) != cls.inert[key]:
                raise ConfigError(f"{cls.__name__}: {key}={value!r} is not supported; it must be {cls.inert[key]!r}")
        return cls(**{key: _tuples(value) for key, value in config.items() if key in names})

    def _as_float(self, *keys: str) -> None:
        """Store numbers as floats: JSON writes 1 for 1.0."""
        for key in keys:
            value = getattr(self, key)
            self._require(_is_number(value), key, "a number")
            object.__setattr__(self, key, float(value))

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}: {key}={getattr(self, key)!r} is not supported; it must be {allowed}"
            )

    def _counts(self, *keys: str) -> None:
        for key in keys:
            self._require(_is_count(getattr(self, key)), key, "a positive integer")

    def _positive(self, *keys: str) -> None:
        self._as_float(*keys)
        for key in keys:
            self._require(getattr(self, key) > 0, key, "a positive number")

    def _flags(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "true or false")

    def _one_of(self, key: str, allowed: Iterable[Any]) -> None:
        allowed = tuple(allowed)
        self._require(getattr(self, key) in allowed, key, f"one of {', '.join(map(str, allowed))}")

    def _sample_size(self) -> None:
        size = self.sample_size
        pair = isinstance(size, tuple) and len(size) == 2 and all(map(_is_count, size))
        self._require(
            size is None or _is_count(size) or pair, "sample_size", "a positive integer, a pair of them, or null"
        )

    def _channels(self, down: str, up: str, allowed_down: Iterable[str], allowed_up: Iterable[str]) -> int:
        """Check block_out_channels and both lists of block types against each other; returns the number of blocks."""
        channels = self.block_out_channels
        self._require(
            isinstance(channels, tuple) and channels != () and all(map(_is_count, channels)),
            "block_out_channels",
            "a list of positive integers",
        )
        groups = self.norm_num_groups
        self._require(
            all(c % groups == 0 for c in channels), "block_out_channels", f"multiples of norm_num_groups={groups}"
        )
        for key, allowed in ((down, tuple(allowed_down)), (up, tuple(allowed_up))):
            kinds = getattr(self, key)
            self._require(
                isinstance(kinds, tuple) and all(k in allowed for k in kinds), key, f"a list of {', '.join(allowed)}"
            )
            self._require(len(kinds) == len(channels), key, f"as long as block_out_channels ({len(channels)})")
        return len(channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(_Config):
    """config.json of diffusers' UNet2DConditionModel, as far as Stable Diffusion 1, 2 and XL and their variants go.

    `attention_head_dim` is the *number* of attention heads: diffusers misnamed it and files keep the name.
    `upcast_attention` is accepted and has no effect: attention scores and their softmax are float32 here in any case.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3

    inert: ClassVar[dict[str, Any]] = {
        "addition_embed_type_num_heads": 64,
        "attention_type": "default",
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }
    # diffusers' EMAModel saves its own settings into the network's config.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step", "use_ema_warmup")
    )

    def __post_init__(self) -> None:
        self._counts("in_channels", "out_channels", "norm_num_groups", "conv_in_kernel", "conv_out_kernel")
        self._positive("norm_eps", "mid_block_scale_factor")
        self._flags("center_input_sample", "flip_sin_to_cos", "use_linear_projection")
        self._require(self.upcast_attention in (True, False, None), "upcast_attention", "true, false or null")
        for key in ("conv_in_kernel", "conv_out_kernel"):
            self._require(getattr(self, key) % 2 == 1, key, "odd")
        for key in ("time_cond_proj_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            value = getattr(self, key)
            self._require(value is None or _is_count(value), key, "a positive integer or null")
        self._sample_size()
        self._one_of("act_fn", ACTIVATIONS)
        self._one_of("resnet_time_scale_shift", ("default", "scale_shift"))
        self._one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", None))
        self._one_of("addition_embed_type", ("text_time", None))
        blocks = self._channels(
            "down_block_types",
            "up_block_types",
            ("CrossAttnDownBlock2D", "DownBlock2D"),
            ("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        self._require(self.block_out_channels[0] % 2 == 0, "block_out_channels", "even in its first entry")
        half = self.block_out_channels[0] // 2
        self._as_float("freq_shift")
        self._require(self.freq_shift < half, "freq_shift", f"a number below {half}")
        if self.addition_embed_type == "text_time":
            self._counts("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        for key in ("layers_per_block", "cross_attention_dim", "attention_head_dim"):
            self._require(self._fits(key, _is_count, blocks), key, f"a positive integer or a list of {blocks}")
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
        self._check_depths(blocks)

    def _fits(self, key: str, is_item: Any, blocks: int) -> bool:
        value = getattr(self, key)
        return is_item(value) or (isinstance(value, tuple) and len(value) == blocks and all(map(is_item, value)))

    def _spread(self, key: str) -> tuple[Any, ...]:
        value = getattr(self, key)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def _check_depths(self, blocks: int) -> None:
        key, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
        layers = self._spread("layers_per_block")
        depths = self._spread(key)

        def item(value: Any, count: int) -> bool:
            return _is_count(value) or (isinstance(value, tuple) and len(value) == count and all(map(_is_count, value)))

        self._require(len(depths) == blocks, key, f"a positive integer or a list of {blocks}")
        self._require(
            all(map(item, depths, layers)), key, "positive integers, or lists with one for each of a block's layers"
        )
        if self.reverse_transformer_layers_per_block is not None:
            depths = self.reverse_transformer_layers_per_block
            ups = [count + 1 for count in reversed(layers)]
            self._require(isinstance(depths, tuple) and len(depths) == blocks, reverse, f"null or a list of {blocks}")
            self._require(
                all(map(item, depths, ups)),
                reverse,
                "positive integers, or lists with one for each of an up block's layers",
            )
        else:
            self._require(all(map(_is_count, depths)), key, f"without lists inside unless {reverse} is given")

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
        """The middle block, which always attends to its own tokens too; None where there is no middle block."""
        if self.mid_block_type is None:
            return None
        depth = self._spread("transformer_layers_per_block")[-1]
        depth = depth[0] if isinstance(depth, tuple) else depth
        heads, context_dim = self._spread("attention_head_dim")[-1], self._spread("cross_attention_dim")[-1]
        return Stage(self.block_out_channels[-1], 1, (depth,), heads, context_dim, False)

    @property
    def up_stages(self) -> tuple[Stage, ...]:
        """The up blocks in the order they run: the innermost resolution first."""
        reverse = self.reverse_transformer_layers_per_block
        depths = self._spread("transformer_layers_per_block") if reverse is None else reverse[::-1]
        return self._stages(self.up_block_types[::-1], depths, 1)[::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(_Config):
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
        self._counts("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        self._positive("scaling_factor")
        self._flags("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        self._sample_size()
        self._one_of("act_fn", ACTIVATIONS)
        self._channels("down_block_types", "up_block_types", ("DownEncoderBlock2D",), ("UpDecoderBlock2D",))

    @property
    def downscale(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(_Config):
    """config.json of transformers' CLIPTextModel and CLIPTextModelWithProjection.

    `eos_token_id=2` is what transformers wrote before 4.31 for every model, whatever its tokenizer: it means that the
    pooled token is the one with the highest id.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    inert: ClassVar[dict[str, Any]] = {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "model_type": "clip_text_model",
        "use_attention_mask": False,
    }
    # Bookkeeping that changes no output.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("architectures", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")
        + (
            "gradient_checkpointing",
            "initializer_factor",
            "initializer_range",
            "return_dict",
            "output_hidden_states",
            "output_attentions",
        )
    )

    def __post_init__(self) -> None:
        self._counts("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers")
        self._counts("num_attention_heads", "max_position_embeddings")
        self._positive("layer_norm_eps")
        self._one_of("hidden_act", TEXT_ACTIVATIONS)
        self._require(isinstance(self.eos_token_id, int) and self.eos_token_id >= 0, "eos_token_id", "a token id")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            f"a divisor of hidden_size={self.hidden_size}",
        )

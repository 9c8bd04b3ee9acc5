"""The training configuration: a TOML file as strict dataclasses. No JAX here.

A key that is unknown or of the wrong type is an error that names it. The `[model]` tables hold the keys of the
components' own config.json files and are checked by `sdjax.config`.
"""

import dataclasses
import math
import os
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class TrainConfigError(ValueError):
    """A training configuration that cannot be used; the message is one line naming the key."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where examples come from: exactly one of `folder`, `shards`, `latents` and `generator`."""

    folder: str | None = None  # images with metadata.jsonl or .txt captions: a folder or an fsspec URL
    shards: str | None = None  # WebDataset tar files: a path or fsspec URL, with * ? [] patterns
    latents: str | None = None  # what `python -m pipelines.encode_latents` wrote: a folder or an fsspec URL
    generator: str | None = None  # "module:Class", a source made from `options`
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 512  # images are cut and scaled to size x size
    aspect_ratio_buckets: tuple[tuple[int, ...], ...] = ()  # [height, width] each, of which the nearest takes its place
    workers: int = 2
    caption: str | None = None  # of pictures that have none
    caption_chunks: int = 1  # of 75 tokens, after which a caption is cut
    flip: bool = False  # half of the pictures, drawn anew at each visit
    cache_latents: bool = False  # encode the whole data set once before the first step


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with a linear warm-up, a constant rate and a decay to zero over the last `decay_steps`."""

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay_steps: int = 0
    schedule: Literal["linear", "cosine"] = "linear"  # of the decay
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0  # on matrices and kernels only
    clip_norm: float = 1.0  # of the whole gradient; 0 is none
    accumulate: int = 1  # a step's batch is worked off in this many parts
    ema_decay: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The UNet's objective; epsilon, v or sample is what the scheduler's `prediction_type` says."""

    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    caption_dropout: float = 0.1
    train_text_encoder: bool = False
    in_channels: int | None = None  # of the UNet, where init's takes fewer: what is new begins at zero


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is trained in place of the networks themselves, where the rank is not 0."""

    rank: int = 0
    init: str | None = None  # one to go on from: a folder, hub id, fsspec URL or file


@dataclass(frozen=True, kw_only=True)
class ControlNet:
    """Where a ControlNet begins: at another, or as a copy of the UNet's way down."""

    init: str | None = None  # a folder, hub id, fsspec URL or single file


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """The VAE's objective: absolute and squared error, and the weights of that of its edges and of KL."""

    edges: float = 0.0
    kl: float = 1e-6
    decoder_only: bool = False  # the encoder stays, and with it every UNet that was trained on its latents


@dataclass(frozen=True, kw_only=True)
class Model:
    """Components to make from scratch, by the keys of their config.json; the others come from `init`."""

    unet: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    tokenizer: dict[str, int] | None = None  # merges, max_length: trained on the captions of the data


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training run."""

    task: Literal["vae", "unet", "controlnet"]
    output: str
    steps: int
    batch_size: int  # of all devices and accumulated parts together
    data: Data
    init: str | None = None  # a checkpoint: a folder, hub id, fsspec URL or single file
    prediction_type: str | None = None  # of a single file that does not say it: epsilon or v_prediction
    tokenizer: str | None = None  # of a single file: a folder, hub id or fsspec URL; None is CLIP's on the hub
    allow_ckpt: bool = False  # whether weights to start from may be PyTorch's own files
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and optimizer are float32
    remat: bool = False  # gradient checkpointing of the UNet: each block is computed again in the backward pass
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    diffusion: Diffusion = Diffusion()
    lora: Lora = Lora()
    controlnet: ControlNet = ControlNet()
    reconstruction: Reconstruction = Reconstruction()
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    sheet_every: int = 1000
    sheet_prompts: tuple[str, ...] = ()
    sheet_images: tuple[str, ...] = ()  # of each prompt the control image, or the picture that is edited

    @property
    def denoises(self) -> bool:
        """Whether what is trained removes noise from latents: a UNet, or a ControlNet beside it."""
        return self.task != "vae"

    @property
    def has_sheets(self) -> bool:
        """Whether there is anything to show: a VAE's are of the data."""
        return self.task == "vae" or bool(self.sheet_prompts)

    @property
    def result(self) -> str:
        """What is left at the end, which is also its folder's name: a model, a lora or a controlnet."""
        return "lora" if self.lora.rank else "controlnet" if self.task == "controlnet" else "model"


_RANGES: list[tuple[str, Callable[[Any], bool], tuple[str, ...]]] = [
    (
        "be at least 1",
        lambda value: value >= 1,
        ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "sheet_every")
        + ("data.size", "data.workers", "optimizer.accumulate", "diffusion.in_channels"),
    ),
    (
        "be at least 0",
        lambda value: value >= 0,
        ("optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.clip_norm", "lora.rank"),
    ),
    (
        "be at least 0 and finite",
        lambda value: 0 <= value < math.inf,
        ("optimizer.weight_decay", "diffusion.offset_noise", "reconstruction.edges", "reconstruction.kl"),
    ),
    ("be above 0 and finite", lambda value: 0 < value < math.inf, ("optimizer.learning_rate",)),
    ("be above 0", lambda value: value > 0, ("diffusion.min_snr_gamma",)),
    ("lie between 0 and 1", lambda value: 0 <= value <= 1, ("diffusion.caption_dropout", "optimizer.ema_decay")),
    ("be at least 0 and below 1", lambda value: 0 <= value < 1, ("optimizer.beta1", "optimizer.beta2")),
    ("lie between 1 and 8", lambda value: 1 <= value <= 8, ("data.caption_chunks",)),
    ("be at least 0 and below 2**32", lambda value: 0 <= value < 2**32, ("seed",)),
]
_OTHERS = {  # what only other tasks' runs look at
    "vae": (
        *("remat", "sheet_prompts", "sheet_images", "data.cache_latents", "data.caption", "data.aspect_ratio_buckets"),
        *("diffusion.", "lora.", "controlnet."),
        *("model.unet", "model.text_encoder", "model.scheduler", "model.tokenizer"),
    ),
    "unet": ("reconstruction.", "controlnet."),
    "controlnet": ("reconstruction.", "lora.", "model.", "diffusion.train_text_encoder", "diffusion.in_channels"),
}
_BEFORE_LATENTS = (  # what has no part in training on latents that another run encoded
    *("model.vae", "model.text_encoder", "model.tokenizer", "diffusion.train_text_encoder"),
    *("data.flip", "data.caption", "data.size", "data.cache_latents", "data.aspect_ratio_buckets"),
    "data.caption_chunks",
)


def load(path: str | Path, **overrides: Any) -> Train:
    """Read a TOML file; `overrides` replace top-level keys where they are not None.

    Raises:
        TrainConfigError: the file, or a key of it, cannot be used.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainConfigError(f"{path} is not there; configs/ holds examples") from None
    except OSError as error:
        raise TrainConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainConfigError(f"{path} is not TOML: {error}") from None
    config = build(Train, table | {key: value for key, value in overrides.items() if value is not None})
    check(config)
    # ~, as fsspec reads the data's
    starts = (config.init, config.lora.init, config.controlnet.init)
    init, lora, controlnet = (None if path is None else os.path.expanduser(path) for path in starts)
    return dataclasses.replace(
        config,
        output=os.path.expanduser(config.output),
        init=init,
        lora=dataclasses.replace(config.lora, init=lora),
        controlnet=ControlNet(init=controlnet),
    )


def build(kind: Any, value: Any, name: str = "") -> Any:
    """Return `value` as `kind`: a dataclass from a table, or a checked value."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TrainConfigError(f"{name} is a table, not {value!r}")
        hints, prefix = typing.get_type_hints(kind), f"{name}." if name else ""
        if unknown := sorted(set(value) - set(hints)):
            raise TrainConfigError(f"{prefix}{unknown[0]} is no option; there are {', '.join(sorted(hints))}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory}  # both MISSING
        if missing := sorted(required - set(value)):
            raise TrainConfigError(f"{prefix}{missing[0]} is missing")
        made: Any = kind
        return made(**{key: build(hints[key], item, prefix + key) for key, item in value.items()})
    if isinstance(kind, types.UnionType):  # "X | None"
        return build(kind.__args__[0], value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise TrainConfigError(f"{name} is {value!r}; it can be {' or '.join(map(repr, arguments))}")
        return value
    if origin is dict and isinstance(value, dict):
        return {
            key: item if arguments[1] is Any else build(arguments[1], item, f"{name}.{key}")
            for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list):
        return tuple(build(arguments[0], item, name) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not (origin or kind):
        wanted = {tuple: "list", dict: "table"}.get(origin or kind, kind.__name__)
        raise TrainConfigError(f"{name} is {value!r}; it must be of type {wanted}")
    return value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by their whole names, `optimizer.beta1`."""
    found = {}
    for each in dataclasses.fields(value):
        item, name = getattr(value, each.name), f"{prefix}{each.name}"
        found |= flat(item, f"{name}.") if dataclasses.is_dataclass(item) else {name: item}
    return found


def check(config: Train) -> None:
    """Raise TrainConfigError where a value is out of range, does nothing, or does not go with another."""
    data, values = config.data, flat(config)
    defaults = flat(Train(task=config.task, output="", steps=1, batch_size=1, data=Data()))
    if sum(source is not None for source in (data.folder, data.shards, data.latents, data.generator)) != 1:
        raise TrainConfigError("data must name exactly one of folder, shards, latents and generator")
    if data.options and data.generator is None:
        raise TrainConfigError("data.options does nothing without data.generator; take it out")
    if config.init is None:
        for name in ("prediction_type", "tokenizer", "allow_ckpt"):
            if getattr(config, name):
                raise TrainConfigError(f"{name} does nothing without init; take it out")
    elif config.model.tokenizer is not None and config.model.text_encoder is None:
        raise TrainConfigError(
            "model.tokenizer does not go with the text encoder of init, which knows other ids; describe one in "
            "model.text_encoder"
        )
    if data.latents is not None:
        fresh = [name for name in _BEFORE_LATENTS if values[name] != defaults[name]]
        if fresh := fresh + [f"task {config.task}"] * (config.task != "unet"):
            raise TrainConfigError(f"{fresh[0]} does not go with data.latents, which another run has encoded already")
    if data.flip and data.cache_latents:
        raise TrainConfigError("data.flip does not go with data.cache_latents: pictures are encoded once")
    if data.caption is not None and data.generator is not None:
        raise TrainConfigError("data.caption does nothing with data.generator, which has its own; take it out")
    shapes = data.aspect_ratio_buckets
    if shapes and data.generator is not None:
        raise TrainConfigError(
            "data.aspect_ratio_buckets does not go with data.generator, whose pictures have one size"
        )
    for number, shape in enumerate(shapes):
        if len(shape) != 2 or min(shape) < 1:
            raise TrainConfigError(f"data.aspect_ratio_buckets has {list(shape)}; each is [height, width] in pixels")
        if shape in shapes[:number]:
            raise TrainConfigError(f"data.aspect_ratio_buckets has {list(shape)} twice; take one out")
    if config.optimizer.schedule != Optimizer.schedule and not config.optimizer.decay_steps:
        raise TrainConfigError("optimizer.schedule does nothing without optimizer.decay_steps; take it out")
    if config.lora.init is not None and not config.lora.rank:
        raise TrainConfigError("lora.init does nothing without lora.rank; take it out")
    if config.lora.rank:
        for name in (name for name in values if name.startswith("model.") and values[name] is not None):
            raise TrainConfigError(f"{name} does not go with lora.rank: a LoRA belongs to the model in init")
    if config.task == "controlnet" and config.init is None:
        raise TrainConfigError("init is missing: the model that the ControlNet is for")
    if config.diffusion.in_channels is not None and (config.lora.rank or config.model.unet is not None):
        other = "lora.rank" if config.lora.rank else "model.unet"
        raise TrainConfigError(f"diffusion.in_channels does not go with {other}: it widens the whole UNet of init")
    shown = config.sheet_images or config.task == "controlnet"
    if shown and len(config.sheet_images) != len(config.sheet_prompts):
        counts = f"{len(config.sheet_images)} for {len(config.sheet_prompts)} sheet_prompts"
        raise TrainConfigError(f"sheet_images has {counts}; give one for each")
    for what, allowed, names in _RANGES:
        for name in names:
            if values[name] is not None and not allowed(values[name]):
                raise TrainConfigError(f"{name} is {values[name]}; it must {what}")
    for name in values:
        if name.startswith(_OTHERS[config.task]) and values[name] != defaults[name]:
            raise TrainConfigError(f"{name} does nothing where task is {config.task!r}; take it out")
    if config.reconstruction.decoder_only and config.optimizer.weight_decay:
        raise TrainConfigError("optimizer.weight_decay does not go with reconstruction.decoder_only: the encoder stays")
    if config.optimizer.warmup_steps + config.optimizer.decay_steps > config.steps:
        raise TrainConfigError("optimizer.warmup_steps and decay_steps together are more than steps")

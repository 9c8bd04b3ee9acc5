"""How a run begins: its networks made from scratch or read from a checkpoint, and found to fit each other."""

import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax import family
from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.config.base import MAX_COUNT
from sdjax.family import TOKENIZERS, Family
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet2DCondition
from sdjax.models.vae import AutoencoderKL
from sdjax.sampling import Schedule
from sdjax.training.config import Train, TrainConfigError
from sdjax.training.data import Source
from sdjax.training.encoded import EncodedSet, encoding_parts
from sdjax.training.networks import Networks, Params, fitted, flat
from sdjax.training.tokenizer import train_tokenizer
from sdjax.weights import checkpoint
from sdjax.weights.checkpoint import CLASSES

_KINDS = {
    "unet": (UNetConfig, UNet2DCondition),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "text_encoder_2": (CLIPTextConfig, CLIPTextModelWithProjection),
}
_CAPTIONS = 4000  # that a new tokenizer is trained on
_FIRST_LOGVAR = -6.0
_TOKEN_GAIN = 25.0  # to a standard deviation of 0.5


def is_conditioned(config: Train, start: checkpoint.Checkpoint | None) -> bool:
    """Whether a picture is needed beside each image: for a ControlNet, or for a UNet that edits."""
    if config.task != "unet":
        return config.task == "controlnet"
    settings = config.model.unet
    if settings is None:
        settings = start.json("unet", "config.json") if start is not None else {}
    unet = UNetConfig.from_dict(settings)
    return (config.diffusion.in_channels or unet.in_channels) == 2 * unet.out_channels


def prepare(config: Train, source: Source | EncodedSet, start: checkpoint.Checkpoint | None) -> Networks:
    """Make or read the networks that the run's task needs; `start` is what `init` names.

    Raises:
        TrainConfigError: a component is neither described nor in `init`, or does not fit the others.
        CheckpointError: `start` cannot be read, or is of a family that cannot be trained.
    """
    networks = Networks({}, {}, {}, {}, {}, xl=_xl(config, start))
    encoders = ("text_encoder",) if networks.xl is None else networks.xl.text_encoders
    names = ("vae",) if config.task == "vae" else ("vae", *encoders, "unet")
    encoding = encoding_parts(encoders)
    if isinstance(source, EncodedSet) and start is not None and start.fingerprint(encoding) != source.fingerprint:
        raise TrainConfigError(
            f"{config.data.latents} was not encoded by the {', '.join(encoding)} of {config.init}; "
            "encode the images with that model, or start from the one that encoded them"
        )
    if start is not None:
        tokenizers = [TOKENIZERS[name] for name in encoders]
        needed = (*names, *tokenizers, "scheduler") if config.denoises else names
        networks.init = start.fingerprint(name for name in needed if getattr(config.model, name, None) is None)
    if config.denoises:
        networks.texts = _texts(config, source, start, encoders)
    for number, name in enumerate(names):
        kind, module = _KINDS[name]
        settings: Any = getattr(config.model, name, None)
        fresh = settings is not None
        if fresh and name == "text_encoder":
            settings = fitted(settings, networks.texts)
        elif fresh:
            settings = {"_class_name": CLASSES[name][1], **settings}
        elif start is not None:
            settings = start.json(name, "config.json")
        else:
            raise TrainConfigError(f"model.{name} is missing: describe it, or name a checkpoint in init")
        options: dict[str, Any] = {"remat": config.remat} if name == "unet" else {}
        widened = config.diffusion.in_channels if name == "unet" else None
        if widened is not None:
            settings = settings | {"in_channels": widened}
        # A frozen VAE computes in float32 whatever the rest does: in half precision SDXL's overflows.
        dtype = jnp.dtype("float32" if name == "vae" and config.denoises else config.dtype)
        build = partial(module, kind.from_dict(settings), dtype=dtype, param_dtype=jnp.float32, **options)
        networks.configs[name], networks.modules[name], networks.dtypes[name] = settings, build(rngs=None), dtype
        if fresh or start is None:
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            networks.params[name] = jax.device_get(_started(name, flat(build(rngs=nnx.Rngs(key)))))
        else:
            what, edit = f"{config.init}/{name}", partial(_widened, channels=widened)
            filled = checkpoint.fill(build(rngs=None), start.tensors(name), what=what, place=np.asarray, edit=edit)
            networks.params[name] = flat(filled)
    side = VAEConfig.from_dict(networks.configs["vae"]).downscale
    if not isinstance(source, EncodedSet) and config.data.size % side:
        raise TrainConfigError(f"data.size is {config.data.size}; the vae needs a multiple of {side}")
    for shape in config.data.aspect_ratio_buckets:
        if any(each % side for each in shape):
            raise TrainConfigError(f"data.aspect_ratio_buckets has {list(shape)}; the vae needs multiples of {side}")
    if config.denoises:
        _check(networks)
        if (networks.inpaints or networks.edits) and (config.data.cache_latents or isinstance(source, EncodedSet)):
            name = "cache_latents" if config.data.cache_latents else "latents"
            what = "paints inside masks, drawn" if networks.inpaints else "edits pictures, encoded"
            raise TrainConfigError(f"data.{name} does not go with a UNet that {what} at each step")
    return networks


def _widened(key: str, tensor: np.ndarray, *, channels: int | None) -> np.ndarray:
    """A UNet's tensor where it takes that many channels: those that it did not know count for nothing yet."""
    if channels is None or key != "conv_in.weight":
        return tensor
    return np.pad(tensor, ((0, 0), (0, max(channels - tensor.shape[1], 0)), (0, 0), (0, 0)))


def _xl(config: Train, start: checkpoint.Checkpoint | None) -> Family | None:
    """Which Stable Diffusion XL a run's UNet is read from, if it is one."""
    if not config.denoises or start is None or config.model.unet is not None:
        return None
    if start.json("unet", "config.json").get("addition_embed_type") is None:
        return None
    found, _ = family.read(start)
    found.check_trainable(str(config.init))
    for name in ("text_encoder", "tokenizer"):
        if getattr(config.model, name) is not None:
            raise TrainConfigError(f"model.{name} does not go with the UNet of {config.init}, Stable Diffusion XL's")
    return found


def _started(name: str, params: Params) -> Params:
    """New parameters changed so that training from scratch is quick.

    Kernels of the image networks keep a signal's variance (LeCun 1998) where PyTorch's start, which the modules follow,
    takes two thirds of it: the bundled VAE's mean absolute error after 250 steps was 0.17 against 0.28. Its latents
    start nearly without noise. The UNet's output and residual branches start at zero (Nichol & Dhariwal 2021), and so
    do the text encoder's, under tokens large enough to be told apart: else its layers soon drown which word is which.
    """
    if name == "text_encoder":
        last, token = ("out_proj.kernel", "fc2.kernel"), "token_embedding.embedding"
        params = {path: leaf * 0 if path.endswith(last) else leaf for path, leaf in params.items()}
        return {path: leaf * _TOKEN_GAIN if path.endswith(token) else leaf for path, leaf in params.items()}
    params = {path: leaf * math.sqrt(3) if path.endswith("kernel") else leaf for path, leaf in params.items()}
    if name == "unet":
        last = ("conv_out.kernel", "conv2.kernel", "proj_out.kernel")
        return {path: jnp.zeros_like(leaf) if path.endswith(last) else leaf for path, leaf in params.items()}
    bias = "quant_conv.bias" if "quant_conv.bias" in params else "encoder.conv_out.bias"
    channels = params[bias].shape[0] // 2
    return params | {bias: params[bias].at[channels:].set(_FIRST_LOGVAR)}


def _texts(
    config: Train, source: Source | EncodedSet, start: checkpoint.Checkpoint | None, encoders: Sequence[str]
) -> dict[str, str]:
    """The tokenizers' and the scheduler's files."""
    texts = {}
    if config.model.tokenizer is not None:
        names = config.model.tokenizer.keys()
        if names != {"merges", "max_length"} or not 0 <= config.model.tokenizer["merges"] <= MAX_COUNT:
            raise TrainConfigError(f"model.tokenizer takes merges, 0 to {MAX_COUNT:,}, max_length and nothing else")
        assert not isinstance(source, EncodedSet)  # its text encoder is made already
        rng = np.random.default_rng(config.seed)
        captions = (source.caption(index, rng) for index in range(min(_CAPTIONS, len(source))))
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(captions, **config.model.tokenizer, folder=folder)
            texts = {f"tokenizer/{path.name}": path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}
    elif start is not None:
        texts = {path: text for name in encoders for path, text in start.texts(TOKENIZERS[name]).items()}
    scheduler = config.model.scheduler
    if scheduler is None and start is not None:
        scheduler = start.json("scheduler", "scheduler_config.json")
    if scheduler is None or not texts:
        missing = "scheduler" if scheduler is None else "tokenizer"
        raise TrainConfigError(f"model.{missing} is missing: describe it, or name a checkpoint in init")
    Schedule.from_config(scheduler)  # refused before latents are made for it
    if scheduler.get("_class_name") is None:  # which an export names
        raise TrainConfigError('the scheduler has no _class_name; "DDIMScheduler" is one')
    return texts | {"scheduler/scheduler_config.json": json.dumps(scheduler, indent=2) + "\n"}


def _check(networks: Networks) -> None:
    unet = UNetConfig.from_dict(networks.configs["unet"])
    vae = VAEConfig.from_dict(networks.configs["vae"])
    latent = vae.latent_channels
    if unet.in_channels not in (latent, 2 * latent, 2 * latent + 1) or unet.out_channels != latent:
        raise TrainConfigError(
            f"model.unet must have in_channels and out_channels {latent}, as the vae's latents; or in_channels "
            f"{2 * latent}, to edit pictures by instruction, or {2 * latent + 1}, to paint inside masks"
        )
    if networks.xl is not None:  # which was found to fit when it was read
        return
    if unet.addition_embed_type is not None:
        raise TrainConfigError("model.unet has addition_embed_type; Stable Diffusion XL is trained from init alone")
    text, widths = CLIPTextConfig.from_dict(networks.configs["text_encoder"]), unet.cross_attention_dim
    if any(width != text.hidden_size for width in (widths if isinstance(widths, tuple) else (widths,))):
        raise TrainConfigError(
            f"model.unet.cross_attention_dim must be {text.hidden_size}, the text encoder's hidden_size"
        )

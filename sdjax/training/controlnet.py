"""The ControlNet of a run (https://arxiv.org/abs/2302.05543): begun, and exported as diffusers' ControlNetModel."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdjax import controls
from sdjax.config import ControlNetConfig, DownConfig, UNetConfig, VAEConfig
from sdjax.models.controlnet import ControlNet
from sdjax.training.config import Train, TrainConfigError
from sdjax.training.networks import Networks, Params, bind, flat
from sdjax.weights import checkpoint
from sdjax.weights.checkpoint import CheckpointError, Component
from sdjax.weights.safetensors import write_tensors

NAME = "controlnet"

_CLASS = "ControlNetModel"
_FILE = "diffusion_pytorch_model.safetensors"

_EMBEDDING = (16, 32, 96, 256)  # channels of the control image at its own size, at half of it, and so on
_ZERO = ("controlnet_down_blocks.", "controlnet_mid_block.", "controlnet_cond_embedding.conv_out.")


def add(networks: Networks, config: Train) -> None:
    """Put a ControlNet among a run's networks: the one in `controlnet.init`, or a copy of the UNet's way down.

    Raises:
        TrainConfigError: the UNet is told more than its latent.
        CheckpointError, ConfigError: the one in `controlnet.init` cannot be read, or does not fit the UNet.
    """
    configs = {
        "unet": UNetConfig.from_dict(networks.configs["unet"]),
        "vae": VAEConfig.from_dict(networks.configs["vae"]),
    }
    if networks.inpaints or networks.edits:
        raise TrainConfigError(
            f"the UNet of {config.init} is told a picture already; train a ControlNet beside one that is not"
        )
    options: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.float32, "remat": config.remat}
    if config.controlnet.init is None:
        settings = _settings(configs["unet"], configs["vae"])
        key = jax.random.fold_in(jax.random.key(config.seed), len(networks.params))
        made = ControlNet(ControlNetConfig.from_dict(settings), **options, rngs=nnx.Rngs(key))
        params = _copied(jax.device_get(flat(made)), networks.params["unet"])
    else:
        read = controls.read(
            [config.controlnet.init], configs, what=str(config.init), variant=None, allow_pickle=config.allow_ckpt
        )
        [(start, own)] = read.values()
        settings, made = start.json("", "config.json"), ControlNet(own, **options, rngs=None)
        params = flat(checkpoint.fill(made, start.tensors(""), what=config.controlnet.init, place=np.asarray))
        networks.init = f"{networks.init} {start.fingerprint([''])}"
    networks.configs[NAME], networks.params[NAME] = settings, params
    networks.modules[NAME] = ControlNet(ControlNetConfig.from_dict(settings), **options, rngs=None)
    networks.dtypes[NAME] = options["dtype"]


def _settings(unet: UNetConfig, vae: VAEConfig) -> dict[str, Any]:
    """The config.json of a ControlNet of the UNet's shape."""
    shared = {field.name: getattr(unet, field.name) for field in dataclasses.fields(DownConfig)}
    halvings = round(math.log2(vae.downscale))
    channels = (_EMBEDDING + _EMBEDDING[-1:] * halvings)[: halvings + 1]
    return {"_class_name": _CLASS, **shared, "conditioning_embedding_out_channels": channels}


def _copied(params: Params, unet: Params) -> Params:
    """New parameters with the UNet's in place of those that it has too; the last layers add nothing yet."""
    zero = {name: np.zeros_like(leaf) for name, leaf in params.items() if name.startswith(_ZERO)}
    return params | {name: unet[name] for name in params.keys() & unet.keys()} | zero


def save(folder: Path, networks: Networks, params: Params | None, dtype: str | None = None) -> None:
    """Write the ControlNet as diffusers lays it out, into a new folder; without `params` only what it is."""
    folder.mkdir(parents=True)
    config = json.dumps(networks.configs[NAME], indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    if params is not None:
        write_tensors(folder / _FILE, checkpoint.tensors_of(bind(networks.modules[NAME], params), dtype))


def is_one(folder: Path) -> bool:
    """Whether a folder is what `save` wrote, and no other network of diffusers', which have a file of the same name."""
    try:
        return Component(folder).json("", "config.json").get("_class_name") == _CLASS
    except CheckpointError:
        return False

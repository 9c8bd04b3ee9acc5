"""A checkpoint's networks: with shapes alone, or loaded."""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from sdjax.config import AutoencoderTinyConfig, CLIPTextConfig, ControlNetConfig, UNetConfig, VAEConfig
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.controlnet import ControlNet
from sdjax.models.tiny import AutoencoderTiny
from sdjax.models.unet import UNet2DCondition
from sdjax.models.vae import AutoencoderKL
from sdjax.parallel import Devices
from sdjax.spec import Spec
from sdjax.weights import checkpoint

_CLASSES = {
    CLIPTextConfig: CLIPTextModel,
    UNetConfig: UNet2DCondition,
    ControlNetConfig: ControlNet,
    VAEConfig: AutoencoderKL,
    AutoencoderTinyConfig: AutoencoderTiny,
}


def build(spec: Spec, names: Iterable[str] | None = None, *, devices: int | None = None) -> dict[str, nnx.Module]:
    """The networks of a checkpoint, or those of the names, with shapes in place of parameters.

    devices: on how many of them, whose axis leads the shapes; None is as a program sees them.
    """
    networks = {}
    for name in spec.configs if names is None else names:
        overflows = name == "vae" and spec.family.upcasts_vae and spec.dtype == "float16"
        dtype = "float32" if overflows else spec.dtype
        config = spec.configs[name]
        kind = CLIPTextModelWithProjection if name.endswith("text_encoder_2") else _CLASSES[type(config)]
        networks[name] = kind(config, dtype=dtype, param_dtype=spec.dtype, rngs=None)
    axis = () if devices is None else (devices,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*axis, *leaf.shape), leaf.dtype), networks)


def load(spec: Spec, devices: Devices | None = None, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The networks of a checkpoint, or those of the names.

    devices: a copy goes to each, under an axis that leads; None is one copy, on JAX's default device.

    Raises:
        CheckpointError: a tensor is missing, left over, truncated or of another shape; the message names it.
    """
    networks, place = build(spec, names), jax.device_put if devices is None else devices.replicate
    for name, network in networks.items():
        what, edit = f"{name} of {spec.name}", spec.edit(name)
        checkpoint.fill(network, spec.tensors(name), what=what, place=place, edit=edit)
    return networks

"""A checkpoint's networks: with shapes alone, or loaded onto the devices."""

from collections.abc import Iterable

from flax import nnx

from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet2DCondition
from sdjax.models.vae import AutoencoderKL
from sdjax.parallel import Devices
from sdjax.spec import Spec
from sdjax.weights import checkpoint

_CLASSES = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DCondition,
    "vae": AutoencoderKL,
}


def build(spec: Spec, names: Iterable[str] | None = None) -> dict[str, nnx.Module]:
    """The networks of a checkpoint, or those of the names, with shapes in place of parameters."""
    networks = {}
    for name in spec.configs if names is None else names:
        overflows = name == "vae" and spec.family.upcasts_vae and spec.dtype == "float16"
        dtype = "float32" if overflows else spec.dtype
        networks[name] = _CLASSES[name](spec.configs[name], dtype=dtype, param_dtype=spec.dtype, rngs=None)
    return networks


def load(spec: Spec, devices: Devices, names: Iterable[str] | None = None) -> dict[str, nnx.Module]:
    """The networks of a checkpoint, or those of the names, on every device.

    Raises:
        CheckpointError: a tensor is missing, left over, truncated or of another shape; the message names it.
    """
    networks = build(spec, names)
    for name, network in networks.items():
        tensors = spec.checkpoint.tensors(name)
        checkpoint.fill(network, tensors, what=f"{name} of {spec.name}", place=devices.replicate, edit=spec.edit(name))
    return networks

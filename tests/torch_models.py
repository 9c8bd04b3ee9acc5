"""Small random torch networks from diffusers and transformers, and their weights in ours."""

from typing import Any

import jax
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from flax import nnx
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sdjax.config
from sdjax.models import clip, controlnet, tiny, unet, vae

UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
VAE = {
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
CONTROLNET = {key: UNET[key] for key in UNET if key not in ("sample_size", "up_block_types")} | {
    "conditioning_embedding_out_channels": [4, 8],
}
TINY = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 2],
    "num_decoder_blocks": [2, 1],
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 98,
}


def randomise(network: torch.nn.Module, seed: int = 0) -> Any:
    """`network` in eval mode, biases and norm weights moved off the zeros and ones they start from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def torch_unet(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    """diffusers' UNet for a config.json's content."""
    torch.manual_seed(seed)
    return randomise(UNet2DConditionModel(**config), seed)


def torch_vae(config: dict[str, Any], seed: int = 0) -> AutoencoderKL:
    """diffusers' AutoencoderKL for a config.json's content."""
    torch.manual_seed(seed)
    return randomise(AutoencoderKL(**config), seed)


def torch_controlnet(config: dict[str, Any], seed: int = 0) -> ControlNetModel:
    """diffusers' ControlNet for a config.json's content, its zero convolutions filled."""
    torch.manual_seed(seed)
    network = ControlNetModel(**config)
    zeros = [network.controlnet_mid_block, *network.controlnet_down_blocks, network.controlnet_cond_embedding.conv_out]
    for conv in zeros:
        conv.reset_parameters()
    return randomise(network, seed)


def torch_tiny(config: dict[str, Any], seed: int = 0) -> AutoencoderTiny:
    """diffusers' tiny autoencoder for a config.json's content."""
    torch.manual_seed(seed)
    return randomise(AutoencoderTiny(**config), seed)


def torch_clip(
    config: dict[str, Any], seed: int = 0, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """transformers' text encoder for a config.json's content."""
    torch.manual_seed(seed)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomise(kind(CLIPTextConfig(**config)), seed)


def checkpoint_key(path: tuple[Any, ...]) -> str:
    """The PyTorch state-dict key of a leaf of one of our modules."""
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def to_flax(key: str, tensor: torch.Tensor) -> np.ndarray:
    """A PyTorch tensor in Flax's layout; embeddings are the two-dimensional weights that are not transposed."""
    array = tensor.detach().numpy()
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and "embedding.weight" not in key else array


def fill(module: Any, state_dict: dict[str, torch.Tensor]) -> Any:
    """`module`, built with rngs=None, with exactly the tensors of `state_dict`; every key and shape must match."""
    graph, state = nnx.split(module)
    leaves = nnx.to_flat_state(state)
    keys = [checkpoint_key(path) for path, _ in leaves]
    assert sorted(keys) == sorted(state_dict), sorted(set(keys) ^ set(state_dict))
    filled = []
    for (path, leaf), key in zip(leaves, keys, strict=True):
        array = to_flax(key, state_dict[key])
        assert leaf.shape == array.shape, f"{key}: {array.shape} for {leaf.shape}"
        filled.append((path, leaf.replace(jax.numpy.asarray(array, leaf.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def our_unet(config: dict[str, Any], network: torch.nn.Module, **kw: Any) -> unet.UNet2DCondition:
    """Our UNet with `network`'s weights."""
    module = unet.UNet2DCondition(sdjax.config.UNetConfig.from_dict(config), rngs=None, **kw)
    return fill(module, network.state_dict())


def our_vae(config: dict[str, Any], network: torch.nn.Module, **kw: Any) -> vae.AutoencoderKL:
    """Our autoencoder with `network`'s weights."""
    module = vae.AutoencoderKL(sdjax.config.VAEConfig.from_dict(config), rngs=None, **kw)
    return fill(module, network.state_dict())


def our_controlnet(config: dict[str, Any], network: torch.nn.Module, **kw: Any) -> controlnet.ControlNet:
    """Our ControlNet with `network`'s weights."""
    module = controlnet.ControlNet(sdjax.config.ControlNetConfig.from_dict(config), rngs=None, **kw)
    return fill(module, network.state_dict())


def our_tiny(config: dict[str, Any], network: torch.nn.Module, **kw: Any) -> tiny.AutoencoderTiny:
    """Our tiny autoencoder with `network`'s weights."""
    module = tiny.AutoencoderTiny(sdjax.config.AutoencoderTinyConfig.from_dict(config), rngs=None, **kw)
    return fill(module, network.state_dict())


def our_clip(config: dict[str, Any], network: torch.nn.Module, **kw: Any) -> clip.CLIPTextModel:
    """Our text encoder with `network`'s weights; its class follows `network`'s."""
    projection = isinstance(network, CLIPTextModelWithProjection)
    kind = clip.CLIPTextModelWithProjection if projection else clip.CLIPTextModel
    state_dict = network.state_dict()
    if not projection:  # transformers 5 drops the prefix that its earlier versions, and published checkpoints, have
        state_dict = {f"text_model.{key}": tensor for key, tensor in state_dict.items()}
    return fill(kind(sdjax.config.CLIPTextConfig.from_dict(config), rngs=None, **kw), state_dict)


def relative_error(ours: Any, theirs: torch.Tensor | np.ndarray) -> float:
    """max |difference| / max |reference|."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape, f"{ours.shape} for {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    """A torch image batch in our layout."""
    return tensor.detach().permute(0, 2, 3, 1).numpy()

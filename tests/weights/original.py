"""Small random networks of each family, and their weights in the original layout as diffusers' converters read it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.loaders import single_file_utils as converters

from sdjax.config import UNetConfig, VAEConfig
from sdjax.weights import ldm
from tests import checkpoints, torch_models

Tensors = dict[str, torch.Tensor]
VOCABULARY = len(checkpoints.vocabulary())
TEXT = torch_models.CLIP | {"vocab_size": VOCABULARY, "max_position_embeddings": 77, "num_attention_heads": 1}
TEXT |= {"projection_dim": 32, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
OPEN_CLIP = TEXT | {"hidden_act": "gelu", "hidden_size": 64, "projection_dim": 64}
UNET = torch_models.UNET | {"norm_num_groups": 32, "attention_head_dim": 8}
VAE = torch_models.VAE | {"norm_num_groups": 32}
LINEAR = {"use_linear_projection": True, "attention_head_dim": [1, 2], "block_out_channels": [64, 128]}
XL = LINEAR | {
    "attention_head_dim": [1, 1, 2],
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}


class Sample(NamedTuple):
    """A family's configurations; the text encoders by component, each with its place in the file."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, tuple[str, dict[str, Any]]]


def unet(context: int, **changes: Any) -> dict[str, Any]:
    return UNET | {"cross_attention_dim": context} | changes


FIRST = {"text_encoder": ("cond_stage_model.transformer.", TEXT)}
SECOND = {"text_encoder": ("cond_stage_model.model.", OPEN_CLIP)}
BIG = ("conditioner.embedders.{}.model.", OPEN_CLIP | {"projection_dim": 20})
SAMPLES = {
    "1": Sample(unet(32), VAE, FIRST),
    "1 deeper": Sample(
        unet(
            32,
            block_out_channels=[32, 64, 64],
            layers_per_block=2,
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        ),
        VAE
        | {"block_out_channels": [32, 32, 64], "layers_per_block": 2}
        | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
        FIRST,
    ),
    "1 inpainting": Sample(unet(32, in_channels=9), VAE, FIRST),
    "1 instruct": Sample(unet(32, in_channels=8), VAE, FIRST),
    "2": Sample(unet(64, **LINEAR), VAE, SECOND),
    "XL": Sample(
        unet(96, **XL, projection_class_embeddings_input_dim=20 + 6 * 8),
        VAE,
        {"text_encoder": ("conditioner.embedders.0.transformer.", TEXT), "text_encoder_2": (BIG[0].format(1), BIG[1])},
    ),
    "XL refiner": Sample(
        unet(64, **XL, projection_class_embeddings_input_dim=20 + 5 * 8)
        | {"block_out_channels": [64, 64, 128], "transformer_layers_per_block": 2, "attention_head_dim": [1, 1, 2]},
        VAE,
        {"text_encoder_2": (BIG[0].format(0), BIG[1])},
    ),
}


def networks(sample: Sample) -> dict[str, torch.nn.Module]:
    """The components of a sample as torch modules of random weights."""
    made = {"unet": torch_models.torch_unet(sample.unet, 2), "vae": torch_models.torch_vae(sample.vae)}
    for i, (name, (_, config)) in enumerate(sample.text.items()):
        made[name] = torch_models.torch_clip(config, i + 1, projection=name == "text_encoder_2")
    return made


def write(sample: Sample, states: Mapping[str, Tensors]) -> Tensors:
    """The tensors of a single file."""
    network = _renamed(states["unet"], ldm.unet(UNetConfig.from_dict(sample.unet)))
    file = {f"model.diffusion_model.{key}": tensor for key, tensor in network.items()}
    file |= {f"first_stage_model.{key}": tensor for key, tensor in vae(sample.vae, states["vae"]).items()}
    for name, (prefix, _) in sample.text.items():
        file |= {f"{prefix}{key}": t for key, t in _text(states[name], ".model." in prefix).items()}
    return {key: tensor.contiguous() for key, tensor in file.items()}


def vae(config: dict[str, Any], state: Tensors) -> Tensors:
    """The tensors of a VAE's file, whose attention is of 1x1 convolutions."""
    found = _renamed(state, ldm.vae(VAEConfig.from_dict(config)))
    return {key: t[:, :, None, None] if ".attn_1." in key and t.ndim == 2 else t for key, t in found.items()}


def _renamed(state: Tensors, table: ldm.Table) -> Tensors:
    parts = {key: key.rpartition(".") for key in state}
    return {f"{table[module]}.{leaf}": state[key].contiguous() for key, (module, _, leaf) in parts.items()}


def _text(state: Tensors, open_clip: bool) -> Tensors:
    state = {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}
    if not open_clip:
        return state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    file = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(1.0),
        "text_projection": state.get("text_projection.weight", torch.ones(20, 64)).T,
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names["self_attn.out_proj"] = "attn.out_proj"
    for i in range(OPEN_CLIP["num_hidden_layers"]):
        here, there = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for leaf in ("weight", "bias"):
            for name, other in names.items():
                file[f"{there}.{other}.{leaf}"] = state[f"{here}.{name}.{leaf}"]
            parts = [state[f"{here}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            file[f"{there}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return file


def as_diffusers_reads(sample: Sample, file: Tensors) -> dict[str, Tensors]:
    """The UNet and the VAE of a single file by diffusers' own converters."""
    return {
        "unet": converters.convert_ldm_unet_checkpoint(dict(file), sample.unet),
        "vae": converters.convert_ldm_vae_checkpoint(dict(file), sample.vae),
    }

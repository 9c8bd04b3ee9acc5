"""The original layout of Stable Diffusion checkpoints: where each module lies in a file of latent diffusion's own code.

A table maps each module that has parameters, by its path here, to its path in such a file. It is made by walking the
configuration as the networks do, so one walk serves Stable Diffusion 1, 2 and XL and their ControlNets, and the keys of
a table are also all that a LoRA may name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from sdjax.config import CLIPTextConfig, ControlNetConfig, UNetConfig, VAEConfig
from sdjax.config.unet import DownConfig
from sdjax.weights.safetensors import CheckpointError

Table = dict[str, str]

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# In files that were converted there and back.
_LATER_VAE_ATTENTION = _VAE_ATTENTION | {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.q_proj": "attn.in_proj",  # one matrix for the three of them
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet(config: UNetConfig) -> Table:
    """The modules of a UNet, in a file below `model.diffusion_model`."""
    table, skips = _down(config)
    table |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
    if config.time_cond_proj_dim is not None:
        table["time_embedding.cond_proj"] = "time_embed.cond_proj"

    channels, count, last = config.block_out_channels[-1], len(skips), len(config.block_out_channels) - 1
    for i, stage in enumerate(config.up_stages):
        for j in range(stage.layers):
            there = f"output_blocks.{count - len(skips)}"
            table |= _resnet(f"up_blocks.{i}.resnets.{j}", f"{there}.0", channels + skips.pop() != stage.channels)
            if stage.depths:
                table |= _same(f"up_blocks.{i}.attentions.{j}", f"{there}.1", _transformer(stage.depths[j]))
            channels = stage.channels
            if j == stage.layers - 1 and i < last:
                table[f"up_blocks.{i}.upsamplers.0.conv"] = f"{there}.{2 if stage.depths else 1}.conv"
    return table


def controlnet(config: ControlNetConfig) -> Table:
    """The modules of a ControlNet, in a file below `control_model` or at its root."""
    table, skips = _down(config)
    table |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(skips))}
    table["controlnet_mid_block"] = "middle_block_out.0"
    blocks = [f"blocks.{i}" for i in range(2 * len(config.conditioning_embedding_out_channels) - 2)]
    hints = {name: f"{2 * i}" for i, name in enumerate(["conv_in", *blocks, "conv_out"])}  # activations between them
    return table | _under("controlnet_cond_embedding", "input_hint_block", hints)


def _down(config: DownConfig) -> tuple[Table, list[int]]:
    """The modules up to the end of the middle block, and the channels of each skip."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
    }
    if config.addition_embed_type is not None:
        table |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}

    channels = config.block_out_channels[0]
    skips, last = [channels], len(config.block_out_channels) - 1
    for i, stage in enumerate(config.down_stages):
        for j in range(stage.layers):
            there = f"input_blocks.{len(skips)}"
            table |= _resnet(f"down_blocks.{i}.resnets.{j}", f"{there}.0", channels != stage.channels)
            if stage.depths:
                table |= _same(f"down_blocks.{i}.attentions.{j}", f"{there}.1", _transformer(stage.depths[j]))
            channels = stage.channels
            skips.append(channels)
        if i < last:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{len(skips)}.0.op"
            skips.append(channels)

    if config.mid_stage is not None:
        table |= _resnet("mid_block.resnets.0", "middle_block.0", False)
        for depth in config.mid_stage.depths:
            table |= _same("mid_block.attentions.0", "middle_block.1", _transformer(depth))
            table |= _resnet("mid_block.resnets.1", "middle_block.2", False)
    return table, skips


def vae(config: VAEConfig) -> Table:
    """The modules of an AutoencoderKL, in a file below `first_stage_model`."""
    table = {}
    channels, layers = config.block_out_channels, config.layers_per_block
    for half, way, sizes, count in (
        ("encoder", "down", channels, layers),
        ("decoder", "up", channels[::-1], layers + 1),
    ):
        table |= _same(half, half, ("conv_in", "conv_out")) | {f"{half}.conv_norm_out": f"{half}.norm_out"}
        table |= _resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", False, _VAE_RESNET)
        table |= _resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", False, _VAE_RESNET)
        if config.mid_block_add_attention:
            table |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        before, last = sizes[0], len(sizes) - 1
        for i, size in enumerate(sizes):
            # The original numbers both halves from the image inwards.
            here, there = f"{half}.{way}_blocks.{i}", f"{half}.{way}.{i if half == 'encoder' else last - i}"
            for j in range(count):
                table |= _resnet(f"{here}.resnets.{j}", f"{there}.block.{j}", before != size, _VAE_RESNET)
                before = size
            if i < last:
                table[f"{here}.{way}samplers.0.conv"] = f"{there}.{way}sample.conv"
    if config.use_quant_conv:
        table["quant_conv"] = "quant_conv"
    if config.use_post_quant_conv:
        table["post_quant_conv"] = "post_quant_conv"
    return table


def open_clip(config: CLIPTextConfig, *, projection: bool) -> Table:
    """The modules of a text encoder, in a file as OpenCLIP names them; its `in_proj` is q, k and v in one."""
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for i in range(config.num_hidden_layers):
        table |= _under(f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}", _TEXT_LAYER)
    return table | ({"text_projection": "text_projection"} if projection else {})


def translated(tensors: Iterable[tuple[str, np.ndarray]], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file under the keys that the modules have, one at a time; a key nobody knows stays as it is.

    Raises:
        CheckpointError: a tensor that is several in one cannot be cut into them.
    """
    modules: dict[str, list[str]] = {}
    for here, there in table.items():
        modules.setdefault(there, []).append(here)
    for key, tensor in tensors:
        there, leaf = _parts(key)
        here = modules.get(there, [there])
        if there == "text_projection" == key:
            tensor = tensor.T  # a bare matrix that OpenCLIP multiplies from the left
        if len(here) > 1 and (not tensor.ndim or len(tensor) % len(here)):
            raise CheckpointError(f"{key} of shape {list(tensor.shape)} is not {len(here)} in one")
        for name, part in zip(here, np.split(tensor, len(here)) if len(here) > 1 else [tensor], strict=True):
            yield f"{name}.{leaf}", part


def _parts(key: str) -> tuple[str, str]:
    """A key's module and leaf: OpenCLIP also writes `in_proj_weight`, and leaves bare parameters without one."""
    match = re.fullmatch(r"(.*?)(?:[._](weight|bias))?", key)
    assert match is not None
    start, attention, name = match[1].partition(".mid.attn_1.")
    return f"{start}{attention}{_LATER_VAE_ATTENTION.get(name, name)}", match[2] or "weight"


def _under(here: str, there: str, names: Mapping[str, str]) -> Table:
    return {f"{here}.{name}": f"{there}.{other}" for name, other in names.items()}


def _same(here: str, there: str, names: Iterable[str]) -> Table:
    return _under(here, there, {name: name for name in names})


def _resnet(here: str, there: str, shortcut: bool, names: Mapping[str, str] = _UNET_RESNET) -> Table:
    return _under(here, there, {k: v for k, v in names.items() if shortcut or k != "conv_shortcut"})


def _transformer(depth: int) -> list[str]:
    """The modules of a Transformer, which both layouts name alike."""
    attention = [f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
    block = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", *attention]
    blocks = [f"transformer_blocks.{i}.{name}" for i in range(depth) for name in block]
    return ["norm", "proj_in", "proj_out", *blocks]

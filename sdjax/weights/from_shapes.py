"""The configurations that the shapes of a network's tensors imply.

What shapes do not show (heads, activations, how wide a number is told) is as all published networks of such shapes have
it.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

from sdjax.weights.safetensors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
_HEAD_WIDTH = 64  # of every family but Stable Diffusion 1, whose UNet has 8 heads at any width
_OPEN_CLIP_LAYERS = 23  # that Stable Diffusion 2 uses of 24
_SIZE_WIDTH = 256  # of each number of an image's size that Stable Diffusion XL is told
_XL_CONTEXT = 2048  # what Stable Diffusion XL attends to
_Stages = Iterator[list[tuple[int, int | None]]]


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _counted(shapes: Shapes, key: str) -> int:
    """How many of the keys with 0, 1, 2, ... in place of {} there are before one is missing."""
    return len(list(takewhile(lambda i: key.format(i) in shapes, count())))


def _depth(shapes: Shapes, transformer: str) -> int | None:
    """How many layers a transformer has; None where there is none."""
    blocks = _counted(shapes, f"{transformer}.transformer_blocks.{{}}.norm1.weight")
    return blocks if f"{transformer}.norm.weight" in shapes else None


def _shared(values: list[Any]) -> Any:
    """One value where all are alike, as configurations write it."""
    return values[0] if len(set(values)) == 1 else values


def _original_stages(shapes: Shapes) -> _Stages:
    """Channels and transformer depth of each layer of a UNet's down half, for each resolution."""
    stage = []
    for n in count(1):
        block = f"input_blocks.{n}"
        if f"{block}.0.op.weight" in shapes:
            yield stage
            stage = []
        elif f"{block}.0.out_layers.3.weight" in shapes:
            stage.append((shapes[f"{block}.0.out_layers.3.weight"][0], _depth(shapes, f"{block}.1")))
        else:
            yield stage
            return


def _diffusers_stages(shapes: Shapes) -> _Stages:
    """The same in the diffusers layout."""
    for i in count():
        block, stage = f"down_blocks.{i}", []
        for j in range(_counted(shapes, f"{block}.resnets.{{}}.conv2.weight")):
            stage.append((shapes[f"{block}.resnets.{j}.conv2.weight"][0], _depth(shapes, f"{block}.attentions.{j}")))
        if not stage:
            return
        yield stage


class _Layout(NamedTuple):
    """Where a layout has what is read from a UNet's down half, and from a ControlNet, which is a copy of it.

    hints: the convolutions of a ControlNet's picture that end a resolution.
    """

    stages: Callable[[Shapes], _Stages]
    conv_in: str
    middle: str
    told: str
    hints: tuple[str, ...]


_ORIGINAL = _Layout(
    _original_stages,
    "input_blocks.0.0.weight",
    "middle_block.1",
    "label_emb.0.0.weight",
    tuple(f"input_hint_block.{4 * i}.weight" for i in range(8)),
)
_HINT = "controlnet_cond_embedding"
_DIFFUSERS = _Layout(
    _diffusers_stages,
    "conv_in.weight",
    "mid_block.attentions.0",
    "add_embedding.linear_1.weight",
    (f"{_HINT}.conv_in.weight", *(f"{_HINT}.blocks.{2 * i + 1}.weight" for i in range(7))),
)


def is_controlnet(shapes: Shapes) -> bool:
    """Whether they are those of a ControlNet, in either layout."""
    return is_original_controlnet(shapes) or _DIFFUSERS.hints[0] in shapes


def is_original_controlnet(shapes: Shapes) -> bool:
    """Whether they are those of a ControlNet in the original layout."""
    return _ORIGINAL.hints[0] in shapes


def _down(shapes: Shapes, layout: _Layout) -> dict[str, Any]:
    """What the configurations of a UNet and of a ControlNet share."""
    stages = list(layout.stages(shapes))
    if not stages or not all(stages):
        raise CheckpointError("has a resolution without layers")
    channels, depths = [stage[0][0] for stage in stages], [stage[0][1] for stage in stages]
    middle, xl = _depth(shapes, layout.middle), layout.told in shapes
    layers = [*depths[:-1], depths[-1] if middle is None else middle]
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if context is None:
        if not xl:
            raise CheckpointError("has a network that attends to no prompt")
        context = _XL_CONTEXT  # a small ControlNet, which is told of the prompt beside the time alone
    projection = next((key for key in shapes if key.endswith(".proj_in.weight")), None)
    if middle is not None:
        projection = f"{layout.middle}.proj_in.weight"
    linear = xl if projection is None else len(shapes[projection]) == 2  # in every family but Stable Diffusion 1
    config = {
        "in_channels": shapes[layout.conv_in][1],
        "block_out_channels": channels,
        "down_block_types": ["DownBlock2D" if depth is None else "CrossAttnDownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2D" if middle is None else "UNetMidBlock2DCrossAttn",
        "layers_per_block": _shared([len(stage) for stage in stages]),
        # A resolution without transformers has no depth of its own; the last one's is the middle block's.
        "transformer_layers_per_block": _shared([1 if depth is None else depth for depth in layers]),
        "cross_attention_dim": context,
        "attention_head_dim": _shared([max(1, size // _HEAD_WIDTH) if linear else 8 for size in channels]),
        "use_linear_projection": linear,
    }
    if xl:
        config["projection_class_embeddings_input_dim"] = shapes[layout.told][1]
    return config


def unet(shapes: Shapes) -> dict[str, Any]:
    """config.json of a UNet in the original layout; what an XL is told of sizes depends on its text encoder."""
    config = _down(shapes, _ORIGINAL)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    config |= {
        "_class_name": "UNet2DConditionModel",
        "out_channels": shapes["out.2.weight"][0],
        "up_block_types": [kinds[kind] for kind in reversed(config["down_block_types"])],
    }
    if (key := "time_embed.cond_proj.weight") in shapes:
        config["time_cond_proj_dim"] = shapes[key][1]
    return config


def controlnet(shapes: Shapes) -> dict[str, Any]:
    """config.json of a ControlNet in either layout."""
    layout = _ORIGINAL if is_original_controlnet(shapes) else _DIFFUSERS
    hints = [shapes[key] for key in layout.hints if key in shapes]
    config = _down(shapes, layout) | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": hints[0][1],
        "conditioning_embedding_out_channels": [hint[0] for hint in hints],
    }
    if "projection_class_embeddings_input_dim" in config:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": _SIZE_WIDTH}
    return config


def vae(shapes: Shapes) -> dict[str, Any]:
    """config.json of an AutoencoderKL in the original layout, but for the scale of its latents."""
    blocks = _counted(shapes, "encoder.down.{}.block.0.conv1.weight")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(blocks)],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": _counted(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shapes) -> dict[str, Any]:
    """config.json of CLIP's text encoder."""
    start = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    return _text_config(
        tokens=shapes[f"{start}embeddings.token_embedding.weight"],
        positions=shapes[f"{start}embeddings.position_embedding.weight"][0],
        intermediate=shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
        layers=_counted(shapes, f"{start}encoder.layers.{{}}.mlp.fc1.weight"),
        projection_dim=None,
        act="quick_gelu",
    )


def open_clip(shapes: Shapes, projection: bool) -> dict[str, Any]:
    """config.json of OpenCLIP's text encoder; without a projection it is Stable Diffusion 2's."""
    layers = _counted(shapes, "transformer.resblocks.{}.mlp.c_fc.weight")
    return _text_config(
        tokens=shapes["token_embedding.weight"],
        positions=shapes["positional_embedding"][0],
        intermediate=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        layers=layers if projection else min(layers, _OPEN_CLIP_LAYERS),
        projection_dim=shapes["text_projection"][1] if projection else None,
        act="gelu",
    )


def _text_config(
    *, tokens: tuple[int, ...], positions: int, intermediate: int, layers: int, projection_dim: int | None, act: str
) -> dict[str, Any]:
    vocab_size, width = tokens
    return {
        "architectures": ["CLIPTextModel" if projection_dim is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": intermediate,
        "projection_dim": projection_dim or width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": positions,
        "hidden_act": act,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }

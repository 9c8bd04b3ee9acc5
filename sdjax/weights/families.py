"""What an original single file is: its family, recognised from its keys, and the configurations that its shapes imply.

The original files carry no configuration. A family fixes what shapes do not show (heads, activations, the noise
schedule); everything else is read from the shapes, so a file of any width can be read.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.weights import ldm
from sdjax.weights.safetensors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
PREDICTION_TYPES = ("epsilon", "v_prediction")
HEAD_WIDTH = 64  # of every family but Stable Diffusion 1, whose UNet has 8 heads at any width
_OPEN_CLIP_LAYERS = 23  # that Stable Diffusion 2 uses of 24
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class Encoder(NamedTuple):
    """A text encoder of a family: where it lies, and whether it is OpenCLIP's and gives a projected vector."""

    prefix: str
    open_clip: bool
    projection: bool


class Family(NamedTuple):
    """What all files of a family have in common."""

    name: str
    pipeline: str
    encoders: Mapping[str, Encoder]
    size_conditions: int = 0  # numbers that an image's size and crop are told in


# In the order in which they are tried: the first whose encoders are all there.
FAMILIES = (
    Family(
        "Stable Diffusion XL",
        "StableDiffusionXL",
        {
            "text_encoder": Encoder("conditioner.embedders.0.transformer.", False, False),
            "text_encoder_2": Encoder("conditioner.embedders.1.model.", True, True),
        },
        6,
    ),
    Family(
        "Stable Diffusion XL refiner",
        "StableDiffusionXL",
        {"text_encoder_2": Encoder("conditioner.embedders.0.model.", True, True)},
        5,
    ),
    Family("Stable Diffusion 2", "StableDiffusion", {"text_encoder": Encoder("cond_stage_model.model.", True, False)}),
    Family(
        "Stable Diffusion 1",
        "StableDiffusion",
        {"text_encoder": Encoder("cond_stage_model.transformer.", False, False)},
    ),
)
UNET, VAE = "model.diffusion_model.", "first_stage_model."


class Part(NamedTuple):
    """A component of a file.

    prefix: of its keys in the file.
    table: of its modules; None where the keys are the modules' own.
    unused: keys, without the prefix, of what the network has and no image depends on.
    """

    prefix: str
    table: ldm.Table | None
    unused: frozenset[str] = frozenset()


class Layout(NamedTuple):
    """What was recognised.

    files: the JSON files that a folder in the diffusers layout would have, by their path.
    parts: the components that have weights.
    """

    family: Family
    files: dict[str, dict[str, Any]]
    parts: dict[str, Part]


def recognise(shapes: Shapes, metadata: Mapping[str, str], prediction_type: str | None) -> Layout:
    """What a file with such tensors is.

    Args:
        metadata: of the file, where it has some; ModelSpec's says what the network predicts.
        prediction_type: `epsilon` or `v_prediction`, if the caller knows.

    Raises:
        CheckpointError: it is of no family, or it does not say what its network predicts; the message has no subject.
    """
    found = [f for f in FAMILIES if all(_below(shapes, encoder.prefix) for encoder in f.encoders.values())]
    if not found or not _below(shapes, UNET):
        raise CheckpointError(f"is no Stable Diffusion in the original layout; {_what_else(shapes)}")
    try:
        return _recognised(found[0], shapes, metadata, prediction_type)
    except KeyError as error:
        raise CheckpointError(f"is a {found[0].name} that lacks {error.args[0]}") from None


def _recognised(family: Family, shapes: Shapes, metadata: Mapping[str, str], prediction_type: str | None) -> Layout:
    configs: dict[str, dict[str, Any]] = {}
    parts: dict[str, Part] = {}
    pooled = 0
    for name, encoder in family.encoders.items():
        below = _below(shapes, encoder.prefix)
        config = (_open_clip if encoder.open_clip else _clip)(below, encoder.projection)
        table = ldm.open_clip(CLIPTextConfig.from_dict(config), projection=encoder.projection)
        past = ("text_projection", f"transformer.resblocks.{config['num_hidden_layers']}.")
        unused = frozenset(key for key in below if not encoder.projection and key.startswith(past))
        parts[name] = Part(encoder.prefix, table if encoder.open_clip else None, unused)
        configs[name], pooled = config, config["projection_dim"]

    xl, first = family.size_conditions > 0, family.name == "Stable Diffusion 1"
    unet = _unet(_below(shapes, UNET), lambda channels: 8 if first else max(1, channels // HEAD_WIDTH))
    vae = _vae(_below(shapes, VAE))
    latent = vae["latent_channels"]
    kinds = {latent: "", 2 * latent: "InstructPix2Pix", 2 * latent + 1: "Inpaint"}
    if unet["in_channels"] not in kinds:
        raise CheckpointError(f"has a UNet of {unet['in_channels']} channels for a VAE of {latent}")
    kind = "Img2Img" if "text_encoder" not in family.encoders else kinds[unet["in_channels"]]
    predicts = _prediction(family, shapes, metadata, prediction_type, kind)
    side = 128 if xl else 96 if family.name == "Stable Diffusion 2" and predicts == "v_prediction" else 64
    configs["unet"] = unet | {"sample_size": side}
    if xl:
        width = (unet["projection_class_embeddings_input_dim"] - pooled) // family.size_conditions
        configs["unet"] |= {"addition_embed_type": "text_time", "addition_time_embed_dim": width}
    scale = 0.13025 if xl else 0.18215
    configs["vae"] = vae | {"scaling_factor": scale, "force_upcast": xl, "sample_size": 8 * side}
    parts["unet"] = Part(UNET, ldm.unet(UNetConfig.from_dict(configs["unet"])))
    parts["vae"] = Part(VAE, ldm.vae(VAEConfig.from_dict(configs["vae"])))

    files = {f"{name}/config.json": config for name, config in configs.items()}
    scheduler = _scheduler(xl, kind, predicts, "ztsnr" in shapes)
    files["scheduler/scheduler_config.json"] = scheduler
    files["model_index.json"] = _index(family, kind, scheduler["_class_name"])
    return Layout(family, files, parts)


def _what_else(shapes: Shapes) -> str:
    if any("lora" in key for key in shapes):
        return "it is a LoRA"
    if "emb_params" in shapes or len(shapes) <= 2:
        return "it may be a textual inversion"
    if "conv_in.weight" in shapes:
        return "it is one component in the diffusers layout; name the folder that has them all"
    return f"no keys {UNET}* and {', '.join(f'{e.prefix}*' for f in FAMILIES[1:] for e in f.encoders.values())}"


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _counted(shapes: Shapes, key: str) -> int:
    """How many of the keys with 0, 1, 2, ... in place of {} there are before one is missing."""
    return len(list(takewhile(lambda i: key.format(i) in shapes, count())))


def _shared(values: list[Any]) -> Any:
    """One value where all are alike, as configurations write it."""
    return values[0] if len(set(values)) == 1 else values


def _down_stages(shapes: Shapes) -> Iterator[list[tuple[int, int]]]:
    """Channels and transformer depth of each layer, for each resolution."""
    stage = []
    for n in count(1):
        block = f"input_blocks.{n}"
        if f"{block}.0.op.weight" in shapes:
            yield stage
            stage = []
        elif f"{block}.0.out_layers.3.weight" in shapes:
            depth = _counted(shapes, f"{block}.1.transformer_blocks.{{}}.norm1.weight")
            stage.append((shapes[f"{block}.0.out_layers.3.weight"][0], depth))
        else:
            yield stage
            return


def _unet(shapes: Shapes, heads: Callable[[int], int]) -> dict[str, Any]:
    stages = list(_down_stages(shapes))
    if not all(stages):
        raise CheckpointError("has a UNet without layers")
    channels, depths = [stage[0][0] for stage in stages], [stage[0][1] for stage in stages]
    middle = _counted(shapes, "middle_block.1.transformer_blocks.{}.norm1.weight")
    attends = next((key for key in shapes if key.endswith("attn2.to_k.weight")), None)
    if attends is None:
        raise CheckpointError("has a UNet that attends to no prompt")
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]],
        "layers_per_block": _shared([len(stage) for stage in stages]),
        # A resolution without transformers has no depth of its own; the last one's is the middle block's.
        "transformer_layers_per_block": _shared([depth or 1 for depth in depths[:-1]] + [middle]),
        "cross_attention_dim": shapes[attends][1],
        "attention_head_dim": _shared([heads(size) for size in channels]),
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }
    for key, name in (
        ("label_emb.0.0.weight", "projection_class_embeddings_input_dim"),
        ("time_embed.cond_proj.weight", "time_cond_proj_dim"),
    ):
        if key in shapes:
            config[name] = shapes[key][1]
    return config


def _vae(shapes: Shapes) -> dict[str, Any]:
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


def _clip(shapes: Shapes, projection: bool) -> dict[str, Any]:
    start = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    return _text_config(
        tokens=shapes[f"{start}embeddings.token_embedding.weight"],
        positions=shapes[f"{start}embeddings.position_embedding.weight"][0],
        intermediate=shapes[f"{start}encoder.layers.0.mlp.fc1.weight"][0],
        layers=_counted(shapes, f"{start}encoder.layers.{{}}.mlp.fc1.weight"),
        projection_dim=None,
        act="quick_gelu",
    )


def _open_clip(shapes: Shapes, projection: bool) -> dict[str, Any]:
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
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": positions,
        "hidden_act": act,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }


def _prediction(family: Family, shapes: Shapes, metadata: Mapping[str, str], asked: str | None, kind: str) -> str:
    """What the network predicts: as asked, as the file says, or as all networks of its family do."""
    if asked is not None:
        if asked not in PREDICTION_TYPES:
            raise CheckpointError(f"cannot predict {asked!r}; prediction_type is {' or '.join(PREDICTION_TYPES)}")
        return asked
    said = {"v": "v_prediction"}.get(told := metadata.get("modelspec.prediction_type", ""), told)
    if said in PREDICTION_TYPES:
        return said
    if "v_pred" in shapes:
        return "v_prediction"
    if family.name == "Stable Diffusion 2" and not kind:
        raise CheckpointError(
            "is a Stable Diffusion 2, which does not say what it predicts; give prediction_type: v_prediction for the "
            "models of 768 pixels, epsilon for those of 512"
        )
    return "epsilon"


def _scheduler(xl: bool, kind: str, predicts: str, zero_snr: bool) -> dict[str, Any]:
    """What the family's published folders have."""
    name = "EulerDiscrete" if xl else "EulerAncestralDiscrete" if kind == "InstructPix2Pix" else "PNDM"
    if name == "PNDM" and predicts == "v_prediction":
        name = "DDIM"
    config = _SCHEDULE | {"_class_name": f"{name}Scheduler", "prediction_type": predicts}
    return config | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {})


def _index(family: Family, kind: str, scheduler: str) -> dict[str, Any]:
    """model_index.json, with which diffusers too loads what `save_pretrained` writes."""
    xl = family.size_conditions > 0
    index: dict[str, Any] = {
        "_class_name": f"{family.pipeline}{kind}Pipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
    }
    for suffix in ("", "_2") if xl else ("",):
        encoder = family.encoders.get(f"text_encoder{suffix}")
        name = "CLIPTextModelWithProjection" if encoder and encoder.projection else "CLIPTextModel"
        index[f"text_encoder{suffix}"] = ["transformers", name] if encoder else [None, None]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"] if encoder else [None, None]
    if not xl:
        return index | {"safety_checker": [None, None], "requires_safety_checker": False}
    refiner = "text_encoder" not in family.encoders
    return (
        index | {"force_zeros_for_empty_prompt": not refiner} | ({"requires_aesthetics_score": True} if refiner else {})
    )

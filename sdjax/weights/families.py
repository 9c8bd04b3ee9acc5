"""What a single file is: its family, recognised from its keys, and the folder that it would be.

Such files carry no configuration. A family fixes the noise schedule and what pipelines are told; everything else is
read from the shapes (`from_shapes.py`), so a file of any width can be read.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.config import CLIPTextConfig, ControlNetConfig, UNetConfig, VAEConfig
from sdjax.weights import from_shapes, ldm
from sdjax.weights.checkpoint import CLASSES
from sdjax.weights.from_shapes import Shapes, below
from sdjax.weights.safetensors import CheckpointError

PREDICTION_TYPES = ("epsilon", "v_prediction")
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
    """A text encoder of a family: where it lies, and whether it is OpenCLIP's."""

    prefix: str
    open_clip: bool


class Original(NamedTuple):
    """What all files of a family in the original layout have in common."""

    name: str
    encoders: Mapping[str, Encoder]
    size_conditions: int = 0  # numbers that an image's size and crop are told in

    @property
    def is_xl(self) -> bool:
        return self.size_conditions > 0


# In the order in which they are tried: the first whose encoders are all there.
FAMILIES = (
    Original(
        "Stable Diffusion XL",
        {
            "text_encoder": Encoder("conditioner.embedders.0.transformer.", False),
            "text_encoder_2": Encoder("conditioner.embedders.1.model.", True),
        },
        6,
    ),
    Original("Stable Diffusion XL refiner", {"text_encoder_2": Encoder("conditioner.embedders.0.model.", True)}, 5),
    Original("Stable Diffusion 2", {"text_encoder": Encoder("cond_stage_model.model.", True)}),
    Original("Stable Diffusion 1", {"text_encoder": Encoder("cond_stage_model.transformer.", False)}),
)
UNET, VAE, CONTROLNET = "model.diffusion_model.", "first_stage_model.", "control_model."
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


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

    encoders: the text encoders.
    files: the JSON files that a folder in the diffusers layout would have, by their path.
    parts: the components that have weights.
    """

    encoders: Mapping[str, Encoder]
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
    found = [f for f in FAMILIES if all(below(shapes, encoder.prefix) for encoder in f.encoders.values())]
    if not found or not below(shapes, UNET):
        raise CheckpointError(f"is no Stable Diffusion in the original layout; {_what_else(shapes)}")
    if edm := [key for key in _EDM if key in shapes]:
        raise CheckpointError(
            f"is a {found[0].name} trained as EDM ({', '.join(edm)}), whose noise levels and scaling are not supported"
        )
    try:
        return _recognised(found[0], shapes, metadata, prediction_type)
    except KeyError as error:
        raise CheckpointError(f"is a {found[0].name} that lacks {error.args[0]}") from None


def _recognised(family: Original, shapes: Shapes, metadata: Mapping[str, str], prediction_type: str | None) -> Layout:
    configs: dict[str, dict[str, Any]] = {}
    parts: dict[str, Part] = {}
    pooled = 0
    for name, encoder in family.encoders.items():
        own, projects = below(shapes, encoder.prefix), name == "text_encoder_2"
        config = from_shapes.open_clip(own, projects) if encoder.open_clip else from_shapes.clip(own)
        table = ldm.open_clip(CLIPTextConfig.from_dict(config), projection=projects)
        past = ("text_projection", f"transformer.resblocks.{config['num_hidden_layers']}.")
        unused = frozenset(key for key in own if not projects and key.startswith(past))
        parts[name] = Part(encoder.prefix, table if encoder.open_clip else None, unused)
        configs[name], pooled = config, config["projection_dim"]

    xl = family.is_xl
    unet = from_shapes.unet(below(shapes, UNET))
    vae = from_shapes.vae(below(shapes, VAE))
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
    if "time_cond_proj_dim" in unet:  # a full LCM (https://arxiv.org/abs/2310.04378), which is told of the guidance
        scheduler["_class_name"] = "LCMScheduler"
    files["scheduler/scheduler_config.json"] = scheduler
    files["model_index.json"] = _index(family, kind, scheduler["_class_name"])
    return Layout(family.encoders, files, parts)


def recognise_controlnet(shapes: Shapes, name: str) -> Layout:
    """What a ControlNet's file with such tensors is, in the original layout or in that of diffusers.

    Args:
        name: of the file; nothing else says of a ControlNet for shuffled pictures that it adds averages.

    Raises:
        CheckpointError: it is none; the message has no subject.
    """
    prefix = CONTROLNET if below(shapes, CONTROLNET) else ""
    own = below(shapes, prefix)
    if not from_shapes.is_controlnet(own):
        raise CheckpointError("is no ControlNet; one has keys input_hint_block.* or controlnet_cond_embedding.*")
    if any(key.startswith("task_embedding") for key in own):
        raise CheckpointError("is a ControlNet Union, which is not supported; give one of a single kind")
    if "lora_controlnet" in own or "difference" in own:
        raise CheckpointError("is only what a ControlNet adds to a checkpoint; give the whole ControlNet")
    try:
        config = from_shapes.controlnet(own) | {"global_pool_conditions": "shuffle" in name}
    except KeyError as error:
        raise CheckpointError(f"is a ControlNet that lacks {error.args[0]}") from None
    original = from_shapes.is_original_controlnet(own)
    part = Part(prefix, ldm.controlnet(ControlNetConfig.from_dict(config)) if original else None)
    return Layout({}, {"config.json": config}, {"": part})


def recognise_vae(shapes: Shapes, own: Mapping[str, Any]) -> Layout:
    """What a VAE's file with such tensors is, in the original layout, by itself or within a checkpoint.

    Args:
        own: config.json of the VAE whose place it is to take: shapes do not show how its latents are scaled.

    Raises:
        CheckpointError: it is none; the message has no subject.
    """
    prefix = VAE if below(shapes, VAE) else ""
    if f"{prefix}decoder.mid.block_1.conv1.weight" not in shapes:
        raise CheckpointError("is no VAE in the original layout; one in diffusers' is a folder with a config.json")
    if own.get("_class_name") == "AutoencoderTiny":
        raise CheckpointError("does not say how its latents are scaled, and nor does the model's tiny autoencoder")
    try:
        config = from_shapes.vae(below(shapes, prefix))
    except KeyError as error:
        raise CheckpointError(f"is a VAE that lacks {error.args[0]}") from None
    config |= {key: own[key] for key in ("scaling_factor", "force_upcast", "sample_size") if key in own}
    return Layout({}, {"config.json": config}, {"": Part(prefix, ldm.vae(VAEConfig.from_dict(config)))})


def _what_else(shapes: Shapes) -> str:
    if any(from_shapes.is_controlnet(below(shapes, prefix)) for prefix in (CONTROLNET, "")):
        return "it is a ControlNet; give it as controlnets (--controlnet)"
    if "decoder.mid.block_1.conv1.weight" in shapes:
        return "it is a VAE; give it as vae (--vae)"
    if any("lora" in key for key in shapes):
        return "it is a LoRA"
    if "emb_params" in shapes or len(shapes) <= 2:
        return "it may be a textual inversion"
    if "conv_in.weight" in shapes:
        return "it is one component in the diffusers layout; name the folder that has them all"
    encoders = ", ".join(f"{encoder.prefix}*" for family in FAMILIES[1:] for encoder in family.encoders.values())
    if below(shapes, UNET):
        return f"it has a UNet, and no text encoder: no keys {encoders}"
    return f"no keys {UNET}* and {encoders}"


def _prediction(family: Original, shapes: Shapes, metadata: Mapping[str, str], asked: str | None, kind: str) -> str:
    """What the network predicts: as asked, as the file says, or as all networks of its family do."""
    if asked is not None:
        if asked not in PREDICTION_TYPES:
            raise CheckpointError(f"cannot predict {asked!r}; prediction_type is {' or '.join(PREDICTION_TYPES)}")
        return asked
    if "v_pred" in shapes:  # before ModelSpec's, which trainers copy from the file that they began with
        return "v_prediction"
    said = {"v": "v_prediction"}.get(told := metadata.get("modelspec.prediction_type", ""), told)
    if said in PREDICTION_TYPES:
        return said
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


def _index(family: Original, kind: str, scheduler: str) -> dict[str, Any]:
    """model_index.json, with which diffusers too loads what `save_pretrained` writes."""
    xl = family.is_xl
    index: dict[str, Any] = {
        "_class_name": f"StableDiffusion{'XL' * xl}{kind}Pipeline",
        "unet": CLASSES["unet"],
        "vae": CLASSES["vae"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
    }
    for suffix in ("", "_2") if xl else ("",):
        for name in (f"text_encoder{suffix}", f"tokenizer{suffix}"):
            index[name] = CLASSES[name] if f"text_encoder{suffix}" in family.encoders else [None, None]
    if not xl:
        return index | {"safety_checker": [None, None], "requires_safety_checker": False}
    refiner = "text_encoder" not in family.encoders
    return (
        index | {"force_zeros_for_empty_prompt": not refiner} | ({"requires_aesthetics_score": True} if refiner else {})
    )

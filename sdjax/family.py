"""Which kind of Stable Diffusion a checkpoint is: the parts that it has, that they fit, and what its UNet is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.config import CLIPTextConfig, ConfigError, UNetConfig, VAEConfig
from sdjax.weights.checkpoint import Checkpoint, CheckpointError

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The text encoders that a checkpoint may have, in the order of their states, each with its tokenizer."""

_KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")
PIPELINES = (
    *(f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in _KINDS),
    *(f"LatentConsistencyModel{kind}Pipeline" for kind in ("", "Img2Img")),
)
"""The diffusers pipelines whose checkpoints can be run."""


@dataclass(frozen=True)
class Family:
    """What a checkpoint's model_index.json and configurations say of it.

    text_encoders: the components that read the prompt, in the order in which the UNet is given their states.
    is_xl: the UNet is told a pooled prompt and sizes too, and text states come from the last layer but one, unnormed.
    refines: Stable Diffusion XL's refiner: told an aesthetic score in place of a target size.
    zeroes_empty: zeros stand for a negative prompt that is not given.
    embeds_guidance: the UNet is told the guidance scale, and needs no unconditional half (consistency models).
    inpaints: the UNet is told the mask and the image outside of it, and so always needs them.
    edits: the UNet is told the image that the prompt is an instruction for (InstructPix2Pix).
    upcasts_vae: the VAE overflows in float16 and computes in float32 instead.
    """

    text_encoders: tuple[str, ...]
    is_xl: bool
    refines: bool
    zeroes_empty: bool
    embeds_guidance: bool
    inpaints: bool
    edits: bool
    upcasts_vae: bool


def read(checkpoint: Checkpoint) -> tuple[Family, dict[str, Any]]:
    """A checkpoint's family, and the configuration of each of its networks.

    Raises:
        CheckpointError, ConfigError: it is of no family that can be run, or its parts are of different ones.
    """
    index, source = checkpoint.index, checkpoint.source
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(f"{source} is a {index.get('_class_name')}; supported are {', '.join(PIPELINES)}")
    encoders = tuple(name for name in TOKENIZERS if (index.get(name) or [None])[0] is not None)
    kinds = {**dict.fromkeys(encoders, CLIPTextConfig), "unet": UNetConfig, "vae": VAEConfig}
    configs = {}
    for name, kind in kinds.items():
        try:
            configs[name] = kind.from_dict(checkpoint.json(name, "config.json"))
        except ConfigError as error:
            raise ConfigError(f"{name}/config.json of {source}: {error}") from None
    unet, vae, latent = configs["unet"], configs["vae"], configs["vae"].latent_channels
    if not encoders:
        raise CheckpointError(f"{source} has no text_encoder; its model_index.json names none")
    if unet.in_channels not in (latent, 2 * latent, 2 * latent + 1):
        raise CheckpointError(
            f"{source}: the UNet takes {unet.in_channels} channels; with this VAE {latent} can be run, "
            f"{2 * latent} for editing images, or {2 * latent + 1} for painting inside masks"
        )
    is_xl = unet.addition_embed_type == "text_time"
    family = Family(
        text_encoders=encoders,
        is_xl=is_xl,
        refines=is_xl and bool(index.get("requires_aesthetics_score", False)),
        zeroes_empty=is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        embeds_guidance=unet.time_cond_proj_dim is not None,
        inpaints=unet.in_channels == 2 * latent + 1,
        edits=unet.in_channels == 2 * latent,
        upcasts_vae=is_xl and vae.force_upcast,
    )
    _check_text(source, family, configs)
    return family, configs


def _check_text(source: str, family: Family, configs: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the text encoders and the UNet are not made for each other."""
    unet, texts = configs["unet"], [configs[name] for name in family.text_encoders]
    given = sum(text.hidden_size for text in texts)
    if unet.cross_attention_dim != given:
        raise CheckpointError(
            f"{source}: the UNet attends to {unet.cross_attention_dim} channels, the text encoder gives {given}; "
            "they are not a pair"
        )
    if len({text.max_position_embeddings for text in texts}) > 1:
        lengths = " and ".join(str(text.max_position_embeddings) for text in texts)
        raise CheckpointError(f"{source}: the text encoders read {lengths} tokens; they are not a pair")
    if not family.is_xl:
        return
    if family.text_encoders[-1] != "text_encoder_2":
        raise CheckpointError(f"{source}: the UNet is Stable Diffusion XL's, but there is no text_encoder_2")
    ids = 5 if family.refines else 6
    told = texts[-1].projection_dim + ids * unet.addition_time_embed_dim
    if told != unet.projection_class_embeddings_input_dim:
        raise CheckpointError(
            f"{source}: the UNet is told {unet.projection_class_embeddings_input_dim} numbers of prompt and size, "
            f"text_encoder_2 and {ids} sizes make {told}; they are not a pair (or requires_aesthetics_score is wrong)"
        )

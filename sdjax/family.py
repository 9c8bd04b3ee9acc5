"""Which kind of Stable Diffusion a checkpoint is: the parts that it has, that they fit, and what its UNet is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.config import AutoencoderTinyConfig, CLIPTextConfig, ConfigError, UNetConfig, VAEConfig
from sdjax.request import Request
from sdjax.values import RequestError
from sdjax.weights.checkpoint import Checkpoint, CheckpointError

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The text encoders that a checkpoint may have, in the order of their states, each with its tokenizer."""

_KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")
PIPELINES = (
    *(f"StableDiffusion{xl}{kind}Pipeline" for xl in ("", "XL") for kind in _KINDS),
    *(f"LatentConsistencyModel{kind}Pipeline" for kind in ("", "Img2Img")),
)
"""The diffusers pipelines whose checkpoints can be run."""

_OF_XL = ("prompt_2", "negative_prompt_2", "original_size", "target_size")  # Request fields
_OF_XL += tuple(f"negative_{name}" for name in ("original_size", "crops_coords_top_left", "target_size"))

_OF_LATENTS = {
    "latent_channels": "latent channels",
    "downscale": "pixels a latent",
    "scaling_factor": "latents' scales",
}


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
    draws_latents: an image's latents are drawn from a distribution, as a tiny autoencoder's are not.
    """

    text_encoders: tuple[str, ...]
    is_xl: bool
    refines: bool
    zeroes_empty: bool
    embeds_guidance: bool
    inpaints: bool
    edits: bool
    upcasts_vae: bool
    draws_latents: bool

    @property
    def keeps_steps(self) -> bool:
        """Whether from an image too all steps are taken, over the strength's share of the timesteps.

        As diffusers' LatentConsistencyModelImg2ImgPipeline does; from an image SDXL, or any model inside a mask, takes
        the last steps there.
        """
        return self.embeds_guidance and not self.is_xl

    def check(self, request: Request) -> None:
        """Raise RequestError where a request asks for what such a checkpoint does not do, or lacks what it needs."""
        if self.inpaints and not request.is_masked:
            raise RequestError("this checkpoint paints inside masks; give image and mask_image, or image and outpaint")
        if self.edits and (request.image is None or request.is_masked):
            raise RequestError("this checkpoint edits images; give image, without mask_image and outpaint")
        if self.edits and request.hires_scale > 1:
            raise RequestError("hires_scale does not go with a checkpoint that edits images; leave it out")
        if self.refines and request.image is None:
            raise RequestError("this checkpoint refines images; give image")
        for name in () if self.is_xl else _OF_XL:
            if getattr(request, name) is not None:
                raise RequestError(f"{name} is for Stable Diffusion XL, which this checkpoint is not; leave it out")
        if self.embeds_guidance and request.guidance_scales is not None:
            raise RequestError("this checkpoint is told one guidance_scale for all steps; leave out guidance_scales")

    def check_trainable(self, name: str) -> None:
        """Raise CheckpointError where `sdjax.train` cannot train such a checkpoint, of that name."""
        if self.refines:
            raise CheckpointError(f"{name} is Stable Diffusion XL's refiner; its base can be trained")
        if not self.draws_latents:
            raise CheckpointError(
                f"the VAE of {name} is an AutoencoderTiny; latents of an AutoencoderKL are trained on"
            )


def read(checkpoint: Checkpoint, vae: Checkpoint | None = None) -> tuple[Family, dict[str, Any]]:
    """A checkpoint's family, and the configuration of each of its networks.

    Args:
        vae: what takes the place of the checkpoint's own.

    Raises:
        CheckpointError, ConfigError: it is of no family that can be run, or its parts are of different ones.
    """
    index, source = checkpoint.index, checkpoint.source
    if index.get("_class_name") not in PIPELINES:
        raise CheckpointError(f"{source} is a {index.get('_class_name')}; supported are {', '.join(PIPELINES)}")
    encoders = tuple(name for name in TOKENIZERS if _has(checkpoint, name))
    kinds = {**dict.fromkeys(encoders, CLIPTextConfig), "unet": UNetConfig}
    configs: dict[str, Any] = {name: read_config(kind, checkpoint, name) for name, kind in kinds.items()}
    configs["vae"] = _vae_config(checkpoint, "vae")
    if vae is not None:
        own, configs["vae"] = configs["vae"], _vae_config(vae, "")
        check_fit(f"the VAE {vae.source}", source, sides(configs["vae"], own))
    unet, autoencoder, latent = configs["unet"], configs["vae"], configs["vae"].latent_channels
    if not encoders:
        raise CheckpointError(f"{source} has no text_encoder; its model_index.json names none")
    if unet.in_channels not in (latent, 2 * latent, 2 * latent + 1):
        raise CheckpointError(
            f"{source}: the UNet takes {unet.in_channels} channels; with this VAE {latent} can be run, "
            f"{2 * latent} for editing images, or {2 * latent + 1} for painting inside masks"
        )
    if unet.out_channels != latent:
        raise CheckpointError(f"{source}: the UNet gives {unet.out_channels} channels, the VAE's latents have {latent}")
    if (autoencoder.in_channels, autoencoder.out_channels) != (3, 3):
        raise CheckpointError(
            f"{source}: the VAE takes {autoencoder.in_channels} channels and gives {autoencoder.out_channels}; "
            "an image has 3"
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
        upcasts_vae=is_xl and autoencoder.force_upcast,
        draws_latents=isinstance(autoencoder, VAEConfig),
    )
    _check_text(source, family, configs)
    return family, configs


def _has(checkpoint: Checkpoint, component: str) -> bool:
    """Whether model_index.json names a component. Raises CheckpointError."""
    named = checkpoint.index.get(component) or [None]
    if not isinstance(named, list):
        raise CheckpointError(
            f"model_index.json of {checkpoint.source} has a {component} that is neither null nor a library and a class"
        )
    return named[0] is not None


def read_config(kind: Any, checkpoint: Checkpoint, component: str) -> Any:
    """A component's configuration. Raises CheckpointError, ConfigError."""
    try:
        return kind.from_dict(checkpoint.json(component, "config.json"))
    except (ConfigError, RecursionError) as error:
        where = f"{component}/config.json".lstrip("/")
        why = "it has lists within lists without end" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{where} of {checkpoint.source}: {why}") from None


def check_fit(part: str, model: str, sides: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise CheckpointError where a part says other things of itself than the model that it is to go with."""
    for name, (own, its) in sides.items():
        if own != its:
            raise CheckpointError(
                f"{part} does not fit {model}: its {name} are {_shown(own)}, the model's {_shown(its)}"
            )


def _shown(value: Any) -> str:
    return ", ".join("x".join(map(str, part)) for part in value) if isinstance(value, list) else str(value)


def _vae_config(checkpoint: Checkpoint, component: str) -> VAEConfig | AutoencoderTinyConfig:
    is_tiny = checkpoint.json(component, "config.json").get("_class_name") == "AutoencoderTiny"
    return read_config(AutoencoderTinyConfig if is_tiny else VAEConfig, checkpoint, component)


def sides(vae: Any, own: Any) -> dict[str, tuple[Any, Any]]:
    """What two VAEs must agree on to have the same latents, for `check_fit`."""
    pairs = {name: (getattr(vae, key), getattr(own, key)) for key, name in _OF_LATENTS.items()}
    if type(vae) is not type(own):
        del pairs["latents' scales"]  # a tiny autoencoder has them scaled already
    return pairs


def can_be_refined(family: Family) -> bool:
    """Whether it is Stable Diffusion XL's base, for images from text and from images."""
    return family.is_xl and not (family.refines or family.inpaints or family.edits)


def _check_text(source: str, family: Family, configs: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the text encoders and the UNet are not made for each other."""
    unet, texts = configs["unet"], [configs[name] for name in family.text_encoders]
    given = sum(text.hidden_size for text in texts)
    for stage in unet.down_stages:
        if stage.context_dim != given:
            raise CheckpointError(
                f"{source}: the UNet attends to {stage.context_dim} channels, the text encoder gives {given}; "
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

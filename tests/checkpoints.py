"""Small random Stable Diffusion checkpoints, made and saved by diffusers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import torch_models

MERGES = ["r e", "re d</w>", "c i", "ci r", "cir c", "l e</w>", "circ le</w>", "a t</w>", "c at</w>"]
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> dict[str, int]:
    """CLIP's kind of vocabulary: every byte alone and at a word's end, some merges, the two special tokens."""
    letters = list(bytes_to_unicode().values())
    merged = [merge.replace(" ", "") for merge in MERGES]
    return {
        token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END])
    }


def scheduler(name: str = "PNDMScheduler", **config: Any) -> Any:
    """A diffusers scheduler with Stable Diffusion's settings."""
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if name == "PNDMScheduler":
        usual |= {"skip_prk_steps": True}
    if name == "DDIMScheduler":
        usual |= {"clip_sample": False, "set_alpha_to_one": False}
    return getattr(diffusers, name)(**usual | config)


def _text_config(changes: Mapping[str, Any] | None) -> dict[str, Any]:
    vocab = vocabulary()
    special = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    return torch_models.CLIP | special | {"vocab_size": len(vocab), "max_position_embeddings": 77} | dict(changes or {})


def tokenizer(**special: str) -> CLIPTokenizer:
    merges = [tuple(merge.split()) for merge in MERGES]
    return CLIPTokenizer(vocab=vocabulary(), merges=merges, model_max_length=77, **special)


def pipeline(
    *,
    unet: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    seed: int = 0,
    tokens: Mapping[str, str] | None = None,
) -> diffusers.StableDiffusionPipeline:
    """diffusers' pipeline of random networks; the arguments change torch_models' small configurations.

    tokens: the tokenizer's special ones, such as pad_token.
    """
    text_config = _text_config(text)
    unet_config = torch_models.UNET | {"cross_attention_dim": text_config["hidden_size"]} | dict(unet or {})
    vae_config = torch_models.VAE | dict(vae or {})
    text_encoder = torch_models.torch_clip(text_config, seed + 1)
    # diffusers 0.42 looks for clip_skip's norm where transformers 4 had it.
    object.__setattr__(text_encoder, "text_model", text_encoder)
    return diffusers.StableDiffusionPipeline(
        vae=torch_models.torch_vae(vae_config, seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer(**tokens or {}),
        unet=torch_models.torch_unet(unet_config, seed + 2),
        scheduler=scheduler or globals()["scheduler"]("DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline_xl(
    *,
    unet: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    text_2: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    seed: int = 0,
    kind: Any = diffusers.StableDiffusionXLPipeline,
    **settings: Any,
) -> Any:
    """diffusers' Stable Diffusion XL pipeline of random networks, of any `kind`; `settings` go into model_index.json.

    With requires_aesthetics_score it is a refiner, which has the second text encoder alone.
    """
    refines = settings.get("requires_aesthetics_score", False)
    text_config = _text_config({"num_hidden_layers": 3} | dict(text or {}))
    text_config_2 = _text_config({"hidden_size": 40, "hidden_act": "gelu", "num_hidden_layers": 4} | dict(text_2 or {}))
    told = text_config_2["projection_dim"] + 8 * (5 if refines else 6)
    attended = text_config_2["hidden_size"] + (0 if refines else text_config["hidden_size"])
    xl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    xl |= {"projection_class_embeddings_input_dim": told, "cross_attention_dim": attended}
    return kind(
        vae=torch_models.torch_vae(torch_models.VAE | {"scaling_factor": 0.13025} | dict(vae or {}), seed),
        text_encoder=None if refines else torch_models.torch_clip(text_config, seed + 1),
        text_encoder_2=torch_models.torch_clip(text_config_2, seed + 3, projection=True),
        tokenizer=None if refines else tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        unet=torch_models.torch_unet(torch_models.UNET | xl | dict(unet or {}), seed + 2),
        scheduler=scheduler or globals()["scheduler"]("EulerDiscreteScheduler"),
        add_watermarker=False,
        **settings,
    )


def saved(folder: Path, make: Callable[..., Any] = pipeline, **changes: Any) -> Any:
    """`pipeline`, or what else makes one, saved to a folder as diffusers saves it, quiet on the terminal."""
    made = make(**changes)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

"""Small random Stable Diffusion checkpoints, made and saved by diffusers."""

import json
from collections.abc import Mapping
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


def pipeline(
    *,
    unet: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    seed: int = 0,
) -> diffusers.StableDiffusionPipeline:
    """diffusers' pipeline of random networks; the arguments change torch_models' small configurations."""
    vocab = vocabulary()
    special = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    text_config = (
        torch_models.CLIP | special | {"vocab_size": len(vocab), "max_position_embeddings": 77} | dict(text or {})
    )
    unet_config = torch_models.UNET | {"cross_attention_dim": text_config["hidden_size"]} | dict(unet or {})
    vae_config = torch_models.VAE | dict(vae or {})
    merges = [tuple(merge.split()) for merge in MERGES]
    text_encoder = torch_models.torch_clip(text_config, seed + 1)
    # diffusers 0.42 looks for clip_skip's norm where transformers 4 had it.
    object.__setattr__(text_encoder, "text_model", text_encoder)
    return diffusers.StableDiffusionPipeline(
        vae=torch_models.torch_vae(vae_config, seed),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77),
        unet=torch_models.torch_unet(unet_config, seed + 2),
        scheduler=scheduler or globals()["scheduler"]("DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def saved(folder: Path, **changes: Any) -> diffusers.StableDiffusionPipeline:
    """`pipeline` saved to a folder as diffusers saves it, quiet on the terminal."""
    made = pipeline(**changes)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

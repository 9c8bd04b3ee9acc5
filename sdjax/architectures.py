"""Configurations of published checkpoints by name, for measuring and planning without their weights."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.family import TOKENIZERS
from sdjax.parts import BUNDLED
from sdjax.weights.checkpoint import CLASSES

_CLIP_L = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
_OPENCLIP_H = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
}
_OPENCLIP_BIGG = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "text_encoder": _CLIP_L,
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": _VAE,
    },
    "sd21": {
        "text_encoder": _OPENCLIP_H,
        "unet": {
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "sample_size": 96,
        },
        "vae": _VAE,
    },
    "sdxl": {
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPENCLIP_BIGG,
        "unet": {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        "vae": {**_VAE, "scaling_factor": 0.13025},
    },
}
"""config.json of each network, by folder: Stable Diffusion 1.1 to 1.5, 2.0 and 2.1 at 768 pixels, XL base."""

_VOCABULARY = Path(BUNDLED) / "tokenizer"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SCHEDULE = {**_BETAS, "clip_sample": False, "steps_offset": 1}


@contextmanager
def checkpoint(model: str) -> Iterator[str]:
    """What `Spec` is given for a model: an architecture's name, `bundled`, or a checkpoint's folder, hub id or URL.

    An architecture is a folder without weights that is gone afterwards.
    """
    if model in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / model
            write(model, folder)
            yield str(folder)
    else:
        yield BUNDLED if model == "bundled" else model


def write(name: str, folder: Path) -> None:
    """Make `folder` a checkpoint of an architecture, with all but the weights; its tokenizer is the bundled model's."""
    configs = ARCHITECTURES[name]
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * (name == 'sdxl')}Pipeline"}
    for part, config in configs.items():
        _write(folder / part / "config.json", config)
        index[part] = CLASSES[part]
        if part in TOKENIZERS:
            index[TOKENIZERS[part]] = CLASSES[TOKENIZERS[part]]
            shutil.copytree(_VOCABULARY, folder / TOKENIZERS[part])
    prediction = "v_prediction" if name == "sd21" else "epsilon"
    _write(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULE, "prediction_type": prediction})
    _write(folder / "model_index.json", {**index, "scheduler": ("diffusers", "DDIMScheduler")})


def _write(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))

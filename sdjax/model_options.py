"""The options with which commands name a model, and what `Spec` is given for them. Knows no JAX."""

import argparse
from typing import Any


def add_model_options(to: Any) -> None:
    """Add the options to a parser or to a group of one."""
    to.add_argument(
        "--model",
        help="folder, hub id (org/name or org/name@revision), URL or single .safetensors file of a checkpoint "
        "(default: the bundled model)",
    )
    to.add_argument("--variant", help="which weight files to read of the networks that have several, such as fp16")
    to.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:WEIGHT]",
        help="a LoRA to add to the model, at a weight of 1 or that given; may be given several times",
    )
    to.add_argument(
        "--textual-inversion",
        action="append",
        metavar="PATH[:TOKEN]",
        help="learned embeddings that prompts use by their token, the file's own or that given; may be given several "
        "times",
    )
    to.add_argument(
        "--controlnet",
        action="append",
        metavar="PATH",
        help="folder, hub id, URL or single .safetensors file of a ControlNet, one for each control image; may be "
        "given several times",
    )
    to.add_argument(
        "--refiner",
        metavar="PATH",
        help="Stable Diffusion XL's refiner, named as a model is, which ends the runs of its base",
    )
    to.add_argument(
        "--vae",
        metavar="PATH",
        help="another autoencoder, named as a model is, such as madebyollin/taesd, or its single file",
    )
    to.add_argument(
        "--vae-tiling",
        action="store_true",
        help="decode and encode images of any size in strips, in less memory; large ones always are",
    )
    to.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="CLIP's vocab.json and merges.txt, which a single file does not hold "
        "(default: openai/clip-vit-large-patch14 from the hub)",
    )
    to.add_argument(
        "--prediction-type",
        metavar="TYPE",
        help="epsilon or v_prediction, where a single file does not say what it predicts",
    )
    to.add_argument(
        "--allow-ckpt",
        action="store_true",
        help="read .ckpt, .pt, .pth and .bin files. Such files are programs that can do anything when loaded the usual "
        "way; they are read without being run, and off by default because a .safetensors file needs no such care",
    )


def _lora(text: str) -> tuple[str, float]:
    """A LoRA's path and weight from PATH or PATH:WEIGHT; a URL's colon and a drive's are the path's."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _inversion(text: str) -> str | tuple[str, str]:
    """A textual inversion's path, and its token where one follows the last colon; a URL's colon is the path's."""
    path, _, token = text.rpartition(":")
    return (path, token) if path and token and "/" not in token else text


def model_options(options: argparse.Namespace | Any) -> dict[str, Any]:
    """Keyword arguments of `Spec` for the options that were given."""
    values = {
        "variant": options.variant,
        "loras": [_lora(text) for text in options.lora or ()],
        "textual_inversions": [_inversion(text) for text in options.textual_inversion or ()],
        "controlnets": options.controlnet,
        "refiner": options.refiner,
        "vae": options.vae,
        "vae_tiling": options.vae_tiling,
        "tokenizer": options.tokenizer,
        "prediction_type": options.prediction_type,
        "allow_pickle": options.allow_ckpt,
    }
    return {name: value for name, value in values.items() if value}

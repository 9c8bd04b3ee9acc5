"""The networks of a run, and how they are exported.

A network's parameters are float32 arrays by name, `{"down_blocks.0.resnets.0.conv1.kernel": array, ...}`: plain enough
for optax, orbax and averaging. They are the host's, so that devices hold what a step reads and nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.config.base import MAX_COUNT
from sdjax.family import TOKENIZERS, Family
from sdjax.text import Tokenizer
from sdjax.weights import checkpoint
from sdjax.weights.checkpoint import CLASSES

Params = dict[str, Any]  # arrays of numpy or JAX

_LAYOUT = "0.42.1"  # of diffusers, which reads no inpainting model that does not say one


@dataclass
class Networks:
    """Components by their folder's name, and what else a checkpoint holds.

    Attributes:
        configs: each network's config.json.
        modules: each network without parameters.
        dtypes: what each network computes in.
        params: each network's parameters, on the host.
        texts: the tokenizers' and the scheduler's files, by their path.
        xl: of Stable Diffusion XL, which is read from a checkpoint; None is another.
        init: the fingerprint of what was read from a checkpoint.
    """

    configs: dict[str, dict[str, Any]]
    modules: dict[str, nnx.Module]
    dtypes: dict[str, np.dtype]
    params: dict[str, Params]
    texts: dict[str, str]
    xl: Family | None = None
    init: str | None = None

    @property
    def scheduler(self) -> dict[str, Any]:
        return json.loads(self.texts["scheduler/scheduler_config.json"])

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """What reads captions, in the order of their states."""
        return tuple(name for name in TOKENIZERS if name in self.modules)

    @property
    def inpaints(self) -> bool:
        """Whether the UNet is told a mask and a picture."""
        return UNetConfig.from_dict(self.configs["unet"]).in_channels == 2 * self._latent + 1

    @property
    def edits(self) -> bool:
        """Whether the UNet is told the picture that a caption is an instruction for."""
        return UNetConfig.from_dict(self.configs["unet"]).in_channels == 2 * self._latent

    @property
    def _latent(self) -> int:
        return VAEConfig.from_dict(self.configs["vae"]).latent_channels

    def tokenizers(self) -> list[Tokenizer]:
        """Each text encoder's tokenizer, for captions as for prompts."""
        configs = {name: CLIPTextConfig.from_dict(self.configs[name]) for name in self.text_encoders}
        return [
            _tokenizer(self.texts, TOKENIZERS[name], config.vocab_size, config.max_position_embeddings)
            for name, config in configs.items()
        ]

    def export(self, folder: Path, params: Mapping[str, Params] | None, dtype: str | None = None) -> None:
        """Write a checkpoint in the diffusers layout with `params` in place of those of the networks they name.

        Without `params` it has no weights, and says only what the networks are.
        """
        modules = {name: module for name, module in self.modules.items() if name in CLASSES}
        weights = {}
        if params is not None:
            weights = {
                name: checkpoint.tensors_of(bind(module, params.get(name, self.params[name])), dtype)
                for name, module in modules.items()
            }
        classes = {name: CLASSES[name] for name in modules}
        if "unet" in classes:
            classes["scheduler"] = "diffusers", self.scheduler["_class_name"]
            classes |= {TOKENIZERS[name]: CLASSES[TOKENIZERS[name]] for name in self.text_encoders}
        kind, does = "" if self.xl is None else "XL", ""
        if "unet" in classes:
            does = "Inpaint" if self.inpaints else "InstructPix2Pix" if self.edits else ""
        index = {"_class_name": f"StableDiffusion{kind}{does}Pipeline", "_diffusers_version": _LAYOUT}
        index |= {**classes, "feature_extractor": [None, None]}
        if self.xl is None:
            index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        else:
            index |= {"image_encoder": [None, None], "force_zeros_for_empty_prompt": self.xl.zeroes_empty}
        configs = {name: self.configs[name] for name in modules}
        checkpoint.write(folder, index=index, configs=configs, weights=weights, texts=self.texts)


def flat(module: nnx.Module) -> Params:
    """Return a module's parameters by their path."""
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def bind(module: nnx.Module, params: Params) -> Any:
    """Return the module with these parameters; works on traced arrays."""
    graph, state = nnx.split(module)
    leaves = {path: leaf.replace(params[_name(path)]) for path, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _tokenizer(texts: Mapping[str, str], component: str, vocab_size: int, length: int) -> Tokenizer:
    own = {path: text for path, text in texts.items() if path.startswith(f"{component}/")}
    with checkpoint.as_folder(own) as folder:
        return Tokenizer(folder, vocab_size=vocab_size, length=length)


def fitted(settings: dict[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """The config of a new text encoder, whose vocabulary is its tokenizer's."""
    length = json.loads(texts.get("tokenizer/tokenizer_config.json", "{}")).get("model_max_length")
    tokenizer = _tokenizer(texts, "tokenizer", MAX_COUNT, 2)
    [[start, end]] = tokenizer([""])[0].tolist()
    kind = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    ids = {"vocab_size": tokenizer.first_added, "bos_token_id": start, "eos_token_id": end}
    return settings | ids | {"max_position_embeddings": length} | kind

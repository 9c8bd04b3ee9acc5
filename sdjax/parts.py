"""What a model is made of, wherever each part of it is read from, without its weights.

The source's networks, another VAE, ControlNets and a refiner; LoRAs and textual inversions, which change them;
tokenizers and the noise schedule; and the fingerprint of all.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from sdjax import controls, family, sampling
from sdjax.family import TOKENIZERS
from sdjax.text import Tokenizer
from sdjax.values import DTYPES
from sdjax.weights.checkpoint import Checkpoint, CheckpointError, Edit, as_folder
from sdjax.weights.lora import Lora, fused
from sdjax.weights.safetensors import Entry
from sdjax.weights.single_file import is_single_file, open_checkpoint, open_vae
from sdjax.weights.textual_inversion import TextualInversion, extended

BUNDLED = str(Path(__file__).parent / "bundled")
REFINER = "refiner."
"""How the names of a refiner's networks begin beside the base's."""


class Parts:
    """What a model is made of, by name; see `Spec` for what that makes of requests.

    Args:
        source: a checkpoint's folder, hub id or URL, or a single file in the original layout.
        dtype: `float32`, `bfloat16` or `float16`, in which the networks compute; part of the fingerprint. How float32
            products are rounded on TPUs and GPUs is JAX's: see `jax_default_matmul_precision`.
        variant: see `Checkpoint`; also of the refiner, and of a VAE or ControlNet that has it.
        loras: files that are added to the networks, each a path or URL, or one and its weight (1); see `Lora`.
        controlnets: folders, hub ids or URLs of ControlNets in the diffusers layout, or single files in either layout,
            in the order of a request's control images.
        refiner: that of Stable Diffusion XL's refiner, or a single file, which ends the runs of its base; see
            `Request.denoising_end`. LoRAs and textual inversions are the base's alone.
        vae: that of another autoencoder of the same latents: AutoencoderTiny, or another AutoencoderKL; the latter also
            a single file in the original layout.
        vae_tiling: whether images are decoded and encoded in strips, in a fraction of the memory and more time; None
            does so for large ones (`sdjax.models.tiling`). Pixels are the same but for rounding.
        textual_inversions: files of learned tokens, each a path or URL, or one and its token; see `TextualInversion`.
        tokenizer, prediction_type: of a single file, for its refiner too where that is one; see `SingleFile`.
        allow_pickle: whether weights of any kind may be PyTorch's own files; see `torch_zip`.

    Attributes:
        dtype, vae_tiling: as given.
        checkpoint: the source's files.
        family: which Stable Diffusion it is.
        configs: of each network by its name, the VAE that is used, ControlNets and a refiner's (`REFINER`) included.
        schedule: of its noise.
        controlnets: the ControlNets' names in `configs`, in their order.
        refiner: the refiner's own, or None.

    Raises:
        ValueError: `dtype` is none of those.
        CheckpointError, ConfigError, SamplingError: what is there cannot be run; the message names it.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] = BUNDLED,
        *,
        dtype: str = "float32",
        variant: str | None = None,
        loras: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
        textual_inversions: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], str]] = (),
        controlnets: Sequence[str | os.PathLike[str]] = (),
        refiner: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        vae_tiling: bool | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        allow_pickle: bool = False,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        for given in (loras, textual_inversions, controlnets):
            if isinstance(given, str | os.PathLike):
                raise ValueError(f"{given} is given where a list of files is taken; give [{str(given)!r}]")
        self.dtype, self.vae_tiling = str(dtype), vae_tiling
        single_file: dict[str, Any] = {"tokenizer": tokenizer, "prediction_type": prediction_type}
        self.checkpoint = open_checkpoint(source, variant=variant, allow_pickle=allow_pickle, **single_file)
        other_vae = None
        if vae is not None:
            replaced = self.checkpoint.json("vae", "config.json")
            other_vae = open_vae(vae, replaced, variant=variant, allow_pickle=allow_pickle)
        self.family, self.configs = family.read(self.checkpoint, other_vae)
        # Where each network lies, and as which component.
        self._parts: dict[str, tuple[Checkpoint, str]] = {name: (self.checkpoint, name) for name in self.configs}
        if other_vae is not None:
            self._parts["vae"] = other_vae, ""
        self.schedule = sampling.Schedule.from_config(self.checkpoint.json("scheduler", "scheduler_config.json"))

        pairs = [lora if isinstance(lora, tuple) else (lora, 1.0) for lora in loras]
        self._loras = [Lora(*pair, self.configs, what=self.name, allow_pickle=allow_pickle) for pair in pairs]
        named = [each if isinstance(each, tuple) else (each, None) for each in textual_inversions]
        self._inversions = [
            TextualInversion(*each, self.configs, what=self.name, allow_pickle=allow_pickle) for each in named
        ]
        self._first_added: dict[str, int] = {}
        for name in [name for name in self.configs if any(each.count(name) for each in self._inversions)]:
            self._add_tokens(name)

        found = controls.read(controlnets, self.configs, what=self.name, variant=variant, allow_pickle=allow_pickle)
        self._parts |= {name: (part, "") for name, (part, _) in found.items()}
        self.configs |= {name: config for name, (_, config) in found.items()}
        self.controlnets = tuple(found)
        self.refiner: Self | None = None
        if refiner is not None:
            options = single_file if is_single_file(refiner) else {}
            self.refiner = type(self)(refiner, dtype=dtype, variant=variant, allow_pickle=allow_pickle, **options)
            _check_refiner(self.refiner, self)
            for name in (*self.refiner.family.text_encoders, "unet"):
                self._parts[REFINER + name] = self.refiner.checkpoint, name
                self.configs[REFINER + name] = self.refiner.configs[name]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "tokenizers"}

    def _add_tokens(self, encoder: str) -> None:
        """Make room for the textual inversions in a text encoder's table of embeddings."""
        tokenizer, config = self._tokenizer(encoder), self.configs[encoder]
        end = tokenizer.first_added + sum(each.count(encoder) for each in self._inversions)
        self._first_added[encoder] = tokenizer.first_added
        # By its id, because the highest id of a text is no longer the one that ends it.
        self.configs[encoder] = dataclasses.replace(
            config, vocab_size=max(config.vocab_size, end), eos_token_id=tokenizer.end
        )

    def tensors(self, name: str) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of one of the networks, wherever it is from; see `Checkpoint.tensors`."""
        part, component = self._parts[name]
        return part.tensors(component)

    def entries(self, name: str) -> dict[str, Entry]:
        """Where they lie, their shapes and dtypes; see `Checkpoint.entries`."""
        part, component = self._parts[name]
        return part.entries(component)

    def config_json(self, name: str) -> dict[str, Any]:
        """The config.json of one of the networks."""
        part, component = self._parts[name]
        return part.json(component, "config.json")

    @property
    def index(self) -> dict[str, Any]:
        """model_index.json, with the class of the VAE that is used."""
        if self._parts["vae"][0] is self.checkpoint:
            return self.checkpoint.index
        return self.checkpoint.index | {"vae": ["diffusers", self.config_json("vae").get("_class_name")]}

    @property
    def has_added_tokens(self) -> bool:
        """Whether textual inversions have changed a tokenizer and its text encoder."""
        return bool(self._first_added)

    def edit(self, component: str) -> Edit:
        """What makes of a component's tensors those that LoRAs and textual inversions change."""
        fuse = fused(self._loras, component)
        if component not in self._first_added:
            return fuse
        extend = extended(self._inversions, component, self._first_added[component])
        return lambda key, tensor: extend(key, fuse(key, tensor))

    @property
    def name(self) -> str:
        """What metadata calls the model."""
        return self.checkpoint.name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything about the model that pixels depend on, in hex, as it was when first asked for.

        Then every file of weights is read.
        """
        return self.hashed()

    def hashed(self) -> str:
        """What the fingerprint would be of the files as they are now."""
        tokenizers = [TOKENIZERS[name] for name in self.family.text_encoders]
        own = [name for name, (part, _) in self._parts.items() if part is self.checkpoint]
        added = [name for name in self._parts if name not in own and not name.startswith(REFINER)]
        parts = [self.checkpoint.fingerprint([*own, *tokenizers, "scheduler"]), self.dtype]
        parts += [f"{name} {self._parts[name][0].fingerprint([''])}" for name in added]
        parts += [self.refiner.hashed()] if self.refiner else []
        parts += [f"{lora.file.hashed()} {lora.weight!r}" for lora in self._loras]
        parts += [f"{each.file.hashed()} {each.token!r}" for each in self._inversions]
        if self.family.is_xl:  # what of it model_index.json alone says
            parts += [f"{self.family.refines} {self.family.zeroes_empty}"]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @cached_property
    def tokenizers(self) -> tuple[Tokenizer, ...]:
        """The tokenizer of each text encoder, read when first needed. Raises CheckpointError."""
        return tuple(self._tokenizer(name) for name in self.family.text_encoders)

    def _tokenizer(self, encoder: str) -> Tokenizer:
        config = self.configs[encoder]
        added = [(each.token, each.count(encoder)) for each in self._inversions if each.count(encoder)]
        with as_folder(self.checkpoint.texts(TOKENIZERS[encoder])) as folder:
            return Tokenizer(folder, vocab_size=config.vocab_size, length=config.max_position_embeddings, added=added)


def _check_refiner(refiner: Parts, base: Parts) -> None:
    """Raise CheckpointError where a checkpoint is no refiner, or the other none that a refiner goes with."""
    name = refiner.name
    if not refiner.family.refines:
        raise CheckpointError(f"{name} is no refiner of Stable Diffusion XL, which says requires_aesthetics_score")
    if not family.can_be_refined(base.family):
        raise CheckpointError(f"the refiner {name} goes with Stable Diffusion XL's base, which {base.name} is not")
    family.check_fit(f"the refiner {name}", base.name, family.sides(refiner.configs["vae"], base.configs["vae"]))

"""What a checkpoint promises, without its weights: enough to check, complete, name and pack requests on any machine."""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sdjax import canvas, controls, family, sampling, tables, text
from sdjax.canvas import Canvas
from sdjax.family import TOKENIZERS
from sdjax.prompts import MAX_CLAUSES
from sdjax.request import MAX_SIDE, Request
from sdjax.text import Text, Tokenizer
from sdjax.values import DTYPES, RequestError
from sdjax.weights.checkpoint import Checkpoint, Edit
from sdjax.weights.lora import Lora, fused
from sdjax.weights.safetensors import Entry
from sdjax.weights.single_file import is_single_file, open_checkpoint, open_vae
from sdjax.weights.textual_inversion import TextualInversion, extended

BUNDLED = str(Path(__file__).parent / "bundled")
REFINER = "refiner."
"""How the names of a refiner's networks begin beside the base's."""

_DENOISING_END = 0.8  # where a refiner takes over unless the request says it, as https://arxiv.org/abs/2307.01952 does


class Program(NamedTuple):
    """What is compiled into a program; requests that agree on it can share a batch."""

    width: int
    height: int
    prompts: int  # that the network is asked with: the joined ones and the negative one
    chunks: int  # of tokens, in each of them
    variants: int  # encodings that compel's weights take, of each chunk
    refiner: tuple[int, ...]  # its prompts, chunks and variants; empty where none ends the run
    final_width: int  # after a second pass
    final_height: int
    reuses: bool  # deep features, from call to call
    token_merging_ratio: float

    @property
    def has_second_pass(self) -> bool:
        return (self.width, self.height) != (self.final_width, self.final_height)


class Spec:
    """A checkpoint's configurations, and what follows from them for a request.

    Args:
        source: a checkpoint's folder, hub id or URL, or a single file in the original layout.
        dtype: `float32`, `bfloat16` or `float16`, in which the networks compute; part of the fingerprint.
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
        refiner: the refiner's own Spec, or None.

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
        for one in (it for it in (loras, textual_inversions, controlnets) if isinstance(it, str | os.PathLike)):
            raise ValueError(f"{one} is given where a list of files is taken; give [{str(one)!r}]")
        self.dtype, self.vae_tiling = str(dtype), vae_tiling
        single_file: dict[str, Any] = {"tokenizer": tokenizer, "prediction_type": prediction_type}
        self.checkpoint = open_checkpoint(source, variant=variant, allow_pickle=allow_pickle, **single_file)
        other_vae = None
        if vae is not None:
            own = self.checkpoint.json("vae", "config.json")
            other_vae = open_vae(vae, own, variant=variant, allow_pickle=allow_pickle)
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
        self.refiner: Spec | None = None
        if refiner is not None:
            given = single_file if is_single_file(refiner) else {}
            self.refiner = Spec(refiner, dtype=dtype, variant=variant, allow_pickle=allow_pickle, **given)
            own, its = ((each.name, each.family, each.configs) for each in (self, self.refiner))
            family.check_refiner(its, own)
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
        """SHA-256 of everything about the model that pixels depend on, in hex."""
        tokenizers = [TOKENIZERS[name] for name in self.family.text_encoders]
        own = [name for name, (part, _) in self._parts.items() if part is self.checkpoint]
        added = [name for name in self._parts if name not in own and not name.startswith(REFINER)]
        parts = [self.checkpoint.fingerprint([*own, *tokenizers, "scheduler"]), self.dtype]
        parts += [f"{name} {self._parts[name][0].fingerprint([''])}" for name in added]
        parts += [self.refiner.fingerprint] if self.refiner else []
        parts += [f"{lora.file.digest} {lora.weight!r}" for lora in self._loras]
        parts += [f"{each.file.digest} {each.token!r}" for each in self._inversions]
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
        with self.checkpoint.local(TOKENIZERS[encoder]) as folder:
            return Tokenizer(folder, vocab_size=config.vocab_size, length=config.max_position_embeddings, added=added)

    @property
    def scale(self) -> int:
        """Pixels a latent, on each axis."""
        return self.configs["vae"].downscale

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height of an image of which none are asked, in pixels."""
        size = self.configs["unet"].sample_size or 64
        height, width = size if isinstance(size, tuple) else (size, size)
        return width * self.scale, height * self.scale

    @property
    def multiple(self) -> int:
        """What a width or height is a multiple of."""
        return max(8, self.scale)

    @property
    def distilled(self) -> bool:
        """Whether it says that it is a consistency model, for a few steps of lcm or tcd."""
        return sampling.is_distilled(sampling.default_sampler(self.schedule)) or self.family.embeds_guidance

    def resolve(self, request: Request, *, read: bool = True) -> Request:
        """The request with this checkpoint's defaults in place of None.

        A resolved request comes back as it is.

        Args:
            request: its pictures are read, for their size and hashes.
            read: False passes over pictures whose size and hashes the request has already.

        Raises:
            RequestError: this checkpoint cannot make it, or a picture cannot be used.
            TypeError: it is no Request.
        """
        if not isinstance(request, Request):
            raise TypeError(f"a {type(request).__name__} is no request; give Request(prompt=...)")
        known = None not in (request.image_sha256, request.width, request.height)
        mask_known = request.mask_image is None or request.mask_image_sha256 is not None
        if request.image is not None and (read or not (known and mask_known)):
            request = canvas.measured(request, self.multiple)
        if request.control_image is not None:
            controls.check(request, len(self.controlnets))
            if read or None in (request.control_image_sha256, request.width, request.height):
                request = controls.measured(request, self.multiple)
        width, height = self.default_size
        try:
            asked = request.sampler
            sampler = sampling.canonical(asked) if asked else sampling.default_sampler(self.schedule)
            defaults = {
                "width": width,
                "height": height,
                "negative_prompt": None if self.family.zeroes_empty else "",
                "denoising_end": None if self.refiner is None else _DENOISING_END,
                "sigmas": "" if request.timesteps else sampling.default_sigmas(self.schedule, sampler),
            }
            missing = {name: value for name, value in defaults.items() if getattr(request, name) is None}
            request = dataclasses.replace(request, sampler=sampler, **missing)
            # With a LoRA it may well be distilled.
            if sampling.is_distilled(sampler) and not (self.distilled or self._loras):
                _warn(f"sampler={sampler} is for models distilled for it, which {self.name} does not say that it is")
            self.table(request)
            if self.refiner and request.denoising_end != 1:
                self.refiner_table(request)
            if request.hires_scale > 1:
                self.hires_table(request)
        except sampling.SamplingError as error:
            raise RequestError(str(error)) from None
        self._check(request)
        return request

    def _check(self, request: Request) -> None:
        """Raise RequestError where a request, complete with its defaults, asks what this checkpoint cannot do."""
        self.family.check(request)
        for name in ("width", "height"):
            side = getattr(request, name)
            if side % self.multiple:
                raise RequestError(f"{name}={side} is not a multiple of {self.multiple}, which this model's VAE needs")
        if self.refiner is None and request.denoising_end is not None:
            raise RequestError("denoising_end is for a refiner, and none is loaded; give refiner (--refiner PATH)")
        if request.hires_scale > 1 and request.denoising_end not in (None, 1):
            raise RequestError(
                "hires_scale does not go with a refiner; leave it out, or the refiner by denoising_end=1"
            )
        program = self.program(request)
        if max(program.final_width, program.final_height) > MAX_SIDE:
            raise RequestError(f"hires_scale={request.hires_scale:g} makes a side longer than {MAX_SIDE}")
        if request.hires_scale > 1 and not program.has_second_pass:
            raise RequestError(
                f"hires_scale={request.hires_scale:g} makes no larger image: sides are multiples of {self.multiple}"
            )
        encoders = [config for name, config in self.configs.items() if "text_encoder" in name]
        layers = min(encoder.num_hidden_layers for encoder in encoders) - self.family.is_xl
        if request.clip_skip >= layers:
            raise RequestError(f"clip_skip={request.clip_skip} leaves no layer; the text encoder has {layers}")
        joined = len(self.text(request).clauses)
        if joined > MAX_CLAUSES:
            raise RequestError(f"prompt joins {joined} prompts by AND; allowed are {MAX_CLAUSES}")

    def prepare(self, resolved: Request) -> Canvas | None:
        """The pictures of a resolved request as pixels at its size; None where it has none.

        Raises:
            RequestError: they cannot be read any more, or are others.
        """
        return None if resolved.image is None else canvas.fit(resolved, canvas.load(resolved, self.multiple))

    def control_images(self, resolved: Request) -> list[Image.Image]:
        """The control images of a resolved request, of any size. Raises RequestError as `prepare` does."""
        return controls.load(resolved)[0]

    def id(self, resolved: Request) -> str:
        """The name of the image that a resolved request makes: 32 hex digits of a hash of it and the fingerprint."""
        return hashlib.sha256(f"{self.fingerprint} {resolved.canonical()}".encode()).hexdigest()[:32]

    def program(self, resolved: Request) -> Program:
        """What must be compiled for a resolved request."""
        width, height = resolved.width, resolved.height
        assert width is not None, "resolve the request first"
        assert height is not None
        refiner = self.refiner.text(resolved).counts if self.refiner and resolved.denoising_end != 1 else ()
        final = [round(side * resolved.hires_scale / self.multiple) * self.multiple for side in (width, height)]
        shortcuts = resolved.cache_interval > 1, resolved.token_merging_ratio
        return Program(width, height, *self.text(resolved).counts, refiner, final[0], final[1], *shortcuts)

    def text(self, request: Request) -> Text:
        """What the text encoders are given for a request.

        Raises:
            RequestError: its prompts cannot be used.
            CheckpointError: a tokenizer cannot be read.
        """
        tokenizers = self.tokenizers
        first = request.prompt, request.negative_prompt or ""
        second = request.prompt_2 or first[0], request.negative_prompt_2 or first[1]
        try:
            read = _text(tokenizers, (first, second)[: len(tokenizers)], request.prompt_language)
        except ValueError as error:
            raise RequestError(str(error)) from None
        return read.with_negative_twice() if self.family.edits else read

    def rank(self, resolved: Request) -> tuple[Program, int]:
        """What to sort resolved requests by: neighbours then share programs, and batches that finish together."""
        return self.program(resolved), self.calls(resolved)

    def calls(self, resolved: Request) -> int:
        """Sampler rows that a resolved request takes: network calls, or pairs of them under guidance."""
        program, calls = self.program(resolved), self.table(resolved).calls
        calls += self.hires_table(resolved).calls if program.has_second_pass else 0
        return calls + (self.refiner_table(resolved).calls if program.refiner else 0)

    def table(self, resolved: Request) -> sampling.Table:
        """The sampler table of a resolved request, up to where the refiner takes over."""
        return tables.run(self.schedule, resolved, edits=self.family.edits, all_steps=self.family.embeds_guidance)

    def hires_table(self, resolved: Request) -> sampling.Table:
        """The sampler table of its second pass."""
        return tables.second_pass(self.schedule, resolved, all_steps=self.family.embeds_guidance)

    def refiner_table(self, resolved: Request) -> sampling.Table:
        """The sampler table of the refiner, where its program has one."""
        assert self.refiner is not None
        return tables.refiner(self.refiner.schedule, resolved)


@functools.cache
def _warn(message: str) -> None:
    """Say it once."""
    logging.getLogger(__name__).warning(message)


@functools.lru_cache(maxsize=1024)
def _text(tokenizers: tuple[Tokenizer, ...], prompts: tuple[tuple[str, str], ...], language: str) -> Text:
    return text.encode(tokenizers, prompts, language)

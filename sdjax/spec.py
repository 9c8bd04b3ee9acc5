"""What a checkpoint promises, without its weights: enough to check, complete, name and pack requests on any machine."""

import dataclasses
import functools
import logging
from typing import NamedTuple

from PIL import Image

from sdjax import canvas, controls, sampling, tables, text
from sdjax.canvas import Canvas
from sdjax.parts import Parts
from sdjax.prompts import MAX_CLAUSES
from sdjax.request import MAX_SIDE, Request, id_of
from sdjax.text import Text, Tokenizer
from sdjax.values import RequestError

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


class Spec(Parts):
    """A checkpoint's parts, and what follows from them for a request.

    Its arguments, its other attributes and what it raises are those of `Parts`.
    """

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

        A resolved request comes back equal.

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
        return id_of(self.fingerprint, vars(resolved))

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
        all_steps = self.family.keeps_steps and not resolved.is_masked
        return tables.run(self.schedule, resolved, edits=self.family.edits, all_steps=all_steps)

    def hires_table(self, resolved: Request) -> sampling.Table:
        """The sampler table of its second pass."""
        return tables.second_pass(self.schedule, resolved, all_steps=self.family.keeps_steps)

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

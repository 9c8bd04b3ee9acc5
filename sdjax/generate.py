"""Stable Diffusion, bound together: a checkpoint, its networks on the local devices, and requests in batches to pixels.

Nothing that a request may vary is in a compiled program but its width and height, and how many prompts of how many
chunks it has, where that is more than the usual one and its negative. A batch always has `batch_size` rows
a device, padded with copies, and the sampler runs `SCAN_ROWS` table rows a call, so one program serves every sampler,
step count, guidance, seed, prompt, image and mask, and a request's pixels do not depend on what shares its batch. A row
without an image starts from an image of zeros, one without a mask has a mask of ones; only encoding images is a program
of its own, run for the batches that have some.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from sdjax import postprocess, programs, sampling
from sdjax.batch import HostNoise, Pictures, guidance_embedding, guidance_weights, time_ids
from sdjax.canvas import Canvas
from sdjax.family import TOKENIZERS
from sdjax.networks import load
from sdjax.parallel import Device, Devices
from sdjax.request import Request
from sdjax.sampling import noise, scan
from sdjax.spec import BUNDLED, Program, Spec
from sdjax.text import Text
from sdjax.weights import checkpoint
from sdjax.weights.single_file import is_single_file

SCAN_ROWS = 5
"""Sampler rows in one call of the compiled scan: divides the usual step counts, and is long enough to hide dispatch."""

IN_FLIGHT = 2  # batches that the devices have been given and the host has not fetched
_READERS = 8  # images of a batch that are fetched at once


@dataclass(frozen=True)
class Result:
    """A finished image.

    request: with every field filled in.
    id: hex name of the request on this model.
    pixels: uint8 [height, width, 3]; of the request's size, or of the whole image that was repainted or grown.
    flags: what is odd about it: `nan` (the network overflowed; such pixels are black), `black`, `flat` (nearly one
        colour), `truncated` (the prompt was too long and lost its end).
    """

    request: Request
    id: str
    pixels: UInt8[np.ndarray, "height width 3"]
    flags: tuple[str, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.pixels)


class StableDiffusion:
    """Images from requests, on all devices of this host.

    Attributes:
        spec: the checkpoint's promises.
        batch_size: images that a device makes at once; fixed, because a batch of another size rounds otherwise.
        devices: what they run on.
    """

    def __init__(self, spec: Spec, networks: dict[str, nnx.Module], batch_size: int, devices: Devices) -> None:
        self.spec, self.batch_size, self.devices = spec, batch_size, devices
        self._networks = networks
        scale = spec.configs["vae"].scaling_factor
        self._encode = devices.pmap(functools.partial(programs.encode_text, is_xl=spec.family.is_xl))
        self._encode_image = devices.pmap(functools.partial(programs.encode_image, scale=scale))
        self._enlarge = devices.pmap(functools.partial(programs.enlarge, scale=scale), static_broadcasted_argnums=6)
        self._start = devices.pmap(programs.start)
        self._encode_mean = devices.pmap(programs.encode_mean)
        advance = functools.partial(programs.advance, last_is_told=not spec.family.edits)
        self._advance = devices.pmap(advance, donate_argnums=1)
        self._decode = devices.pmap(functools.partial(programs.decode, scale=scale))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | Spec = BUNDLED,
        *,
        dtype: str = "float32",
        batch_size: int | None = None,
        devices: Sequence[Device] | Devices | None = None,
        **options: Any,
    ) -> "StableDiffusion":
        """Load a checkpoint onto the devices.

        Args:
            source: a folder, hub id, fsspec URL or single file, or a `Spec` that was made of one.
            dtype, options: see `Spec`; not asked where a Spec is given.
            batch_size: images that a device makes at once; default 1 on CPU, 4 elsewhere.
            devices: default all local devices.

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be run; the message names what is wrong.
        """
        spec = source if isinstance(source, Spec) else Spec(source, dtype=dtype, **options)
        on = devices if isinstance(devices, Devices) else Devices(devices)
        if batch_size is None:
            batch_size = 1 if on.platform == "cpu" else 4
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} makes nothing; allowed is 1 or more")
        networks = load(spec, on)
        _ = spec.tokenizers  # refused now where they cannot be read
        return cls(spec, networks, batch_size, on)

    @classmethod
    def from_single_file(cls, source: str | os.PathLike[str], **options: Any) -> "StableDiffusion":
        """Load a file in the original layout (`model.safetensors`), a path or URL, onto the devices.

        Args:
            source: see `sdjax.weights.single_file.SingleFile`.
            options: `tokenizer`, `prediction_type` and `allow_pickle` of `SingleFile`, and those of `from_pretrained`.

        Raises:
            CheckpointError: the file cannot be run; the message names what is wrong.
        """
        if not is_single_file(source):
            raise checkpoint.CheckpointError(f"{source} is no single file; from_pretrained loads folders")
        return cls.from_pretrained(source, **options)

    @property
    def parameters(self) -> int:
        """Parameters of all networks."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._networks)) // len(self.devices)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the checkpoint in the diffusers layout, which diffusers and `from_pretrained` load.

        Raises:
            FileExistsError: `folder` is there already.
            ValueError: textual inversions were added, which that layout keeps in files of their own.
        """
        if self.spec.has_added_tokens:
            raise ValueError("a model with textual inversions cannot be saved; load it without them")
        source = self.spec.checkpoint
        first = jax.tree.map(lambda array: array[0], self._networks)
        checkpoint.save(
            folder,
            index=source.index,
            configs={name: source.json(name, "config.json") for name in self._networks},
            weights={name: checkpoint.tensors_of(network) for name, network in first.items()},
            texts={
                path: text
                for folder in ("scheduler", *(TOKENIZERS[name] for name in self.spec.family.text_encoders))
                for path, text in source.texts(folder).items()
            },
        )

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """The images of the requests, in their order; see `stream`."""
        resolved = [self.spec.resolve(request) for request in requests]
        # Requests that share a program share batches; those of like length finish together.
        ranks = [(self.spec.program(request), self.spec.calls(request)) for request in resolved]
        order = sorted(range(len(resolved)), key=ranks.__getitem__)
        results = dict(zip(order, self.stream(resolved[i] for i in order), strict=True))
        return [results[i] for i in range(len(resolved))]

    def stream(
        self, requests: Iterable[Request], *, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Result]:
        """The images of the requests, each as soon as its batch is done, in order, while the next batch runs.

        Args:
            requests: neighbours of one program, such as those with the same width and height, share a batch.
            progress: called with the sampler rows done and all sampler rows of the batch in hand.

        Raises:
            RequestError: a request that the checkpoint cannot make, or whose pictures cannot be read, when its turn
                comes; `Spec.resolve` says so beforehand.
        """
        flight: deque[_Flight] = deque()
        resolved = (self.spec.resolve(request, read=False) for request in requests)
        for batch in self._batches(resolved):
            flight.append(self.launch(batch))
            if len(flight) == IN_FLIGHT:
                yield from self._land(flight.popleft(), progress)
        for last in flight:
            yield from self._land(last, progress)

    def _batches(self, resolved: Iterable[Request]) -> Iterator[list[Request]]:
        size = self.batch_size * len(self.devices)
        for _, group in groupby(resolved, self.spec.program):
            while batch := list(islice(group, size)):
                yield batch

    def launch(self, batch: list[Request]) -> "_Flight":
        """Give the devices a batch; returns at once, with arrays that they will fill."""
        padding = self.batch_size * len(self.devices) - len(batch)
        canvases = self._prepare(batch)
        rows, boards = batch + batch[-1:] * padding, canvases + canvases[-1:] * padding
        texts = [self.spec.text(request) for request in rows]
        split, networks = self.devices.split, self._networks
        shared = _Shared(
            requests=rows,
            clauses=np.stack([text.clauses for text in texts]),
            conditions=self._conditions(rows, texts),
            keys=split(noise.keys([request.seed for request in rows])),
            is_given=split(np.array([request.noise == "torch" for request in rows])),
            rescale=split(np.array([request.guidance_rescale for request in rows], np.float32)),
        )
        program = self.spec.program(batch[0])
        latents, ticks = self._first_pass(rows, boards, shared, program)
        if program.has_second_pass:
            latents, more = self._second_pass(rows, latents, shared, program)
            ticks += more
        pixels, finite = self._decode(networks["vae"], latents)
        return _Flight(batch, canvases, [text.truncated for text in texts], ticks, pixels, finite)

    def _conditions(self, rows: list[Request], texts: list[Text]) -> programs.Conditions:
        """What the UNet is told of each request whatever the size."""
        split, family = self.devices.split, self.spec.family
        ids, weights = (np.stack([getattr(text, name) for text in texts]) for name in ("ids", "weights"))
        variants = jax.tree.map(lambda *each: np.stack(each), *(text.variants for text in texts))
        is_negative = np.arange(ids.shape[2]) >= len(texts[0].clauses)
        clip_skip = np.array([np.where(is_negative, 0, request.clip_skip) for request in rows], np.int32)
        is_zero = np.array([is_negative & (request.negative_prompt is None) for request in rows])
        encoders = tuple(self._networks[name] for name in family.text_encoders)
        conditions = self._encode(
            encoders, split(ids), split(weights), split(clip_skip), split(is_zero), split(variants)
        )
        if family.embeds_guidance:
            channels = self.spec.configs["unet"].time_cond_proj_dim
            conditions = conditions._replace(guidance=split(guidance_embedding(rows, channels)))
        return conditions

    def _first_pass(
        self, rows: list[Request], boards: list[Canvas | None], shared: "_Shared", program: Program
    ) -> tuple[jax.Array, "_Ticks"]:
        """Latents at the requests' width and height."""
        split, spec = self.devices.split, self.spec
        pictures = Pictures(boards, (program.height, program.width), spec.scale)
        tables = [spec.table(request) for request in rows]
        # diffusers does not encode an image that neither the start nor the blending needs.
        encoded = [
            board is not None and not spec.family.edits and not (spec.family.inpaints and request.strength == 1)
            for board, request in zip(boards, rows, strict=True)
        ]
        masked = [board is not None and board.mask is not None for board in boards]
        drawn = HostNoise(rows, tables, self._shape(program.height, program.width), encoded=encoded, masked=masked)

        def encode(pixels: np.ndarray, posterior: np.ndarray) -> jax.Array:
            return self._encode_image(
                self._networks["vae"],
                split(pixels),
                split(pictures.there),
                shared.keys,
                shared.is_given,
                split(posterior),
            )

        mask, told = split(pictures.mask), None
        if spec.family.edits:
            told = (self._encode_mean(self._networks["vae"], split(pictures.image)),)
        if spec.family.inpaints:
            told = (mask, encode(pictures.unmasked, drawn.unmasked))
        needed = pictures.there.any() and not spec.family.edits
        image = encode(pictures.image, drawn.posterior) if needed else split(np.zeros_like(drawn.start))
        return self._sample(tables, drawn, shared, image, mask, told)

    def _second_pass(
        self, rows: list[Request], latents: jax.Array, shared: "_Shared", program: Program
    ) -> tuple[jax.Array, "_Ticks"]:
        """Latents at the size of `hires_scale`: the first pass's image or latent, enlarged, to start from."""
        height, width = program.final_height, program.final_width
        tables = [self.spec.hires_table(request) for request in rows]
        shape = self._shape(height, width)
        directly = [request.hires_upscaler == "latent" for request in rows]
        encoded = [not each for each in directly]
        drawn = HostNoise(rows, tables, shape, encoded=encoded, masked=[False] * len(rows))
        split = self.devices.split
        image = self._enlarge(
            self._networks["vae"],
            latents,
            split(np.array(directly)),
            shared.keys,
            shared.is_given,
            split(drawn.posterior),
            (height, width),
        )
        everywhere = split(np.ones((len(rows), *shape[:2], 1), np.float32))
        return self._sample(tables, drawn, shared, image, everywhere, None)

    def _shape(self, height: int, width: int) -> tuple[int, int, int]:
        return height // self.spec.scale, width // self.spec.scale, self.spec.configs["vae"].latent_channels

    def _sample(
        self,
        tables: list[sampling.Table],
        drawn: HostNoise,
        shared: "_Shared",
        image: jax.Array,
        mask: jax.Array,
        told: tuple[jax.Array, ...] | None,
    ) -> tuple[jax.Array, "_Ticks"]:
        """Run the tables, a few rows a call; `told` are further channels of the UNet, which then needs no blending."""
        split = self.devices.split
        levels = split(np.array([(table.start_signal, table.start_noise) for table in tables], np.float32))
        state, known = self._start(shared.keys, shared.is_given, split(drawn.start), levels, image, mask)
        known = known if told is None else None
        length = max(table.calls for table in tables)
        padded = -(-length // SCAN_ROWS) * SCAN_ROWS
        family, (height, width) = self.spec.family, drawn.start.shape[1:3]
        weights = guidance_weights(
            shared.requests, tables, shared.clauses, padded, edits=family.edits, embedded=family.embeds_guidance
        )
        conditions = shared.conditions
        if family.is_xl:
            size, joined = (height * self.spec.scale, width * self.spec.scale), shared.clauses.shape[1]
            ids = time_ids(shared.requests, size, joined, weights.shape[2], refines=family.refines)
            conditions = conditions._replace(time_ids=split(ids))
        stacked = sampling.stack(tables, padded), weights
        ticks = []
        for first in range(0, length, SCAN_ROWS):
            part = jax.tree.map(lambda column, first=first: column[:, first : first + SCAN_ROWS], stacked)
            given = scan.Given(split(drawn.rows(first, SCAN_ROWS)), shared.is_given)
            state, tick = self._advance(
                self._networks["unet"],
                state,
                conditions,
                split(part),
                shared.keys,
                shared.rescale,
                given,
                known,
                told,
            )
            ticks.append((min(SCAN_ROWS, length - first), tick))
        return state.latents, ticks

    def _prepare(self, batch: list[Request]) -> list[Canvas | None]:
        """The requests' pictures, read side by side."""
        if all(request.image is None for request in batch):
            return [None] * len(batch)
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(self.spec.prepare, batch))

    def _land(self, flight: "_Flight", progress: Callable[[int, int], None] | None) -> Iterator[Result]:
        """Wait for a batch and hand its images out."""
        if progress is not None:
            total, done = sum(rows for rows, _ in flight.ticks), 0
            for rows, tick in flight.ticks:
                tick.block_until_ready()
                done += rows
                progress(done, total)
        pixels, finite = self.devices.join(flight.pixels), self.devices.join(flight.finite)
        for i, request in enumerate(flight.batch):
            canvas = flight.canvases[i]
            made = pixels[i] if canvas is None else canvas.finish(pixels[i])
            flags = postprocess.oddities(made) if finite[i] else ["nan"]
            flags += ["truncated"] * flight.cut[i]
            made = postprocess.resize(made, request.resize)
            yield Result(request, self.spec.id(request), made, tuple(flags))


_Ticks = list[tuple[int, jax.Array]]
"""For each call of the scan, its sampler rows, and an array that is ready when they are done."""


class _Shared(NamedTuple):
    """What both passes of a batch use; the arrays of JAX are on the devices."""

    requests: list[Request]
    clauses: np.ndarray
    conditions: programs.Conditions
    keys: jax.Array
    is_given: jax.Array
    rescale: jax.Array


class _Flight(NamedTuple):
    """A batch that the devices are working on."""

    batch: list[Request]
    canvases: list[Canvas | None]
    cut: list[bool]
    ticks: _Ticks
    pixels: jax.Array
    finite: jax.Array

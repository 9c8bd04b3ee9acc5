"""Stable Diffusion, bound together: a checkpoint, its networks on the local devices, and requests in batches to pixels.

Nothing that a request may vary is in a compiled program but what `spec.Program` holds. A batch always has `batch_size`
rows a device, padded with copies, and the sampler runs `SCAN_ROWS` table rows a call, so one program serves every
sampler, step count, guidance, seed, prompt, image and mask, and a request's pixels do not depend on what shares its
batch. A row without an image starts from an image of zeros, one without a mask has a mask of ones; only encoding images
is a program of its own, run for the batches that have some.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax import postprocess, programs
from sdjax.batch import HostNoise, Pictures
from sdjax.canvas import Canvas
from sdjax.denoise import Batch, Denoiser, Ticks
from sdjax.family import TOKENIZERS
from sdjax.files import folder_here
from sdjax.networks import build, load
from sdjax.parallel import Device, Devices
from sdjax.parts import BUNDLED, REFINER
from sdjax.request import Request
from sdjax.spec import Spec
from sdjax.values import BATCH_SIZE, RequestError
from sdjax.weights import checkpoint
from sdjax.weights.single_file import is_single_file

IN_FLIGHT = 2  # batches that the devices have been given and the host has not fetched
_READERS = 8  # images of a batch that are fetched at once

_Pictures = TypeVar("_Pictures")


@dataclass(frozen=True, eq=False)  # arrays have no truth value
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

    def __init__(self, spec: Spec, networks: dict[str, Any], batch_size: int, devices: Devices) -> None:
        self.spec, self.batch_size, self.devices = spec, batch_size, devices
        self._networks = networks
        self._split = functools.partial(devices.split, each=batch_size)
        self._denoiser, self._refiner = Denoiser(spec, networks, batch_size, devices), None
        if spec.refiner is not None:
            own = {name.removeprefix(REFINER): part for name, part in networks.items() if name.startswith(REFINER)}
            self._refiner = Denoiser(spec.refiner, own, batch_size, devices)
        vae = {"scale": spec.configs["vae"].scaling_factor, "tiled": spec.vae_tiling}
        self._encode_image = devices.pmap(functools.partial(programs.encode_image, **vae))
        self._encode_mean = devices.pmap(functools.partial(programs.encode_mean, tiled=spec.vae_tiling))
        self._enlarge = devices.pmap(functools.partial(programs.enlarge, **vae))
        self._decode = devices.pmap(functools.partial(programs.decode, **vae))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | Spec = BUNDLED,
        *,
        dtype: str = "float32",
        batch_size: int | None = None,
        devices: Sequence[Device] | Devices | None = None,
        first: Request | None = None,
        **options: Any,
    ) -> "StableDiffusion":
        """Load a checkpoint onto the devices.

        Args:
            source: a folder, hub id, fsspec URL or single file, or a `Spec` that was made of one.
            dtype, options: see `Spec` (`controlnets`, `refiner`, `vae` and others), where none is given.
            batch_size: images that a device makes at once; default 1 on CPU, 4 elsewhere.
            devices: default all local devices.
            first: what will be asked for first; what it needs is compiled while the weights are read.

        Raises:
            RequestError: the checkpoint cannot make `first`.
            CheckpointError, ConfigError, SamplingError: the checkpoint cannot be run; the message names what is wrong.
            ValueError: `dtype` or `batch_size` is none that there is, or options are given beside a Spec.
        """
        if isinstance(source, Spec) and (options or dtype not in ("float32", source.dtype)):
            given = ", ".join(options) or "dtype"
            raise ValueError(f"{given} cannot be changed for a Spec that is made; give it to Spec(...)")
        spec = source if isinstance(source, Spec) else Spec(source, dtype=dtype, **options)
        on = devices if isinstance(devices, Devices) else Devices(devices)
        if batch_size is None:
            batch_size = 1 if on.platform == "cpu" else BATCH_SIZE
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is no number of images; allowed is an integer of 1 or more")
        _ = spec.tokenizers, spec.refiner and spec.refiner.tokenizers  # refused now where they cannot be read

        def compile_for(batch: list[Request], networks: dict[str, Any]) -> None:
            cls(spec, networks, batch_size, on).launch(batch)

        batch = None if first is None else [spec.resolve(first)]
        with ThreadPoolExecutor(2) as background:
            loaded, named = background.submit(load, spec, on), background.submit(lambda: spec.fingerprint)
            if batch is not None:
                jax.eval_shape(functools.partial(compile_for, batch), build(spec, devices=len(on)))
            networks = loaded.result()
            named.result()  # for ids, from files that may be gone or others by then
        on.wait()
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

        Its ControlNets and its refiner are checkpoints of their own, and not written.

        Raises:
            FileExistsError: `folder` is there already.
            ValueError: `folder` is a URL; or textual inversions were added, for which that layout has no place.
        """
        if self.spec.has_added_tokens:
            raise ValueError("a model with textual inversions cannot be saved; load it without them")
        source = self.spec.checkpoint
        own = {name: self._networks[name] for name in (*self.spec.family.text_encoders, "unet", "vae")}
        first = jax.tree.map(lambda array: np.asarray(array.addressable_data(0))[0], own)
        with checkpoint.new_folder(folder_here(folder)) as new:
            checkpoint.write(
                new,
                index=self.spec.index,
                configs={name: self.spec.config_json(name) for name in first},
                weights={name: checkpoint.tensors_of(network) for name, network in first.items()},
                texts={
                    path: text
                    for part in ("scheduler", *(TOKENIZERS[name] for name in self.spec.family.text_encoders))
                    for path, text in source.texts(part).items()
                },
            )

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """The images of the requests, in their order; see `stream`."""
        resolved = [self.spec.resolve(request, read=False) for request in requests]
        order = sorted(range(len(resolved)), key=lambda i: self.spec.rank(resolved[i]))
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
            RequestError: a request that the checkpoint cannot make, after the images of all before it, or one whose
                pictures cannot be read, after those of the batches before; `Spec.resolve` says so beforehand.
            Exception: whatever `requests` raises, after the images of all that it gave.
        """
        flight: deque[_Flight] = deque()
        refused: list[Exception] = []

        def resolved() -> Iterator[Request]:
            try:
                for request in requests:
                    yield self.spec.resolve(request, read=False)
            except Exception as error:
                refused.append(error)

        for batch in self._batches(resolved()):
            try:
                flight.append(self.launch(batch))
            except RequestError as error:
                refused.insert(0, error)  # before that of a later one, which may have been met already
                break
            if len(flight) == IN_FLIGHT:
                yield from self._land(flight.popleft(), progress)
        for last in flight:
            yield from self._land(last, progress)
        if refused:
            raise refused[0]

    def _batches(self, resolved: Iterable[Request]) -> Iterator[list[Request]]:
        size = self.batch_size * len(self.devices)
        for _, group in groupby(resolved, self.spec.program):
            while batch := list(islice(group, size)):
                yield batch

    def launch(self, batch: list[Request]) -> "_Flight":
        """Give the devices a batch, and return without waiting for them, with arrays that they will fill."""
        canvases = self._read(self.spec.prepare, batch, "image")
        controls = zip(canvases, self._read(self.spec.control_images, batch, "control_image"), strict=True)
        control_images = [found if canvas is None else list(map(canvas.cut, found)) for canvas, found in controls]
        shared = self._denoiser.batch(self.spec.program(batch[0]), batch, control_images)
        latents, ticks = self._first_pass(canvases, shared)
        if shared.program.has_second_pass:
            latents, more = self._second_pass(latents, shared)
            ticks += more
        pixels, finite = self._decode(self._networks["vae"], latents)
        return _Flight(batch, canvases, shared.cut, ticks, pixels, finite)

    def _first_pass(self, canvases: list[Canvas | None], shared: Batch) -> tuple[jax.Array, Ticks]:
        """Latents at the requests' width and height."""
        split, spec, rows, program = self._split, self.spec, shared.requests, shared.program
        pictures = Pictures(canvases, (program.height, program.width), spec.scale)
        tables = [spec.table(request) for request in rows]
        # As in diffusers, an image that neither the start nor the blending needs is not encoded.
        needed = [
            canvas is not None and not spec.family.edits and not (spec.family.inpaints and request.strength == 1)
            for canvas, request in zip(canvases, rows, strict=True)
        ]
        encoded = [each and spec.family.draws_latents for each in needed]
        masked = [each is not None and spec.family.draws_latents and each.mask is not None for each in canvases]
        drawn = HostNoise(rows, tables, self._shape(program.height, program.width), encoded=encoded, masked=masked)

        def encode(pixels: np.ndarray, posterior: np.ndarray) -> jax.Array:
            draws = shared.draws(split(posterior))
            return self._encode_image(self._networks["vae"], split(pixels), split(pictures.there), draws)

        mask, told = split(pictures.mask), None
        if spec.family.edits:
            told = (self._encode_mean(self._networks["vae"], split(pictures.image)),)
        if spec.family.inpaints:
            told = (mask, encode(pictures.unmasked, drawn.unmasked))
        image = encode(pictures.image, drawn.posterior) if any(needed) else split(np.zeros_like(drawn.start))
        state, known = self._denoiser.start(shared, tables, drawn, image, mask)
        known = None if told else known  # a UNet that is told further channels needs no blending
        latents, ticks = self._denoiser.run(shared, tables, drawn, state, known=known, told=told)
        if self._refiner is None or not program.refiner:
            return latents, ticks
        tables = [spec.refiner_table(request) for request in rows]
        refined, drawn = self._refiner.batch(program, rows, [[]] * len(rows), stage=1), drawn.then(tables)
        state, _ = self._refiner.start(refined, tables, drawn, latents, mask)
        latents, more = self._refiner.run(refined, tables, drawn, state, known=known)
        return latents, ticks + more

    def _second_pass(self, latents: jax.Array, shared: Batch) -> tuple[jax.Array, Ticks]:
        """Latents at the size of `hires_scale`: the first pass's image or latent, enlarged, to start from."""
        rows, shape = shared.requests, self._shape(shared.program.final_height, shared.program.final_width)
        shared = shared._replace(keys=self._denoiser.keys(rows, stage=2))
        tables = [self.spec.hires_table(request) for request in rows]
        directly = [request.hires_upscaler == "latent" for request in rows]
        encoded = [self.spec.family.draws_latents and not each for each in directly]
        drawn = HostNoise(rows, tables, shape, encoded=encoded, masked=[False] * len(rows))
        draws = shared.draws(self._split(drawn.posterior))
        image = self._enlarge(self._networks["vae"], latents, self._split(np.array(directly)), draws)
        everywhere = self._split(np.ones((len(rows), *shape[:2], 1), np.float32))
        state, known = self._denoiser.start(shared, tables, drawn, image, everywhere)
        return self._denoiser.run(shared, tables, drawn, state, known=known)

    def _shape(self, height: int, width: int) -> tuple[int, int, int]:
        return height // self.spec.scale, width // self.spec.scale, self.spec.configs["vae"].latent_channels

    @staticmethod
    def _read(read: Callable[[Request], _Pictures], batch: list[Request], field: str) -> list[_Pictures]:
        """What `read` makes of each request, read side by side where one has the field."""
        if all(getattr(request, field) is None for request in batch):
            return list(map(read, batch))
        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(read, batch))

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


class _Flight(NamedTuple):
    """A batch that the devices are working on."""

    batch: list[Request]
    canvases: list[Canvas | None]
    cut: list[bool]
    ticks: Ticks
    pixels: jax.Array
    finite: jax.Array

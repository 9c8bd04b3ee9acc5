"""What the host hands the devices for a batch: pictures, masks, sizes, guidance, controls, and torch's noise."""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float32
from PIL import Image

from sdjax.canvas import Canvas
from sdjax.request import Request
from sdjax.sampling import Table, noise
from sdjax.values import OF_CONTROLS, corner_of, numbers, size_of


class Pictures:
    """A batch's images and masks as the devices take them.

    there: bool [batch], which requests have an image.
    image: float32 [batch, height, width, 3] in -1..1; zeros without one.
    mask: float32 [batch, h, w, 1], at the size of the latents; ones without one.
    """

    def __init__(self, canvases: Sequence[Canvas | None], size: tuple[int, int], scale: int) -> None:
        batch = len(canvases)
        self.there = np.array([canvas is not None for canvas in canvases])
        self.image = np.zeros((batch, *size, 3), np.float32)
        self.mask = np.ones((batch, size[0] // scale, size[1] // scale, 1), np.float32)
        self._painted: dict[int, np.ndarray] = {}
        for i, canvas in enumerate(canvases):
            if canvas is None:
                continue
            self.image[i] = canvas.image / np.float32(255) * 2 - 1
            if canvas.mask is not None:
                painted = self._painted[i] = canvas.mask >= 128
                self.mask[i] = painted[::scale, ::scale, None]  # the nearest pixel, as diffusers takes it

    @property
    def unmasked(self) -> Float32[np.ndarray, "batch height width 3"]:
        """The images, grey (0) where their masks are."""
        result = self.image.copy()
        for i, painted in self._painted.items():
            result[i][painted] = 0
        return result


def guidance_weights(
    requests: Sequence[Request],
    tables: Sequence[Table],
    joined: Float32[np.ndarray, "batch joined"],
    rows: int,
    *,
    edits: bool,
    embedded: bool,
) -> Float32[np.ndarray, "batch rows prompts"]:
    """How much each prompt's output counts at each of `rows` sampler rows.

    joined: weights of the prompts that AND joins.  edits: whether the negative prompt comes twice, with an image and
    without, between which image_guidance_scale leads (equation 3 of https://arxiv.org/abs/2211.09800).  embedded:
    whether the network is told the guidance scale instead.
    """
    guidance = np.stack([_guidance(request, table, rows) for request, table in zip(requests, tables, strict=True)])
    if embedded:
        guidance = np.ones_like(guidance)
    conditional = guidance[..., None] * joined[:, None]
    negative = 1 - conditional.sum(-1, keepdims=True)  # 0 for one prompt at scale 1
    if not edits:
        return np.concatenate([conditional, negative], axis=-1)
    images = np.array([[request.image_guidance_scale] for request in requests], np.float32)
    surplus = np.where(guidance > 1, images, np.float32(1))[..., None] - 1
    return np.concatenate([conditional, negative + surplus, -surplus], axis=-1)


def _guidance(request: Request, table: Table, rows: int) -> Float32[np.ndarray, " rows"]:
    """The guidance scale of each sampler row: its step's, and 1 outside of the request's guidance interval."""
    steps = table.steps
    listed = numbers(request.guidance_scales)
    scales = np.full(steps, request.guidance_scale) if listed is None else np.array(listed[-steps:])
    done = np.arange(steps) / steps
    inside = (request.guidance_start <= done) & (done < request.guidance_end)
    by_step = np.where(inside, np.maximum(scales, 1), 1).astype(np.float32)
    return np.pad(by_step[table.step], (0, rows - table.calls), constant_values=1)


def control_pixels(
    loaded: Sequence[Sequence[Image.Image]], size: tuple[int, int], count: int
) -> list[Float32[np.ndarray, "batch height width 3"]]:
    """For each of `count` ControlNets its image of each request, in 0..1 at height and width; zeros where none is.

    Resized as diffusers resizes them: by Lanczos, stretched.
    """
    result = [np.zeros((len(loaded), *size, 3), np.float32) for _ in range(count)]
    height, width = size
    for row, found in enumerate(loaded):
        for its_images, image in zip(result, found, strict=False):  # a request may have none
            same = image.size == (width, height)
            fitted = image if same else image.resize((width, height), Image.Resampling.LANCZOS)
            its_images[row] = np.asarray(fitted, np.float32) / 255
    return result


def control_scales(
    requests: Sequence[Request], tables: Sequence[Table], rows: int, count: int
) -> Float32[np.ndarray, "batch rows nets"]:
    """How much each ControlNet counts at each of `rows` sampler rows.

    Nothing outside of its interval, which as in diffusers is of the network's calls (Heun's method makes two a step) in
    the whole run, also where a refiner ends it, and nothing where a request has no control image.
    """
    result = np.zeros((len(requests), rows, count), np.float32)
    for i, (request, table) in enumerate(zip(requests, tables, strict=True)):
        if request.control_image is None:
            continue
        scale, start, end = (np.broadcast_to(numbers(getattr(request, name)) or [], count) for name in OF_CONTROLS)
        call, calls = np.arange(table.calls)[:, None], table.run_calls
        inside = (call / calls >= start) & ((call + 1) / calls <= end)
        result[i, : table.calls] = np.where(inside, scale, 0)
    return result


def fresh_rows(
    requests: Sequence[Request], tables: Sequence[Table], weights: Float32[np.ndarray, "batch rows prompts"]
) -> Bool[np.ndarray, "batch rows prompts"]:
    """Where each prompt's deep features are made anew: every cache_interval calls, and after a row that asked for none.

    weights: `guidance_weights`.
    """
    call = np.arange(weights.shape[1])
    intervals = np.array([request.cache_interval for request in requests])
    calls = np.array([table.calls for table in tables])
    needed = weights != 0
    needed[..., 0] |= np.array([request.guidance_rescale > 0 for request in requests])[:, None]  # as `scan` asks
    needed &= (call < calls[:, None])[..., None]
    idle = np.pad(~needed[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=True)
    return needed & (idle | (call % intervals[:, None] == 0)[..., None])


def guidance_embedding(requests: Sequence[Request], channels: int) -> Float32[np.ndarray, "batch channels"]:
    """Sinusoids of the guidance scales for a network that was distilled with them.

    They are of `w = guidance_scale - 1` (https://arxiv.org/abs/2310.04378, section 4.2, in the scale of Request).
    """
    half = channels // 2
    scales = np.array([request.guidance_scale - 1 for request in requests], np.float32) * np.float32(1000)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000) / (half - 1)))
    angles = scales[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(waves, [(0, 0), (0, channels % 2)])


def time_ids(
    requests: Sequence[Request], size: tuple[int, int], joined: int, prompts: int, *, refines: bool
) -> Float32[np.ndarray, "batch prompts ids"]:
    """What Stable Diffusion XL is told of each picture with each prompt: sizes and corners, the vertical one first.

    size: height and width, of what is sampled.  joined: prompts that are not the negative one.  refines: an aesthetic
    score stands in the place of the target size.
    """
    told = np.zeros((len(requests), prompts, 5 if refines else 6), np.float32)
    for row, request in zip(told, requests, strict=True):
        row[:joined] = _told(request, "", size, refines)
        row[joined:] = _told(request, "negative_", size, refines)
    return told


def _told(request: Request, sign: str, size: tuple[int, int], refines: bool) -> list[float]:
    def given(name: str) -> str | None:
        own = getattr(request, sign + name)
        return getattr(request, name) if own is None else own

    original, target = (
        size if (text := given(name)) is None else size_of(text)[::-1] for name in ("original_size", "target_size")
    )
    corner = corner_of(given("crops_coords_top_left") or "0,0")
    end = [getattr(request, f"{sign}aesthetic_score")] if refines else target
    return [*original, *corner, *end]


class HostNoise:
    """The noise of a batch that torch would draw, in diffusers' order, for the requests that ask for it; else zeros.

    posterior, start, unmasked: [batch, h, w, c], for encoding the image, the start latent, and for encoding what the
    mask leaves.

    Args:
        requests, tables: of the batch.
        shape: h, w, c of the latents.
        encoded: which requests have an image that is encoded.
        masked: which have a mask; diffusers encodes what it leaves for every kind of UNet.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        tables: Sequence[Table],
        shape: tuple[int, ...],
        *,
        encoded: Sequence[bool],
        masked: Sequence[bool],
    ) -> None:
        self.posterior, self.start, self.unmasked = np.zeros((3, len(requests), *shape), np.float32)
        self._generators: dict[int, noise.TorchGenerator] = {}
        for i, request in enumerate(requests):
            if request.noise != "torch":
                continue
            generator = self._generators[i] = noise.TorchGenerator(request.seed)
            if encoded[i]:
                self.posterior[i] = noise.torch_latent(generator, shape)
            self.start[i] = noise.torch_latent(generator, shape)
            if masked[i]:
                self.unmasked[i] = noise.torch_latent(generator, shape)
        self._rows = self._of_rows(tables)

    def _of_rows(self, tables: Sequence[Table]) -> dict[int, Iterator[np.ndarray]]:
        used = {i: generator for i, generator in self._generators.items() if tables[i].uses_noise.any()}
        return {i: noise.torch_step_noise(tables[i], used[i], self.start.shape[1:]) for i in used}

    @property
    def is_drawn(self) -> bool:
        """Whether `rows` gives anything but zeros."""
        return bool(self._rows)

    def then(self, tables: Sequence[Table]) -> "HostNoise":
        """The noise of tables that go on where those end, all of whose rows were asked for."""
        following = copy.copy(self)
        following._rows = self._of_rows(tables)
        return following

    def rows(self, count: int) -> Float32[np.ndarray, "batch count h w c"]:
        """The noise of the next `count` sampler rows; zeros past the end of a table."""
        result = np.zeros((len(self.start), count, *self.start.shape[1:]), np.float32)
        for i, drawn in self._rows.items():
            for place, row in enumerate(islice(drawn, count)):
                result[i, place] = row
        return result

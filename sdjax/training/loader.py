"""Batches of training examples, in an order that is a function of the step.

Because any example can be asked for by its number, the batch of any step can be made without having made those before
it, which is what exact resumption needs.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int, UInt8

from sdjax.training.data import Conditioned, Source, buckets_of, framed
from sdjax.training.encoded import EncodedSet
from sdjax.training.framing import scaled


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> Int[np.ndarray, " length"]:
    return np.random.default_rng([seed, epoch]).permutation(length)


def indices(step: int, batch_size: int, length: int, seed: int) -> Int[np.ndarray, " batch"]:
    """Return which examples step `step` sees: each epoch is one permutation, and batches run on across epochs."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(length, seed, int(place) // length)[place % length] for place in places])


class Batch(NamedTuple):
    """The examples of one step, of which captions were dropped: empty ones stand in their place.

    empty: which captions are.
    frames: of the pixels.
    conditioning, is_unseen: pictures that the images are made from, and which of them a UNet that edits is not told.
    moments, context, pooled: of a data set that is encoded already; of Stable Diffusion XL's there are pooled vectors.
    """

    indices: Int[np.ndarray, " batch"]
    empty: Bool[np.ndarray, " batch"] | None = None
    pixels: UInt8[np.ndarray, "batch height width 3"] | None = None
    frames: Int[np.ndarray, "batch 4"] | None = None
    captions: list[str] | None = None
    conditioning: UInt8[np.ndarray, "batch height width 3"] | None = None
    is_unseen: Bool[np.ndarray, " batch"] | None = None
    moments: Float16[np.ndarray, "batch h w moments"] | None = None
    context: Float16[np.ndarray, "batch length hidden"] | None = None
    pooled: Float16[np.ndarray, "batch pooled"] | None = None


class Loader:
    """Batches by step, made ahead of time by threads.

    Args:
        source: the data set.
        batch_size: examples a step.
        seed: of the order, the captions' phrasing and their dropout.
        images, captions, conditioning: whether to read them.
        caption_dropout: the part of captions that become empty, 0 to 1. As many conditioning pictures are unseen, half
            of those with an empty caption too (https://arxiv.org/abs/2211.09800, where the part is 0.1).
        workers: threads that read.
        flip: whether half of the pictures are mirrored, left to right, with those that they are made from.
    """

    def __init__(
        self,
        source: Source | EncodedSet,
        batch_size: int,
        seed: int,
        *,
        images: bool,
        captions: bool,
        caption_dropout: float,
        workers: int,
        conditioning: bool = False,
        flip: bool = False,
    ) -> None:
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._images, self._captions, self._conditioning = images, captions, conditioning
        self._dropout, self._flip = caption_dropout, flip
        self._workers = workers

    def batch(self, step: int) -> Batch:
        """Make the batch of a step."""
        source = self._source
        if (buckets := buckets_of(source)) is None:
            chosen = indices(step, self._batch_size, len(source), self._seed)
        else:
            chosen = buckets.indices(step, self._batch_size, self._seed)
        rngs = [np.random.default_rng([self._seed, step, place]) for place in range(len(chosen))]
        chances, numbers = np.array([rng.random() for rng in rngs]), chosen.tolist()
        dropped = chances < self._dropout
        if isinstance(source, EncodedSet):
            texts = [source.unconditional if drop else source.text(i) for i, drop in zip(numbers, dropped, strict=True)]
            pooled = [text.pooled for text in texts if text.pooled is not None]
            return Batch(
                chosen,
                empty=np.array([drop or source.is_empty(i) for i, drop in zip(numbers, dropped, strict=True)]),
                frames=np.array([source.frame(i) for i in numbers]),
                moments=np.stack([source.moments(i) for i in numbers]),
                context=np.stack([text.states for text in texts]),
                pooled=np.stack(pooled) if pooled else None,
            )
        captions = empty = pixels = frames = conditioning = is_unseen = None
        if self._captions:
            spoken = [source.caption(i, rng) for i, rng in zip(numbers, rngs, strict=True)]
            captions = ["" if drop else caption for caption, drop in zip(spoken, dropped, strict=True)]
            empty = np.array([not caption for caption in captions])
        flipped = np.array([rng.random() < 0.5 for rng in rngs]) & self._flip
        if self._images:
            made, found = zip(*(framed(source, i) for i in numbers), strict=True)
            pixels, frames = np.stack(made), np.array(found)
            pixels[flipped] = pixels[flipped, :, ::-1]
            height, width = pixels.shape[1:3]
            _, wide = scaled(frames[:, 0], frames[:, 1], height, width)
            frames[flipped, 3] = (wide.astype(int) - width - frames[:, 3])[flipped]
        if self._conditioning:
            assert isinstance(source, Conditioned)
            conditioning = np.stack([source.conditioning(i) for i in numbers])
            conditioning[flipped] = conditioning[flipped, :, ::-1]
            is_unseen = (self._dropout / 2 <= chances) & (chances < 1.5 * self._dropout)
        return Batch(chosen, empty, pixels, frames, captions, conditioning, is_unseen)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `start` to before `stop`, a few made ahead."""
        with ThreadPoolExecutor(self._workers) as pool:
            ahead = [pool.submit(self.batch, step) for step in range(start, min(stop, start + 2 * self._workers))]
            try:
                for step in range(start, stop):
                    batch = ahead.pop(0).result()
                    if step + 2 * self._workers < stop:
                        ahead.append(pool.submit(self.batch, step + 2 * self._workers))
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

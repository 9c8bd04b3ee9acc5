"""Sources of training examples: sequences with `len`, `image(index)` and `caption(index, rng)`."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from sdjax.training import scenes
from sdjax.training.buckets import Buckets
from sdjax.training.config import Data
from sdjax.training.encoded import EncodedSet
from sdjax.training.framing import Frame
from sdjax.training.samples import DataError
from sdjax.training.stored import Folder, Shards


@runtime_checkable
class Source(Protocol):
    """A captioned image data set.

    One whose examples the configuration does not settle also has `files()`: for each, values that tell it from any
    other, and last what else changes where it is written anew. One that cuts pictures has `framed(index)`: an image and
    its frame; and `buckets`, if they are cut to several shapes.
    """

    def __len__(self) -> int: ...
    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]: ...
    def caption(self, index: int, rng: np.random.Generator) -> str: ...


@runtime_checkable
class Conditioned(Source, Protocol):
    """One whose images are made from other pictures: what a ControlNet, or a UNet that edits, is trained on."""

    def conditioning(self, index: int) -> UInt8[np.ndarray, "height width 3"]: ...


class Scenes:
    """`count` training scenes of `sdjax.training.scenes`; a caption is phrased anew at each visit.

    With `closeup`, pictures are drawn at that size and a window of `size` around the first thing is cut out of them: an
    autoencoder learns outlines from a quarter of the pixels.
    """

    def __init__(self, size: int, count: int, seed: int = 0, closeup: int | None = None) -> None:
        if closeup is not None and closeup < size:
            raise DataError(f"closeup is {closeup}; it must be at least data.size, {size}, which is cut out of it")
        self._size, self._count, self._seed, self._closeup = size, count, seed, closeup

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        return self._drawn(index, scenes.draw)

    def conditioning(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        return self._drawn(index, scenes.outlines)

    def _drawn(self, index: int, draw: Callable[..., np.ndarray]) -> UInt8[np.ndarray, "size size 3"]:
        scene = scenes.scene(index, self._seed)
        if self._closeup is None:
            return draw(scene, self._size)
        thing, most = scene.things[0], self._closeup - self._size
        left, top = (min(max(round(at * self._closeup - self._size / 2), 0), most) for at in (thing.x, thing.y))
        return draw(scene, self._closeup)[top : top + self._size, left : left + self._size]

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return scenes.caption(scenes.scene(index, self._seed), rng)


def buckets_of(source: Any) -> Buckets | None:
    """What a source's pictures are cut to, if that is several shapes."""
    return getattr(source, "buckets", None)


def framed(source: Source, index: int) -> tuple[UInt8[np.ndarray, "height width 3"], Frame]:
    """Return an image of a source and its frame, which of a source that cuts none is the image."""
    if (own := getattr(source, "framed", None)) is not None:
        return own(index)
    image = source.image(index)
    height, width, _ = image.shape
    return image, Frame(height, width, 0, 0)


def open_source(data: Data, *, captions: bool = False, conditioned: bool = False) -> Source | EncodedSet:
    """Return the source that the configuration names.

    captions, conditioned: whether all its images must have captions, or pictures that they are made from.

    Raises:
        DataError: it is not there, lacks a file that it needs, or holds nothing that can be trained on.
    """
    needed: dict[str, Any] = {"captions": captions, "conditioned": conditioned, "caption": data.caption}
    if data.folder is not None:
        return Folder(data.folder, data.size, **needed)
    if data.shards is not None:
        return Shards(data.shards, data.size, **needed)
    if data.latents is not None:
        return EncodedSet(data.latents)
    module, _, name = (data.generator or "").partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise DataError(f'data.generator {data.generator!r} cannot be imported; write "module:Class"') from None
    try:
        made = kind(size=data.size, **data.options)
        count = len(made)
    except TypeError as error:
        raise DataError(f"data.options do not fit {data.generator}: {error}") from None
    if not count:
        raise DataError(f"data.generator {data.generator} has no examples")
    if conditioned and not isinstance(made, Conditioned):
        raise DataError(
            f"data.generator {data.generator} has no conditioning(index), the picture an image is made from"
        )
    return made

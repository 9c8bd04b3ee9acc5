"""Pictures decoded and cut to what networks are trained on, and what was cut off."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sdjax import inputs
from sdjax.training.samples import DataError
from sdjax.values import RequestError


class Frame(NamedTuple):
    """A picture's height and width before it was scaled and cut, and where in the scaled one the cut begins."""

    height: int
    width: int
    top: int
    left: int


def decode(content: bytes, size: int, what: str) -> tuple[UInt8[np.ndarray, "size size 3"], Frame]:
    """Decode an image, over white where it is transparent, and cut the largest centred square to size x size.

    Raises:
        DataError: it cannot be read; `what` names it.
    """
    try:
        picture = inputs.decode(content, what)
    except RequestError as error:
        raise DataError(str(error)) from None
    return square(picture, size), frame(picture, size)


def square(picture: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The largest centred square of a picture, at size x size."""
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))


def frame(picture: Image.Image, size: int) -> Frame:
    """That of the square: as diffusers' trainers have it, which scale the shorter side to `size` and cut then."""
    top, left = (round((int(side * size / min(picture.size)) - size) / 2) for side in (picture.height, picture.width))
    return Frame(picture.height, picture.width, top, left)

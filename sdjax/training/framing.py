"""Pictures decoded and cut to what networks are trained on, and what was cut off."""

import io
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from sdjax import inputs
from sdjax.training.samples import DataError
from sdjax.values import RequestError


class Frame(NamedTuple):
    """A picture's height and width before it was scaled and cut, and where in the scaled one the cut begins."""

    height: int
    width: int
    top: int
    left: int


def decode(content: bytes, shape: tuple[int, ...], what: str) -> tuple[UInt8[np.ndarray, "height width 3"], Frame]:
    """Decode an image, over white where it is transparent, and cut it to height x width.

    Raises:
        DataError: it cannot be read; `what` names it.
    """
    try:
        picture = inputs.decode(content, what)
    except RequestError as error:
        raise DataError(str(error)) from None
    return cut(picture, *shape), frame(picture, *shape)


def sides(content: bytes) -> tuple[int, int] | None:
    """An upright image's height and width, of its header; None where these bytes are too few, or no image's."""
    try:
        with Image.open(io.BytesIO(content), formats=inputs.FORMATS) as picture:
            # Not a PNG's own method, which decodes the picture to look behind it. A TIFF's size is the upright one.
            turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) >= 5 and picture.format != "TIFF"
            return picture.size if turned else (picture.height, picture.width)
    except Exception:  # decoders raise all sorts over broken files
        return None


def cut(picture: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """The largest centred part of a picture that has these sides' ratio, at height x width."""
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def frame(picture: Image.Image, height: int, width: int) -> Frame:
    """That of the cut, as diffusers' trainers have it, which scale a picture until it covers what is then cut out."""
    tall, wide = scaled(picture.height, picture.width, height, width)
    return Frame(picture.height, picture.width, round((int(tall) - height) / 2), round((int(wide) - width) / 2))


def scaled(tall: Any, wide: Any, height: int, width: int) -> tuple[Any, Any]:
    """The height and width of pictures, tall x wide, once they are scaled to cover height x width."""
    return np.maximum(tall * width / wide, height), np.maximum(wide * height / tall, width)

"""What is done to finished pixels: checks that say what is odd about them, and the size that was asked for."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageStat

from sdjax.values import size_of

_BLACK = 8  # of 255; the brightest value of a black image is below
_FLAT = 2  # the standard deviation of each channel of a flat image is below


def oddities(pixels: UInt8[np.ndarray, "height width 3"]) -> list[str]:
    """`black`, or else `flat`, where it is so: images of which a dataset should know."""
    if pixels.max() < _BLACK:
        return ["black"]
    return ["flat"] if max(ImageStat.Stat(Image.fromarray(pixels)).stddev) < _FLAT else []


def resize(
    pixels: UInt8[np.ndarray, "height width 3"], size: str | None
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The pixels at a size such as `640x360`, by Lanczos; None leaves them."""
    if size is None:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size_of(size), Image.Resampling.LANCZOS))

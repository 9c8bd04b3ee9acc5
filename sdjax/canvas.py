"""What a request's pictures are at the size that is sampled, and what becomes of the pixels that come back.

Images are resized as diffusers resizes them (Lanczos, stretched to the asked size). Knows no JAX.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from sdjax import inputs
from sdjax.request import MAX_SIDE, Request
from sdjax.values import RequestError, size_of

Box = tuple[int, int, int, int]  # left, top, right, bottom

_LONGEST = 16_383  # side that a WebP can have
_BLUR = 8  # pixels; smooths the stripes that repeating an edge makes


@dataclass(frozen=True)
class Canvas:
    """The pictures of a request.

    image: what the VAE encodes, [height, width, 3] of the request.
    mask: 255 where to repaint, [height, width]; None where all of it.
    original: what the finished pixels are put back into, of any size.
    original_mask: as large, 255 where to repaint; None where all of it.
    box: the part of it that `image` shows, in its middle where their shapes differ.
    size: width and height of the result, the top left of `original`.
    overlay: whether what the mask leaves is put back to the bit.
    """

    image: UInt8[np.ndarray, "height width 3"]
    mask: UInt8[np.ndarray, "height width"] | None
    original: Image.Image
    original_mask: Image.Image | None
    box: Box
    size: tuple[int, int]
    overlay: bool

    def cut(self, picture: Image.Image) -> Image.Image:
        """What `image` shows of a picture that goes with the whole original, such as a control image.

        Where that is all of it, the picture as it is, of any size.
        """
        height, width = self.image.shape[:2]
        if (self.original.size, self.box) == ((width, height), (0, 0, width, height)):
            return picture
        return _filled(_resized(picture, self.original.size).crop(self.box), (width, height))

    def finish(self, pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "final_height final_width 3"]:
        """The result's pixels from those that were sampled: the untouched part is the original's, to the bit."""
        if self.original_mask is None:
            return pixels
        left, top, right, bottom = self.box
        whole = self.original.copy()
        whole.paste(_covering(Image.fromarray(pixels), (right - left, bottom - top)), (left, top))
        if self.overlay:
            # Pillow's composite is exact at 0 and at 255.
            whole = Image.composite(whole, self.original, self.original_mask)
        return np.asarray(whole.crop((0, 0, *self.size)))


@dataclass(frozen=True)
class Loaded:
    """A request's pictures as they were read; `hashes` are the Request fields that name their content."""

    image: Image.Image
    mask: Image.Image | None
    hashes: dict[str, str]
    size: tuple[int, int]  # of the result, where the canvas grew to a multiple


def load(request: Request, multiple: int) -> Loaded:
    """The request's pictures, the canvas grown where it asks for that, to a `multiple` of pixels on each side.

    Raises:
        RequestError: a picture that cannot be used.
    """
    image, sha256 = inputs.load(str(request.image), "image", sha256=request.image_sha256)
    hashes = {"image_sha256": sha256}
    if request.outpaint is not None:
        size, place = grown(request.outpaint, image.size)
        padded = [-(-side // multiple) * multiple for side in size]
        if (request.width or padded[0], request.height or padded[1]) != tuple(padded):
            raise RequestError(f"outpaint sets the size, {padded[0]}x{padded[1]} here; leave out width and height")
        if max(padded) > MAX_SIDE:
            raise RequestError(
                f"outpaint={request.outpaint} makes {size[0]} x {size[1]} pixels; a side has at most {MAX_SIDE}"
            )
        return Loaded(*extend(image, (padded[0], padded[1]), place), hashes, size)
    if request.mask_image is None:
        return Loaded(image, None, hashes, image.size)
    mask, hashes["mask_image_sha256"] = inputs.load(
        str(request.mask_image), "mask_image", sha256=request.mask_image_sha256, mask=True
    )
    mask = _resized(mask, image.size)
    if np.asarray(mask).max() < 128:
        raise RequestError("mask_image is dark everywhere; white is what is repainted")
    return Loaded(image, mask, hashes, image.size)


def measured(request: Request, multiple: int) -> Request:
    """A request with its pictures' hashes, and with its image's size where that is what will be made.

    Raises:
        RequestError: a picture that cannot be used, or that is smaller than a `multiple` of pixels.
    """
    loaded = load(request, multiple)
    size: dict[str, int] = {}
    if request.padding_mask_crop is None:
        size = {
            name: side // multiple * multiple
            for name, side in zip(("width", "height"), loaded.image.size, strict=True)
            if getattr(request, name) is None
        }
    elif request.resize is None and max(loaded.image.size) > _LONGEST:
        raise RequestError(
            f"image has {loaded.image.width}x{loaded.image.height} pixels; with padding_mask_crop, which keeps all of "
            f"them, a side has at most {_LONGEST}; resize makes them fewer"
        )
    if 0 in size.values():
        raise RequestError(
            f"image has {loaded.image.width}x{loaded.image.height} pixels; a side needs {multiple}, or "
            "give width and height"
        )
    return dataclasses.replace(request, **loaded.hashes, **size)


def fit(request: Request, loaded: Loaded) -> Canvas:
    """The pictures of a request whose width and height are known, at that size."""
    assert request.width is not None, "resolve the request first"
    assert request.height is not None
    size = request.width, request.height
    original, mask = loaded.image, loaded.mask
    if request.padding_mask_crop is not None and mask is not None:
        box = crop_region(np.asarray(mask), size, request.padding_mask_crop)
        image, small = _filled(original.crop(box), size), _filled(mask.crop(box), size)
        final = original.size
    else:
        original, mask = _resized(original, size), mask and _resized(mask, size)
        image, small, box = original, mask, (0, 0, *size)
        final = loaded.size if request.outpaint is not None else size
    return Canvas(
        image=np.asarray(image),
        mask=None if small is None else np.asarray(small),
        original=original,
        original_mask=mask,
        box=box,
        size=final,
        overlay=request.overlay,
    )


def grown(outpaint: str, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The canvas that `Request.outpaint` asks for around an image of `size`, and where in it the image lies."""
    width, height = size
    if "=" not in outpaint:
        wide, high = size_of(outpaint)
        if wide < width or high < height:
            raise RequestError(f"outpaint={outpaint} is smaller than the image, {width}x{height}")
        return (wide, high), ((wide - width) // 2, (high - height) // 2)
    margins = {name: int(pixels) for name, pixels in (part.split("=") for part in outpaint.split(","))}
    left, top = margins.get("left", 0), margins.get("top", 0)
    return (left + width + margins.get("right", 0), top + height + margins.get("bottom", 0)), (left, top)


def extend(image: Image.Image, size: tuple[int, int], place: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The image at its place in a canvas of `size` that its blurred edges fill; and the mask of what they fill."""
    (left, top), (width, height) = place, size
    around = ((top, height - top - image.height), (left, width - left - image.width))
    filled = Image.fromarray(np.pad(np.asarray(image), (*around, (0, 0)), mode="edge"))
    filled = filled.filter(ImageFilter.GaussianBlur(_BLUR))
    filled.paste(image, place)
    mask = Image.new("L", size, 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return filled, mask


def crop_region(mask: UInt8[np.ndarray, "height width"], size: tuple[int, int], pad: int) -> Box:
    """The box around a mask, with a margin, in the shape of `size` where the picture has room, as diffusers cuts it."""
    ys, xs = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    left, right = _padded(xs, pad, mask.shape[1])
    top, bottom = _padded(ys, pad, mask.shape[0])
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, int((right - left) / ratio - (bottom - top)), mask.shape[0])
    else:
        left, right = _widened(left, right, int((bottom - top) * ratio - (right - left)), mask.shape[1])
    return left, top, right, bottom


def _padded(places: np.ndarray, pad: int, limit: int) -> tuple[int, int]:
    return max(int(places[0]) - pad, 0), min(int(places[-1]) + 1 + pad, limit)


def _widened(low: int, high: int, by: int, limit: int) -> tuple[int, int]:
    """`by` more, half on each side, moved to lie within 0 and `limit`, and cut there."""
    low, high = low - by // 2, high + by - by // 2
    over = max(high - limit, 0)
    low, high = low - over, high - over
    return (0, min(high - low, limit)) if low < 0 else (low, high)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _filled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in the middle of `size`, its shape kept and its edges repeated."""
    width, height = size
    inner = width, max(image.height * width // image.width, 1)
    if width / height >= image.width / image.height:
        inner = max(image.width * height // image.height, 1), height
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    around = [(top, height - top - inner[1]), (left, width - left - inner[0])]
    pixels = np.asarray(_resized(image, inner))
    return Image.fromarray(np.pad(pixels, (around + [(0, 0)])[: pixels.ndim], mode="edge"))


def _covering(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image over all of `size`, its shape kept and cut around its middle: what undoes `_filled`."""
    width, height = size
    outer = width, max(image.height * width // image.width, 1)
    if width / height <= image.width / image.height:
        outer = max(image.width * height // image.height, 1), height
    covering = Image.new("RGB", size)
    covering.paste(_resized(image, outer), (width // 2 - outer[0] // 2, height // 2 - outer[1] // 2))
    return covering

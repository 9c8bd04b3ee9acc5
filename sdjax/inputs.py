"""Pictures from elsewhere, as pixels: any path or fsspec URL, any usual mode, nothing trusted. Knows no JAX."""

import hashlib
import io
import os
import stat
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import numpy as np
from fsspec.config import conf
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from sdjax.retrying import FinalError, is_absent, retry
from sdjax.values import RequestError, is_web, one_line

MAX_BYTES = 2**26
MAX_PIXELS = 2**26
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ATTEMPTS = 4  # two seconds: of a million rows many may name hosts that are no longer there
_CONNECT, _SILENCE, _TOTAL = 10, 30, 120  # seconds that a web server has to be there, to go on, and for all of a file
_MEMORY = 600  # seconds for which a web server that said nothing is not asked again
_silent: dict[str, float] = {}  # until when
_answered: set[str] = set()
_PICTURES = 4  # that are kept: image, mask and ControlNets' pictures of all rows of a job


class _Room:
    """So many pixels are decoded at once, whatever the number of threads: a file of 300 KB may take a gigabyte."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Hold the room of a picture, once there is so much."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_ROOM = _Room(2 * MAX_PIXELS)


class Input(NamedTuple):
    """A picture that was read. image: RGB, upright, or L of a mask. sha256: of the file, in hex."""

    image: Image.Image
    sha256: str


class _Kept:
    """The pictures that were asked for last, while somebody would have them kept."""

    def __init__(self) -> None:
        self._found: OrderedDict[Any, Input] = OrderedDict()
        self._keepers, self._lock = 0, threading.Lock()

    def change(self, keepers: int) -> None:
        """Count so many more that would have them kept; after the last of them all are forgotten."""
        with self._lock:
            self._keepers += keepers
            if not self._keepers:
                self._found.clear()

    def get(self, key: Any, find: Callable[[], Input]) -> Input:
        """The picture under a key, or else what `find` gives."""
        with self._lock:
            found = self._found.get(key)
        found = found or find()
        with self._lock:
            if self._keepers:
                self._found[key] = found
                self._found.move_to_end(key)
            if len(self._found) > _PICTURES:
                self._found.popitem(last=False)
        return found


_KEPT = _Kept()


@contextmanager
def keeping() -> Iterator[None]:
    """Meanwhile, a picture that is asked for again and again is read once, or by each thread that asks meanwhile."""
    _KEPT.change(1)
    try:
        yield
    finally:
        _KEPT.change(-1)


def load(url: str, name: str, *, sha256: str | None = None, mask: bool = False) -> Input:
    """The picture at `url`; the first frame of several.

    It is turned as its EXIF orientation says. Transparency lies over white, in a mask over black (it stays).
    Sixteen bits become eight.

    Args:
        url: path or fsspec URL.
        name: what errors call it.
        sha256: what the file must hash to, in hex.
        mask: read lightness instead of colours.

    Raises:
        RequestError: it is missing, corrupt, no picture, another one than was named, or larger than `MAX_BYTES` as a
            file or than `MAX_PIXELS` in pixels, which is asked before anything is decoded.
    """
    shown = url if len(url) <= 80 else f"{url[:20]}...{url[-57:]}"
    if "::" in url:  # some copy all of a file before its size can be asked
        raise RequestError(f"{name} {shown} is a chain of file systems; give the picture's own path or URL")
    found = _KEPT.get((url, mask), lambda: _load(url, f"{name} {shown}", mask))
    if sha256 is not None and found.sha256 != sha256:
        raise RequestError(f"{name} {shown} has changed: its SHA-256 is {found.sha256}, not {sha256}")
    return found


def _load(url: str, what: str, mask: bool) -> Input:
    try:
        data = _read_from_host(url)
    except Exception as error:  # each of fsspec's file systems has errors of its own
        if is_absent(error):
            raise RequestError(f"{what} is not there") from None
        raise RequestError(f"{what} cannot be read: {one_line(error.__cause__ or error)}") from None
    if len(data) > MAX_BYTES:
        raise RequestError(f"{what} is larger than {MAX_BYTES >> 20} MiB, which is the most")
    return Input(decode(data, what, mask=mask), hashlib.sha256(data).hexdigest())


def read(url: str) -> bytes:
    """A file's bytes, or of a larger one the first `MAX_BYTES` + 1; raises what its file system does."""
    return retry(lambda: _whole(url))


def _read_from_host(url: str) -> bytes:
    """As `read`, but a web server that says nothing is asked once, and one that never answered not for each picture."""
    host = url.split("/")[2] if is_web(url) else ""
    if host not in _answered and time.monotonic() < _silent.get(host, 0):
        raise FinalError(f"{host} says nothing")

    def once() -> bytes:
        try:
            return _whole(url)
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(getattr(cause, "status", None), int) or is_absent(error):
                _answered.add(host)
            if not (host and isinstance(cause, TimeoutError)):
                raise
            if type(cause) is TimeoutError:  # of all of it, while it may still come; aiohttp's of a silence are others
                raise FinalError(f"{host} takes too long") from None
            _silent[host] = time.monotonic() + _MEMORY
            raise FinalError(f"{host} says nothing") from None

    data = retry(once, _ATTEMPTS)
    _answered.add(host)
    return data


def _whole(url: str) -> bytes:
    fs, path = fsspec.core.url_to_fs(url, **(_web_options() if is_web(url) else {}))
    if isinstance(fs, LocalFileSystem) and stat.S_ISFIFO(os.stat(path).st_mode):
        raise FinalError("it is a pipe, of which nothing may ever come")
    with fs.open(path, "rb") as file:
        return b"".join(_parts(file))


def _web_options() -> dict[str, Any]:
    """A user's own options of web servers, and a limit to how long one may say nothing, where they set none."""
    from aiohttp import ClientTimeout  # a third of a second

    own = {**conf.get("http", {}), **conf.get("https", {})}.get("client_kwargs", {})
    timeout = own.get("timeout", ClientTimeout(total=_TOTAL, sock_connect=_CONNECT, sock_read=_SILENCE))
    if not isinstance(timeout, ClientTimeout):  # a file of settings can hold a number alone
        timeout = ClientTimeout(total=timeout)
    return {"client_kwargs": {**own, "timeout": timeout}}


def _parts(file: Any) -> Iterator[bytes]:
    """One read of a stream gives what has come, not all that was asked for."""
    left = MAX_BYTES + 1
    while part := file.read(left):
        yield part
        left -= len(part)


def decode(data: bytes, what: str, *, mask: bool = False) -> Image.Image:
    """The picture in a file's bytes, as `load` gives it; `what` is how errors call it. Raises RequestError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise RequestError(f"{what} has {image.width} x {image.height} pixels; the most is {MAX_PIXELS:,} in all")
        if isinstance(image, TiffImageFile):
            _check_tiles(image, data, what)
        with _ROOM.of(image.width * image.height):
            image.load()
            image = ImageOps.exif_transpose(image)
            return _lightness(image) if mask else _colours(image)
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError(f"{what} is no picture; read are {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise all sorts over broken files
        raise RequestError(f"{what} is broken: {one_line(error)}") from None


def _check_tiles(image: TiffImageFile, data: bytes, what: str) -> None:
    """Refuse a TIFF whose tiles go far beyond the picture: they are decoded whole, however little of them is shown.

    Its tags are read as libtiff does, which decodes: of a tag that is there twice Pillow tells the other value.
    """
    order, big = "<" if data.startswith(b"II") else ">", b"+" in data[2:4]
    start, step, value = (8, 20, 12) if big else (2, 12, 8)
    (tags,) = struct.unpack_from(order + ("Q" if big else "H"), data, image.tag_v2.offset)
    sides = {322: 1, 323: 1}  # TileWidth, TileLength
    for place in range(image.tag_v2.offset + start, image.tag_v2.offset + start + tags * step, step):
        tag, kind = struct.unpack_from(order + "HH", data, place)
        if tag in sides:
            if kind not in (3, 4):
                raise ValueError("a side of its tiles is neither SHORT nor LONG")
            sides[tag] = max(sides[tag], *struct.unpack_from(order + " HL"[kind - 2], data, place + value))
    width, height = sides.values()
    pixels = -(-image.width // width) * width * (-(-image.height // height) * height)
    if pixels > 2 * MAX_PIXELS:
        raise RequestError(
            f"{what} has tiles of {width} x {height} with {pixels:,} pixels; the most is {2 * MAX_PIXELS:,}"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no fixed white; save it with 8 or 16 bits a channel")
    return image


def _flat(image: Image.Image, background: str) -> Image.Image:
    """Without transparency, in RGB."""
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def _colours(image: Image.Image) -> Image.Image:
    return _flat(image, "white")


def _lightness(image: Image.Image) -> Image.Image:
    return _flat(image, "black").convert("L")

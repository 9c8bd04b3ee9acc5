"""What users write for a Request's fields, as values of the fields' types, and the error that says what is wrong."""

import base64
import io
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

MAX_PROMPT_CHARACTERS = 10_000
MAX_STEPS = 1000
DTYPES = ("float32", "bfloat16", "float16")
"""Of a model's weights and products."""
BATCH_SIZE = 4
"""Images that a device other than a CPU makes at once, where no number is asked for."""

_SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
_CORNERS = ("crops_coords_top_left", "negative_crops_coords_top_left")
SIZE = re.compile(r"\d{1,5}x\d{1,5}")
_CORNER = re.compile(r"\d{1,5},\d{1,5}")
PICTURES = ("image", "mask_image", "control_image")
OF_STEPS = ("sigmas", "timesteps", "guidance_scales")
"""Fields that may list a number for each sampler step."""
OF_CONTROLS = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
"""Fields that hold a number for all ControlNets, or list one for each."""
_LIST = re.compile(r"[\[(\s]*[-+.\d]")  # how a list of numbers begins, and no name
_NO_FRACTION = re.compile(r"\.0*\s*$")  # of 42.0, as tables write whole numbers in a column with gaps
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def size_of(text: str) -> tuple[int, int]:
    """Width and height of `640x360`."""
    width, height = text.split("x")
    return int(width), int(height)


def corner_of(text: str) -> tuple[int, int]:
    """Top and left of `0,16`."""
    top, left = text.split(",")
    return int(top), int(left)


def is_web(url: str) -> bool:
    """Whether a web server is asked for it, which may list no folders, and give no parts of files."""
    return url.startswith(("http://", "https://"))


def lines(text: Any) -> list[str]:
    """The paths or URLs of a Request's control_image; none of None."""
    return text.splitlines() if text else []


def numbers(text: Any) -> list[float] | None:
    """The numbers that a Request's field lists as text, such as `14.6,5,1`; None of a name, or of None."""
    return [float(number) for number in text.split(",")] if isinstance(text, str) and _LIST.match(text) else None


class RequestError(ValueError):
    """A request that cannot be honoured; the message names the field and what is allowed, in one line."""


def coerce(name: str, value: Any, expected: tuple[type, bool]) -> Any:
    """`value` as the field's type; only lossless conversions (text to number, 3.0 to 3, NumPy scalars)."""
    kind, optional = expected
    if value is None and optional:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if name == "control_image" and value is not None:
        value = _pictures(name, value)
    elif name in PICTURES:
        value = _picture(name, value)
    if name in OF_STEPS or name in OF_CONTROLS:
        value = _listed(name, value)
    if name in _SIZES or name in _CORNERS:
        value = _pair(name, value)
    if kind is bool:
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower(), value)
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
    elif kind is str:
        if isinstance(value, str):
            return value.lower() if name.endswith("_sha256") else value
    elif value is not None and not isinstance(value, bool):
        try:
            is_whole_text = kind is int and isinstance(value, str)
            number = int(_NO_FRACTION.sub("", value)) if is_whole_text else float(value)
            if kind is int and number == int(number):
                return value if isinstance(value, int) else int(number)
            if kind is float and math.isfinite(number):
                return number + 0.0  # of a zero, the one without a sign
        except (TypeError, ValueError, OverflowError):
            pass
    wanted = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}[kind]
    raise RequestError(f"{name}={shown(value)} is not {wanted}")


def shown(value: Any) -> str:
    """A value for an error's one line."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value)[:1000])
    except ValueError:  # a whole number of more digits than Python writes
        text = "a number of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """What an error says, or what it is where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _listed(name: str, value: Any) -> Any:
    """Numbers, listed in any usual way, as text; what is no list as it is."""
    if isinstance(value, str):
        if not _LIST.match(value):
            return value
        value = value.strip("[]() \t\n").replace(",", " ").split()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (Sequence, np.ndarray)):
        return value
    try:
        found = [float(number) for number in value]
    except (TypeError, ValueError, OverflowError):
        found = []
    if not (0 < len(found) <= MAX_STEPS + 1 and all(map(math.isfinite, found))):
        raise RequestError(f"{name}={shown(value)} is no list of 1 to {MAX_STEPS} numbers, such as '9,5,1'")
    return ",".join(repr(number + 0.0).removesuffix(".0") for number in found)


def _picture(name: str, value: Any) -> Any:
    """A path as text; a picture in memory as a URL that holds it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise RequestError(f"{name} is {value.dtype} {list(value.shape)}; an array is uint8 [height, width, 3]")
        try:
            value = Image.fromarray(value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value)
        except (TypeError, ValueError):
            raise RequestError(f"{name} is uint8 {list(value.shape)}; an array is uint8 [height, width, 3]") from None
    if isinstance(value, Image.Image):
        if value.mode == "I":  # of 32 bits, of which PNG would keep 16
            raise RequestError(f"{name} has mode I, which has no fixed white; convert it to RGB")
        if value.mode in ("CMYK", "YCbCr", "HSV"):  # for which PNG has no place
            value = value.convert("RGB")
        buffer = io.BytesIO()
        try:
            value.save(buffer, "PNG", compress_level=1, exif=value.getexif())
        except (OSError, ValueError) as error:
            raise RequestError(f"{name} cannot be kept: {error}; convert it to RGB") from None
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    if isinstance(value, str) and ("\0" in value or not value.strip()):
        raise RequestError(f"{name}={shown(value)} is no path or URL")
    return value


def _pictures(name: str, value: Any) -> str:
    """One picture, or several as a sequence or as JSON's list, as text with a line for each."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f'{name}={shown(value)} is no list; give one such as \'["a.png", "b.png"]\'') from None
    several = value.splitlines() if isinstance(value, str) else value
    if not isinstance(several, (list, tuple)):
        several = [several]
    found = [_picture(name, picture) for picture in several]
    if not found or not all(isinstance(picture, str) and "\n" not in picture for picture in found):
        raise RequestError(f"{name}={shown(value)} is no picture and no list of them")
    return "\n".join(found)


def _pair(name: str, value: Any) -> str:
    """A size or a corner as text."""
    is_size, text = name in _SIZES, value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        text = "{1}x{0}".format(*value) if is_size else "{},{}".format(*value)
    if isinstance(text, str) and (SIZE if is_size else _CORNER).fullmatch(text):
        return "{}x{}".format(*size_of(text)) if is_size else "{},{}".format(*corner_of(text))
    example = "a size; give one such as '1024x768'" if is_size else "a corner; give top and left such as '0,16'"
    raise RequestError(f"{name}={shown(value)} is not {example}")


def check_text(name: str, text: str) -> None:
    """Raise RequestError where a prompt is too long or is not text that UTF-8 can hold."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise RequestError(f"{name} has {len(text):,} characters; allowed are {MAX_PROMPT_CHARACTERS:,}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is not valid Unicode at character {error.start}; give UTF-8 text") from None
    if "\0" in text:
        raise RequestError(f"{name} holds a NUL character; give plain text")

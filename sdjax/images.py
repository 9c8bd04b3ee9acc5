"""Pixels to files: encoding with the metadata that other tools read, contact sheets."""

import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from sdjax.request import Request
from sdjax.values import numbers

FORMATS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
PNG_LEVEL = 1  # zlib; see BENCHMARKS.md for what each level costs and saves
QUALITY = 95  # jpg and webp; 100 makes webp lossless

_EXIF_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_EXIF_MOST = 65_000  # bytes of text; with what is around it a JPEG holds 65,533


def parameters(request: Request, model: str) -> str:
    """The request as the text that the A1111 web interface writes into its PNGs and that most viewers read."""
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    named = request.sigmas and numbers(request.sigmas) is None  # a list's commas would end the value
    sampler = f"{request.sampler} {request.sigmas}" if named else str(request.sampler)
    facts = {
        "Steps": request.num_inference_steps,
        "Sampler": sampler,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": model,
    }
    if request.guidance_scales is not None:  # a list again, in whose place guidance_scale is not looked at
        del facts["CFG scale"]
    if request.image is not None:
        facts["Denoising strength"] = f"{request.strength:g}"
    if request.hires_scale > 1:
        facts["Hires upscale"] = f"{request.hires_scale:g}"
        facts["Hires upscaler"] = request.hires_upscaler.capitalize()
        facts.setdefault("Denoising strength", f"{request.hires_strength:g}")
    if request.clip_skip:
        facts["Clip skip"] = request.clip_skip + 1  # A1111 counts the last layer as 1
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
    return "\n".join(lines)


def encode(
    pixels: UInt8[np.ndarray, "height width 3"], format: str = "png", *, text: str = "", quality: int = QUALITY
) -> bytes:
    """One image file's bytes; `text` goes into the PNG chunk `parameters` or, as much as fits, the EXIF user comment.

    quality: 1 to 100, of jpg and webp; a webp of 100 is lossless. Equal arguments give equal bytes under one version of
    Pillow.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} is out of range; allowed is 1 to 100")
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if format == "png":
        info = PngInfo()
        if text:
            info.add_text("parameters", text)
        image.save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
        return buffer.getvalue()
    if format not in FORMATS:
        raise ValueError(f"image format {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    exif = Image.Exif()
    if text:
        fits = text.encode("utf-16-be")[:_EXIF_MOST].decode("utf-16-be", "ignore")
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"UNICODE\0" + fits.encode("utf-16-be")
    lossless = {"lossless": True, "exact": True} if format == "webp" and quality == 100 else {}
    image.save(buffer, FORMATS[format].split("/")[1], quality=quality, exif=exif, **lossless)
    return buffer.getvalue()


_CELL = 256  # pixels


def fitted(image: Image.Image, cell: int = _CELL) -> Image.Image:
    """An image as large as fits into a square of `cell` pixels."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small pictures are enlarged without smoothing, so that the sheet shows their real pixels.
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], *, columns: int | None = None, cell: int = _CELL
) -> Image.Image:
    """The images in rows, each fitted into a square of `cell` pixels above the start of its caption."""
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = -(-len(images) // columns)
    margin, line = 8, 18
    sheet = Image.new("RGB", (columns * (cell + margin) + margin, rows * (cell + line + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = margin + (i % columns) * (cell + margin), margin + (i // columns) * (cell + line + margin)
        thumbnail = fitted(image, cell)
        sheet.paste(thumbnail, (x + (cell - thumbnail.width) // 2, y + (cell - thumbnail.height) // 2))
        draw.text((x, y + cell + 2), _shorten(draw, " ".join(caption.split()), cell), fill="black", font_size=12)
    return sheet


def _shorten(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The longest start of `text` that is at most `width` pixels wide, with an ellipsis where it was cut."""
    text = text[: width // 2]
    if draw.textlength(text, font_size=12) <= width:
        return text
    while text and draw.textlength(text + "...", font_size=12) > width:
        text = text[:-1]
    return text + "..."

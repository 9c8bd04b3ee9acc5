"""Image files: pixels and metadata as other programs read them, sheets, and writes that are whole or absent."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from sdjax.images import contact_sheet, encode, parameters
from sdjax.request import Request

REQUEST = Request(
    prompt="a red circle,\nvery round",
    negative_prompt="blur",
    seed=3,
    num_inference_steps=20,
    sampler="dpmpp_2m",
    sigmas="karras",
    width=48,
    height=32,
)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)


def test_parameters_are_the_lines_that_a1111_writes():
    assert parameters(REQUEST, "sd15").split("\n") == [
        "a red circle,",
        "very round",
        "Negative prompt: blur",
        "Steps: 20, Sampler: dpmpp_2m karras, CFG scale: 7.5, Seed: 3, Size: 48x32, Model: sd15",
    ]
    plain = dataclasses.replace(REQUEST, negative_prompt="", sigmas=None, clip_skip=1)
    assert parameters(plain, "m").endswith(
        "Sampler: dpmpp_2m, CFG scale: 7.5, Seed: 3, Size: 48x32, Model: m, Clip skip: 2"
    )
    assert "Negative" not in parameters(plain, "m")
    changed = dataclasses.replace(plain, image="a.png", strength=0.6)
    assert "Model: m, Denoising strength: 0.6, Clip skip: 2" in parameters(changed, "m")
    enlarged = dataclasses.replace(plain, hires_scale=2, hires_strength=0.4)
    second = "Hires upscale: 2, Hires upscaler: Lanczos, Denoising strength: 0.4, Clip skip: 2"
    assert second in parameters(enlarged, "m")
    listed = dataclasses.replace(plain, num_inference_steps=2, guidance_scales=(9, 5))
    assert "Sampler: dpmpp_2m, Seed: 3" in parameters(listed, "m")  # guidance_scale is not what was used


@pytest.mark.parametrize("text", ["Steps: 20", "ein Kreis, 円, ⭕"])
def test_png_keeps_pixels_and_text(text):
    image = Image.open(io.BytesIO(encode(PIXELS, "png", text=text)))
    assert np.array_equal(np.asarray(image), PIXELS)
    assert image.info["parameters"] == text


@pytest.mark.parametrize("format", ["jpg", "webp"])
def test_lossy_formats_stay_near_and_keep_text(format):
    smooth = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (32, 48, 3))
    image = Image.open(io.BytesIO(encode(np.ascontiguousarray(smooth), format, text="円 circle")))
    assert np.abs(np.asarray(image.convert("RGB"), int) - smooth).max() <= 8
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + "円 circle".encode("utf-16-be")
    longest = "\n".join(["a" + "\N{GRINNING FACE}" * 9_999] * 2)  # a prompt and a negative one of all that is allowed
    image = Image.open(io.BytesIO(encode(PIXELS, format, text=longest)))
    kept = image.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert longest.startswith(kept)
    assert len(kept) > 16_000


def test_quality_is_heeded_and_a_webp_of_100_is_lossless():
    for format in ("jpg", "webp"):
        assert len(encode(PIXELS, format, quality=30)) < len(encode(PIXELS, format, quality=90))
    image = Image.open(io.BytesIO(encode(PIXELS, "webp", quality=100, text="a")))
    assert np.array_equal(np.asarray(image), PIXELS)
    with pytest.raises(ValueError, match="quality=0 is out of range; allowed is 1 to 100"):
        encode(PIXELS, "jpg", quality=0)


def test_encode_is_deterministic_and_refuses_an_unknown_format():
    assert encode(PIXELS, text="a") == encode(PIXELS.copy(), text="a")
    with pytest.raises(ValueError, match="'bmp' is unknown; allowed are png, jpg, webp"):
        encode(PIXELS, "bmp")


def test_contact_sheet_shows_each_image_in_its_cell():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (99, 9, 99)]
    images = [Image.new("RGB", (20 + 10 * i, 30), colour) for i, colour in enumerate(colours)]
    sheet = contact_sheet(images, ["a caption that is much too long for its cell " * 9] * 5, columns=3, cell=64)
    assert sheet.size == (3 * 72 + 8, 2 * 90 + 8)
    for i, colour in enumerate(colours):
        assert sheet.getpixel((8 + (i % 3) * 72 + 32, 8 + (i // 3) * 90 + 32)) == colour

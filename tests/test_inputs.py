"""Pictures that are read: every usual mode, and everything that must be refused in one line."""

import base64
import io
import os
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sdjax import inputs, retrying
from sdjax.request import Request
from sdjax.values import RequestError

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def saved(folder, image, name="image.png", **options):
    image.save(folder / name, **options)
    return str(folder / name)


def read(path, **options):
    return np.asarray(inputs.load(path, "image", **options).image)


def half_transparent(values):
    alpha = np.full((4, 6, 1), 255, np.uint8)
    alpha[:, 3:] = 0
    return np.concatenate([values, alpha], axis=-1), np.where(alpha == 0, 255, values)


def test_colours_and_grey(tmp_path):
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(RGB))), RGB)
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(GREY))), np.stack([GREY] * 3, -1))
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(GREY > 99))), np.stack([(GREY > 99) * 255] * 3, -1))


def test_alpha_lies_over_white_and_in_a_mask_over_black(tmp_path):
    values, flat = half_transparent(RGB)
    path = saved(tmp_path, Image.fromarray(values))
    assert np.array_equal(read(path), flat)
    assert not read(path, mask=True)[:, 3:].any()
    values, flat = half_transparent(np.stack([GREY], -1))
    assert np.array_equal(read(saved(tmp_path, Image.fromarray(values, "LA"))), np.repeat(flat, 3, -1))


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray((GREY > 99).astype(np.uint8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    expected = np.where((GREY > 99)[..., None], (0, 0, 255), (255, 0, 0))
    assert np.array_equal(read(saved(tmp_path, image)), expected)
    expected[GREY > 99] = 255
    assert np.array_equal(read(saved(tmp_path, image, transparency=1)), expected)


def test_sixteen_bits_and_cmyk(tmp_path):
    deep = Image.fromarray(GREY.astype(np.uint16) * 257 + 100)
    assert np.array_equal(read(saved(tmp_path, deep))[..., 0], GREY)
    cmyk = Image.fromarray(np.concatenate([255 - RGB, np.zeros((4, 6, 1), np.uint8)], -1), "CMYK")
    assert np.array_equal(read(saved(tmp_path, cmyk, "image.tiff")), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(tmp_path, orientation):
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # what a camera held so has stored
    stored = Image.fromarray(RGB)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[turns[orientation]])
    exif = Image.Exif()
    exif[0x112] = orientation
    assert np.array_equal(read(saved(tmp_path, stored, exif=exif)), RGB)


def bomb(width, height):
    """A PNG that says it is that large, and holds a few bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "is not there"),
        (b"", "is no picture"),
        (b"GIF89a", "is no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
        (bomb(8200, 8200), "has 8200 x 8200 pixels; the most is 67,108,864 in all"),
        (bomb(60_000, 60_000), "exceeds limit"),
        (bomb(64, 64), "is broken: image file is truncated"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, data, message):
    if data is not None:
        (tmp_path / "image.png").write_bytes(data)
    with pytest.raises(RequestError) as refused:
        inputs.load(str(tmp_path / "image.png"), "image")
    assert message in str(refused.value)
    assert str(refused.value).startswith("image ")
    assert "\n" not in str(refused.value)


def tiled(sides, big=False, order="<", kind=4):
    """An 8 x 8 TIFF with these tags for the sides of its tile, whose bytes are those of 16 x 16."""
    tile = zlib.compress(TILE.tobytes())
    numbers = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), *sides, (324, 400), (325, len(tile))]
    entry, count = ("HHQQ", "Q") if big else ("HHLL", "H")
    start = struct.pack(order + "2sHHHQ", b"", 43, 8, 0, 16) if big else struct.pack(order + "2sHL", b"", 42, 8)
    tags = b"".join(struct.pack(order + entry, tag, kind, 1, number) for tag, number in numbers)
    data = (b"II" if order == "<" else b"MM") + start[2:] + struct.pack(order + count, len(numbers)) + tags
    return data.ljust(400, b"\0") + tile


TILE = np.arange(256, dtype=np.uint8).reshape(16, 16)
HUGE = [
    tiled([(322, 26_000), (323, 26_000)]),
    tiled([(322, 26_000), (323, 26_000)], order=">"),
    tiled([(322, 26_000), (323, 26_000)], big=True),
    tiled([(322, 26_000), (322, 16), (323, 26_000), (323, 16)]),  # Pillow takes the last of each, libtiff the first
]


@pytest.mark.parametrize("data", HUGE)
def test_tiles_far_larger_than_their_picture_are_not_decoded(data, monkeypatch):
    monkeypatch.setattr(TiffImageFile, "load", lambda image: pytest.fail("it is decoded"))
    with pytest.raises(RequestError, match="image has tiles of 26000 x 26000 with 676,000,000 pixels; the most is"):
        inputs.decode(data, "image")


def test_tiles_whose_sides_are_no_numbers_are_refused():
    with pytest.raises(RequestError, match="image is broken: a side of its tiles is neither SHORT nor LONG"):
        inputs.decode(tiled([(322, 16), (323, 16)], kind=9), "image")


@pytest.mark.parametrize("options", [{}, {"big": True}, {"order": ">"}])
def test_a_tiled_tiff_is_a_picture(options):
    picture = inputs.decode(tiled([(322, 16), (323, 16)], **options), "image")
    assert np.array_equal(picture, np.stack([TILE[:8, :8]] * 3, -1))


def test_a_file_may_not_be_larger_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_BYTES", 2**20)
    (tmp_path / "image.png").write_bytes(bytes(2**20 + 1))
    with pytest.raises(RequestError, match="larger than 1 MiB"):
        inputs.load(str(tmp_path / "image.png"), "image")


@pytest.mark.parametrize("url", ["nowhere://a/b.png", "data:image/png;base64,###", "/", "file:///no/such", "a\nb"])
def test_any_url_gives_a_picture_or_a_request_error(url):
    with pytest.raises(RequestError) as refused:
        inputs.load(url, "image")
    assert len(str(refused.value)) < 400


def test_a_chain_of_file_systems_is_not_followed(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_: pytest.fail("something is copied"))
    for chain in (f"simplecache::file://{tmp_path}/image.png", f"zip://a.png::simplecache::file://{tmp_path}/a.zip"):
        with pytest.raises(RequestError, match="is a chain of file systems; give the picture's own path or URL"):
            inputs.load(chain, "image")


def test_a_hash_pins_the_content(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB))
    found = inputs.load(path, "image").sha256
    assert inputs.load(path, "image", sha256=found).sha256 == found
    saved(tmp_path, Image.fromarray(RGB[::-1].copy()))
    with pytest.raises(RequestError, match=f"has changed: its SHA-256 is .*, not {found}"):
        inputs.load(path, "image", sha256=found)


def test_while_pictures_are_kept_the_last_few_are_read_once(tmp_path, monkeypatch):
    read, whole = [], inputs._whole
    monkeypatch.setattr(inputs, "_whole", lambda url: read.append(url) or whole(url))
    path, *others = (saved(tmp_path, Image.fromarray(RGB), f"{i}.png") for i in range(6))
    with inputs.keeping():
        found = [inputs.load(path, "image") for _ in range(3)]
        assert np.array_equal(inputs.load(path, "mask_image", mask=True).image, Image.fromarray(RGB).convert("L"))
        with pytest.raises(RequestError, match="has changed"):
            inputs.load(path, "image", sha256="0" * 64)
        assert read == [path] * 2
        for other in others:
            inputs.load(other, "image")
        inputs.load(path, "image")
        assert read == [path, path, *others, path]
    assert all(image is found[0].image for image, _ in found)
    saved(tmp_path, Image.fromarray(RGB[::-1].copy()), "0.png")
    assert inputs.load(path, "image").sha256 != found[0].sha256


@given(st.binary(max_size=200))
def test_bytes_give_a_picture_or_a_request_error(data):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    for content in (data, buffer.getvalue()[: len(data)] + data):
        try:
            loaded = inputs.load("data:;base64," + base64.b64encode(content).decode(), "image")
        except RequestError as error:
            assert "\n" not in str(error)
        else:
            assert loaded.image.mode == "RGB"


@pytest.mark.parametrize("picture", [Image.fromarray(RGB), RGB, GREY, GREY[..., None], Image.fromarray(GREY > 99)])
def test_a_picture_in_memory_travels_as_text(picture):
    request = Request(prompt="a", image=picture)
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    expected = pixels if pixels.shape[-1] == 3 else np.repeat(pixels.reshape(4, 6, 1), 3, -1)
    assert np.array_equal(read(request.image), expected)
    assert Request(prompt="a", image=request.image) == request


def test_a_picture_in_memory_is_the_one_of_its_file(tmp_path):
    """Opened and not read, as a Pillow image that a script hands on may be; PNG has no place for its colours."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    path = saved(tmp_path, noise.convert("CMYK"), "image.jpg", exif=exif)
    opened = Image.open(path)
    assert Request(prompt="a", image=opened).image.startswith("data:")
    assert np.array_equal(read(Request(prompt="a", image=opened).image), read(path))


def test_an_array_that_is_no_picture_is_refused():
    for bad in (RGB.astype(np.float32), RGB[None], np.zeros((4, 6, 7), np.uint8)):
        with pytest.raises(RequestError, match="an array is uint8"):
            Request(prompt="a", image=bad)


def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(retrying.time, "sleep", lambda _: pytest.fail("it is tried again"))
    with pytest.raises(RequestError, match=r"pipe\.png cannot be read: it is a pipe"):
        inputs.load(str(tmp_path / "pipe.png"), "image")


def test_no_more_pixels_are_decoded_at_once_than_there_is_room_for(monkeypatch):
    """However many threads ask: of pictures that take half of it two, and of small ones all."""
    monkeypatch.setattr(inputs, "_ROOM", inputs._Room(2 * GREY.size))
    held, most, load = 0, 0, PngImageFile.load
    lock = threading.Lock()

    def slow(image):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        time.sleep(0.02)
        with lock:
            held -= 1
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", slow)
    data = io.BytesIO()
    Image.fromarray(RGB).save(data, "png")
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: inputs.decode(data.getvalue(), "image"), range(8)))
    assert most == 2
    assert all(np.array_equal(image, RGB) for image in found)
    with pytest.raises(RequestError, match="is broken"):
        inputs.decode(data.getvalue()[:-30], "image")
    assert inputs._ROOM._free == 2 * GREY.size

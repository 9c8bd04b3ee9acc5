"""Where a request's pictures lie, and that what was not to be repainted comes back to the bit."""

import dataclasses

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdjax import canvas
from sdjax.request import Request
from sdjax.values import RequestError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (45, 70, 3), np.uint8)
SPOT = np.zeros((45, 70), np.uint8)
SPOT[10:22, 30:50] = 255


def board(**fields):
    request = Request(prompt="a", image=PHOTO, **fields)
    loaded = canvas.load(request, 8)
    width, height = (request.width or loaded.image.width // 8 * 8), (request.height or loaded.image.height // 8 * 8)
    return canvas.fit(dataclasses.replace(request, width=width, height=height), loaded)


def painted(board, value=7):
    return board.finish(np.full_like(board.image, value))


def test_an_image_is_stretched_as_diffusers_stretches_it():
    made = board(width=48, height=32)
    expected = diffusers.image_processor.VaeImageProcessor().preprocess(Image.fromarray(PHOTO), height=32, width=48)
    assert np.array_equal(made.image, ((expected[0].numpy() / 2 + 0.5) * 255).round().transpose(1, 2, 0))
    assert made.mask is None
    assert np.all(painted(made) == 7)


def test_what_the_mask_leaves_is_exact():
    made = board(mask_image=SPOT, width=72, height=48)
    small = np.asarray(Image.fromarray(SPOT).resize((72, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(made.mask, small)
    out = painted(made)
    assert np.array_equal(out[small == 0], made.image[small == 0])
    assert np.all(out[small == 255] == 7)
    assert np.all(painted(board(mask_image=SPOT, width=72, height=48, overlay=False)) == 7)


def test_a_mask_of_another_size_is_fitted_and_a_soft_one_blends():
    soft = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (2, 1))
    made = board(mask_image=soft, width=64, height=32)
    expected = (np.asarray(made.mask, int)[..., None] * 7 + (255 - made.mask.astype(int)[..., None]) * made.image) / 255
    assert np.abs(painted(made) - expected).max() <= 1
    assert np.mean((made.mask > 0) & (made.mask < 255)) > 0


@pytest.mark.parametrize("size", [(48, 32), (32, 64), (64, 8)])
@pytest.mark.parametrize("pad", [0, 5, 100])
def test_padding_crop_cuts_what_diffusers_cuts_and_returns_the_whole(size, pad):
    made = board(mask_image=SPOT, padding_mask_crop=pad, width=size[0], height=size[1])
    processor = diffusers.image_processor.VaeImageProcessor()
    assert made.box == processor.get_crop_region(Image.fromarray(SPOT), *size, pad=pad)
    theirs = processor.resize(Image.fromarray(PHOTO).crop(made.box), *size[::-1], resize_mode="fill")
    # Where the box's shape is another, diffusers' borders are blends of the edge; here they repeat it.
    scale = min(size[0] / (made.box[2] - made.box[0]), size[1] / (made.box[3] - made.box[1]))
    inner = [int((made.box[i + 2] - made.box[i]) * scale + 1e-9) for i in (0, 1)]
    left, top = (size[i] // 2 - inner[i] // 2 for i in (0, 1))
    middle = np.s_[top : top + inner[1], left : left + inner[0]]
    assert np.array_equal(made.image[middle], np.asarray(theirs)[middle])
    out = painted(made)
    assert np.array_equal(out[SPOT == 0], PHOTO[SPOT == 0])
    noise = RNG.integers(0, 256, made.image.shape, np.uint8)
    theirs = processor.apply_overlay(Image.fromarray(SPOT), Image.fromarray(PHOTO), Image.fromarray(noise), made.box)
    assert np.array_equal(made.finish(noise), theirs)


@st.composite
def masks(draw):
    height, width = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(draw(st.integers(1, 3))):
        mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 255
    return mask


@given(masks(), st.tuples(st.integers(1, 64), st.integers(1, 64)), st.integers(0, 50))
def test_a_crop_holds_the_mask_and_is_the_one_that_diffusers_takes(mask, size, pad):
    box = canvas.crop_region(mask, size, pad)
    assert box == diffusers.image_processor.VaeImageProcessor.get_crop_region(Image.fromarray(mask), *size, pad=pad)
    left, top, right, bottom = box
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert 0 <= left < right <= mask.shape[1]
    assert 0 <= top < bottom <= mask.shape[0]


@pytest.mark.parametrize(
    ("outpaint", "size", "place"),
    [
        ("left=16,top=3", (86, 48), (16, 3)),
        ("right=2", (72, 45), (0, 0)),
        ("bottom=5,left=1,right=1,top=1", (72, 51), (1, 1)),
        ("96x45", (96, 45), (13, 0)),
        ("70x45", (70, 45), (0, 0)),
    ],
)
def test_a_canvas_grows_around_pixels_that_stay(outpaint, size, place):
    made = board(outpaint=outpaint)
    assert made.image.shape[0] % 8 == made.image.shape[1] % 8 == 0
    inside = np.zeros((size[1], size[0]), bool)
    inside[place[1] : place[1] + 45, place[0] : place[0] + 70] = True
    out = painted(made)
    assert out.shape == (size[1], size[0], 3)
    assert np.array_equal(out[inside], PHOTO.reshape(-1, 3))
    assert np.all(out[~inside] == 7)
    # The fill continues the edge: no seam is far darker or lighter than the picture.
    assert np.array_equal(made.mask[: size[1], : size[0]] == 0, inside)
    if place[0]:
        assert abs(made.image[:, : place[0]].mean() - PHOTO[:, 0].mean()) < 40


def test_what_goes_with_the_whole_picture_is_cut_as_it_is():
    mask = np.pad(np.full((10, 20), 255, np.uint8), ((20, 15), (40, 10)))
    for fields in ({"width": 16, "height": 32}, {"width": 72, "height": 48}):
        made = board(mask_image=mask, padding_mask_crop=3, **fields)
        assert np.array_equal(np.asarray(made.cut(Image.fromarray(PHOTO))), made.image)
        assert made.cut(Image.fromarray(PHOTO).resize((140, 90))).size == made.image.shape[1::-1]
    for whole in (board(outpaint="left=10"), board(mask_image=mask), board()):
        small = Image.new("RGB", (5, 5))
        assert whole.cut(small) is small


def test_growing_twice_keeps_the_first_pixels():
    once = painted(board(outpaint="left=10,top=4"))
    request = Request(prompt="a", image=once, outpaint="right=30,bottom=1")
    loaded = canvas.load(request, 8)
    size = loaded.image.size
    twice = painted(canvas.fit(dataclasses.replace(request, width=size[0], height=size[1]), loaded), 9)
    assert np.array_equal(twice[4:49, 10:80], PHOTO)
    assert np.all(twice[:4, :80] == 7)
    assert np.all(twice[:, 80:] == 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outpaint": "64x45"}, "outpaint=64x45 is smaller than the image, 70x45"),
        ({"outpaint": "left=8000"}, "outpaint=left=8000 makes 8070 x 45 pixels; a side has at most 4096"),
        ({"outpaint": "left=2", "width": 64}, "outpaint sets the size, 72x48 here"),
        ({"mask_image": np.zeros((4, 4), np.uint8)}, "mask_image is dark everywhere; white is what is repainted"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        board(**fields)


def test_a_picture_that_is_kept_whole_is_none_that_a_format_cannot_hold():
    long = np.zeros((8, 16_384, 3), np.uint8)
    mask = np.zeros((8, 16_384), np.uint8)
    mask[:, :64] = 255
    asked = {"prompt": "a", "image": long, "mask_image": mask, "padding_mask_crop": 4, "width": 64, "height": 64}
    with pytest.raises(RequestError, match=r"image has 16384x8 pixels; .* at most 16383; resize"):
        canvas.measured(Request(**asked), 8)
    assert canvas.measured(Request(**asked, resize="640x8"), 8).width == 64

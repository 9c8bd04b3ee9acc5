"""Requests: what is allowed, what is refused and in which words, and rows of prompt files."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdjax.request import _DEFAULTS, _TYPES, MAX_SEED, Request
from sdjax.values import RequestError, coerce, numbers

REFUSED = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": "x" * 1_000_000}, "1,000,000 characters; allowed are 10,000"),
    ({"prompt": "a\ud800"}, "not valid Unicode at character 1"),
    ({"prompt": "a\0b"}, "NUL"),
    ({"prompt": 7}, "prompt=7 is not text"),
    ({"prompt": None}, "prompt=None is not text"),
    ({"negative_prompt": "x" * 10_001}, "negative_prompt has 10,001"),
    ({"seed": -1}, "allowed is 0 to 4294967295"),
    ({"seed": MAX_SEED + 1}, "allowed is 0 to 4294967295"),
    ({"seed": 1.5}, "seed=1.5 is not a whole number"),
    ({"seed": "9" * 5000}, "is not a whole number"),
    ({"sigmas": [10**400]}, "is no list of 1 to 1000 numbers"),
    ({"controlnet_conditioning_scale": 10**400}, "is no list of 1 to 1000 numbers"),
    ({"seed": "42.5"}, "seed='42.5' is not a whole number"),
    ({"seed": ".0"}, "seed='.0' is not a whole number"),
    ({"seed": True}, "seed=True is not a whole number"),
    ({"num_inference_steps": 0}, "allowed is 1 to 1000"),
    ({"num_inference_steps": 10_000}, "allowed is 1 to 1000"),
    ({"guidance_scale": math.nan}, "guidance_scale=nan is not a finite number"),
    ({"guidance_scale": math.inf}, "not a finite number"),
    ({"guidance_scale": "much"}, "guidance_scale='much' is not a finite number"),
    ({"guidance_scale": None}, "guidance_scale=None is not a finite number"),
    ({"guidance_rescale": 1.1}, "allowed is 0 to 1"),
    ({"eta": -0.1}, "allowed is 0 to 1"),
    ({"sigmas": []}, "sigmas=[] is no list of 1 to 1000 numbers, such as '9,5,1'"),
    ({"sigmas": "5,b"}, "sigmas=['5', 'b'] is no list of 1 to 1000 numbers"),
    ({"sigmas": np.ones((2, 2))}, "sigmas=array([[1., 1.], [1., 1.]]) is no list of 1 to 1000 numbers"),
    ({"sigmas": [5, math.nan]}, "is no list of 1 to 1000 numbers"),
    ({"sigmas": [0]}, "num_inference_steps=0 is out of range"),
    ({"timesteps": range(5000)}, "is no list of 1 to 1000 numbers"),
    ({"timesteps": "karras"}, "timesteps='karras' is no list of numbers; give one such as '9,5,1'"),
    ({"timesteps": {}}, "timesteps={} is not text"),
    ({"sigmas": [5, 1], "timesteps": [900, 10]}, "sigmas and timesteps are both lists"),
    ({"guidance_scales": [7, 5]}, "guidance_scales lists 2 numbers for num_inference_steps=30"),
    (
        {"guidance_scales": "7,500", "num_inference_steps": 2},
        "guidance_scales=500 is out of range",
    ),
    ({"solver_order": 5}, "allowed is 1 to 4"),
    ({"width": 100}, "width=100 is not a multiple of 8; the nearest is 96"),
    ({"height": 0}, "allowed is 8 to 4096"),
    ({"height": 100_000}, "allowed is 8 to 4096"),
    ({"strength": 0}, "allowed is above 0"),
    ({"clip_skip": -1}, "allowed is 0 to 11"),
    ({"noise": "white"}, "allowed are 'jax' and 'torch'"),
    ({"prompt_language": "yaml"}, "prompt_language='yaml' is unknown; allowed are 'a1111' and 'compel' and 'plain'"),
    ({"hires_scale": 0.5}, "allowed is 1 to 4"),
    ({"guidance_start": 0.9, "guidance_end": 0.1}, "guidance_start=0.9 is above guidance_end=0.1"),
    (
        {"control_guidance_start": "0.5", "control_guidance_end": "1,0.4"},
        "control_guidance_start=0.5 is above control_guidance_end=0.4",
    ),
    ({"hires_strength": 0}, "hires_strength=0 leaves no step"),
    ({"image": "a", "outpaint": "left=8", "hires_scale": 2}, "hires_scale would enlarge what mask_image and outpaint"),
    ({"resize": "64"}, "resize='64' is no size; give one such as '640x360'"),
    ({"resize": ""}, "resize='' is no size"),
    ({"resize": "0x64"}, "resize='0x64' is no size"),
    ({"resize": "64x9000"}, "resize='64x9000' is no size"),
    ({"image": Image.new("I", (8, 8))}, "image has mode I, which has no fixed white; convert it to RGB"),
    ({"image": 7}, "image=7 is not text"),
    ({"image": " "}, "image=' ' is no path or URL"),
    ({"control_image": "[" * 100_000}, "control_image='[[[[[[["),
    ({"mask_image": "m.png"}, "mask_image is given without image, which it needs"),
    ({"image": "a.png", "padding_mask_crop": 8}, "padding_mask_crop is given without mask_image"),
    ({"outpaint": "left=8"}, "outpaint is given without image"),
    ({"image": "a.png", "mask_image": "m.png", "outpaint": "left=8"}, "outpaint makes its own mask"),
    ({"image": "a.png", "outpaint": "left=8,left=9"}, "outpaint='left=8,left=9' is not understood; give margins"),
    ({"image": "a.png", "outpaint": "left=-8"}, "is not understood"),
    ({"image": "a.png", "overlay": "maybe"}, "overlay='maybe' is not true or false"),
    ({"image": "a.png", "overlay": 2}, "overlay=2 is not true or false"),
    ({"prompt_2": "a\0b"}, "prompt_2 holds a NUL"),
    ({"negative_prompt_2": "cat"}, "negative_prompt_2 is given without negative_prompt, which it needs"),
    ({"original_size": 64}, "original_size=64 is not a size; give one such as '1024x768'"),
    ({"target_size": (64, 64, 3)}, "target_size=(64, 64, 3) is not a size"),
    ({"crops_coords_top_left": "0x0"}, "crops_coords_top_left='0x0' is not a corner; give top and left such as '0,16'"),
    ({"crops_coords_top_left": (-1, 0)}, "is not a corner"),
    ({"aesthetic_score": 11}, "allowed is 0 to 10"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_refused_in_one_line(values, message):
    with pytest.raises(RequestError) as refused:
        Request(**{"prompt": "a red circle", **values})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_number_of_too_many_digits_to_be_shown_is_refused():
    with pytest.raises(RequestError, match="seed=a number of too many digits is not a whole number"):
        Request(prompt="a", seed=10**5000)


@pytest.mark.parametrize(
    "values",
    [{"seed": " " * 10**6 + "x"}, {"image": "a.png", "outpaint": ",".join(f"x{i}={i}" for i in range(10**5))}],
)
def test_a_cell_of_a_megabyte_is_refused(values):
    """At once: read backwards from every place, it would take hours."""
    with pytest.raises(RequestError, match=r"is not (a whole number|understood)"):
        Request(prompt="a", **values)


def test_lists_of_numbers_are_one_text_however_they_are_written():
    for written in ("14.6,6,0.5", " [14.6, 6.0, .5] ", "14.6 6 0.5", [14.6, 6, 0.5], np.array([14.6, 6, 0.5])):
        request, _ = Request.from_row({"prompt": "a", "sigmas": written})
        assert request.sigmas == "14.6,6,0.5"
        assert numbers(request.sigmas) == [14.6, 6, 0.5]
        assert request.num_inference_steps == 3
        assert dataclasses.replace(request) == request
    assert Request(prompt="a", sigmas=[5, 0]).num_inference_steps == 1
    assert Request(prompt="a", sigmas=[5, 0]) == Request(prompt="a", sigmas=[5])  # one picture, one name
    assert Request(prompt="a", timesteps=[5, 0], guidance_scales=(7, 1)).num_inference_steps == 2
    assert numbers(Request(prompt="a", sigmas="karras").sigmas) is None


def test_sizes_are_diffusers_pairs_or_text():
    request = Request(prompt="a", original_size=(1024, 768), crops_coords_top_left=[0, 16])
    assert (request.original_size, request.crops_coords_top_left) == ("768x1024", "0,16")
    assert Request.from_row({"prompt": "a", "original_size": "768x1024", "Crops_Coords_Top_Left": "0,16"})[0] == request
    assert request.canonical() != Request(prompt="a").canonical()
    assert Request(prompt="a", crops_coords_top_left="00,016") == Request(prompt="a", crops_coords_top_left=(0, 16))


def test_margins_are_the_same_in_any_order():
    one, other = (Request(prompt="a", image="a.png", outpaint=text) for text in ("left=8,top=16", "top=16,left=8"))
    assert one == other
    assert one.canonical() == other.canonical()


@pytest.mark.parametrize(
    ("field", "written", "usual"),
    [
        ("outpaint", "left=08,top=0", "left=8,top=0"),
        ("outpaint", "0100x064", "100x64"),
        ("resize", "0640x00360", "640x360"),
        ("guidance_scale", -0.0, 0),
        ("guidance_scales", [5, -0.0], "5,0"),
        ("image_sha256", "AB" * 32, "ab" * 32),
    ],
)
def test_a_value_is_one_however_it_is_written(field, written, usual):
    one, other = (
        Request(prompt="a", image="a.png", num_inference_steps=2, **{field: value}) for value in (written, usual)
    )
    assert one.canonical() == other.canonical()


def test_from_row_matches_columns_without_case_and_keeps_the_others():
    row = {"Prompt": "a cat", "SEED": "7.0", " Guidance_Scale": "2.5", "width": 64.0, "steps": 3, "class": "cat"}
    request, extras = Request.from_row(row)
    assert request == Request(prompt="a cat", seed=7, guidance_scale=2.5, width=64)
    assert extras == {"steps": 3, "class": "cat"}


def test_from_row_takes_the_default_for_an_empty_cell():
    request, _ = Request.from_row({"prompt": "a", "seed": "", "height": None, "eta": math.nan}, seed=5, eta=0.5)
    assert request == Request(prompt="a", seed=5, eta=0.5)


def test_a_prompt_may_be_empty_beside_a_picture_but_not_in_a_file():
    for picture in ("image", "control_image"):
        assert Request(prompt="", **{picture: "a.png"}).prompt == ""
        for row in ({picture: "a.png"}, {picture: "a.png", "prompt": " "}):
            with pytest.raises(RequestError, match="prompt is empty"):
                Request.from_row(row)


@pytest.mark.parametrize("row", [{}, {"prompt": ""}, {"prompt": None}, {"prompt": b"bytes"}, {"prompt": ["a"]}])
def test_from_row_without_a_usable_prompt_is_refused(row):
    with pytest.raises(RequestError, match="prompt"):
        Request.from_row(row)


def test_from_row_refuses_two_columns_for_one_field():
    with pytest.raises(RequestError, match="two columns are named 'seed'"):
        Request.from_row({"prompt": "a", "seed": 1, "Seed": 2})


REQUESTS = st.builds(
    Request,
    prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip),
    seed=st.integers(0, MAX_SEED),
    num_inference_steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 100),
    eta=st.floats(0, 1),
    width=st.none() | st.integers(1, 512).map(lambda side: side * 8),
    noise=st.sampled_from(["jax", "torch"]),
)


@given(REQUESTS)
def test_a_request_survives_text_and_numpy(request):
    values = json.loads(request.canonical())
    assert Request(**values) == request
    assert Request.from_row({key: None if value is None else str(value) for key, value in values.items()})[0] == request
    as_numpy = {
        key: np.asarray(value)[()] if isinstance(value, int | float) else value for key, value in values.items()
    }
    assert Request(**as_numpy) == request


@given(REQUESTS, REQUESTS)
def test_canonical_text_is_equal_exactly_for_equal_requests(a, b):
    assert (a.canonical() == b.canonical()) == (a == b)
    assert dataclasses.replace(a).canonical() == a.canonical()


@given(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | st.floats() | st.binary() | st.booleans()))
def test_any_row_gives_a_request_or_a_request_error(row):
    try:
        request, extras = Request.from_row(row)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert len(extras) <= len(row)
        assert request.prompt.strip()


def test_defaults_need_no_conversion():
    """So a Request converts only what differs from them."""
    for name, default in _DEFAULTS.items():
        if name != "prompt":
            converted = coerce(name, default, _TYPES[name])
            assert (converted, type(converted)) == (default, type(default)), name

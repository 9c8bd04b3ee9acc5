"""The safetensors reader against the library, and against files that are not what they say."""

import io
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sdjax.weights.safetensors import CheckpointError, read_header, read_tensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def read(data: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(data)
    return dict(read_tensors(file, read_header(file, "a file")))


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"], include_characters="."), min_size=1).filter(
            lambda key: key != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    )
)
def test_every_tensor_is_read_as_it_was_saved(layout):
    tensors = {key: (torch.rand(shape) * 9).to(dtype) for key, (dtype, shape) in layout.items()}
    found = read(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            assert found[key].dtype == ml_dtypes.bfloat16
            assert np.array_equal(found[key].astype(np.float32), tensor.float().numpy())
        else:
            assert found[key].dtype == tensor.numpy().dtype
            assert np.array_equal(found[key], tensor.numpy())


WHOLE = safetensors.torch.save({"a": torch.ones(4, 4), "b": torch.ones(3)})


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_anywhere_is_refused(length):
    with pytest.raises(CheckpointError) as refused:
        read(WHOLE[:length])
    assert str(refused.value).startswith("a file ")


@given(st.binary(max_size=200))
def test_what_is_no_safetensors_file_is_refused_or_empty(data):
    try:
        assert read(data) == {}
    except CheckpointError as error:
        assert "\n" not in str(error)


def with_header(header: object, body: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}, "w takes 12 bytes, which does not fit float32 [4]"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}, "w takes -16 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "does not fit"),
        ({"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}, "w is Q4; readable are F64"),
        ({"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}, "truncated: w ends at byte"),
        ({"dtype": "F32"}, "header cannot be read"),
        ({"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}, "header cannot be read"),
        ([], "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(entry, message):
    with pytest.raises(CheckpointError) as refused:
        read(with_header({"w": entry}))
    assert message in str(refused.value)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=4), st.integers(0, 12))
@example([(0, 4), (2, 4)], 6)
@example([(0, 4), (5, 4)], 9)
@example([(0, 4)], 5)
@example([(0, 4), (4, 0), (0, 0), (4, 3)], 7)
def test_tensors_that_overlap_or_leave_gaps_are_refused_as_the_library_does(places, size):
    header = {
        str(i): {"dtype": "U8", "shape": [length], "data_offsets": [start, start + length]}
        for i, (start, length) in enumerate(places)
    }
    data = with_header(header, bytes(range(size)))
    try:
        expected = safetensors.numpy.load(data)
    except safetensors.SafetensorError:
        with pytest.raises(
            CheckpointError, match=r"is truncated|where byte \d+ is next|bytes that belong to no tensor"
        ):
            read(data)
        return
    found = read(data)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_a_key_of_any_length_is_refused_by_its_length():
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    assert read(with_header({"a" * 1000: entry}, b"1"))
    with pytest.raises(CheckpointError, match=r"a file: its key 'a{40}'... has 1,001 characters; allowed are 1,000"):
        read(with_header({"a" * 1001: entry}, b"1"))


def test_a_header_that_claims_to_be_huge_is_not_read():
    with pytest.raises(CheckpointError, match="a header of"):
        read((2**62).to_bytes(8, "little") + b"{}")


def test_a_header_of_endless_lists_is_refused():
    with pytest.raises(CheckpointError, match="header cannot be read"):
        read((10**5).to_bytes(8, "little") + b"[" * 10**5)

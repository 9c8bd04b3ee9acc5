"""PyTorch's own files, read without PyTorch: what it writes, and what nobody should run."""

import io
import os
import pickle
import tracemalloc
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdjax.weights.safetensors import CheckpointError, read_tensors
from sdjax.weights.torch_zip import read_header


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    return file


def read(file: io.BytesIO) -> dict[str, np.ndarray]:
    return dict(read_tensors(file, read_header(file, "a file")))


def test_every_tensor_is_read_as_it_was_saved():
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = OrderedDict(
        {
            "whole": whole,
            "a part of it": whole[1],
            "half": torch.rand(3).half(),
            "brain": torch.rand(2, 2).bfloat16(),
            "count": torch.tensor(7),
            "none": torch.zeros(0, 3),
            "flags": torch.tensor([True, False]),
            "parameter": torch.nn.Parameter(torch.rand(2)),
        }
    )
    tensors._metadata = {"version": 1}  # pyright: ignore[reportAttributeAccessIssue]
    noted = {"epoch": 3, "lr": 1e-4, "hyper": {"name": "a", "on": [True, None, (1, 2, 3, 4)]}}
    for value in (tensors, {"state_dict": tensors, "optimizer": {"state": {0: {"step": torch.ones(1)}}}, **noted}):
        found = read(saved(value))
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert found[key].shape == tuple(tensor.shape)
            assert np.array_equal(found[key].astype(np.float64), tensor.detach().double().numpy()), key
    assert read(saved({"outer": {"inner": whole}})).keys() == {"outer.inner"}


def pickled(file: io.BytesIO) -> bytes:
    """What torch.save writes about tensors."""
    with zipfile.ZipFile(file) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


WRITTEN = pickled(saved({"a": torch.ones(2), "b": {"c": torch.ones(1, 2).T, 1: [None, torch.Size([1])]}}))


class Runs:
    """What a hostile file does: call something when it is unpickled."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def with_pickle(data: bytes) -> io.BytesIO:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file


def test_what_a_pickle_would_run_is_passed_over_or_refused_by_name(tmp_path):
    victim = tmp_path / "victim"
    victim.touch()
    runs, w = Runs(os.remove, str(victim)), torch.ones(1)
    assert read(saved({"state_dict": {"w": w}, "x": runs, "y": [runs]})).keys() == {"w"}
    assert read(saved({"w": w, "x": runs})).keys() == {"w"}
    for file in (saved(runs), saved({"state_dict": runs}), with_pickle(pickle.dumps(runs, protocol=2))):
        with pytest.raises(
            CheckpointError, match=r"a file: its state dict is made by posix.remove, which could run code"
        ):
            read_header(file, "a file")
    for hidden in (Runs(os.remove, str(victim), [{"w": w}]), Runs(list, Runs(os.remove, w))):
        with pytest.raises(
            CheckpointError, match=r"a file: its net\.x is made by (posix.remove|__builtin__.list), which"
        ):
            read_header(saved({"net": {"w": w, "x": hidden}}), "a file")
    assert victim.exists()


def test_what_trainers_leave_beside_the_tensors_is_passed_over():
    left = {
        "callbacks": {torch.nn.Linear: {"best": np.float64(0.5), "dirs": {1, 2}, "raw": b"x", "many": np.ones(3)}},
        "hyper": {"dtype": torch.float16, "shape": torch.Size([1, 2]), "counts": Counter("ab"), "far": 2**40},
        "network": torch.nn.Linear(2, 2),
        "complex": torch.ones(2, dtype=torch.complex64),
        "eight": torch.ones(2).to(torch.float8_e4m3fn),
    }
    assert read(saved({"state_dict": {"w": torch.ones(2)}, **left})).keys() == {"w"}
    for name in ("complex", "eight"):
        with pytest.raises(CheckpointError, match=rf"a file: its {name} is made by torch\._utils\._rebuild_tensor_v"):
            read_header(saved({"state_dict": {"w": torch.ones(2), name: left[name]}}), "a file")


def test_a_parameter_dict_is_a_dict():
    """As A1111 keeps the vectors of a textual inversion."""
    vectors = torch.rand(2, 3)
    value = {"string_to_param": torch.nn.ParameterDict({"*": vectors}), "string_to_token": {"*": torch.tensor(265)}}
    found = read(saved(value))
    assert found.keys() == {"string_to_param.*", "string_to_token.*"}
    assert np.array_equal(found["string_to_param.*"], vectors.numpy())


@given(st.lists(st.integers(0, 3), max_size=5), st.randoms(use_true_random=False))
def test_axes_in_any_order_are_read_as_they_were_saved(shape, random):
    axes = random.sample(range(len(shape)), len(shape))
    tensor = torch.rand(shape).permute(axes)
    found = read(saved({"w": tensor, "last": torch.rand(2, 3, 2, 2).to(memory_format=torch.channels_last)}))["w"]
    assert found.shape == tensor.shape
    assert np.array_equal(found, tensor.numpy())


@given(st.data())
def test_any_pickle_is_read_or_refused_in_a_line(data):
    """Operations in any order, and what torch.save writes with some of its bytes changed."""
    operations = [
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"u",
        b"s",
        b"a",
        b"e",
        b"R",
        b"\x81",
        b"b",
        b"Q",
        b"N",
    ]
    operations += [b"q\x01", b"h\x01", b"K\x02", b"X\x01\0\0\0w", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"]
    operations += [b"ctorch.nn.modules.container\nParameterDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
    if data.draw(st.booleans()):
        made = b"\x80\x02}" + b"".join(data.draw(st.lists(st.sampled_from(operations), max_size=20))) + b"."
    else:
        made = bytearray(WRITTEN)
        for place in data.draw(st.lists(st.integers(0, len(made) - 1), max_size=3)):
            made[place] = data.draw(st.integers(0, 255))
    try:
        read(with_pickle(bytes(made)))
    except CheckpointError as error:
        assert str(error).startswith("a file")
        assert "\n" not in str(error)


def test_what_would_take_forever_or_all_memory_is_refused():
    doubled = b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 500 + b"K\x01s."
    with pytest.raises(CheckpointError, match="its pickle has a tuple as the key of a dict"):
        read_header(with_pickle(doubled), "a file")
    shape = (
        b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
        b"0NNtQK\0("
    )
    shape += b"K\1" * 10**5 + b"tq\0h\0NNtRs."
    with pytest.raises(CheckpointError, match=r"its w is made by torch\._utils\._rebuild_tensor_v2"):
        read_header(with_pickle(shape), "a file")
    key = b"X" + (2000).to_bytes(4, "little") + b"k" * 2000 + b"q\0"
    for nested, message in [
        (b"\x80\x02}" + key + b"}" + b"h\0}" * 9 + b"s" * 10 + b".", "key 'k{40}'... has 2,000 characters"),
        (b"\x80\x02" + b"}X\0\0\0\0" * 30 + b"}" + b"s" * 30 + b".", "more than 20 dicts within one another"),
    ]:
        with pytest.raises(CheckpointError, match=rf"a file: its .*{message}"):
            read_header(with_pickle(nested), "a file")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/byteorder", bytes(10**8))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="its numbers are not little-endian"):
            read_header(bomb, "a file")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}, protocol=4), "its pickle uses FRAME"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "its state dict is made by builtins.eval"),
        (b"\x80\x02cos\nsystem\n)\x81.", "its state dict is made by os.system"),
        (b"\x80\x02(cos\nsystem\no.", "its pickle uses OBJ"),
        (b"\x80\x02K\x01)R.", "its pickle calls something that is no name"),
        (b"\x80\x02cos\nsystem\n.", "it holds no state dict"),
        (b"\x80\x02X\x01\x00\x00\x001Q.", "refers to something that is no storage"),
        (b"\x80\x02K\x01.", "it holds no state dict"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),  # a large memo index costs nothing
        (b"\x80\x02e.", "cannot be read: IndexError"),
        (b"\x80\x02}", "cannot be read: ValueError"),
        (b"", "cannot be read: ValueError"),
    ],
)
def test_an_odd_pickle_is_refused_in_a_line(data, message):
    file = with_pickle(data)
    if message is None:
        assert read_header(file, "a file") == {}
        return
    with pytest.raises(CheckpointError) as refused:
        read_header(file, "a file")
    assert message in str(refused.value)
    assert str(refused.value).startswith("a file")
    assert "\n" not in str(refused.value)


def test_tensors_that_are_not_where_they_should_be_are_refused():
    for overlapping in (torch.ones(3).expand(2, 3), torch.ones(4, 4)[:, ::2], torch.ones(4, 4)[:, :2]):
        with pytest.raises(CheckpointError, match="w has gaps or repeats between its numbers"):
            read_header(saved({"w": overlapping}), "a file")
    whole = saved({"w": torch.ones(64)}).getvalue()
    for length in range(0, len(whole), 97):
        with pytest.raises(CheckpointError):
            read_header(io.BytesIO(whole[:length]), "a file")
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="the bytes of w are missing or compressed"):
        read_header(packed, "a file")
    short = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(short, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name)[:8] if "/data/" in name else source.read(name))
    with pytest.raises(CheckpointError, match="w lies outside of its 8 bytes"):
        read_header(short, "a file")

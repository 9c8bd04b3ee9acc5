"""PyTorch's own files, read without PyTorch: what it writes, and what nobody should run."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

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


def test_a_pickle_that_would_run_something_is_refused_by_name(tmp_path):
    victim = tmp_path / "victim"
    victim.touch()
    hostile = {"state_dict": {"w": torch.ones(1)}, "x": Runs(os.remove, str(victim))}
    for file in (saved(hostile), with_pickle(pickle.dumps(hostile["x"], protocol=2))):
        with pytest.raises(CheckpointError, match=r"a file: its pickle names posix.remove, which could run code"):
            read_header(file, "a file")
    assert victim.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}, protocol=4), "its pickle uses FRAME"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "its pickle names builtins.eval"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "its pickle uses NEWOBJ"),
        (b"\x80\x02(cos\nsystem\no.", "its pickle names os.system"),
        (b"\x80\x02ctorch\nFloatStorage\nX\x01\x00\x00\x001\x85R.", "asks for a call that describes no tensor"),
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
    with pytest.raises(CheckpointError, match="w is not contiguous"):
        read_header(saved({"w": torch.ones(2, 3).T}), "a file")
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

"""Which files of a folder or a tar are examples: none is passed over unsaid but those that systems leave."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdjax.training.config import Data
from sdjax.training.data import DataError, open_source

RNG = np.random.default_rng(0)


def _png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


def _tar(path, contents):
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return Data(shards=str(path), size=8)


HIDDEN = ("._a.png", ".ipynb_checkpoints/a.png", "x/.cache/y/a.png", "__MACOSX/a.png")


def test_hidden_files_are_no_examples(tmp_path):
    root = tmp_path / ".runs" / "set"  # where the set itself lies is no matter
    for name in ("a.png", "x/b.png", *HIDDEN):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_png())
    assert [name for name, *_ in open_source(Data(folder=str(root), size=8)).files()][::2] == ["a.png", "x/b.png"]
    packed = _tar(tmp_path / "a.tar", dict.fromkeys(("./a.png", "x/b.png", *HIDDEN), _png()))
    assert [key for _, key, _ in open_source(packed).files()] == ["./a", "x/b"]


def test_a_tars_caption_may_be_in_its_json(tmp_path):
    told = {"width": 8, "Caption": " a cat ", "prompt": "no"}
    names = {"a.png": _png(), "a.json": json.dumps(told).encode(), "b.png": _png(), "b.txt": b"b", "b.json": b"{}"}
    source = open_source(_tar(tmp_path / "a.tar", names), captions=True)
    assert [source.caption(i, RNG) for i in range(len(source))] == ["a cat", "b"]


def test_a_tars_image_without_a_caption_is_named_where_captions_are(tmp_path):
    data = _tar(tmp_path / "a.tar", {"a.png": _png(), "a.txt": b"a", "b.png": _png()})
    assert len(open_source(data)) == 2
    with pytest.raises(DataError, match=r"a\.tar has no b\.txt, the caption of b's image"):
        open_source(data, captions=True)


@pytest.mark.parametrize("told", ['{"a": 1}', '{"text": 3}', "[]", "{", '{"text": "half \\ud83d"}'])
def test_a_json_without_a_caption_is_named(tmp_path, told):
    source = open_source(_tar(tmp_path / "a.tar", {"a.png": _png(), "a.json": told.encode()}), captions=True)
    with pytest.raises(DataError, match=r"a\.json of .*a\.tar needs one of text, caption, prompt, as a string"):
        source.caption(0, RNG)

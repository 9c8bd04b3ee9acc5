"""Which files of a folder or a tar are examples: none is passed over unsaid but those that systems leave."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sdjax.training.config import Data
from sdjax.training.data import open_source
from sdjax.training.loader import Loader
from sdjax.training.samples import DataError

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


@pytest.mark.parametrize(
    "told", ['{"a": 1}', '{"text": 3}', "[]", "{", "null", "5", "true", '["text"]', '{"text": "half \\ud83d"}']
)
def test_a_json_without_a_caption_is_named(tmp_path, told):
    source = open_source(_tar(tmp_path / "a.tar", {"a.png": _png(), "a.json": told.encode()}), captions=True)
    with pytest.raises(DataError, match=r"a\.json of .*a\.tar needs one of text, caption, prompt, as a string"):
        source.caption(0, RNG)


def test_pictures_without_a_caption_have_the_one_that_is_given(tmp_path):
    names = {"a.png": _png(), "a.txt": b"own", "b.png": _png(), "c.png": _png(), "c.json": b'{"width": 8}'}
    (tmp_path / "set").mkdir()
    for name in ("a.png", "a.txt", "b.png", "c.png"):
        (tmp_path / "set" / name).write_bytes(names[name])
    folder, packed = Data(folder=str(tmp_path / "set"), size=8), _tar(tmp_path / "a.tar", names)
    given = "a photo of sks dog"
    for data in (folder, packed):
        source = open_source(dataclasses.replace(data, caption=given), captions=True)
        assert [source.caption(i, RNG) for i in range(len(source))] == ["own", given, given]
    rows = '{"file_name": "a.png", "text": "own"}\n{"file_name": "b.png"}\n{"file_name": "c.png", "text": null}'
    (tmp_path / "set" / "metadata.jsonl").write_text(rows)
    source = open_source(dataclasses.replace(folder, caption=given), captions=True)
    assert [source.caption(i, RNG) for i in range(len(source))] == ["own", given, given]


def test_pictures_and_what_they_are_made_from_are_flipped_together(tmp_path):
    """And so is the corner where each was cut, of which Stable Diffusion XL is told."""
    rng, rows, sides = np.random.default_rng(0), [], []
    for i in range(6):
        pixels = rng.integers(0, 256, (16, 20 + 2 * i, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        Image.fromarray(255 - pixels).save(tmp_path / f"{i}.from.png")
        rows.append({"file_name": f"{i}.png", "text": str(i), "conditioning_image_file_name": f"{i}.from.png"})
        sides += [pixels, pixels[:, ::-1]]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(Data(folder=str(tmp_path), size=16), captions=True, conditioned=True)
    plain, flipping = (
        Loader(source, 6, 3, images=True, captions=True, caption_dropout=0.5, workers=1, conditioning=True, flip=flip)
        for flip in (False, True)
    )
    flips = []
    for step in range(40):
        before, batch = plain.batch(step), flipping.batch(step)
        assert (before.captions, before.is_unseen.tolist()) == (batch.captions, batch.is_unseen.tolist())
        for was, now, origin, frame in zip(before.pixels, batch.pixels, batch.conditioning, batch.frames, strict=True):
            flips.append(not np.array_equal(was, now))
            np.testing.assert_array_equal(now, was[:, ::-1] if flips[-1] else was)
            np.testing.assert_array_equal(origin, 255 - now)
            height, width, top, left = frame
            [whole] = [side for side in sides if np.array_equal(side[top : top + 16, left : left + 16], now)]
            assert whole.shape == (height, width, 3)
    assert 0.4 < np.mean(flips) < 0.6
    np.testing.assert_array_equal(flipping.batch(7).pixels, flipping.batch(7).pixels)

"""Data sources read what other tools write."""

import io
import json
import os
import re
import tarfile

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines import image_sets
from sdjax.training import scenes
from sdjax.training.config import Data
from sdjax.training.data import Scenes, open_source
from sdjax.training.samples import DataError
from sdjax.training.stored import Folder

RNG = np.random.default_rng(0)
PICTURES = {f"{number:03d}": scenes.draw(scenes.scene(number), 24) for number in range(5)}


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _folder(root):
    fs, path = fsspec.core.url_to_fs(root)
    for key, pixels in PICTURES.items():
        fs.pipe_file(f"{path}/{key}.png", _png(pixels))
        fs.pipe_file(f"{path}/{key}.txt", f" picture {key}\n".encode())
    return root


def _read(source):
    return {source.caption(i, RNG): source.image(i) for i in range(len(source))}


def _same(found, names=lambda key: f"picture {key}"):
    assert set(found) == {names(key) for key in PICTURES}
    for key, pixels in PICTURES.items():
        np.testing.assert_array_equal(found[names(key)], pixels)


@pytest.mark.parametrize("url", ["file", "memory"])
def test_a_folder_with_captions_beside_its_images(url, tmp_path):
    root = _folder(str(tmp_path) if url == "file" else "memory://captions")
    _same(_read(open_source(Data(folder=root, size=24))))


def test_folders_and_files_of_a_folder_may_be_links(tmp_path):
    for name in ("stored", "set"):
        (tmp_path / name).mkdir()
    _folder(str(tmp_path / "stored"))
    (tmp_path / "set" / "all").symlink_to(tmp_path / "stored")
    _same(_read(open_source(Data(folder=str(tmp_path / "set"), size=24))))
    [piece] = image_sets.cut(str(tmp_path / "set"))
    assert {picture.key for _, (picture, _) in image_sets.read(piece)} == {f"all/{key}.png" for key in PICTURES}
    before = {name: version for name, *_, version in Folder(str(tmp_path / "set"), 24).files()}
    os.utime(tmp_path / "stored" / "000.png", (5, 5))
    after = {name: version for name, *_, version in Folder(str(tmp_path / "set"), 24).files()}
    assert {name for name in before if before[name] != after[name]} == {"all/000.png"}


def test_a_folder_with_metadata(tmp_path):
    _folder(str(tmp_path))
    rows = [{"file_name": f"{key}.png", "text": f"row {key}"} for key in PICTURES]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    _same(_read(open_source(Data(folder=str(tmp_path), size=24))), lambda key: f"row {key}")


def test_a_line_of_metadata_ends_at_its_newline_alone(tmp_path):
    _folder(str(tmp_path))
    captions = {key: f"row {key} \u2028 and \u0085on" for key in PICTURES}
    rows = [{"Text": f" {caption} ", "file_name": f"{key}.png"} for key, caption in captions.items()]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    _same(_read(open_source(Data(folder=str(tmp_path), size=24))), captions.get)
    [piece] = image_sets.cut(f"{tmp_path}/metadata.jsonl")
    assert {picture.caption for _, (picture, _) in image_sets.read(piece)} == set(captions.values())


@pytest.mark.parametrize(
    "line",
    [
        b'{"file_name": "000.png"}',
        b'{"file_name": "000.png", "": "a"}',
        b'{"file_name": "000.png", "text": null, "caption": "a"}',
        b'{"file_name": "000.png", "text": 3}',
        b'{"file_name": "000.png", "text": "half \\ud83d"}',
        b'{"file_name": 3, "text": "a"}',
        b'{"text": "a"}',
        b'["file_name", "text"]',
        b'"file_name text"',
        b"null",
        b"{",
        pytest.param(b"[" * 10**5, id="deep"),
    ],
)
def test_a_line_of_metadata_that_is_no_captioned_file_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "000.png", "text": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"metadata\.jsonl line 3 needs file_name and one of .*, as strings"):
        open_source(Data(folder=str(tmp_path)), captions=True)


def test_metadata_without_captions_is_taken_where_none_are_trained_on(tmp_path):
    _folder(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png"}\n{"file_name": "001.png", "text": null}')
    assert len(open_source(Data(folder=str(tmp_path), size=24))) == 2
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1 needs file_name and one of .*, as strings"):
        open_source(Data(folder=str(tmp_path), size=24), captions=True)


@pytest.mark.parametrize(
    "line",
    ['{"file_name": "a.png", "text": "a", "text": "b"}', '{"file_name": "a.png", "text": "a", "x": {"y": 1, "y": 2}}'],
)
def test_of_two_values_under_one_name_none_is_lost(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text(line)
    (tmp_path / "a.png").write_bytes(_png(PICTURES["000"]))
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1: two keys of an object have the same name"):
        open_source(Data(folder=str(tmp_path)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
        tar.add(tmp_path / "metadata.jsonl", "a.json")
    for path, named in (("metadata.jsonl", "two"), ("a.tar", r"a\.json: two")):
        [piece] = image_sets.cut(f"{tmp_path}/{path}")
        [(_, error)] = image_sets.read(piece)
        assert re.match(f"{named} keys of an object have the same name", str(error))


def test_text_that_is_not_utf8_is_named_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf a cat\n")
    for key in ("a", "b"):
        (tmp_path / f"{key}.png").write_bytes(_png(PICTURES["000"]))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for path in sorted(tmp_path.glob("[ab].*")):
            tar.add(path, path.name)
    for data, name in ((Data(folder=str(tmp_path)), r"a\.txt"), (Data(shards=f"{tmp_path}/c.tar"), r"c\.tar")):
        source = open_source(data)
        assert source.caption(1, RNG) == "a cat"
        with pytest.raises(DataError, match=f"{name} is not valid UTF-8"):
            source.caption(0, RNG)
    for path in (tmp_path, tmp_path / "c.tar"):
        [piece] = image_sets.cut(str(path))
        [(_, error), (_, (picture, _))] = image_sets.read(piece)
        assert "a.txt is not valid UTF-8" in str(error) or "caption of a.png is not valid UTF-8" in str(error)
        assert picture.caption == "a cat"
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1 is not valid UTF-8"):
        open_source(Data(folder=str(tmp_path)))


def _shards(folder):
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxcount=2, verbose=0) as writer:
        for key, pixels in PICTURES.items():
            writer.write({"__key__": key, "png": _png(pixels), "txt": f"picture {key}", "json": {"a": 1}})


def test_webdataset_shards(tmp_path):
    _shards(tmp_path)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    _same(_read(open_source(Data(shards=f"{tmp_path}/*.tar", size=24))))
    one = open_source(Data(shards=f"{tmp_path}/0001.tar", size=24))
    assert [one.caption(i, RNG) for i in range(len(one))] == ["picture 002", "picture 003"]


def test_webdataset_shards_of_a_url(tmp_path):
    _shards(tmp_path)
    fs = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        fs.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    _same(_read(open_source(Data(shards="memory://bucket/0*.tar", size=24))))


def test_images_are_cut_to_a_square_and_made_opaque(tmp_path):
    wide = np.zeros((10, 30, 4), np.uint8)
    wide[:, 10:20] = (255, 0, 0, 255)
    Image.fromarray(wide, "RGBA").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    assert (open_source(Data(folder=str(tmp_path), size=10)).image(0) == (255, 0, 0)).all()
    Image.fromarray(np.zeros_like(wide), "RGBA").save(tmp_path / "a.png")
    assert (open_source(Data(folder=str(tmp_path), size=4)).image(0) == 255).all()


def test_a_generator_named_in_the_configuration():
    source = open_source(Data(generator="sdjax.training.data:Scenes", options={"count": 7, "seed": 3}, size=32))
    assert len(source) == 7
    np.testing.assert_array_equal(source.image(2), scenes.draw(scenes.scene(2, 3), 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": "{tmp}/empty"}, "holds no image"),
        ({"shards": "{tmp}/none-*.tar"}, "holds no image"),
        ({"shards": "{tmp}/none.tar"}, "none.tar is not there"),
        ({"shards": "{tmp}/bad.tar"}, "bad.tar is not a tar file"),
        ({"generator": "sdjax.training.data:None_"}, "cannot be imported"),
        ({"generator": "nothing"}, "cannot be imported"),
        ({"generator": "sdjax.training.data:Scenes"}, "options do not fit"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match=message):
        open_source(Data(**{key: value.format(tmp=tmp_path) for key, value in options.items()}))


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    source = open_source(Data(folder=str(tmp_path), size=8))
    with pytest.raises(DataError, match=r"a\.png is no picture"):
        source.image(0)
    with pytest.raises(DataError, match=r"a\.txt is not there"):
        source.caption(0, RNG)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(DataError, match=r"metadata\.jsonl line 1 needs file_name and one of"):
        open_source(Data(folder=str(tmp_path), size=8), captions=True)


def test_a_tars_image_that_cannot_be_read_is_named_by_its_place(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.txt", "a.png"):
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "a.tar") as tar:
        place = tar.getmember("a.png").offset_data
    with pytest.raises(DataError, match=rf"the image at byte {place} of .*a\.tar is no picture"):
        open_source(Data(shards=f"{tmp_path}/a.tar", size=8)).image(0)


def test_a_window_is_no_larger_than_its_picture():
    assert Scenes(16, 3, closeup=16).image(0).shape == (16, 16, 3)
    with pytest.raises(DataError, match=r"closeup is 15; it must be at least data\.size, 16"):
        Scenes(16, 3, closeup=15)


class Endless:
    def __init__(self, size):
        pass


def test_a_generator_without_examples_is_refused():
    with pytest.raises(DataError, match=r"data\.generator sdjax\.training\.data:Scenes has no examples"):
        open_source(Data(generator="sdjax.training.data:Scenes", options={"count": 0}))
    with pytest.raises(DataError, match=r"data\.options do not fit .*:Endless: .* has no len"):
        open_source(Data(generator="tests.training.test_data:Endless"))


def test_a_caption_that_is_not_there_is_named_before_any_is_read_where_captions_are(tmp_path):
    _folder(str(tmp_path))
    data = Data(folder=str(tmp_path), size=24)
    assert len(open_source(data, captions=True)) == len(PICTURES)
    (tmp_path / "003.txt").unlink()
    with pytest.raises(DataError, match=r"003\.txt is not there; .* needs it as an image or a caption"):
        open_source(data, captions=True)
    assert len(open_source(data)) == len(PICTURES)


def test_a_picture_of_metadata_that_is_not_there_is_named_before_any_is_read(tmp_path):
    for name in ("elsewhere", "set"):
        (tmp_path / name).mkdir()
    _folder(str(tmp_path / "elsewhere"))
    row = '{{"file_name": "../elsewhere/{}.png", "text": "a"}}\n'
    (tmp_path / "set" / "metadata.jsonl").write_text(row.format("000"))
    assert len(open_source(Data(folder=str(tmp_path / "set"), size=24))) == 1
    (tmp_path / "set" / "metadata.jsonl").write_text(row.format("000") + row.format("999"))
    with pytest.raises(DataError, match=r"999\.png is not there; .* needs it as an image or a caption"):
        open_source(Data(folder=str(tmp_path / "set"), size=24))


ORIGINS = {key: 255 - pixels for key, pixels in PICTURES.items()}


def _same_pairs(source):
    for i in range(len(source)):
        key = source.caption(i, RNG).removeprefix("picture ")
        np.testing.assert_array_equal(source.image(i), PICTURES[key])
        np.testing.assert_array_equal(source.conditioning(i), ORIGINS[key])


@pytest.mark.parametrize("column", ["conditioning_image", "control_image", "input_image"])
def test_a_folder_says_what_each_image_is_made_from(tmp_path, column):
    _folder(str(tmp_path))
    rows = [
        {"file_name": f"{key}.png", "text": f"picture {key}", f"{column}_file_name": f"{key}.in"} for key in PICTURES
    ]
    for key, pixels in ORIGINS.items():
        (tmp_path / f"{key}.in").write_bytes(_png(pixels))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data(folder=str(tmp_path), size=24)
    _same_pairs(open_source(data, conditioned=True))
    whole, plain = ({name for name, *_ in open_source(data, conditioned=c).files()} for c in (True, False))
    assert whole - plain == {f"{key}.in" for key in PICTURES}
    (tmp_path / "003.in").unlink()
    with pytest.raises(DataError, match=r"003\.in is not there"):
        open_source(data, conditioned=True)
    del rows[2][f"{column}_file_name"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    needed = r"metadata\.jsonl line 3 needs file_name, conditioning_image_file_name and one of .*, as strings"
    with pytest.raises(DataError, match=needed):
        open_source(data, conditioned=True)
    _same(_read(open_source(data)))


def test_a_tar_holds_what_each_image_is_made_from(tmp_path):
    def write(name, lacks=()):
        with webdataset.TarWriter(str(tmp_path / name)) as writer:
            for key, pixels in PICTURES.items():
                origin = {} if key in lacks else {"conditioning_image.png": _png(ORIGINS[key])}
                writer.write({"__key__": key, "png": _png(pixels), "txt": f"picture {key}", **origin})

    write("whole.tar")
    write("lacking.tar", lacks=["003"])
    data = Data(shards=f"{tmp_path}/whole.tar", size=24)
    _same_pairs(open_source(data, conditioned=True))
    places, plain = (list(open_source(data, conditioned=c).files()) for c in (True, False))
    assert [len(row[-1]) for row in places] == [len(row[-1]) + 2 for row in plain]
    with pytest.raises(DataError, match=r"lacking\.tar has no 003\.conditioning_image\.png"):
        open_source(Data(shards=f"{tmp_path}/lacking.tar", size=24), conditioned=True)
    assert len(open_source(Data(shards=f"{tmp_path}/lacking.tar", size=24))) == len(PICTURES)


class Plain(Endless):
    def __len__(self):
        return 1


def test_a_generator_without_such_pictures_is_refused():
    with pytest.raises(DataError, match=r"test_data:Plain has no conditioning\(index\)"):
        open_source(Data(generator="tests.training.test_data:Plain"), conditioned=True)
    source = open_source(Data(generator="sdjax.training.data:Scenes", options={"count": 3}, size=32), conditioned=True)
    np.testing.assert_array_equal(source.conditioning(2), scenes.outlines(scenes.scene(2), 32))

"""Image sets are read whatever they hold: what is damaged or gone costs itself only."""

import io
import tarfile

import aiohttp
import fsspec
import gcsfs.retry
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import image_sets, tables
from sdjax import retrying
from sdjax.training.samples import members
from tests.pipelines.image_set import PICTURES, png, write_set
from tests.training.test_samples import tar_of


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("400:\nthe name is too long")])
def test_a_file_that_cannot_be_read_costs_its_row_only(monkeypatch, error):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for key in ("a", "b", "c::d", "e"):
        memory.pipe({f"/set/{key}.png": png(PICTURES["000"]), f"/set/{key}.txt": b"a cat"})
    opened = type(memory).open

    def open_(self, path, *args, **options):
        if path == "/set/b.png":
            raise error
        return opened(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "open", open_)
    [piece] = image_sets.cut("memory://set")
    (first, _), bad, chain, (last, _) = [found for _, found in image_sets.read(piece)]
    assert (first.key, last.key) == ("a.png", "e.png")
    assert str(bad) == f"memory://set/b.png cannot be read: {str(error).replace(chr(10), ' ')}"
    assert "'c::d.png' is no file below memory://set" in str(chain)


def test_a_store_that_is_away_for_a_while_costs_no_row(monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe({"/set/a.png": png(PICTURES["000"]), "/set/a.txt": b"a cat"})
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    opened, failures = type(memory).open, iter([OSError("reset")] * (retrying.ATTEMPTS - 1))

    def open_(self, path, *args, **options):
        for error in failures:
            raise error
        return opened(self, path, *args, **options)

    [piece] = image_sets.cut("memory://set")
    monkeypatch.setattr(type(memory), "open", open_)
    [(_, (sample, _))] = list(image_sets.read(piece))
    assert sample.key == "a.png"


@pytest.mark.parametrize("extension", ["gif", "bmp", "tif", "TIFF"])
def test_every_kind_of_picture_that_is_decoded_is_found(tmp_path, extension):
    Image.fromarray(PICTURES["000"]).convert("L").save(tmp_path / f"a.{extension}")
    (tmp_path / "a.txt").write_text("a cat")
    [found] = image_sets.find([str(tmp_path)])
    [(_, (picture, _))] = [found for piece in image_sets.cut(found) for found in image_sets.read(piece)]
    assert picture.key == f"a.{extension}"


def test_a_bad_caption_in_parquet_costs_its_row_only(tmp_path):
    images = [png(pixels) for pixels in list(PICTURES.values())[:3]]
    captions = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 1, 3, 4], "int32")), pa.py_buffer(b"a\xff\xfeb")
    )
    path = str(tmp_path / "set.parquet")
    pq.write_table(pa.table({"image": images, "text": captions}), path)
    [piece] = image_sets.cut(path)
    (first, _), bad, (last, _) = [found for _, found in image_sets.read(piece)]
    assert "not valid UTF-8" in str(bad)
    decoded = list(image_sets.load([first, last], lambda picture, data: (picture.caption, data)))
    assert decoded == [("a", images[0]), ("b", images[2])]


def test_a_row_group_is_decoded_up_to_the_last_picture_that_is_wanted(tmp_path, monkeypatch):
    images = [png(PICTURES["000"] + np.uint8(i)) for i in range(40)]
    path = str(tmp_path / "set.parquet")
    pq.write_table(pa.table({"image": images, "text": ["a"] * 40}), path)
    [piece] = image_sets.cut(path)
    found = [picture for _, (picture, _) in image_sets.read(piece)]
    decoded, rows = [], tables.rows
    monkeypatch.setattr(tables, "rows", lambda batch: decoded.append(batch.num_rows) or rows(batch))
    assert list(image_sets.load([found[1], found[17]], lambda picture, data: data)) == [images[1], images[17]]
    assert sum(decoded) == 32


def test_a_tar_that_is_cut_short_gives_what_it_holds(tmp_path):
    fsspec.filesystem("memory").store.clear()
    write_set(tmp_path, "tar")
    data = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = [member for member in tar if member.name.endswith(".png")][2]
        caption = next(member for member in tar if member.name.endswith("001.txt"))

    def read(data):
        fsspec.filesystem("memory").pipe_file("/cut.tar", data)
        return [found for _, found in image_sets.read(image_sets.Piece("memory://cut.tar"))]

    found = read(data[: third.offset_data + 100])
    assert [picture.key for picture, _ in found[:2]] == ["v1.0/000", "v1.0/001"]
    assert "cut short" in str(found[-1])
    damaged = bytearray(data)
    damaged[third.offset : third.offset + 512] = b"\xff" * 512
    assert "damaged" in str(read(bytes(damaged))[-1])
    damaged[caption.offset : caption.offset + 512] = b"\xff" * 512
    [(picture, _), error] = read(bytes(damaged))  # the second's .json has a caption that is not its own
    assert picture.key == "v1.0/000"
    assert "damaged" in str(error)
    assert "cut.tar is damaged or cut short" in str(read(tar_of({"GNU.sparse.map": "x,y"}))[-1])
    assert all(not isinstance(picture, Exception) for picture in read(data))


@pytest.mark.parametrize("error", [aiohttp.ClientPayloadError("cut"), gcsfs.retry.HttpError({"code": 503})])
def test_a_network_that_fails_within_a_tar_is_no_damage(tmp_path, error):
    """The rest of the tar would be lost, and nobody would count it."""

    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 2000:
                raise error
            return super().read(size)

    write_set(tmp_path, "tar")
    with pytest.raises(type(error)):
        list(members(Failing((tmp_path / "0.tar").read_bytes()), "0.tar"))


def test_hidden_files_are_of_no_set(tmp_path):
    (tmp_path / "__MACOSX").mkdir()
    for name in ("a", "._a", "__MACOSX/a"):
        (tmp_path / f"{name}.png").write_bytes(png(PICTURES["000"]))
        (tmp_path / f"{name}.txt").write_text("a")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(tmp_path.rglob("*a.*")):
            tar.add(path, path.relative_to(tmp_path))
    for path in (str(tmp_path), f"{tmp_path}/set.tar"):
        ((_, (picture, _)),) = image_sets.read(*image_sets.cut(path))
        assert picture.key in ("a", "a.png")


def test_what_generate_images_wrote_is_an_image_set(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest").mkdir()
    for name in ("a", "b"):
        (tmp_path / "shards" / f"{name}.tar").touch()
    (tmp_path / "manifest" / "a.parquet").touch()
    assert image_sets.find([str(tmp_path)]) == [f"{tmp_path}/shards/a.tar"]  # b has no manifest

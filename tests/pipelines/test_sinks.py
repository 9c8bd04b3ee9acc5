"""Units on storage: equal bytes for equal units, committed by the manifest alone, safe to write twice."""

import io
import json
import tarfile

import fsspec
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import sinks, verify
from pipelines.layout import image_name, manifest_name, shard_name
from pipelines.sinks import (
    MANIFEST,
    Images,
    Provenance,
    committed,
    make_tar,
)
from pipelines.sources import Place
from pipelines.storage import Store
from pipelines.units import Row, Unit, make_units
from sdjax.request import Request
from tests.pipelines import standin

SPEC = standin.Spec()
MADE_BY = Provenance("stand-in", SPEC.fingerprint, "test")


@pytest.fixture
def unit() -> Unit:
    rows = []
    for i, prompt in enumerate(["a cat", "ein Bär", standin.NAN_PROMPT]):
        request = SPEC.resolve(Request(prompt=prompt, seed=i))
        rows.append(Row(SPEC.id(request), "p", 1, request, json.dumps({"label": i}), Place("f.csv", i + 1)))
    [unit] = make_units(rows, 10)
    return unit


def images_of(unit, image_format="png"):
    sink = Images("tar", image_format)
    return [sink.encode(standin.picture(SPEC, row.request), MADE_BY) for row in unit.rows]


def write(store, unit, images=None, format="tar"):
    return Images(format, "png").write(store, unit, images or images_of(unit), MADE_BY, 3.0)


def test_a_tar_is_a_function_of_its_images(unit):
    data, offsets = make_tar(unit, images_of(unit), "png", SPEC.fingerprint)
    assert make_tar(unit, images_of(unit), "png", SPEC.fingerprint) == (data, offsets)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{row.id}.{x}" for row in unit.rows for x in ("png", "txt", "json")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        facts = json.loads(tar.extractfile(members[2]).read())
    row, image = unit.rows[0], images_of(unit)[0]
    assert data[offsets[0] : offsets[0] + len(image.data)] == image.data
    assert facts["id"] == row.id
    assert facts["sha256"] == image.sha256
    assert facts["extras"] == row.extras
    fields = {name: value for name, value in facts.items() if name in vars(row.request)}
    assert SPEC.resolve(Request.from_row(fields)[0]) == row.request


@pytest.mark.parametrize("format", ["tar", "files"])
def test_the_manifest_tells_all_of_each_image(tmp_path, unit, format):
    store = Store(str(tmp_path))
    assert committed(store, unit) is None
    size = sum(len(image.data) for image in images_of(unit))
    assert write(store, unit, format=format) == size
    flagged = sum(bool(image.flags) for image in images_of(unit))
    assert committed(store, unit) == {"images": 3, "units": 1, "rejected": 0, "bytes": size, "flagged": flagged}
    table = pq.read_table(tmp_path / manifest_name(unit.name))
    assert table.schema.equals(MANIFEST)
    for row, image, written in zip(unit.rows, images_of(unit), table.to_pylist(), strict=True):
        assert Request(**{name: written[name] for name in vars(row.request)}) == row.request
        assert (written["id"], written["sha256"], written["bytes"]) == (row.id, image.sha256, len(image.data))
        assert written["flags"] == (["nan"] if row.request.prompt == standin.NAN_PROMPT else [])
        assert (written["input_file"], written["input_row"]) == row.place
        assert written["extras"] == row.extras
        assert (written["seconds"], written["device"], written["model"]) == (1.0, "test", "stand-in")
        assert "pillow " in written["versions"]
        place = written["shard"] or written["file"]
        assert place == (shard_name(unit.name) if format == "tar" else image_name(row.id, "png"))
        assert store.read(place, written["offset"], written["offset"] + written["bytes"]) == image.data


@pytest.mark.parametrize("url", ["disk", "memory://twice"])
def test_a_unit_written_twice_is_written_once(tmp_path, unit, url):
    store = Store(str(tmp_path) if url == "disk" else url)
    write(store, unit)
    before = {name: store.read(name) for name in (shard_name(unit.name), manifest_name(unit.name))}
    other = [image._replace(data=b"other hardware") for image in images_of(unit)]
    assert write(store, unit, other) == 0
    assert {name: store.read(name) for name in before} == before


def test_a_shard_left_without_a_manifest_is_replaced(unit):
    fsspec.filesystem("memory").store.clear()
    store = Store("memory://left")
    store.write(shard_name(unit.name), b"of a killed run, on other hardware")
    write(store, unit)
    assert store.read(shard_name(unit.name)) == make_tar(unit, images_of(unit), "png", SPEC.fingerprint)[0]


@pytest.mark.parametrize("format", ["tar", "files"])
@pytest.mark.parametrize("moment", ["exists", "read", "write"])
def test_of_two_workers_at_one_unit_the_first_to_commit_is_kept_whole(unit, format, moment, monkeypatch):
    """The other's pixels differ in a last bit; the first commits at some moment while the other replaces its files."""
    fsspec.filesystem("memory").store.clear()
    store = Store("memory://race")
    ours, theirs = images_of(unit), images_of(unit, "webp")
    real, commit = getattr(Store, moment), sinks._write_manifest
    monkeypatch.setattr(sinks, "_write_manifest", lambda *_: True)
    write(store, unit, ours, format)  # its files are there, its manifest not yet
    monkeypatch.setattr(sinks, "_write_manifest", commit)

    def first_commits(self, name, *arguments, **options):
        answer = real(self, name, *arguments, **options)
        if not options.get("create"):
            monkeypatch.setattr(Store, moment, real)
            assert sinks._write_manifest(store, unit.name, rows, MANIFEST)
        return answer

    rows = rows_of(unit, ours, format)
    monkeypatch.setattr(Store, moment, first_commits)
    assert write(store, unit, theirs, format) == 0
    assert committed(store, unit)["images"] == len(unit.rows)
    assert verify.verify("memory://race").faults == []


@pytest.mark.parametrize("format", ["tar", "files"])
@pytest.mark.parametrize("theirs", ["png", "webp"])
def test_what_a_killed_attempt_left_is_not_put_back_over_what_is_committed(unit, format, theirs, monkeypatch):
    """The first to commit does all of it after the other has replaced what was left; its bytes are equal, or others."""
    fsspec.filesystem("memory").store.clear()
    store = Store("memory://left")
    for name in [shard_name(unit.name)] if format == "tar" else [image_name(row.id, "png") for row in unit.rows]:
        store.write(name, b"of an attempt that was killed")
    commit = sinks._write_manifest

    def first_commits(*arguments):
        monkeypatch.setattr(sinks, "_write_manifest", commit)
        assert Images(format, "png").write(store, unit, images_of(unit, theirs), MADE_BY, 4.0)
        return commit(*arguments)

    monkeypatch.setattr(sinks, "_write_manifest", first_commits)
    assert write(store, unit, format=format) == 0
    assert verify.verify("memory://left").faults == []


def rows_of(unit, images, format):
    """The manifest that a worker writes for these images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "_write_manifest", lambda store, unit, rows, schema: written.extend(rows) or True)
        written: list = []
        write(Store("memory://elsewhere"), unit, images, format)
    return written


def test_the_manifest_is_written_last(tmp_path, unit, monkeypatch):
    store = Store(str(tmp_path))
    written = []
    real = Store.write

    def spy(self, name, data, **options):
        written.append(name)
        if name.startswith("shards/"):
            raise PermissionError("read-only")
        real(self, name, data, **options)

    monkeypatch.setattr(Store, "write", spy)
    with pytest.raises(PermissionError):
        write(store, unit)
    assert written == [shard_name(unit.name)]
    assert committed(store, unit) is None


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_every_image_format_is_what_it_says_and_the_same_each_time(unit, image_format):
    image = images_of(unit, image_format)[0]
    assert images_of(unit, image_format)[0] == image
    with Image.open(io.BytesIO(image.data)) as read:
        assert (read.format, read.size) == ({"jpg": "JPEG"}.get(image_format, image_format.upper()), (16, 16))

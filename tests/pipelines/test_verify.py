"""verify finds whatever is done to a dataset."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from pipelines import latents, verify
from pipelines.layout import manifest_name, shard_name
from pipelines.sinks import MANIFEST
from pipelines.storage import Store
from pipelines.units import unit_name
from tests.pipelines import standin


@pytest.fixture(scope="module", params=["tar", "files"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    (folder / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(20)) + "\n")
    arguments = ("--prompts", folder / "p.txt", "--output", folder / "out", "--unit-size", 8)
    assert standin.run(*arguments, "--format", request.param) == 0
    return folder / "out"


@pytest.fixture
def dataset(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def test_of_each_image_little_more_than_its_id_is_held(tmp_path, monkeypatch):
    store, count = Store(str(tmp_path)), 500
    for i in range(count):
        store.write(manifest_name(f"{i:032x}"), b"")

    def rows(store, name):
        first = int(name.removeprefix("manifest/").removesuffix(".parquet"), 16)
        ids = [f"{first * 200 + i:032x}" for i in range(200)]
        return [{"id": id, "bytes": 1, "flags": []} for id in (ids if first else [*ids[1:], ids[2]])], []

    monkeypatch.setattr(verify, "_unit", rows)
    tracemalloc.start()
    try:
        found = verify.verify(str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.faults == [f"image {2:032x} is in 2 manifests"]
    assert peak < 75 * found.images


def data_files(dataset):
    return sorted(p for folder in ("shards", "images") for p in (dataset / folder).rglob("*") if p.is_file())


def first_manifest(dataset):
    return min((dataset / "manifest").iterdir())


def test_a_dataset_is_proven(made, capsys):
    found = verify.verify(str(made))
    assert (found.images, found.units, found.rejected, found.orphans, found.faults) == (20, 3, 1, [], [])
    assert found.bytes > 0
    assert verify.main([str(made)]) == 0
    assert "20 images in 3 units" in capsys.readouterr().out


@pytest.mark.parametrize("buffered", [True, False])
def test_its_report_ends_in_silence_where_nobody_reads_on(made, buffered):
    """As under `head`; the exit status is what was found all the same."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "pipelines.verify", str(made)]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def break_bytes(dataset):
    path = data_files(dataset)[0]
    data = bytearray(path.read_bytes())
    data[min(600, len(data) // 2)] ^= 1
    path.write_bytes(data)


def cut_short(dataset):
    path = data_files(dataset)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_data(dataset):
    data_files(dataset)[0].unlink()


def cut_manifest(dataset):
    path = first_manifest(dataset)
    path.write_bytes(path.read_bytes()[:-20])


def lose_row(dataset):
    path = first_manifest(dataset)
    pq.write_table(pq.read_table(path).slice(1), path)


def change_prompt_hash(dataset):
    path = first_manifest(dataset)
    rows = pq.read_table(path).to_pylist()
    rows[0]["sha256"] = "0" * 64
    pq.write_table(type(pq.read_table(path)).from_pylist(rows, MANIFEST), path)


def change_id(dataset):
    path = first_manifest(dataset)
    rows = pq.read_table(path).to_pylist()
    rows[0]["id"] = "0" * 32
    pq.write_table(pa.Table.from_pylist(rows, MANIFEST), path)


def double_manifest(dataset):
    path = first_manifest(dataset)
    shutil.copy(path, path.with_name("0" * 32 + ".parquet"))


def drop_column(dataset):
    path = first_manifest(dataset)
    pq.write_table(pq.read_table(path).drop_columns("offset"), path)


def change_type(dataset):
    path = first_manifest(dataset)
    table = pq.read_table(path)
    place = table.column_names.index("bytes")
    pq.write_table(table.set_column(place, "bytes", table["bytes"].cast("string")), path)


def lose_unit(dataset):
    first_manifest(dataset).unlink()


def lose_rejects(dataset):
    shutil.rmtree(dataset / "rejected")


@pytest.mark.parametrize(
    "damage",
    [
        break_bytes,
        cut_short,
        lose_data,
        cut_manifest,
        lose_row,
        change_prompt_hash,
        change_id,
        double_manifest,
        drop_column,
        change_type,
        lose_unit,
        lose_rejects,
    ],
)
def test_damage_is_found(dataset, damage, capsys):
    damage(dataset)
    assert verify.verify(str(dataset)).faults != []
    assert verify.main([str(dataset)]) == 1
    assert "fault: " in capsys.readouterr().out


def test_what_is_missing_says_what_mends_it(dataset):
    data_files(dataset)[0].unlink()
    (fault,) = verify.verify(str(dataset)).faults
    assert fault.startswith("manifest/")
    assert fault.endswith(" is missing; delete this manifest and run the command again")


def set_first(name, value):
    """Another value in the first manifest's first row."""

    def damage(dataset):
        table = pq.read_table(first_manifest(dataset))
        first, *others = table.to_pylist()
        pq.write_table(pa.Table.from_pylist([{**first, name: value}, *others], table.schema), first_manifest(dataset))

    return damage


@pytest.mark.parametrize("name", ["id", "bytes", "sha256", "flags", "prompt", "file", "offset"])
def test_a_row_that_lacks_a_value_is_found(dataset, name):
    set_first(name, None)(dataset)
    assert f"manifest/{first_manifest(dataset).name}: a row lacks a value" in verify.verify(str(dataset)).faults


@pytest.mark.parametrize("place", ["../beside.txt", "shards/../../beside.txt", "/etc/passwd", "a\0b", "x" * 5000])
def test_a_manifest_names_nothing_outside_the_dataset(dataset, place):
    (dataset.parent / "beside.txt").write_text("somebody's own")
    set_first("shard", place)(dataset)
    assert any(f"{place} is no name that jobs give" in fault for fault in verify.verify(str(dataset)).faults)


@pytest.mark.parametrize("summary", [{"finished": True}, {"finished": True, "images": "2"}])
def test_a_summary_without_counts_is_found(dataset, summary):
    (dataset / "summary.json").write_text(json.dumps(summary))
    assert verify.verify(str(dataset)).faults == ["summary.json lacks the counts of a finished job"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A shard of latents as encode_latents writes it; no network has seen a picture for it."""
    store = Store(str(tmp_path_factory.mktemp("verify") / "latents"))
    draw = np.random.default_rng(0).standard_normal
    shared = {"unconditional": draw((3, 2)).astype(np.float16)}
    shapes = {"moments": (2, 2, 4), "text": (3, 2)}
    own = [{name: draw(shape).astype(np.float16) for name, shape in shapes.items()} for _ in range(2)]
    arrays = [latents.Arrays(example, shared) for example in own]
    made_of = {"model_fingerprint": "f" * 64, "dtype": "float32", "size": 16, "caption": "a cat"}
    hashes = [f"{i:064x}" for i in range(2)]
    ids = [latents.id_of(**made_of, image_sha256=image) for image in hashes]
    shard = shard_name(unit_name(ids), latents.SUFFIX)
    tensors = {name: np.stack([example[name] for example in own]) for name in shapes}
    store.write(shard, save(tensors | shared))
    rows = [
        {
            **made_of,
            "id": id,
            "image_sha256": image,
            "shard": shard,
            "index": i,
            "bytes": one.bytes,
            "sha256": one.sha256,
            "flags": [],
        }
        for i, (id, image, one) in enumerate(zip(ids, hashes, arrays, strict=True))
    ]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, latents.MANIFEST), buffer, compression="zstd")
    store.write(manifest_name(unit_name(ids)), buffer.getvalue().to_pybytes())
    found = verify.verify(store.url)
    assert (found.images, found.faults) == (2, [])
    return store


@pytest.mark.parametrize("lost", ["moments", "text", "unconditional"])
def test_a_shard_of_latents_without_one_of_its_tensors_is_found(encoded, lost):
    shard = encoded.find("shards")[0]
    whole = encoded.read(shard)
    encoded.write(shard, save({name: tensor for name, tensor in load(whole).items() if name != lost}))
    try:
        (fault,) = verify.verify(encoded.url).faults
    finally:
        encoded.write(shard, whole)
    assert f"{shard} is no whole shard of latents" in fault


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [
        ("images", "seed", 1),
        ("images", "guidance_scale", float("nan")),
        ("images", "model_fingerprint", "e" * 64),
        ("latents", "id", "0" * 32),
        ("latents", "caption", "a dog"),
        ("latents", "image_sha256", "e" * 64),
    ],
)
def test_a_row_whose_id_is_of_another_is_found(dataset, encoded, tmp_path, of, name, value):
    if of == "latents":
        dataset = shutil.copytree(encoded.path(), tmp_path / "latents")
    set_first(name, value)(dataset)
    (fault,) = verify.verify(str(dataset)).faults
    assert fault.endswith(" is not the id of what its row says")


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_flipped_bit_stops_it(made, encoded, data):
    store = Store(data.draw(st.sampled_from([str(made), encoded.url])))
    name = data.draw(st.sampled_from([*store.find("manifest"), *store.find("shards"), *store.find("images")]))
    whole = store.read(name)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    store.write(name, bytes(broken))
    try:
        verify.verify(store.url)
    finally:
        store.write(name, whole)


@pytest.mark.parametrize("is_later", [True, False])
def test_a_dataset_of_another_version_is_proven_too(dataset, is_later):
    for path in (dataset / "manifest").iterdir():
        table = pq.read_table(path).drop_columns(["token_merging_ratio", "seed"])
        if is_later:  # its ids are hashes of that field too
            table = table.append_column("a_later_field", [["x"] * len(table)])
            table = table.set_column(table.column_names.index("eta"), "eta", [[0.5] * len(table)])
        pq.write_table(table, path)
    found = verify.verify(str(dataset))
    assert (found.images, found.faults) == (20, [])
    break_bytes(dataset)
    assert verify.verify(str(dataset)).faults != []


def test_leftovers_are_reported_and_are_no_fault(dataset, capsys):
    shard, half = f"shards/{'1' * 32}.tar", f"manifest/.{'1' * 32}.parquet.77"
    for name in (shard, half, "shards/own.tar", "rejected/own.jsonl"):
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_bytes(b"of a killed run, or the user's own")
    found = verify.verify(str(dataset))
    assert found.orphans == [half, shard]
    assert found.faults == []
    assert verify.main([str(dataset)]) == 0
    assert f"leftover: {shard}" in capsys.readouterr().out


def test_what_is_no_dataset_is_refused(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert "holds no dataset" in capsys.readouterr().err

"""verify finds whatever is done to a dataset."""

import shutil

import pyarrow.parquet as pq
import pytest

from pipelines import verify
from pipelines.sinks import MANIFEST
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


def test_a_dataset_of_another_version_is_proven_too(dataset):
    for path in (dataset / "manifest").iterdir():
        table = pq.read_table(path).drop_columns(["token_merging_ratio", "seed"])
        pq.write_table(table.append_column("a_later_field", [["x"] * len(table)]), path)
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

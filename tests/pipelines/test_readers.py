"""Datasets that a job has made, opened by the programs that they are for."""

import json
import tarfile

import duckdb
import numpy as np
import pandas as pd

from tests.pipelines import standin
from tests.pipelines.outputs import assert_same, direct, table


def test_readers_open_the_dataset(made, tmp_path, monkeypatch):
    import datasets
    import webdataset

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    expected = direct(table())
    shards = sorted(map(str, (made / "shards").iterdir()))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert_same({s["__key__"]: s["png"] for s in samples}, expected)
    assert all(s["txt"] == s["json"]["prompt"] for s in samples)

    loaded = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path / "hf"))
    assert_same({s["__key__"]: np.asarray(s["png"]) for s in loaded}, expected)
    assert {s["json"]["id"] for s in loaded} == expected.keys()

    manifest = datasets.load_dataset(
        "parquet", data_files=str(made / "manifest" / "*.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert set(manifest["id"]) == expected.keys()

    frame = pd.read_parquet(made / "manifest")
    assert set(frame["id"]) == expected.keys()
    counted = duckdb.sql(
        f"""select extras->>'Label' as label, count(*) as n from '{made}/manifest/*.parquet' group by label"""
    ).fetchall()
    assert dict(counted) == frame["extras"].map(lambda e: json.loads(e)["Label"]).value_counts().to_dict()

    for shard in shards:
        with tarfile.open(shard) as tar:
            assert len(tar.getnames()) % 3 == 0


def test_an_image_folder_opens(prompts, tmp_path):
    import datasets

    assert standin.run("--prompts", prompts, "--output", tmp_path / "out", "--format", "files") == 0
    loaded = datasets.load_dataset(
        "imagefolder",
        data_dir=str(tmp_path / "out" / "images"),
        split="train",
        drop_labels=True,
        cache_dir=str(tmp_path / "hf"),
    )
    assert len(loaded) == len(direct(table()))

"""Rows for the jobs' tests, the pictures that they ask for, and what a job has left."""

import csv
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.storage import Store
from sdjax.request import Request
from tests.pipelines import standin

SPEC = standin.Spec()
ROWS = 150


def table(n=ROWS):
    """Rows of two sizes and several lengths, with a class label and every tenth prompt again."""
    return [
        {
            "Prompt": f"prompt {i - i % 10 // 9}",
            "seed": "" if i % 10 == 9 or i % 10 == 8 else str(i),
            "num_inference_steps": str(1 + i % 5) if i % 10 < 8 else "",
            "width": "24" if i % 3 == 0 and i % 10 < 8 else "",
            "Label": f"class {i % 7}",
        }
        for i in range(n)
    ]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def direct(rows, **defaults) -> dict[str, np.ndarray]:
    """The pictures that the rows ask for, by id, made without the job."""
    requests = [SPEC.resolve(Request.from_row(row, **defaults)[0]) for row in rows]
    return {SPEC.id(request): standin.picture(SPEC, request).pixels for request in requests}


def images(output) -> dict[str, np.ndarray]:
    """A dataset's pictures by id, by way of its manifests."""
    store = Store(str(output))
    found = {}
    for name in store.find("manifest"):
        for row in pq.read_table(pa.BufferReader(store.read(name))).to_pylist():
            assert row["id"] not in found
            data = store.read(row["shard"] or row["file"], row["offset"], row["offset"] + row["bytes"])
            found[row["id"]] = np.asarray(Image.open(io.BytesIO(data)))
    return found


def files(output) -> dict[str, str]:
    """Names and hashes of what readers take for data."""
    store = Store(str(output))
    names = store.find("shards") + store.find("images")
    return {name: hashlib.sha256(store.read(name)).hexdigest() for name in names}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for id, pixels in expected.items():
        np.testing.assert_array_equal(found[id], pixels)


def summary(output) -> dict:
    return Store(str(output)).read_json("summary.json")


def account(output) -> tuple[int, ...]:
    return tuple(summary(output)[name] for name in ("rows", "images", "rejected", "duplicates", "already_done"))


def no_load(model, **options):
    raise AssertionError("the model was loaded")

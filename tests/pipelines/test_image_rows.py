"""Rows with pictures in a job: planned beside rows of text, and rejected alone where a picture is unusable."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipelines import generate_images, verify
from pipelines.sources import Place
from pipelines.storage import READERS
from pipelines.units import PlanRequest, PlanRows
from sdjax import inputs
from sdjax.spec import Spec
from tests.pipelines import standin
from tests.test_inputs import bomb

PHOTO = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def test_a_bad_picture_rejects_its_row_alone(tiny, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    Image.fromarray(PHOTO).save(tmp_path / "same.png")
    Image.new("L", (3, 3), 255).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "photo.png").read_bytes()[:200])
    (tmp_path / "bomb.png").write_bytes(bomb(50_000, 50_000))
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    rows = [
        ("text", "", ""),
        ("image", "photo.png", ""),
        ("image", "same.png", ""),  # a duplicate: what a picture shows counts, not its name
        ("masked", "photo.png", "mask.png"),
        ("missing", "nowhere.png", ""),
        ("broken", "broken.png", ""),
        ("huge", "bomb.png", ""),
        ("small", "tiny.png", ""),
        ("no mask", "photo.png", "nowhere.png"),
        ("alone", "", "mask.png"),
    ]
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "image", "mask_image"])
        writer.writerows([prompt, *(str(tmp_path / name) if name else "" for name in names)] for prompt, *names in rows)
    output = tmp_path / "out"
    arguments = ["--prompts", str(tmp_path / "prompts.csv"), "--output", str(output), "--model", str(tiny)]

    def spec(model, **options):
        return Spec(model, **options)

    assert generate_images.main(arguments, spec=spec, load=standin.load) == 0
    assert verify.main([str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert [summary[name] for name in ("rows", "images", "rejected", "duplicates")] == [10, 3, 6, 1]
    lines = [json.loads(line) for file in (output / "rejected").iterdir() for line in file.read_text().splitlines()]
    reasons = {line["values"]["prompt"]: line["reason"] for line in lines}
    for prompt, reason in [
        ("missing", "nowhere.png is not there"),
        ("broken", "is broken"),
        ("huge", "exceeds limit"),
        ("small", "image has 4x4 pixels; a side needs 8"),
        ("no mask", "mask_image"),
        ("alone", "mask_image is given without image"),
    ]:
        assert reason in reasons[prompt]
    made = {row["prompt"]: row for file in (output / "manifest").iterdir() for row in pq.read_table(file).to_pylist()}
    assert made.keys() == {"text", "image", "masked"}
    assert (made["image"]["width"], made["image"]["height"]) == (40, 24)
    assert made["image"]["image_sha256"] == made["masked"]["image_sha256"] is not None
    assert made["text"]["image"] is None


def test_a_picture_of_all_rows_is_not_read_for_each(tiny, tmp_path, monkeypatch):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    read, whole = [], inputs._whole
    monkeypatch.setattr(inputs, "_whole", lambda url: read.append(url) or whole(url))
    plan = PlanRequest(Spec(str(tiny)), {"image": str(tmp_path / "photo.png")}, None)
    rows = [(Place("f", i), {"prompt": f"a cat {i}"}) for i in range(500)]
    stage = PlanRows(lambda piece: rows, plan, 1, str(tmp_path / "out"), plan.fetches)
    stage.setup()
    assert list(stage.process("piece"))[-1].value["rows"] == 500
    assert len(read) <= READERS  # that ask before the first has it

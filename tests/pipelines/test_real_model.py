"""The job with a real, small model on eight devices: the pixels are those of the library."""

import csv
import functools
import io
import tarfile

import apache_beam as beam
import jax
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.testing.util import assert_that
from PIL import Image

from pipelines import generate_images, verify
from pipelines.handler import SdjaxModelHandler
from pipelines.options import IN_PROCESS
from pipelines.storage import Store
from sdjax.generate import StableDiffusion
from sdjax.request import Request


@functools.cache
def pipe_of(folder: str) -> StableDiffusion:
    """One model for the job and for what it is compared with, so that its programs are compiled once."""
    return StableDiffusion.from_pretrained(folder)


def load_cached(model, folder, **options):
    return pipe_of(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "p.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler"])
        for i in range(20):
            sampler = ["ddim", "euler", ""][i % 3]
            writer.writerow([f"a cat number {i}", "blue" if i % 4 else "", i, 1 + i % 4, [1, 7.5][i % 2], sampler])
    return path


def test_the_job_makes_the_pixels_that_the_library_makes(tiny, prompts, tmp_path):
    arguments = ["--prompts", str(prompts), "--output", str(tmp_path), "--model", str(tiny), "--unit-size", "8"]
    assert generate_images.main(arguments, load=functools.partial(load_cached, folder=str(tiny))) == 0
    assert verify.main([str(tmp_path)]) == 0
    made = {}
    for shard in (tmp_path / "shards").iterdir():
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".png"):
                    image = Image.open(io.BytesIO(tar.extractfile(name).read()))
                    made[name.removesuffix(".png")] = np.asarray(image), image.text["parameters"]
    rows = list(csv.DictReader(prompts.open(newline="")))
    results = pipe_of(str(tiny)).generate([Request.from_row(row)[0] for row in rows])
    assert made.keys() == {result.id for result in results}
    for result in results:
        pixels, text = made[result.id]
        np.testing.assert_array_equal(pixels, result.pixels)
        assert text.startswith(result.request.prompt + "\n")
        assert f"Seed: {result.request.seed}" in text
    told = Store(str(tmp_path)).read_json("summary.json")
    assert told["images"] == 20
    assert 0 < told["padding"] < 1
    assert told["seconds"]["compile"] > 0


@pytest.mark.parametrize(("rows", "padding"), [(1, 7 / 8), (8, 0.0)])
def test_every_device_is_fed(rows, padding, tiny, tmp_path):
    """A call makes an image on each of eight devices: one row leaves seven idle, eight leave none."""
    assert pipe_of(str(tiny)).batch_size == 1
    assert jax.local_device_count() == 8
    (tmp_path / "p.txt").write_text("".join(f"a cat number {i}\n" for i in range(rows)))
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--model", str(tiny)]
    arguments += ["--num-inference-steps", "2"]
    assert generate_images.main(arguments, load=functools.partial(load_cached, folder=str(tiny))) == 0
    told = Store(str(tmp_path / "out")).read_json("summary.json")
    assert (told["images"], told["padding"]) == (rows, padding)


def test_the_handler_serves_other_pipelines(tiny):
    request = Request(prompt="a cat", num_inference_steps=2)
    expected = pipe_of(str(tiny)).generate([request])[0]

    def check(results):
        [result] = results
        np.testing.assert_array_equal(result.inference.pixels, expected.pixels)
        assert result.inference.id == expected.id

    with beam.Pipeline(runner=IN_PROCESS) as pipeline:
        handler = SdjaxModelHandler(str(tiny), load=functools.partial(load_cached, folder=str(tiny)))
        assert_that(pipeline | beam.Create([request]) | RunInference(handler), check)

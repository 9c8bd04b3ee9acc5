"""The job with a real, small model on eight devices: the pixels are those of the library."""

import csv
import functools
import io
import shutil
import tarfile

import apache_beam as beam
import jax
import numpy as np
import pytest
from apache_beam.ml.inference.base import RunInference
from apache_beam.testing.util import assert_that
from PIL import Image
from safetensors.numpy import save_file

from pipelines import generate_images, verify
from pipelines.handler import SdjaxModelHandler, load_stable_diffusion
from pipelines.latents import LatentSpec
from pipelines.options import IN_PROCESS
from pipelines.progress import ProgressLine
from pipelines.storage import Store
from sdjax.generate import StableDiffusion
from sdjax.request import Request
from sdjax.spec import Spec


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


CHANGES = {
    "unet/diffusion_pytorch_model.safetensors": lambda data: data[:-4] + bytes(4),
    "scheduler/scheduler_config.json": lambda data: data + b"\n",
    "../lora.safetensors": lambda data: data[:-4] + bytes(4),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_replaced_while_a_job_runs_commits_nothing(name, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ProgressLine, "_follow", lambda line: None)  # where all is slow it would say something too
    folder = shutil.copytree(tiny, tmp_path / "model")
    added = {"unet.up_blocks.0.resnets.0.time_emb_proj.diff": np.ones((64, 128), np.float32)}
    save_file(added, tmp_path / "lora.safetensors")
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--model", str(folder)]
    arguments += ["--num-inference-steps", "1", "--lora", str(tmp_path / "lora.safetensors"), "--unit-size", "1"]

    def load(model, **options):
        (folder / name).write_bytes(CHANGES[name]((folder / name).read_bytes()))
        return load_stable_diffusion(model, **options)

    assert generate_images.main(arguments, load=load) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "the files of model were replaced since the job began" in line
    assert Store(str(tmp_path / "out")).find("manifest") == []
    assert generate_images.main(arguments) == 0
    assert verify.main([str(tmp_path / "out")]) == 0


def test_what_encodes_is_hashed_as_it_is_now_too(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    spec = LatentSpec(Spec(folder), None)
    assert spec.hashed() == spec.fingerprint
    (folder / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text() + "\n")
    assert spec.hashed() != spec.fingerprint == LatentSpec(Spec(tiny), None).fingerprint


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

"""`python -m sdjax.sample`: its files, its words, and what an interrupt leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from sdjax import Request, StableDiffusion, images, sample
from sdjax.request import field_types

SMALL = ["--num-inference-steps", "2", "--width", "48", "--height", "32"]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The folder of a run over two prompts with two images each."""
    folder = tmp_path_factory.mktemp("sample") / "new" / "folder"
    prompts = ["a red circle", "ein Kreis, 円"]
    options = ["--model", str(tiny), "--output", str(folder), "--num-images", "2", "--seed", "7", "--sampler", "euler"]
    assert sample.main([*prompts, *options, "--negative-prompt", "cat", *SMALL, "--verbose"]) == 0
    return folder


def test_each_image_is_a_png_that_says_how_it_was_made(made):
    files = sorted(made.glob("[0-9a-f]*.png"))
    assert len(files) == 4
    texts = []
    for file in files:
        image = Image.open(file)
        assert image.size == (48, 32)
        texts.append(image.info["parameters"])
    for text in texts:
        assert "Negative prompt: cat\nSteps: 2, Sampler: euler, CFG scale: 7.5, Seed: " in text
        assert text.endswith("Size: 48x32, Model: tiny")
    assert sorted((text.split("\n")[0], text.split("Seed: ")[1][0]) for text in texts) == [
        (prompt, seed) for prompt in ("a red circle", "ein Kreis, 円") for seed in "78"
    ]


def test_the_contact_sheet_holds_every_image(made):
    assert {path.name for path in made.iterdir()} == {"sheet.png", *(path.name for path in made.glob("[0-9a-f]*.png"))}
    sheet = np.asarray(Image.open(made / "sheet.png"))
    assert sheet.shape == (2 * 282 + 8, 2 * 264 + 8, 3)
    cells = [sheet[8 + y * 282 :, 8 + x * 264 :][:256, :256] for y in range(2) for x in range(2)]
    assert len({cell.tobytes() for cell in cells}) == 4


def test_every_request_field_is_an_option():
    text = sample.parser().format_help()
    for name in field_types():
        assert f"--{name.replace('_', '-')} " in text or name == "prompt", name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed=-1 is out of range; allowed is 0 to 4294967295"),
        (["--num-images", "0"], "--num-images=0 makes nothing"),
        (["--width", "100"], "width=100 is not a multiple of 8"),
        (["--sampler", "magic"], "unknown sampler 'magic'"),
        (["--seed", "4294967295", "--num-images", "2"], "seed=4294967296 is out of range"),
        (["--num-images", "1000000000000000"], "seed=999999999999999 is out of range"),
        (["--model", "/no/such/folder"], "/no/such/folder is neither a folder, nor a hub id"),
        (["--batch-size", "0"], "--batch-size=0 makes nothing"),
        (["--quality", "0"], "--quality=0 is out of range; allowed is 1 to 100"),
        (["--batch-size", "auto"], "does not say how much memory it has"),
        (["--sweep", "strenght=0.4,0.6"], "--sweep strenght=0.4,0.6 is not understood"),
        (["--image", ""], "image='' is no path or URL"),
        (["--model", ""], "--model is empty; give it a value, or leave it out"),
        (["--lora", " "], "--lora is empty"),
        (["--seed", ""], "seed='' is not a whole number"),
        (["--sweep", "eta"], "--sweep eta is not understood; give a request's field and values"),
        (["--sweep", "eta=0,2"], "eta=2.0 is out of range"),
        (["--sweep", "eta=0", "--sweep", "eta=1"], "--sweep names a field twice"),
        (["--model", "oci://bucket/model"], "Install ocifs"),
    ],
)
def test_a_bad_call_is_refused_in_one_line_and_writes_nothing(tiny, tmp_path, capsys, arguments, message):
    output = ["--output", str(tmp_path / "out")]
    assert sample.main(["a red circle", "--model", str(tiny), *SMALL, *output, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m sdjax.sample: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_makes_each_combination(tiny, tmp_path):
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "start.png")
    arguments = ["--model", str(tiny), "--output", str(tmp_path / "out"), "--image", str(tmp_path / "start.png")]
    swept = ["--sweep", "strength=0.5,1", "--sweep", "guidance-scale=3,7"]
    assert sample.main(["a red circle", *arguments, *SMALL, *swept, "--num-images", "2"]) == 0
    texts = [Image.open(file).info["parameters"] for file in (tmp_path / "out").glob("[0-9a-f]*.png")]
    found = {tuple(text.split(f"{name}: ")[1].split(",")[0] for name in ("CFG scale", "Seed")) for text in texts}
    assert len(texts) == 8
    assert found == {("3", "0"), ("3", "1"), ("7", "0"), ("7", "1")}
    assert {text.split("Denoising strength: ")[1] for text in texts} == {"0.5", "1"}


def test_a_sweep_over_sizes_shares_batches_and_the_sheet_keeps_its_order(tiny, tmp_path, monkeypatch):
    launched, captions = [], []
    launch, sheet = StableDiffusion.launch, images.contact_sheet
    monkeypatch.setattr(
        StableDiffusion, "launch", lambda pipe, batch: launched.append(len(batch)) or launch(pipe, batch)
    )
    monkeypatch.setattr(images, "contact_sheet", lambda made, texts: captions.extend(texts) or sheet(made, texts))
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    arguments = ["--model", str(tiny), "--output", str(tmp_path), "--batch-size", "2", "--num-inference-steps", "2"]
    swept = ["--height", "32", "--sweep", "width=32,48", "--sweep", "seed=1,2", "--num-images", "2"]
    assert sample.main(["red", "cat", *arguments, *swept]) == 0
    assert len(list(tmp_path.glob("[0-9a-f]*.png"))) == len(captions) == 12  # seed 2 comes twice of each
    assert launched[-6:] == [2] * 6
    assert captions[:4] == [f"seed {seed}, width 32: red" for seed in (1, 2, 3)] + ["seed 1, width 48: red"]


def test_the_sheet_is_of_the_first_images(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "_SHEET", 2)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert sample.main(["red", "--model", str(tiny), "--output", str(tmp_path), *SMALL, "--num-images", "3"]) == 0
    assert Image.open(tmp_path / "sheet.png").size == (2 * 264 + 8, 282 + 8)
    assert len(list(tmp_path.glob("[0-9a-f]*.png"))) == 3
    assert "3 images in" in (said := capsys.readouterr().err)
    assert "with sheet.png of the first 2, in" in said


def test_a_prompt_may_be_empty_beside_a_picture(tiny, tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    arguments = ["", "--model", str(tiny), "--output", str(tmp_path / "out"), "--num-inference-steps", "2"]
    assert sample.main([*arguments, "--image", str(tmp_path / "red.png")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert sample.main(arguments) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_every_option_says_what_it_is():
    for action in sample.parser()._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("command", ["sample", "train"])
def test_without_docstrings_commands_have_their_options(command):
    helped = [sys.executable, "-OO", "-m", f"sdjax.{command}", "--help"]
    ran = subprocess.run(helped, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_an_output_that_is_a_file_is_said_before_anything_is_made(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("the weights are read"))
    (tmp_path / "out").touch()
    assert sample.main(["red", "--model", str(tiny), "--output", str(tmp_path / "out")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_an_output_that_is_for_reading_only_is_said_before_anything_is_made(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("the weights are read"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # to root every folder is for writing
    assert sample.main(["red", "--model", str(tiny), "--output", str(tmp_path)]) == 2
    assert f"--output={tmp_path} may not be written to" in capsys.readouterr().err


def test_too_little_memory_is_said_in_a_line(tiny, tmp_path, capsys, monkeypatch):
    def launch(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nin all")

    monkeypatch.setattr(StableDiffusion, "launch", launch)
    assert sample.main(["red", "--model", str(tiny), "--output", str(tmp_path), *SMALL]) == 1
    said = "the devices have too little memory; a smaller --batch-size, --width or --height, or --vae-tiling, take less"
    assert said in capsys.readouterr().err


def test_an_output_that_is_a_url_is_refused(capsys):
    """As a path it would be a folder named gs:."""
    assert sample.main(["red", "--output", "gs://bucket/out"]) == 2
    assert "gs://bucket/out is a URL; give a folder on this machine" in capsys.readouterr().err


def test_the_same_command_makes_the_same_files(made, tiny, tmp_path):
    arguments = ["--model", str(tiny), "--output", str(tmp_path), "--seed", "8", "--sampler", "euler"]
    assert sample.main(["a red circle", "--negative-prompt", "cat", *arguments, *SMALL]) == 0
    (file,) = tmp_path.glob("[0-9a-f]*.png")
    assert (made / file.name).read_bytes() == file.read_bytes()
    assert Request(prompt="a red circle").seed == 0


def test_an_interrupt_leaves_whole_files_only(tiny, tmp_path):
    # A shell's background jobs ignore SIGINT, and so would whatever this test starts in one.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heeding += "runpy.run_module('sdjax.sample', run_name='__main__')"
    command = [sys.executable, "-c", heeding, "a red circle", "--num-images", "500", "--model", str(tiny)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(
        [*command, *SMALL, "--output", str(tmp_path / "out")],
        cwd=Path(__file__).parents[1],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("*.png"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted; the files that are there are whole"
    files = list((tmp_path / "out").iterdir())
    assert 3 <= len(files) < 500
    for file in files:
        assert file.suffix == ".png"
        Image.open(file).load()


def test_describe_says_what_a_model_is_and_makes_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--describe", "--model", str(tiny)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tiny: StableDiffusion\n")
    networks = safetensors.numpy.load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    count = sum(array.size for array in networks.values())
    assert f"unet: {count / 1e6:,.1f} million parameters, stored as float32" in said
    for line in ("sampler: ddim", "size: 32x32, in multiples of 8", "prediction_type: epsilon"):
        assert f"  {line}\n" in said
    assert "LoRAs for a UNet that attends to 32 channels\n" in said
    assert "ControlNets of block_out_channels [32, 64] that attend to 32\n  no refiner\n" in said
    assert not any(tmp_path.iterdir())
    assert sample.main(["--model", str(tiny)]) == 2
    assert "no PROMPT is given" in capsys.readouterr().err

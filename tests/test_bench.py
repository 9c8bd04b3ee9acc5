"""`python -m sdjax.bench`: its figures are of what ran, and its table, JSON and plot say the same."""

import json
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import Mock

import jax
import pytest

from sdjax import bench
from sdjax.architectures import ARCHITECTURES
from sdjax.benchmark import ours, torch_side
from sdjax.benchmark.ours import Measured
from sdjax.request import Request
from sdjax.spec import Spec
from tests import torch_models

SMALL = {
    "text_encoder": {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1},
    "unet": torch_models.UNET,
    "vae": torch_models.VAE,
}


@pytest.fixture(scope="module")
def measured(own_compile_cache, tmp_path_factory):
    """A run of a small architecture with random weights, two steps and two batch sizes, on one device."""
    folder = tmp_path_factory.mktemp("bench")
    files = {name: folder / f"bench.{name}" for name in ("json", "png")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        patch.setitem(ARCHITECTURES, "sd15", SMALL)
        options = ["--model", "sd15", "--batch-size", "1,2", "--repeats", "1", "--num-inference-steps", "2"]
        assert bench.main([*options, "--json", str(files["json"]), "--plot", str(files["png"])]) == 0
    return files


def test_every_stage_is_measured(measured):
    found = json.loads(measured["json"].read_text())
    assert [m["batch_size"] for m in found["sdjax"]] == [1, 2]
    for m in found["sdjax"]:
        assert set(m["stages"]) == {"encode_text", "start", "advance", "decode", "host copy", "encode"}
        assert set(m["compile_cold"]) == set(m["compile_warm"]) == {"encode_text", "start", "advance", "decode"}
        assert all(seconds > 0 for seconds in m["stages"].values())
        # Two steps of two halves each.
        assert m["unet_call"] == pytest.approx(m["stages"]["advance"] / 4)
        assert 0 < m["share_of_peak"] < 1
        assert m["peak_bytes"] > 0
    one, two = found["sdjax"]
    assert one["flops_per_image"] == two["flops_per_image"]
    assert sum(two["compile_warm"].values()) < sum(two["compile_cold"].values())


def test_diffusers_is_measured_alike_and_compared(tiny, measured):
    request = Spec(tiny).resolve(Request(prompt="a red circle", num_inference_steps=2))
    their = torch_side.measure(tiny, request, batch_size=1, dtype="float32", repeats=1, compiled=False)
    assert their["calls"] == Spec(tiny).calls(request)  # both halves of guidance in one
    assert 0 < their["decode"] < their["batch"] > their["UNet"] > 0
    assert their["UNet bytes"] >= sum(tensor.nbytes for _, tensor in Spec(tiny).checkpoint.tensors("unet"))

    found = json.loads(measured["json"].read_text())["sdjax"][0]
    found.pop("share_of_peak")
    row = bench.ratios([Measured(**found)], {"eager": [their]}).splitlines()[-1].split(" | ")
    assert row[:2] == ["| eager", "1"]
    assert float(row[5]) == pytest.approx(found["stages"]["advance"] / their["calls"] / their["UNet"], abs=0.01)
    assert float(row[9]) == pytest.approx(found["program_bytes"]["advance"] / their["UNet bytes"], abs=0.01)


def test_a_way_that_fails_without_a_word_is_left_out(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ProcessPoolExecutor, "submit", Mock(side_effect=AssertionError))
    request = Spec(tiny).resolve(Request(prompt="a red circle"))
    assert bench.compare(tiny, request, [1]) == {}
    assert "diffusers, compiled: AssertionError" in capsys.readouterr().err


def test_the_plot_is_a_picture(measured):
    assert measured["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "1,many"], "--batch-size=1,many is not understood; give numbers such as 4 or 1,2,4,8"),
        (["--batch-size", "0"], "--batch-size=0 is not understood"),
        (["--repeats", "0"], "--repeats=0 measures nothing"),
        (["--json", "/nowhere/a.json"], "--json: there is no folder /nowhere"),
        (["--plot", "."], "--plot: . is a folder; give a file"),
        (["--plot", "rates.exe"], "--plot: rates.exe ends as no picture; known are "),
        (["--model", "/nowhere"], "/nowhere is neither a folder"),
        (["--compare", "diffusers", "--sampler", "heun"], "--compare diffusers does not go with sampler"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(capsys, options, message):
    assert bench.main(options) == 2
    assert f"python -m sdjax.bench: {message}" in capsys.readouterr().err


HALF = Measured(
    batch_size=2,
    devices=4,
    load=(9.0, 3.0),
    compile_cold={"advance": 20.0, "decode": 5.0},
    compile_warm={"advance": 2.0, "decode": 0.5},
    stages={"advance": 1.2, "decode": 0.3, "host copy": 0.01, "encode": 0.02},
    unet_call=0.15,
    images_per_second=4.0,
    flops_per_image=2.5e12,
    peak_flops=40e12,
    peak_bytes=3 * 2**30,
    program_bytes={"advance": 2**30, "decode": 2**29},
)


def test_the_table_says_what_was_measured():
    cells = dict(line.strip("| ").split(" | ") for line in bench.table([HALF]).splitlines()[2:])
    assert cells == {
        "load s, first / again": "9.0 / 3.0",
        "compile s, cold / warm": "25.0 / 2.5",
        "advance s": "1.2000",
        "decode s": "0.3000",
        "host copy s": "0.0100",
        "encode s": "0.0200",
        "one UNet call s": "0.1500",
        "images/s": "4",
        "TFLOP an image": "2.5",
        "TFLOP/s": "10",
        "share of peak": "25%",
        "peak memory GiB": "3.00",
    }


def test_ratios_are_of_one_device_and_of_equal_work():
    their = {"batch": 4.0, "UNet": 0.5, "decode": 0.6, "calls": 4.0, "UNet bytes": 2**31, "decode bytes": 2**29}
    row = bench.ratios([HALF], {"eager": [their]}).splitlines()[-1].strip("| ").split(" | ")
    # A batch of 2 on each of 4 devices in 2 s; a call of both halves in 0.3 s.
    assert row == ["eager", "2", "4.0000", "0.50", "0.5000", "0.60", "0.6000", "0.50", "2.00", "0.50", "0.50", "1.00"]


def test_stages_are_medians_of_batches():
    assert ours._median([1, 1, 5, 5, 2, 2], 3) == 4
    assert ours._median([3.0], 1) == 3


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA L4", 121e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_a_devices_peak_is_its_makers(kind, peak):
    assert ours._peak_flops(kind, "bfloat16") == peak


def test_the_peak_of_a_device_that_is_not_known_is_measured():
    assert ours._peak_flops("NVIDIA L40S", "float32") < 100e12

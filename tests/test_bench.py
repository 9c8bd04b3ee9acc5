"""`python -m sdjax.bench`: its figures are of what ran, and its table, JSON and plot say the same."""

import json

import jax
import pytest

from sdjax import bench
from sdjax.architectures import ARCHITECTURES
from sdjax.benchmark import torch_side
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
    ours = Measured(**found)
    row = bench.ratios([ours], {"eager": [their]}).splitlines()[-1].split(" | ")
    assert row[:2] == ["| eager", "1"]
    assert float(row[5]) == pytest.approx(ours.stages["advance"] / their["calls"] / their["UNet"], abs=0.01)
    assert float(row[9]) == pytest.approx(ours.program_bytes["advance"] / their["UNet bytes"], abs=0.01)


def test_the_plot_is_a_picture(measured):
    assert measured["png"].read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said(capsys):
    assert bench.main(["--batch-size", "many"]) == 2
    assert bench.main(["--model", "/nowhere"]) == 2
    assert "python -m sdjax.bench: " in capsys.readouterr().err

"""`python -m sdjax.bench`: its figures are of what ran, and its table, JSON and plot say the same."""

import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
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
    peak_is="the bfloat16 peak",
    peak_bytes=3 * 2**30,
    bytes_are="largest program",
    program_bytes={"advance": 2**30, "decode": 2**29},
)
THEIR = {"batch": 4.0, "UNet": 0.5, "decode": 0.6, "calls": 4.0, "UNet bytes": 2**31, "decode bytes": 2**29}
THEIR |= {"batch_size": 2}


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
        assert m["bytes_are"] == "largest program"
    one, two = found["sdjax"]
    assert one["flops_per_image"] == two["flops_per_image"]
    assert sum(two["compile_warm"].values()) < sum(two["compile_cold"].values())


def test_diffusers_is_measured_alike_and_compared(tiny, measured):
    request = Spec(tiny).resolve(Request(prompt="a red circle", num_inference_steps=2))
    their = torch_side.measure(str(tiny), request, batch_size=1, dtype="float32", repeats=1, compiled=False)
    assert their["calls"] == Spec(tiny).calls(request)  # both halves of guidance in one
    assert 0 < their["decode"] < their["batch"] > their["UNet"] > 0
    assert their["UNet bytes"] >= sum(tensor.nbytes for _, tensor in Spec(tiny).checkpoint.tensors("unet"))

    found = json.loads(measured["json"].read_text())["sdjax"][0]
    found.pop("share_of_peak")
    their["batch_size"] = 1
    row = bench.ratios([Measured(**found)], {"eager": [their]}).splitlines()[-1].split(" | ")
    assert row[:2] == ["| eager", "1"]
    assert float(row[5]) == pytest.approx(found["stages"]["advance"] / their["calls"] / their["UNet"], abs=0.01)
    assert float(row[9]) == pytest.approx(found["program_bytes"]["advance"] / their["UNet bytes"], abs=0.01)


@pytest.mark.parametrize(
    ("source", "name", "revision"), [("~/model@1", "HOME/model@1", None), ("org/name@fp16", "org/name", "fp16")]
)
def test_diffusers_is_given_the_checkpoint_in_its_own_words(monkeypatch, tmp_path, source, name, revision):
    (tmp_path / "model@1").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    given = Mock(side_effect=OSError("found"))
    monkeypatch.setattr(torch_side.DiffusionPipeline, "from_pretrained", given)
    with pytest.raises(OSError, match="found"):
        torch_side.measure(source, Request(prompt="x"), batch_size=1, dtype="float32", repeats=1, compiled=False)
    assert given.call_args.args == (name.replace("HOME", str(tmp_path)),)
    assert given.call_args.kwargs["revision"] == revision


def failing(monkeypatch, of: int, error: Exception) -> None:
    """Lets what is measured at a batch size end in an error, and finds HALF at others."""

    def alone(measuring, *_, batch_size, **__):
        if batch_size == of:
            raise error
        return replace(HALF, batch_size=batch_size) if measuring is bench.measure else {**THEIR, "batch": 1.0}

    monkeypatch.setattr(bench, "_alone", alone)


@pytest.mark.parametrize(
    "error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), BrokenProcessPool("terminated")]
)
def test_a_batch_that_does_not_fit_costs_its_own_column(tiny, monkeypatch, capsys, error):
    failing(monkeypatch, 2, error)
    assert bench.main(["--model", str(tiny), "--batch-size", "1,2,4"]) == 0
    said = capsys.readouterr()
    assert "|  | batch 1 | batch 4 |" in said.out
    assert "sdjax, batch 2: too little memory, or the process was ended\n" in said.err
    assert bench.main(["--model", str(tiny), "--batch-size", "2"]) == 1


def test_another_error_is_not_hidden(tiny, monkeypatch):
    failing(monkeypatch, 2, RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        bench.main(["--model", str(tiny), "--batch-size", "1,2"])


def test_diffusers_is_compared_at_the_sizes_that_both_did(tiny, monkeypatch, capsys):
    failing(monkeypatch, 2, MemoryError())
    theirs = bench.compare(str(tiny), Spec(tiny).resolve(Request(prompt="a red circle")), [1, 2, 4])
    assert {way: [their["batch_size"] for their in theirs[way]] for way in theirs} == {"eager": [1], "compiled": [1]}
    assert "diffusers, eager, batch 2: MemoryError" in capsys.readouterr().err
    rows = bench.ratios([replace(HALF, batch_size=size) for size in (1, 4)], theirs).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| eager", "1"], ["| compiled", "1"]]


def test_the_model_is_called_as_its_folder_is(tiny, monkeypatch, capsys):
    failing(monkeypatch, 0, MemoryError())
    monkeypatch.chdir(tiny)
    assert bench.main(["--model", "."]) == 0
    assert capsys.readouterr().out.startswith(f"{tiny.name}, ")


def test_a_way_that_fails_without_a_word_is_left_out(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ProcessPoolExecutor, "submit", Mock(side_effect=AssertionError))
    request = Spec(tiny).resolve(Request(prompt="a red circle"))
    assert bench.compare(str(tiny), request, [1]) == {}
    assert "diffusers, compiled, batch 1: AssertionError" in capsys.readouterr().err


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
        (["--model", ""], "--model is empty; give it a value, or leave it out"),
        (["--model", "memory://nowhere"], "memory://nowhere"),
        (["--compare", "diffusers", "--sampler", "heun"], "--compare diffusers does not go with sampler"),
        (["--compare", "diffusers", "--seed", "3"], "--compare diffusers does not go with seed"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(capsys, options, message):
    assert bench.main(options) == 2
    assert f"python -m sdjax.bench: {message}" in capsys.readouterr().err


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
        "share of the bfloat16 peak": "25%",
        "largest program GiB": "3.00",
    }


def test_ratios_are_of_one_device_and_of_equal_work():
    row = bench.ratios([HALF], {"eager": [THEIR]}).splitlines()[-1].strip("| ").split(" | ")
    # A batch of 2 on each of 4 devices in 2 s; a call of both halves in 0.3 s.
    assert row == ["eager", "2", "4.0000", "0.50", "0.5000", "0.60", "0.6000", "0.50", "2.00", "0.50", "0.50", "1.00"]


def test_stages_are_medians_of_batches():
    assert ours._median([1, 1, 5, 5, 2, 2], 3) == 4
    assert ours._median([3.0], 1) == 3


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        *(("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA L4", 121e12), ("NVIDIA H100 80GB HBM3", 989e12)),
        *(
            ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA H100 NVL", 835e12),
            ("NVIDIA H200", 989e12),
            ("NVIDIA H200 NVL", 835e12),
        ),
    ],
)
def test_a_devices_peak_is_its_makers(kind, peak):
    assert ours._peak_flops(kind, "float32") == (peak, "the bfloat16 peak")


def test_the_peak_of_a_device_that_is_not_known_is_measured():
    peak, what = ours._peak_flops("NVIDIA L40S", "float32")
    assert peak < 100e12
    assert what == "a large float32 product"

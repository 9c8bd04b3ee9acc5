"""Whole images: diffusers' on the same weights and seed, the same in any company, and one program for every request."""

import dataclasses
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from unittest.mock import Mock

import diffusers
import jax
import numpy as np
import pytest
import torch

import sdjax
from sdjax import Request, RequestError, StableDiffusion, generate, programs
from sdjax.batch import HostNoise
from sdjax.parallel import Devices
from sdjax.sampling import noise
from sdjax.spec import Spec
from tests import checkpoints

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
RED = Request(prompt="a red circle", seed=3, num_inference_steps=5, width=48, height=32)


@pytest.fixture(scope="module")
def pipe(tiny):
    return StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1])


def theirs(pipeline, folder, request, scheduler, **config):
    """diffusers' image for a request with torch's noise, as uint8."""
    if scheduler == "DDIMScheduler":
        config["clip_sample"] = False  # diffusers' default where the file is another scheduler's; it ruins latents
    pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(folder / "scheduler", **config)
    pixels = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        eta=request.eta,
        clip_skip=request.clip_skip or None,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="np",
    ).images[0]
    return (pixels * 255).round().astype(np.uint8)


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


CHECKPOINTS = {
    "sd1": {},
    "v_prediction, linear projections, three levels": {
        "unet": {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "layers_per_block": 2,
            "use_linear_projection": True,
            "attention_head_dim": [2, 4, 4],
        },
        "vae": {"latent_channels": 4, "layers_per_block": 2},
        "text": {"hidden_act": "gelu", "num_hidden_layers": 3},
        "scheduler": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    },
    "PNDM's file, eight-pixel VAE": {
        "vae": {
            "block_out_channels": [32, 32, 64, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "scheduler": ("PNDMScheduler", {}),
    },
}
REQUESTS = [
    ("ddim", {}, RED),
    ("dpmpp_2m", {"use_karras_sigmas": True}, dataclasses.replace(RED, sigmas="karras", num_inference_steps=8)),
    ("euler", {}, dataclasses.replace(RED, negative_prompt="cat", guidance_scale=3, seed=2**32 - 1)),
    ("heun", {"use_karras_sigmas": True}, dataclasses.replace(RED, sigmas="karras", guidance_rescale=0.7)),
    ("ddim", {}, dataclasses.replace(RED, guidance_scale=1, clip_skip=1)),
    ("ddim", {}, dataclasses.replace(RED, eta=0.8)),
    ("euler_ancestral", {}, dataclasses.replace(RED, prompt="red " * 100, prompt_language="plain")),
]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_images_are_those_of_diffusers(name, tmp_path):
    changes = dict(CHECKPOINTS[name])
    if "scheduler" in changes:
        scheduler, config = changes["scheduler"]
        changes["scheduler"] = checkpoints.scheduler(scheduler, **config)
    pipeline = checkpoints.saved(tmp_path / "model", **changes)
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])
    requests = [dataclasses.replace(request, sampler=sampler, noise="torch") for sampler, _, request in REQUESTS]
    results = pipe.generate(requests)
    for result, (sampler, config, request) in zip(results, REQUESTS, strict=True):
        expected = theirs(pipeline, tmp_path / "model", request, SCHEDULERS[sampler], **config)
        assert difference(result.pixels, expected) <= 2, (sampler, request)
        assert result.pixels.std() > 10, "a picture of nothing compares nothing"
        assert result.flags == (("truncated",) if len(request.prompt) > 300 else ())
    # The checkpoint's own scheduler is the default.
    if name == "sd1":
        assert pipe.generate([dataclasses.replace(RED, noise="torch")])[0].request.sampler == "ddim"


def test_a_request_gives_the_same_pixels_in_any_company(tiny, pipe):
    one = dataclasses.replace(RED, sampler="dpmpp_2m", sigmas="karras", num_inference_steps=6)
    others = [
        dataclasses.replace(
            RED, seed=i, sampler=sampler, num_inference_steps=2 + i % 3, guidance_scale=i, prompt="cat" * i
        )
        for i, sampler in enumerate(["ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "euler_ancestral"], 1)
    ]
    alone = [pipe.generate([request])[0] for request in (one, *others)]
    for devices in (2, 8):
        wide = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:devices])
        for order in ([0, 1, 2, 3, 4, 5, 6], [6, 3, 0, 5, 1, 2, 4], [5, 0]):
            for i, result in zip(order, wide.generate([(one, *others)[i] for i in order]), strict=True):
                assert result.id == alone[i].id
                assert np.array_equal(result.pixels, alone[i].pixels), (devices, order, i)


def test_a_batch_gives_the_pixels_of_each_row_alone(tiny):
    pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:2], batch_size=3)
    requests = [
        dataclasses.replace(
            RED, seed=i, sampler=sampler, guidance_scale=1 + i % 3, num_inference_steps=3 + i % 4, noise=noise
        )
        for i, (sampler, noise) in enumerate([(s, n) for s in SCHEDULERS for n in ("jax", "torch")])
    ]
    together = pipe.generate(requests)
    for request, result in zip(requests, together, strict=True):
        assert np.array_equal(pipe.generate([request])[0].pixels, result.pixels), request


def test_only_a_new_size_compiles(pipe, compilations):
    pipe.generate([RED])
    compilations()
    for sampler in SCHEDULERS:
        pipe.generate(
            [
                dataclasses.replace(RED, sampler=sampler, num_inference_steps=2, seed=9, prompt="cat"),
                dataclasses.replace(RED, sampler=sampler, num_inference_steps=21, guidance_scale=1, noise="torch"),
                dataclasses.replace(RED, sampler=sampler, negative_prompt="red", guidance_rescale=0.5, clip_skip=1),
            ]
        )
    pipe.generate([dataclasses.replace(RED, sampler="dpmpp_2m", sigmas="karras"), dataclasses.replace(RED, eta=1)])
    assert compilations() == 0
    pipe.generate([dataclasses.replace(RED, width=32)])
    assert compilations() > 0


def test_a_call_moves_no_parameters(tiny):
    pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:2])
    pipe.generate([RED])
    with jax.transfer_guard_host_to_device("disallow"), jax.transfer_guard_device_to_device("disallow"):
        pipe.generate([RED])


def test_stream_hands_out_in_order_with_progress(pipe):
    seen = []
    requests = [dataclasses.replace(RED, num_inference_steps=n, width=w) for n, w in [(3, 48), (12, 48), (4, 32)]]
    results = list(pipe.stream(iter(requests), progress=lambda done, total: seen.append((done, total))))
    assert [result.request.num_inference_steps for result in results] == [3, 12, 4]
    assert [result.pixels.shape for result in results] == [(32, 48, 3), (32, 48, 3), (32, 32, 3)]
    assert seen == [(3, 3), (5, 12), (10, 12), (12, 12), (4, 4)]


@pytest.mark.parametrize("wrong", [{"sampler": "magic"}, {"image": "/no/such.png", "image_sha256": "0" * 64}])
def test_what_came_before_a_request_that_cannot_be_made_is_handed_out(pipe, wrong):
    for before in range(5):
        stream = pipe.stream([*[RED] * before, dataclasses.replace(RED, **wrong), RED])
        assert [next(stream).request.prompt for _ in range(before)] == [RED.prompt] * before
        with pytest.raises(RequestError, match=r"magic|such\.png is not there"):
            next(stream)


def test_the_first_request_that_cannot_be_made_is_named(pipe):
    gone = dataclasses.replace(RED, image="/no/such.png", image_sha256="0" * 64)
    with pytest.raises(RequestError, match=r"/no/such\.png is not there"):
        list(pipe.stream([gone, dataclasses.replace(RED, sampler="magic")]))


@pytest.mark.parametrize("error", [RuntimeError("the reader broke"), RequestError("prompt is empty"), KeyError("row")])
def test_what_came_before_an_error_of_the_reader_is_handed_out(pipe, error):
    def requests(count):
        yield from [RED] * count
        raise error

    for before in range(5):
        stream = pipe.stream(requests(before))
        assert [next(stream).request.prompt for _ in range(before)] == [RED.prompt] * before
        with pytest.raises(type(error), match=str(error)):
            next(stream)


def test_what_is_no_request_batch_size_or_list_is_refused_in_a_line():
    """Where types are not checked at every call, as in the tests they are."""
    code = """
from pathlib import Path
from sdjax import Spec, StableDiffusion
for call in (
    lambda: Spec().resolve("a red circle"),
    lambda: StableDiffusion.from_pretrained(batch_size=2.0),
    lambda: Spec(controlnets="org/canny"),
    lambda: Spec(loras=Path("a.safetensors")),
    lambda: StableDiffusion.from_pretrained(Spec(), dtype="bfloat16"),
):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == [
        "TypeError a str is no request; give Request(prompt=...)",
        "ValueError batch_size=2.0 is no number of images; allowed is an integer of 1 or more",
        "ValueError org/canny is given where a list of files is taken; give ['org/canny']",
        "ValueError a.safetensors is given where a list of files is taken; give ['a.safetensors']",
        "ValueError dtype cannot be changed for a Spec that is made; give it to Spec(...)",
    ]


def test_a_dtype_may_be_numpys():
    code = "import numpy, sdjax; print(sdjax.Spec(dtype=numpy.dtype('float16')).fingerprint)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == Spec(dtype="float16").fingerprint


def test_results_can_be_compared_and_kept_in_sets(pipe):
    one, other = pipe.generate([RED, RED])
    assert one == one
    assert one != other
    assert other in [one, other]
    assert len({one, other}) == 2


def test_a_model_is_not_saved_to_a_url(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://bucket/model is a URL; give a folder on this machine"):
        pipe.save_pretrained("gs://bucket/model")
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_saved_takes_no_second_copy_on_the_device(pipe, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(generate.checkpoint, "write", lambda *_, **__: held.append(len(jax.live_arrays())))
    before = len(jax.live_arrays())
    pipe.save_pretrained(tmp_path / "model")
    assert held == [before]


def test_images_are_made_and_named_when_the_files_are_gone(tiny, pipe, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    copy = StableDiffusion.from_pretrained(folder, devices=jax.devices()[:1])
    shutil.rmtree(folder)
    assert copy.generate([RED])[0].id == pipe.generate([RED])[0].id


def test_what_fills_a_batch_up_is_not_drawn_again(tiny, monkeypatch):
    drawn, own = [], noise.torch_latent
    monkeypatch.setattr(noise, "torch_latent", lambda *each: drawn.append(each) or own(*each))
    alone, among = (
        StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1], batch_size=size).generate(
            [dataclasses.replace(RED, noise="torch", sampler="euler_ancestral")]
        )
        for size in (1, 3)
    )
    assert len(drawn) == 2 * 5  # the start and a row's noise for four of five steps, each time
    assert difference(alone[0].pixels, among[0].pixels) <= 1


def test_step_noise_that_no_row_uses_is_not_handed_to_the_devices(pipe, monkeypatch):
    handed, own = [], HostNoise.rows
    monkeypatch.setattr(HostNoise, "rows", lambda self, count: handed.append(count) or own(self, count))
    for sampler, times in [("dpmpp_2m", 1), ("euler_ancestral", 3)]:
        handed.clear()
        pipe.generate([dataclasses.replace(RED, noise="torch", sampler=sampler, num_inference_steps=12)])
        assert handed == [5] * times


def test_a_change_of_precision_is_heeded_by_programs_that_have_run():
    devices, traced = Devices(jax.devices()[:1]), []
    square = devices.pmap(lambda x: traced.append(jax.config.jax_default_matmul_precision) or x @ x)
    ones = devices.split(np.ones((2, 2), np.float32))
    for precision in (None, None, "highest", None):
        with jax.default_matmul_precision(precision):
            square(ones)
    assert traced == [None, "highest"]


def test_a_host_without_the_devices_that_are_asked_for_says_so(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", Mock(side_effect=AssertionError))  # JAX's, with JAX_PLATFORMS=cuda
    with pytest.raises(ValueError, match="JAX finds no device with JAX_PLATFORMS=cpu: there is none"):
        Devices()


def test_type_checkers_are_told_that_there_are_types():
    root = Path(sdjax.__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("sdjax", "pipelines"):
        assert (root / package / "py.typed").is_file()
        assert "py.typed" in data[package]


def test_guidance_holds_in_its_interval_alone(pipe):
    def pixels(**changes):
        return pipe.generate([dataclasses.replace(RED, **changes)])[0].pixels

    none, whole = pixels(guidance_scale=1), pixels()
    assert np.array_equal(pixels(guidance_end=0), none)
    assert np.array_equal(pixels(guidance_start=1), none)
    late = pixels(guidance_start=0.35)
    assert np.array_equal(late, pixels(guidance_start=0.4))
    assert difference(late, none) > 0
    assert difference(late, whole) > 0


def test_threads_can_share_a_pipe(pipe):
    expected, got = pipe.generate([RED])[0].pixels, {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: pipe.generate([RED])[0].pixels})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got[i], expected) for i in range(3))


def test_a_nan_is_flagged_and_hurts_nothing_else(tiny):
    pipe = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1], batch_size=2)
    fine = pipe.generate([RED, RED])[0]
    embedding = pipe._networks["text_encoder"].text_model.embeddings.token_embedding.embedding
    (word,) = pipe.spec.tokenizers[0].tokens("cat")
    embedding[...] = embedding[...].at[:, word].set(np.nan)
    bad, good = pipe.generate([dataclasses.replace(RED, prompt="cat"), RED])
    assert bad.flags == ("nan",)
    assert not bad.pixels.any()
    assert good.flags == ()
    assert np.array_equal(good.pixels, fine.pixels)


def test_a_list_of_guidance_scales_is_heeded_step_by_step(pipe):
    def pixels(**changes):
        return pipe.generate([dataclasses.replace(RED, **changes)])[0].pixels

    assert np.array_equal(pixels(guidance_scales=[7.5] * 5), pixels())
    assert np.array_equal(pixels(guidance_scales=[1, 1, 7.5, 7.5, 7.5]), pixels(guidance_start=0.4))
    assert difference(pixels(guidance_scales=[9, 8, 7, 6, 5]), pixels()) > 0


def test_what_is_asked_for_first_is_compiled_while_the_weights_are_read(tiny, pipe, compilations):
    larger = dataclasses.replace(RED, hires_scale=1.5)
    ready = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:2], first=larger)
    compilations()
    (result,) = ready.generate([larger])
    assert compilations() == 0
    assert np.array_equal(result.pixels, pipe.generate([larger])[0].pixels)
    assert np.array_equal(ready.generate([RED])[0].pixels, pipe.generate([RED])[0].pixels)


def test_what_could_not_be_compiled_first_may_be_tried_again(tiny, pipe, monkeypatch):
    devices = Devices(jax.devices()[:2])
    compile = devices.compile

    def fail_to_decode(function, lowered):
        if getattr(function, "func", function) is programs.decode:
            raise RuntimeError("no memory")
        return compile(function, lowered)

    monkeypatch.setattr(devices, "compile", fail_to_decode)
    with pytest.raises(RuntimeError, match="no memory"):
        StableDiffusion.from_pretrained(tiny, devices=devices, first=RED)
    monkeypatch.undo()
    assert np.array_equal(
        StableDiffusion.from_pretrained(tiny, devices=devices, first=RED).generate([RED])[0].pixels,
        pipe.generate([RED])[0].pixels,
    )


def test_what_cannot_be_asked_for_first_is_refused_before_anything_is_loaded(tiny, monkeypatch):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(RequestError, match="width=12"):
        StableDiffusion.from_pretrained(tiny, first=Request(prompt="a", width=12))

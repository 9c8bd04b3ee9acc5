"""Images controlled by ControlNets: diffusers' on the same weights and seed, in any company, several at once."""

import dataclasses
import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import generate_images
from sdjax import Request, RequestError, StableDiffusion
from sdjax.batch import control_scales
from sdjax.parts import BUNDLED
from sdjax.sampling import Schedule, make_table
from sdjax.spec import Spec
from sdjax.values import OF_CONTROLS, lines, numbers
from sdjax.weights.checkpoint import CheckpointError
from tests import checkpoints, torch_models
from tests.test_families import CONFIGURATIONS
from tests.test_image_guided import MASK

RNG = np.random.default_rng(0)
FIRST, SECOND = (
    np.asarray(Image.fromarray(RNG.integers(0, 256, (5, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC))
    for size in ((60, 40), (48, 32))
)
PLAIN = Request(
    prompt="a red circle", seed=3, num_inference_steps=5, width=48, height=32, sampler="ddim", noise="torch"
)
ONE = dataclasses.replace(PLAIN, control_image=FIRST)
BOTH = dataclasses.replace(
    PLAIN,
    control_image=[FIRST, SECOND],
    negative_prompt="cat",
    controlnet_conditioning_scale=[0.8, 1.5],
    control_guidance_start=[0, 0.3],
    control_guidance_end=[0.7, 1],
)


def network(seed, unet, **changes):
    """A random ControlNet for a diffusers UNet, loud enough to be seen."""
    config = {
        key: unet.config[key]
        for key in torch_models.torch_controlnet(torch_models.CONTROLNET).config
        if key in unet.config
    }
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return torch_models.torch_controlnet(config | {"conditioning_embedding_out_channels": [4, 8]} | changes, seed)


@pytest.fixture(scope="module")
def nets(tiny, tmp_path_factory):
    """Two ControlNets of diffusers, and the folders that they are saved in."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    folder = tmp_path_factory.mktemp("controlnets")
    made = [network(5, unet), network(6, unet, controlnet_conditioning_channel_order="bgr")]
    paths = [folder / "canny", folder / "depth"]
    for net, path in zip(made, paths, strict=True):
        net.save_pretrained(path)
    return made, paths


@pytest.fixture(scope="module")
def pipe(tiny, nets):
    return StableDiffusion.from_pretrained(tiny, controlnets=nets[1], devices=jax.devices()[:2])


def theirs(kind, pipeline, controlnet, request, images, **options):
    """diffusers' image for a request; `options` are of the call."""
    made = kind(**pipeline.components, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    several = isinstance(controlnet, list)
    control = [Image.fromarray(image) for image in images] if several else Image.fromarray(images[0])
    options = {"control_image": control} | options if "image" in options else {"image": control}
    for name in OF_CONTROLS:
        listed = numbers(getattr(request, name))
        options[name] = listed if len(listed) > 1 else listed[0]
    result = made(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guess_mode=request.guess_mode,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed),
        **options,
    )
    return np.asarray(result.images[0])


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_images_are_those_of_diffusers(tiny, nets, pipe):
    networks, _ = nets
    pipeline = checkpoints.pipeline()
    photo = Image.fromarray(FIRST[::-1]).resize((48, 32))
    from_image = dataclasses.replace(BOTH, image=photo, strength=0.7)
    guesses = dataclasses.replace(BOTH, guess_mode=True)
    requests = [BOTH, guesses, from_image, dataclasses.replace(guesses, prompt=""), PLAIN]
    results = [result.pixels for result in pipe.generate(requests)]
    for request, pixels in zip(requests[:-1], results, strict=False):
        kind, options = diffusers.StableDiffusionControlNetPipeline, {}
        if request.image is not None:
            kind = diffusers.StableDiffusionControlNetImg2ImgPipeline
            options = {"image": photo, "strength": request.strength}
        expected = theirs(kind, pipeline, networks, request, [FIRST, SECOND], **options)
        assert difference(pixels, expected) <= 2, request
        assert difference(pixels, results[-1]) > 20, "the control must be seen"
    # Without a control image it is the checkpoint's own picture.
    alone = StableDiffusion.from_pretrained(tiny, devices=jax.devices()[:1]).generate([PLAIN])[0]
    assert difference(results[-1], alone.pixels) <= 1


def test_a_crop_around_the_mask_cuts_the_control_image_too(tiny, tmp_path):
    photo = Image.fromarray(FIRST[::-1]).resize((48, 32))
    box = Image.fromarray(np.pad(np.full((8, 12), 255, np.uint8), ((4, 20), (6, 30))))
    control = np.zeros((32, 48, 3), np.uint8)
    control[2:14, 4:20] = 255
    net = network(5, diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet"))
    with torch.no_grad():  # the part that is repainted is small
        for layer in (net.controlnet_cond_embedding.conv_in, net.controlnet_cond_embedding.conv_out):
            layer.weight.mul_(20)
    net.save_pretrained(tmp_path)
    shared = {"strength": 1.0, "padding_mask_crop": 4}
    request = dataclasses.replace(
        PLAIN, image=photo, mask_image=box, control_image=control, controlnet_conditioning_scale=2, **shared
    )
    pipe = StableDiffusion.from_pretrained(tiny, controlnets=[tmp_path], devices=jax.devices()[:1])
    kind, images = diffusers.StableDiffusionControlNetInpaintPipeline, {"image": photo, "mask_image": box}
    expected = theirs(kind, checkpoints.pipeline(), net, request, [control], **images, **shared)
    assert difference(pipe.generate([request])[0].pixels, expected) <= 2
    whole = pipe.generate([dataclasses.replace(request, padding_mask_crop=None)])[0].pixels
    assert difference(whole, expected) > 10


def test_the_interval_is_of_the_whole_run_also_where_a_refiner_ends_it():
    schedule = Schedule.from_config(json.loads((Path(BUNDLED) / "scheduler/scheduler_config.json").read_text()))
    whole, cut = (
        make_table(schedule, sampler="heun", num_inference_steps=10, denoising_end=end) for end in (None, 0.6)
    )
    request = dataclasses.replace(ONE, control_guidance_start=0.2, control_guidance_end=0.5)
    expected, found = (control_scales([request], [table], 20, 1) for table in (whole, cut))
    assert 8 < cut.calls < whole.calls
    assert np.array_equal(found[:, : cut.calls], expected[:, : cut.calls])
    assert not found[:, cut.calls :].any()


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("heun", "HeunDiscreteScheduler"), ("dpm_2", "KDPM2DiscreteScheduler")]
)
def test_the_interval_counts_calls_where_steps_have_several(sampler, scheduler, nets, pipe):
    request = dataclasses.replace(BOTH, sampler=sampler)
    pipeline = checkpoints.pipeline()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(
        pipeline.scheduler.config, timestep_spacing="leading"
    )
    expected = theirs(diffusers.StableDiffusionControlNetPipeline, pipeline, nets[0], request, [FIRST, SECOND])
    assert difference(pipe.generate([request])[0].pixels, expected) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL"])
def test_images_of_other_configurations_are_those_of_diffusers(family, configuration, tmp_path):
    """The last one has Stable Diffusion 2's projections and what it predicts."""
    make = checkpoints.pipeline_xl if family.endswith("XL") else checkpoints.pipeline
    changes = CONFIGURATIONS[configuration]
    scheduler = checkpoints.scheduler("EulerDiscreteScheduler", **changes.get("scheduler", {}))
    pipeline = checkpoints.saved(tmp_path / "model", make, **changes | {"scheduler": scheduler})
    halvings = len(pipeline.vae.config.block_out_channels) - 1
    controlnet = network(5, pipeline.unet, conditioning_embedding_out_channels=[4, 8, 8, 16][: halvings + 1])
    controlnet.save_pretrained(tmp_path / "net")
    pipe = StableDiffusion.from_pretrained(
        tmp_path / "model", controlnets=[tmp_path / "net"], devices=jax.devices()[:1]
    )
    request = dataclasses.replace(ONE, sampler=None, controlnet_conditioning_scale=1.3, control_guidance_end=0.8)
    requests = [
        request,
        dataclasses.replace(request, guidance_scale=1),
        dataclasses.replace(request, control_image=None),
    ]
    *controlled, free = (result.pixels for result in pipe.generate(requests))
    kind = getattr(diffusers, f"{family}ControlNetPipeline")
    for asked, pixels in zip(requests, controlled, strict=False):
        assert difference(pixels, theirs(kind, pipeline, controlnet, asked, [FIRST])) <= 2, asked
    assert difference(controlled[0], free) > 20


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL"])
def test_images_inside_a_mask_are_those_of_diffusers(family, channels, tmp_path):
    """A UNet of 9 channels is told of the mask; its ControlNet, of 4, is not."""
    make = checkpoints.pipeline_xl if family.endswith("XL") else checkpoints.pipeline
    scheduler = checkpoints.scheduler("EulerDiscreteScheduler")
    pipeline = checkpoints.saved(tmp_path / "model", make, unet={"in_channels": channels}, scheduler=scheduler)
    controlnet = network(5, pipeline.unet, in_channels=4)
    controlnet.save_pretrained(tmp_path / "net")
    pipe = StableDiffusion.from_pretrained(
        tmp_path / "model", controlnets=[tmp_path / "net"], devices=jax.devices()[:1]
    )
    photo, mask = (Image.fromarray(array).resize((48, 32)) for array in (FIRST[::-1], MASK))
    inside = dataclasses.replace(ONE, sampler=None, image=photo, mask_image=mask, overlay=False)
    requests = [
        dataclasses.replace(inside, strength=1.0),
        dataclasses.replace(inside, strength=0.7, guess_mode=True),
        dataclasses.replace(inside, strength=1.0, control_image=None),
    ]
    *controlled, free = (result.pixels for result in pipe.generate(requests))
    kind = getattr(diffusers, f"{family}ControlNetInpaintPipeline")
    for asked, pixels in zip(requests, controlled, strict=False):
        options = {"image": photo, "mask_image": mask, "strength": asked.strength}
        assert difference(pixels, theirs(kind, pipeline, controlnet, asked, [FIRST], **options)) <= 2, asked
    assert difference(controlled[0], free) > 20


def test_rows_with_and_without_control_share_a_program_and_a_batch(pipe, compilations):
    requests = [BOTH, PLAIN, dataclasses.replace(BOTH, control_guidance_end=0.5, controlnet_conditioning_scale=0.3)]
    alone = [pipe.generate([request])[0] for request in requests]
    compilations()
    for order in ([0, 1, 2], [2, 1], [1, 0]):
        for i, result in zip(order, pipe.generate([requests[i] for i in order]), strict=True):
            assert result.id == alone[i].id
            assert np.array_equal(result.pixels, alone[i].pixels), (order, i)
    assert compilations() == 0


def test_a_row_of_a_prompt_file_lists_control_images():
    row = {"prompt": "a", "Control_Image": '["a.png", "b.png"]', "controlnet_conditioning_scale": "[0.5, 1]"}
    request, _ = Request.from_row(row)
    assert request == Request(prompt="a", control_image=["a.png", "b.png"], controlnet_conditioning_scale=(0.5, 1))
    assert lines(request.control_image) == ["a.png", "b.png"]
    for wrong in ('["a.png", ', [], [3], "[[1]]", " "):
        with pytest.raises(RequestError, match="control_image"):
            Request(prompt="a", control_image=wrong)


@pytest.mark.slow
def test_the_job_reads_control_images_from_prompt_files(tiny, nets, pipe, tmp_path):
    pictures = [str(tmp_path / name) for name in ("first.png", "second.png")]
    for path, image in zip(pictures, (FIRST, SECOND), strict=True):
        Image.fromarray(image).save(path)
    rows = [
        {"prompt": "a red circle", "seed": 3, "control_image": pictures},
        {"prompt": "a red circle", "seed": 4},
        {"prompt": "a red circle", "control_image": [str(tmp_path / "nowhere.png")] * 2},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    networks = [argument for path in nets[1] for argument in ("--controlnet", str(path))]
    size = ["--width", "48", "--height", "32", "--num-inference-steps", "5"]
    output = ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out"), "--format", "files"]
    assert generate_images.main([*output, "--model", str(tiny), *networks, *size]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["rejected"]) == (2, 1)
    for row in rows[:2]:
        request = Request(**row, width=48, height=32, num_inference_steps=5)
        result = pipe.generate([request])[0]
        (made,) = (tmp_path / "out").rglob(f"{result.id}.png")
        assert difference(np.asarray(Image.open(made)), result.pixels) <= 1


def test_what_a_request_and_a_checkpoint_say(tiny, nets, tmp_path):
    _, paths = nets
    spec, plain = Spec(tiny, controlnets=paths[:1]), Spec(tiny)
    for name in ("a.png", "b.png"):
        Image.fromarray(FIRST).save(tmp_path / name)
    a, b = (spec.resolve(Request(prompt="a", control_image=tmp_path / name)) for name in ("a.png", "b.png"))
    assert (a.width, a.height) == (56, 40)
    assert spec.id(a) == spec.id(b)
    assert spec.resolve(a) == a
    assert spec.fingerprint != plain.fingerprint
    with pytest.raises(RequestError, match="none is loaded"):
        plain.resolve(ONE)
    with pytest.raises(RequestError, match="lists 2 images for 1 ControlNets"):
        spec.resolve(dataclasses.replace(PLAIN, control_image=[FIRST, SECOND]))
    with pytest.raises(RequestError, match=r'lists 1 images for 2 .*, several as \["a.png", "b.png"\]'):
        Spec(tiny, controlnets=paths).resolve(ONE)
    with pytest.raises(RequestError, match="give one number"):
        spec.resolve(dataclasses.replace(ONE, control_guidance_end="0.5,1"))
    with pytest.raises(RequestError, match="control_guidance_start='2'"):
        dataclasses.replace(ONE, control_guidance_start=2)
    with pytest.raises(RequestError, match=r"control_image .* is not there"):
        spec.resolve(dataclasses.replace(PLAIN, control_image="nowhere.png"))


@pytest.mark.parametrize(
    ("change", "sides"),
    [
        ({"block_out_channels": [32, 32]}, "32x1x32, 32x1x32, the model's 32x1x32, 64x1x32"),
        ({"cross_attention_dim": 40}, "32x1x40, 64x1x40, the model's 32x1x32"),
        ({"conditioning_embedding_out_channels": [4, 8, 8]}, "pixels a latent are 4, the model's 2"),
        ({"in_channels": 9}, "latent channels are 9, the model's 4"),
    ],
)
def test_another_width_is_refused_with_both_sides(change, sides, tiny, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    network(0, unet, **change).save_pretrained(tmp_path / "net")
    with pytest.raises(CheckpointError, match=f"net does not fit .*{sides}"):
        Spec(tiny, controlnets=[tmp_path / "net"])

"""Stable Diffusion XL is trained on what diffusers' trainer gives its UNet, and what is exported draws the same."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import encode_latents, verify
from sdjax import text
from sdjax.generate import StableDiffusion
from sdjax.models import clip
from sdjax.models.unet import UNet2DCondition
from sdjax.sampling.schedule import Schedule
from sdjax.spec import Spec
from sdjax.training import config, latents, lora, objective
from sdjax.training.buckets import Buckets
from sdjax.training.config import TrainConfigError
from sdjax.training.data import framed
from sdjax.training.loader import indices
from sdjax.training.loop import Run
from sdjax.training.networks import bind, flat
from sdjax.training.samples import DataError
from sdjax.training.stored import Folder
from sdjax.weights.safetensors import CheckpointError
from tests import checkpoints
from tests.training.runs import ONE

CAPTIONS = ["a red circle", "", "cat " * 9, "a blue star on a white background"]
SIZES = [(40, 24), (24, 24), (32, 48), (25, 64)]  # widths and heights
SIDE = 16
UNSEEN = UNet2DCondition.__call__
REFINER = diffusers.StableDiffusionXLImg2ImgPipeline


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl") / "model"
    checkpoints.saved(folder, checkpoints.pipeline_xl)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, (size, caption) in enumerate(zip(SIZES, CAPTIONS, strict=True)):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def settings(folder, xl, pictures, **changes):
    options = {"diffusion": config.Diffusion(caption_dropout=0.0), "checkpoint_every": 2, "log_every": 1, **changes}
    data = config.Data(folder=str(pictures), size=SIDE)
    shared = {"task": "unet", "output": str(folder / "run"), "init": str(xl), "steps": 2, "batch_size": 4}
    return config.Train(**{"data": data, **shared, **options})


@pytest.fixture(scope="module")
def run(xl, pictures, tmp_path_factory):
    return Run(settings(tmp_path_factory.mktemp("run"), xl, pictures), ONE)


def given(run):
    """What the first step is given, and which of the pictures those are."""
    [batch] = next(run._batches(0, None))["place"]  # of one device
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], next(run._batches(0, None)))
    assert batch.shape == (1, 4)
    return arrays


def test_a_batch_has_each_pictures_sizes(run):
    arrays = given(run)
    wanted = {  # original height and width, the corner of the cut: the shorter side is 16 when it is made
        "a red circle": (24, 40, 0, 5),
        "": (24, 24, 0, 0),
        ("cat " * 9).strip(): (48, 32, 4, 0),
        "a blue star on a white background": (64, 25, 12, 0),
    }
    source = run.pictures
    order = [source.caption(i, np.random.default_rng(0)) for i in range(4)]
    chosen = sorted(tuple(row) for row in arrays["time_ids"].astype(int))
    assert chosen == sorted((*wanted[caption], SIDE, SIDE) for caption in order)
    assert arrays["ids"].shape == (4, 2, run.networks.tokenizers()[0](["x"])[0].shape[1])
    assert sorted(arrays["is_zero"]) == [False, False, False, True]


def test_a_bucket_is_the_target_that_a_batch_is_told(run):
    """Beside each picture's own sizes, and the corner of the cut where it is scaled to cover the bucket."""
    run.pictures.buckets = Buckets([(24, 16), (16, 16)], np.array([1, 1, 0, 0]))
    try:
        batches = [next(run._batches(step, None)) for step in range(2)]
    finally:
        run.pictures.buckets = None
    wanted = {(24, 40, 0, 5, 16, 16), (24, 24, 0, 0, 16, 16), (48, 32, 0, 0, 24, 16), (64, 25, 8, 0, 24, 16)}
    assert {tuple(row) for batch in batches for row in np.asarray(batch["time_ids"])[0, 0].astype(int)} == wanted
    assert {batch["pixels"].shape[3:5] for batch in batches} == {(24, 16), (16, 16)}


@pytest.mark.parametrize("most", [1, 2, 8])
def test_a_long_caption_is_read_in_chunks_as_prompts_are(run, monkeypatch, most):
    captions = ["a blue star on white, " * 20, "a red circle", "", "cat " * 90]
    monkeypatch.setattr(run.pictures, "caption", lambda index, _: captions[index])
    data = dataclasses.replace(run.config.data, caption_chunks=most)
    monkeypatch.setattr(run, "config", dataclasses.replace(run.config, data=data))
    tokenizers, order = run.networks.tokenizers(), indices(0, 4, 4, 0)
    read = [text.encode(tokenizers, [(captions[index], "")] * 2, "a1111").ids[:, 0] for index in order]
    count = max(ids.shape[1] for ids in read)
    assert count == 5
    arrays = given(run)
    ids = arrays["ids"]
    losses, _ = jax.eval_shape(run._objective(), {}, run.networks.params, arrays, jax.random.key(0))
    assert losses.shape == (4,)
    if most == 1:
        plain = [tokenizer([captions[index] for index in order])[0] for tokenizer in tokenizers]
        np.testing.assert_array_equal(ids, np.stack(plain, axis=1))
        return
    assert ids.shape == (4, 2, min(most, count), 77)
    for found, wanted in zip(ids, read, strict=True):
        np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted[:, : ids.shape[2]])
    monkeypatch.setattr(run.pictures, "caption", lambda index, _: captions[index % 2 + 1])
    assert given(run)["ids"].shape == (4, 2, 1, 77)


def test_corners_are_those_of_diffusers_trainer(pictures):
    """Which resizes the shorter side by torchvision, as int(size * long / short), and cuts the centre."""
    source = Folder(str(pictures), SIDE)
    for i, (width, height) in enumerate(SIZES):
        _, frame = framed(source, i)
        short = min(width, height)
        resized = int(SIDE * height / short), int(SIDE * width / short)
        assert frame == (height, width, *(max(0, round((side - SIDE) / 2.0)) for side in resized))


def test_the_loss_is_that_of_diffusers_trainer(run, xl):
    """The same latents, noise and timesteps through diffusers' networks, put together as its trainer of SDXL does."""
    arrays = given(run)
    batch = {name: jnp.asarray(leaf) for name, leaf in arrays.items()}
    seen = {}

    def recorded(unet, x, t, context, added):
        seen.update(x=x, t=t, output=UNSEEN(unet, x, t, context, added))
        return seen["output"]

    schedule = Schedule.from_config(run.networks.scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DCondition, "__call__", recorded)
        losses, _ = run._objective()({}, jax.tree.map(jnp.asarray, run.networks.params), batch, jax.random.key(3))

    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(xl)
    by_frame = {(*size[::-1],): caption for size, caption in zip(SIZES, CAPTIONS, strict=True)}
    captions = [by_frame[tuple(row[:2].astype(int))] for row in arrays["time_ids"]]
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    for i, caption in enumerate(captions):
        if not caption:  # zeros, as for an empty negative prompt
            states[i], pooled[i] = 0, 0
    x = torch.tensor(np.asarray(seen["x"])).permute(0, 3, 1, 2)
    told = {"text_embeds": pooled, "time_ids": torch.tensor(arrays["time_ids"])}
    with torch.no_grad():
        output = pipeline.unet(x, torch.tensor(np.asarray(seen["t"])), states, added_cond_kwargs=told).sample
        pixels = torch.tensor(arrays["pixels"]).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = pipeline.vae.encode(pixels).latent_dist
    np.testing.assert_allclose(seen["output"], output.permute(0, 2, 3, 1), atol=1e-4)
    # What is left of the noisy latent when the noise that the UNet should have said is taken off is the latent.
    alpha = np.sqrt(schedule.alphas_cumprod)[np.asarray(seen["t"]).astype(int)][:, None, None, None]
    key_latent, _, key_noise, _ = jax.random.split(jax.random.key(3), 4)
    noise, drawn = (
        np.asarray(objective._normal(key, batch["place"], seen["x"].shape[1:])) for key in (key_noise, key_latent)
    )
    mean, deviation = (part.permute(0, 2, 3, 1).numpy() for part in (posterior.mean, posterior.std))
    latent = (mean + deviation * drawn) * 0.13025
    np.testing.assert_allclose(seen["x"], alpha * latent + np.sqrt(1 - alpha**2) * noise, atol=1e-4)
    expected = np.square(output.permute(0, 2, 3, 1).numpy() - noise).mean((1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def same(networks, expected):
    for name in ("unet", "text_encoder", "text_encoder_2"):
        for key, leaf in flat(networks[name]).items():
            np.testing.assert_allclose(leaf[0], expected[name][key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_run_leaves_what_draws(xl, pictures, tmp_path):
    """A LoRA of the UNet and both text encoders, whose sheet is drawn on the way."""
    whole = settings(
        tmp_path,
        xl,
        pictures,
        lora=config.Lora(rank=2),
        data=config.Data(folder=str(pictures), size=SIDE, cache_latents=True),
        diffusion=config.Diffusion(train_text_encoder=True),
        sheet_prompts=("a red circle",),
        sheet_every=2,
    )
    run = Run(whole, ONE)
    assert run.train()
    assert (tmp_path / "run" / "sheets" / "000002.png").exists()
    moved = {name: {key for key, leaf in own.items() if np.any(leaf)} for name, own in run.state.params.items()}
    last = "text_model.encoder.layers.2."  # of three, whose states the UNet is not told
    assert moved["unet"] == run.state.params["unet"].keys()
    assert moved["text_encoder_2"] == run.state.params["text_encoder_2"].keys()
    assert {key for key in run.state.params["text_encoder"] if not key.startswith(last)} <= moved["text_encoder"]
    run.export(tmp_path / "lora")
    pipe = StableDiffusion.from_pretrained(xl, loras=[tmp_path / "lora"], devices=jax.devices()[:1])
    same(pipe._networks, lora.joined(run.networks.params, run.state.ema))


def test_the_whole_model_is_one_that_diffusers_reads(xl, pictures, tmp_path):
    run = Run(settings(tmp_path, xl, pictures, diffusion=config.Diffusion(train_text_encoder=True)), ONE)
    average = {network: {key: leaf + 0.01 for key, leaf in own.items()} for network, own in run.state.params.items()}
    run.state = run.state._replace(step=np.int32(1), ema=average)
    run.export(tmp_path / "model")
    pipe = StableDiffusion.from_pretrained(tmp_path / "model", devices=jax.devices()[:1])
    same(pipe._networks, average)
    assert pipe.spec.family == Spec(xl).family
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    assert theirs.config.force_zeros_for_empty_prompt
    weight = theirs.text_encoder_2.text_projection.weight.detach().numpy()
    np.testing.assert_allclose(weight.T, average["text_encoder_2"]["text_projection.kernel"], atol=1e-6)


def test_latents_made_beforehand_keep_their_frames(xl, pictures, tmp_path):
    whole = settings(tmp_path, xl, pictures)
    cached = Run(dataclasses.replace(whole, data=dataclasses.replace(whole.data, cache_latents=True)), ONE)
    cached.folder.mkdir()
    for _ in range(2):  # made, and read
        found = next(cached._batches(0, latents.cached(cached)))
        expected = next(Run(whole, ONE)._batches(0, None))
        for name in ("time_ids", "is_zero", "ids"):
            np.testing.assert_array_equal(found[name], expected[name])
    (cached.folder / "frames.npy").unlink()
    assert len(latents.cached(cached).frames) == 4


def test_what_is_not_the_base_is_refused(tmp_path, xl, pictures):
    refiner = tmp_path / "refiner"
    checkpoints.saved(refiner, checkpoints.pipeline_xl, kind=REFINER, requires_aesthetics_score=True)
    with pytest.raises(CheckpointError, match="refiner is Stable Diffusion XL's refiner; its base can be"):
        Run(settings(tmp_path, refiner, pictures), ONE)
    editing = tmp_path / "editing"
    checkpoints.saved(editing, checkpoints.pipeline_xl, unet={"in_channels": 8})
    with pytest.raises(DataError, match=r"needs a metadata.jsonl that says each image's conditioning_image_file_name"):
        Run(settings(tmp_path, editing, pictures), ONE)
    tokenizer = config.Model(tokenizer={"merges": 10, "max_length": 20})
    with pytest.raises(TrainConfigError, match=r"model.tokenizer does not go with the UNet of .*, Stable Diffusion XL"):
        Run(settings(tmp_path, xl, pictures, model=tokenizer), ONE)


@pytest.fixture(scope="module")
def encoded(xl, pictures, tmp_path_factory):
    """The pictures as encode_latents writes them."""
    output = tmp_path_factory.mktemp("encoded") / "latents"
    arguments = ["--images", str(pictures), "--model", str(xl), "--size", str(SIDE), "--output", str(output)]
    assert encode_latents.main(arguments) == 0
    assert verify.main([str(output)]) == 0
    return output


def test_what_is_encoded_beforehand_is_what_pictures_would_be_trained_on(xl, pictures, encoded, tmp_path, run):
    """Latents, states, pooled vectors and sizes by `encode_latents`, as the pictures' own step computes them."""
    whole = settings(tmp_path, xl, pictures, data=config.Data(latents=str(encoded)))
    ahead = Run(whole, ONE)
    assert ahead.frozen.keys() == set()
    given_ahead = jax.tree.map(lambda leaf: np.asarray(leaf)[0, 0], next(ahead._batches(0, None)))
    arrays = given(run)
    modules, params = run.networks.modules, jax.tree.map(jnp.asarray, run.networks.params)
    networks = {name: bind(module, params[name]) for name, module in modules.items()}
    encoders = [networks[name] for name in run.networks.text_encoders]
    states, pooled = clip.read(encoders, jnp.asarray(arrays["ids"]), is_xl=True)
    moments = jnp.concatenate(networks["vae"].encode(objective.to_unit(jnp.asarray(arrays["pixels"]))), axis=-1)
    place = {tuple(row): i for i, row in enumerate(arrays["time_ids"])}  # all four have different sizes
    order = [place[tuple(row)] for row in given_ahead["time_ids"]]
    wanted = {"context": states, "pooled": pooled, "moments": moments, "is_zero": arrays["is_zero"]}
    for name, expected in wanted.items():
        found = np.asarray(expected)[order]
        np.testing.assert_allclose(given_ahead[name], found, atol=4e-3, rtol=2e-3, err_msg=name)


def test_a_run_on_latents_goes_to_its_end(xl, pictures, encoded, tmp_path):
    data, dropped = config.Data(latents=str(encoded)), config.Diffusion(caption_dropout=0.5)
    run = Run(settings(tmp_path, xl, pictures, data=data, diffusion=dropped, lora=config.Lora(rank=2)), ONE)
    assert run.train()
    assert all(np.any(factor) for factor in run.state.params["unet"].values())
    other, parts = tmp_path / "other", "text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae"
    checkpoints.saved(other, checkpoints.pipeline_xl, seed=5)
    with pytest.raises(TrainConfigError, match=f"not encoded by the {parts} of"):
        Run(settings(tmp_path, other, pictures, data=data), ONE)

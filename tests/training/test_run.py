"""Whole runs of tiny networks: killed and resumed, stopped, started from, and what each option changes."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import CLIPTokenizer

from sdjax import compile_cache, files, train
from sdjax.generate import StableDiffusion
from sdjax.parallel import Devices
from sdjax.request import Request
from sdjax.training import config, loop, networks, start
from sdjax.training.config import TrainConfigError
from sdjax.training.data import open_source
from sdjax.training.loop import Run
from sdjax.training.step import State
from sdjax.training.tokenizer import train_tokenizer
from tests.training.runs import ONE, begin, losses, weights, write


def _command(*options):
    # On a CPU that is busy otherwise, XLA's threads may add up in another order; one thread always gives the same bits.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", "sdjax.train", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _wait_for_rows(folder, count, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.csv").exists() and len(losses(folder)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = _command("--config", str(write(folder, prompts=["a red circle", "a blue star"])))
    assert process.wait() == 0, process.communicate()[1]
    return folder / "run"


def test_a_run_leaves_its_numbers_pictures_and_model(whole):
    rows = losses(whole)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert {"loss", "error", "gradient_norm", "learning_rate"} < set(rows[0])
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert list((whole / "tensorboard").glob("events*"))
    assert [path.name for path in (whole / "sheets").glob("*.png")] == ["000008.png"]
    pipe = StableDiffusion.from_pretrained(whole / "model", devices=jax.devices()[:1])
    assert pipe.generate([Request(prompt="a red circle", num_inference_steps=2)])[0].pixels.shape == (16, 16, 3)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path):
    path = write(tmp_path)
    process = _command("--config", str(path))
    _wait_for_rows(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model").exists()
    assert _command("--config", str(path)).wait() == 0
    assert losses(tmp_path / "run") == losses(whole)
    again = weights(tmp_path / "run" / "model")
    for network, tensors in weights(whole / "model").items():
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(again[network][key], tensor, err_msg=key)


def test_a_stopped_run_writes_a_checkpoint(tmp_path):
    path = write(tmp_path, "vae")
    process = _command("--config", str(path), "--steps", "100000")
    _wait_for_rows(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    last = int(losses(tmp_path / "run")[-1]["step"])
    assert f"stopped at step {last}" in errors
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()
    run = Run(config.load(path), ONE)
    assert int(run.state.step) == last


def test_a_run_stopped_before_its_first_step_is_one_line(tmp_path, capsys, monkeypatch):
    kept = []

    def interrupted(_):
        assert kept  # compiled programs are, of which a run that goes on would else wait for all
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_cache, "use", lambda: kept.append(True))
    monkeypatch.setattr(loop, "Run", interrupted)
    assert train.main(["--config", str(write(tmp_path))]) == 130
    assert capsys.readouterr().err == "python -m sdjax.train: interrupted before the first step\n"


@pytest.mark.parametrize("ends", [True, False])
def test_signals_are_the_callers_again_after_a_run(tmp_path, monkeypatch, ends):
    class Made:
        state = State(np.int32(1), {}, {}, ())

        def __init__(self, _):
            pass

        def train(self, stop):
            signal.raise_signal(signal.SIGTERM)
            assert stop.is_set()
            # The second ends the process at once.
            assert {signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
            return False if ends else 1 / 0

    monkeypatch.setattr(loop, "Run", Made)
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.suppress(ZeroDivisionError):
        assert train.main(["--config", str(write(tmp_path))]) == 130
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_checkpoint_can_be_exported_and_started_from(whole, tmp_path):
    """--export writes the average; a new run from it has its networks, and trains the VAE alone."""
    options = ["--config", str(write(tmp_path)), "--output", str(whole), "--export", str(tmp_path / "half")]
    assert _command(*options, "--export-dtype", "float16").wait() == 0
    exported, model = weights(tmp_path / "half"), weights(whole / "model")
    for network, tensors in model.items():
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(exported[network][key], tensor.astype(np.float16))
    loaded = config.load(write(tmp_path, "vae"), init=str(whole / "model"), output=str(tmp_path / "other"))
    run = Run(dataclasses.replace(loaded, model=config.Model()), ONE)
    assert set(run.networks.modules) == {"vae"}
    np.testing.assert_array_equal(run.state.params["vae"]["decoder.conv_in.bias"], model["vae"]["decoder.conv_in.bias"])


def test_a_decoder_trained_alone_still_reads_the_same_latents(whole, tmp_path):
    loaded = config.load(write(tmp_path, "vae"), init=str(whole / "model"), output=str(tmp_path / "other"), steps=2)
    alone = dataclasses.replace(loaded.reconstruction, decoder_only=True)
    run = Run(dataclasses.replace(loaded, model=config.Model(), reconstruction=alone), ONE)
    run.train()
    run.export(tmp_path / "model")
    before, after = weights(whole / "model")["vae"], weights(tmp_path / "model")["vae"]
    same = {key: np.allclose(tensor, before[key], rtol=1e-6) for key, tensor in after.items()}  # averaging rounds
    changed = {key.split(".")[0] for key in same if not same[key]}
    assert changed == {"decoder", "post_quant_conv"}
    told = [json.loads((folder / "model" / "vae" / "config.json").read_text()) for folder in (whole, tmp_path)]
    assert told[0].get("scaling_factor") == told[1].get("scaling_factor")


def test_the_objective_and_the_loader_are_told_what_the_configuration_says(tmp_path, monkeypatch):
    loaded = config.load(write(tmp_path, cache="false"))
    loaded = dataclasses.replace(loaded, diffusion=dataclasses.replace(loaded.diffusion, caption_dropout=0.375))
    loaded = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, flip=True))
    made = SimpleNamespace(
        modules={},
        scheduler={},
        tokenizers=list,
        text_encoders=(),
        xl=None,
        inpaints=False,
        edits=False,
        configs={"vae": {"scaling_factor": 0.625}},
    )
    run = SimpleNamespace(config=loaded, devices=ONE, networks=made, source=None, _conditioned=False)
    told = {}
    monkeypatch.setattr(loop.objective, "denoising", lambda *_, **options: told.update(options))
    Run._objective(run)
    assert told["scaling_factor"] == 0.625

    class Reached(Exception):
        pass

    def loader(*_, **options):
        told.update(options)
        raise Reached

    monkeypatch.setattr(loop, "Loader", loader)
    with pytest.raises(Reached):
        next(Run._batches(run, 0, None))
    assert told["caption_dropout"] == 0.375
    assert told["flip"] is True


def _gradients(folder, devices=ONE, dtype="float32", text=True, accumulate=1):
    """The gradients of a run's first step, by network: a tenth of them is Adam's first moment."""
    loaded = config.load(write(folder, cache="false"), steps=1)
    changed = dataclasses.replace(
        loaded,
        batch_size=32,
        dtype=dtype,
        diffusion=dataclasses.replace(loaded.diffusion, train_text_encoder=text),
        optimizer=dataclasses.replace(loaded.optimizer, clip_norm=0.0, accumulate=accumulate),
    )
    run = Run(changed, devices)
    # What starts at zero would hide the gradients of what comes before it.
    for name, leaf in run.state.params["unet"].items():
        if not leaf.any() and name.endswith("kernel"):
            run.state.params["unet"][name] = 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape)
    run.train()
    return optax.tree_utils.tree_get(run.state.optimizer, "mu")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    return _gradients(tmp_path_factory.mktemp("plain"))


def _distance(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        ({"devices": Devices(), "accumulate": 4}, 0, 1e-4),
        ({"dtype": "bfloat16"}, 1e-3, 0.04),
    ],
    ids=["eight devices, four parts", "bfloat16"],
)
def test_the_gradient_of_a_step(gradients, tmp_path, change, least, most):
    changed = _gradients(tmp_path, **change)
    assert least <= _distance(gradients, changed) < most
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(changed))


def test_networks_are_made_as_the_configuration_says(tmp_path, monkeypatch):
    """A frozen VAE computes in float32 whatever the rest does."""
    told = {}

    def standin(name):
        class Network(nnx.Module):
            def __init__(self, config, *, rngs, **options):
                told[name] = options

        return Network

    kinds = {name: (kind, standin(name)) for name, (kind, _) in start._KINDS.items()}
    monkeypatch.setattr(start, "_KINDS", kinds)
    monkeypatch.setattr(start, "_started", lambda name, params: params)
    for remat in (False, True):
        loaded = dataclasses.replace(config.load(write(tmp_path)), remat=remat, dtype="bfloat16")
        start.prepare(loaded, open_source(loaded.data), None)
        assert told["unet"]["remat"] == remat
    assert {name: str(options["dtype"]) for name, options in told.items()} == {
        "vae": "float32",
        "text_encoder": "bfloat16",
        "unet": "bfloat16",
    }


def test_a_new_text_encoder_fits_a_tokenizer_in_either_form(tmp_path):
    size = train_tokenizer(["a red circle"] * 9, 20, 12, tmp_path / "files")
    CLIPTokenizer.from_pretrained(tmp_path / "files").save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "vocab.json").exists()
    fitted = [
        networks.fitted({}, {f"tokenizer/{path.name}": path.read_text() for path in folder.iterdir()})
        for folder in (tmp_path / "files", tmp_path / "one")
    ]
    assert fitted[0] == fitted[1]
    assert (fitted[0]["vocab_size"], fitted[0]["max_position_embeddings"]) == (size, 12)
    assert (fitted[0]["bos_token_id"], fitted[0]["eos_token_id"]) == (size - 2, size - 1)


def test_the_text_encoder_is_trained_only_if_asked(gradients, tmp_path):
    frozen = _gradients(tmp_path, text=False)
    assert set(gradients) == {"unet", "text_encoder"}
    assert np.abs(gradients["text_encoder"]["text_model.embeddings.token_embedding.embedding"]).max() > 0
    assert set(frozen) == {"unet"}
    assert _distance(gradients["unet"], frozen["unet"]) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "s/batch_size = 4/batch_size = 3/",
            "batch_size is 3; 8 devices and optimizer.accumulate 1 need a multiple of 8",
        ),
        ("s/cross_attention_dim = 8/cross_attention_dim = 9/", "model.unet.cross_attention_dim must be 8"),
        ("s/sample_size = 8/in_channels = 5/", "model.unet must have in_channels and out_channels 4"),
        ("s/merges = 100/mergez = 100/", "model.tokenizer"),
        ("s/merges = 100/merges = -600/", "model.tokenizer takes merges, 0 to 1,000,000, max_length"),
        ('s/_class_name = "DDIMScheduler"//', 'the scheduler has no _class_name; "DDIMScheduler" is one'),
        ("s/[model.scheduler]/[model.other]/", "model.other is no option"),
        ("s/norm_num_groups = 4/norm_num_groups = 3/", "norm_num_groups=3"),
        ("s/scaled_linear/cubic/", "beta_schedule='cubic'"),
        ("s/size = 16/size = 17/", "data.size is 17; the vae needs a multiple of 2"),
        ("s/sheet_prompts = []/sheet_prompts = ['a <lora:x:1>']/", "sheet_prompts: prompt has '<lora:x:1>'"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, change, message):
    path = write(tmp_path)
    _, old, new, _ = change.split("/")
    assert old in path.read_text()
    text = path.read_text().replace(old, new, 1)
    path.write_text(text if "batch_size" in old else text.replace("batch_size = 4", "batch_size = 8"))
    assert train.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_stays_that_was_there_before_a_run_that_cannot_start(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("batch_size = 4", "batch_size = 3"))
    (tmp_path / "run").mkdir()
    assert train.main(["--config", str(path)]) == 2
    assert (tmp_path / "run").exists()


def test_a_run_of_another_configuration_does_not_go_on(tmp_path):
    begun = begin(tmp_path)
    begun.config = dataclasses.replace(begun.config, steps=1)
    begun.checkpoints.save(begun.state)
    assert begun.train()
    assert int(Run(begun.config, ONE).state.step) == 1
    with pytest.raises(TrainConfigError, match="seed 0, not 1; name another --output"):
        Run(dataclasses.replace(begun.config, seed=1), ONE)


def test_an_output_that_is_a_file_is_one_line(tmp_path, capsys):
    path = write(tmp_path, "vae", cache="false")
    path.write_text(path.read_text().replace("batch_size = 4", "batch_size = 8"))
    for output in (path, path / "below"):
        assert train.main(["--config", str(path), "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "Devices", lambda: ONE)
    path = write(tmp_path, "vae")
    output = Path(config.load(path).output)
    monkeypatch.setattr(loop, "Run", None)  # what the first writes last is not read before it has ended
    with files.held(output, "the first"):
        assert train.main(["--config", str(path)]) == 2
    assert f"another run is writing to {output}; wait until it has ended, or name another" in capsys.readouterr().err
    assert not any(output.iterdir())


def test_an_empty_option_is_no_default(tmp_path, capsys):
    assert train.main(["--config", str(write(tmp_path)), "--init", ""]) == 2
    assert capsys.readouterr().err == "python -m sdjax.train: --init is empty; give it a value, or leave it out\n"

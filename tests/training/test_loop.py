"""A run's loop: what stops it and what it leaves then, with steps that only count themselves."""

import dataclasses
import re
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax import train
from sdjax.parallel import Devices
from sdjax.training import config, loop, progress
from sdjax.training.loader import indices
from sdjax.training.loop import Run
from sdjax.training.samples import DataError
from sdjax.training.step import State
from tests.training import runs
from tests.training.runs import ONE, write


@pytest.fixture
def counted(monkeypatch):
    """Steps that only count themselves, with the losses that are set here, by step; no sheets, no signal handlers."""
    losses = {}

    def step(state, frozen, batch):
        number = int(state.step[0]) + 1
        return state._replace(step=state.step + 1), {"loss": np.array([losses.get(number, 0.5)])}

    monkeypatch.setattr(loop, "make_step", lambda *_, **__: step)
    monkeypatch.setattr(loop, "Sheet", lambda _: SimpleNamespace(write=lambda _: None))
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    return losses


def _change(path, **lines):
    text = path.read_text()
    for key, value in lines.items():
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    path.write_text(text)
    return path


def _checkpoints(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_what_one_bad_picture_stops_goes_on_where_it_is_mended(tmp_path, capsys, counted):
    pictures = tmp_path / "set"
    pictures.mkdir()
    for number in range(24):
        Image.new("RGB", (16, 16)).save(pictures / f"{number:02d}.png")
    bad = pictures / f"{indices(2, 8, 24, 0)[0]:02d}.png"
    bad.write_bytes(b"no picture")
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8, checkpoint_every=100, log_every=50, steps=4)
    path.write_text(re.sub("generator = .*\noptions = .*", f'folder = "{pictures}"', path.read_text()))
    for _ in range(2):
        assert train.main(["--config", str(path)]) == 1
        error = capsys.readouterr().err
        assert f"{bad} is no picture" in error
        assert error.endswith("; once that is mended, the same command goes on\n")
        assert "Traceback" not in error
        assert _checkpoints(tmp_path / "run") == [2]
        assert [int(row["step"]) for row in runs.losses(tmp_path / "run")] == [1, 2]
    Image.new("RGB", (32, 32), "red").save(bad)
    assert train.main(["--config", str(path)]) == 0
    assert [int(row["step"]) for row in runs.losses(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_unets_pictures_need_captions_and_a_vaes_do_not(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "a.png")
    for task in ("unet", "vae"):
        path = write(tmp_path, task, cache="false")
        path.write_text(re.sub("generator = .*\noptions = .*", f'folder = "{tmp_path / "set"}"', path.read_text()))
    with pytest.raises(DataError, match=r"a\.txt is not there"):
        Run(config.load(tmp_path / "unet.toml"), ONE)
    assert len(Run(config.load(tmp_path / "vae.toml"), ONE).pictures) == 1


@pytest.mark.parametrize(("fault", "status"), [("RESOURCE_EXHAUSTED: Out of memory\nin all", 1), ("INTERNAL: x", None)])
def test_a_step_that_no_device_has_memory_for_is_one_line(tmp_path, capsys, monkeypatch, counted, fault, status):
    def step(*_):
        raise jax.errors.JaxRuntimeError(fault)

    monkeypatch.setattr(loop, "make_step", lambda *_, **__: step)
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8)
    if status is None:
        with pytest.raises(jax.errors.JaxRuntimeError):
            train.main(["--config", str(path)])
    else:
        assert train.main(["--config", str(path)]) == status
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("python -m sdjax.train: the devices have too little memory; a larger optimizer.acc")


def test_a_loss_that_is_no_number_is_not_saved(tmp_path, capsys, counted):
    counted[4] = np.nan
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8, checkpoint_every=2)
    assert train.main(["--config", str(path)]) == 1
    assert "the loss is nan at step 4" in capsys.readouterr().err
    assert _checkpoints(tmp_path / "run") == [2]


@pytest.mark.parametrize("kind", ["params", "ema", "optimizer"])
def test_weights_that_are_no_numbers_are_neither_saved_nor_exported(tmp_path, capsys, monkeypatch, counted, kind):
    """Their loss is finite: it is from before the update."""
    counting = loop.make_step

    def overflowing(*arguments, **options):
        count = counting(*arguments, **options)

        def step(state, frozen, batch):
            state, row = count(state, frozen, batch)
            spoilt = jax.tree.map(lambda leaf: leaf + np.float32(np.inf), getattr(state, kind))
            return state._replace(**{kind: spoilt}) if state.step[0] == 5 else state, row

        return step

    monkeypatch.setattr(loop, "make_step", overflowing)
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8, checkpoint_every=1, steps=5)
    for _ in range(2):
        assert train.main(["--config", str(path)]) == 1
        assert re.search(rf"{kind} .*is not finite after step 5", capsys.readouterr().err)
        assert _checkpoints(tmp_path / "run") == [3, 4]
        assert not (tmp_path / "run" / "model").exists()


def test_a_run_beyond_the_steps_that_are_asked_is_said_to_be(tmp_path, capsys, counted):
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8, steps=5)
    assert train.main(["--config", str(path)]) == 0
    written = sorted((tmp_path / "run").rglob("*"))
    capsys.readouterr()
    assert train.main(["--config", str(path), "--steps", "3"]) == 2
    assert capsys.readouterr().err.endswith(
        f"{tmp_path / 'run'} has taken 5 steps, and steps is 3; --export writes the model that it has come to\n"
    )
    assert sorted((tmp_path / "run").rglob("*")) == written
    assert train.main(["--config", str(path), "--steps", "3", "--export", str(tmp_path / "model")]) == 0
    assert train.main(["--config", str(path)]) == 0


def test_the_time_of_a_sheet_is_no_steps(tmp_path, monkeypatch, counted):
    clock, speeds, counting = [0.0], [], loop.make_step

    def taking(seconds, call=lambda *_: None):
        def timed(*arguments):
            clock[0] += seconds
            return call(*arguments)

        return timed

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(loop, "make_step", lambda *_, **__: taking(1, counting()))
    monkeypatch.setattr(loop, "Sheet", lambda _: SimpleNamespace(write=taking(99)))
    monkeypatch.setattr(progress.Metrics, "write", lambda _, rows, speed: speeds.append(speed))
    path = _change(write(tmp_path, "vae", cache="false"), batch_size=8, checkpoint_every=9)
    _change(path, steps=5, log_every=5, sheet_every=3)
    assert train.main(["--config", str(path)]) == 0
    assert speeds == [8, 8]


def test_without_an_average_none_is_kept_and_the_last_is_exported(tmp_path, counted):
    path = _change(write(tmp_path, "vae", cache="false"), ema_decay=0, batch_size=8)
    assert train.main(["--config", str(path)]) == 0
    run = Run(config.load(path), ONE)
    assert int(run.state.step) == 8
    assert not run.state.ema
    exported = runs.weights(tmp_path / "run" / "model")["vae"]["decoder.conv_in.bias"]
    np.testing.assert_array_equal(exported, run.state.params["vae"]["decoder.conv_in.bias"])


def test_a_step_begins_when_the_one_before_the_last_is_done(tmp_path, monkeypatch, counted):
    """Else as many run ahead as devices queue, and what stops the run waits for all of them."""
    seen, counting = [], loop.make_step

    class Loss(np.ndarray):
        def block_until_ready(self):
            seen.append(("done", int(self[0])))

    def make_step(*_, **__):
        count = counting()

        def step(state, frozen, batch):
            state, _ = count(state, frozen, batch)
            seen.append(("begun", int(state.step[0])))
            return state, {"loss": np.array([state.step[0]], np.float32).view(Loss)}

        return step

    monkeypatch.setattr(loop, "make_step", make_step)
    path = _change(write(tmp_path, "vae", cache="false"), checkpoint_every=9, log_every=9, steps=4)
    assert Run(config.load(path), ONE).train()
    begun = [("begun", 1), *((what, number - (what == "done")) for number in (2, 3, 4) for what in ("begun", "done"))]
    assert seen[: len(begun)] == begun


@pytest.mark.parametrize(("prompts", "fetched"), [((), [4]), (("a star",), [2, 4])])
def test_a_state_is_fetched_where_something_is_made_of_it(tmp_path, monkeypatch, counted, prompts, fetched):
    steps, fetch = [], Run._fetch
    monkeypatch.setattr(Run, "_fetch", lambda run, state: steps.append(int(state.step[0])) or fetch(run, state))
    path = write(tmp_path, cache="false", prompts=prompts)
    assert Run(config.load(_change(path, checkpoint_every=9, sheet_every=2, steps=4)), ONE).train()
    assert steps == fetched


def test_fetching_a_state_compiles_nothing_and_lets_go_of_the_one_before(compilations):
    class Watched(np.ndarray):
        pass

    before = np.zeros(3, np.float32).view(Watched)
    alive, devices = weakref.ref(before), Devices()
    run = SimpleNamespace(state=State(np.int32(0), {"a": {"b": before}}, {}, ()))
    state = jax.tree.map(devices.replicate, State(np.array(7, np.int32), {"a": {"b": np.ones((3, 7, 13))}}, {}, ()))
    finite = np.isfinite
    del before
    compilations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "isfinite", lambda leaf: finite(leaf) if alive() is None else pytest.fail("two are held"))
        Run._fetch(run, state)
    assert not compilations()
    assert int(run.state.step) == 7
    np.testing.assert_array_equal(run.state.params["a"]["b"], np.ones((3, 7, 13)))
    assert run.state.params["a"]["b"].flags.owndata or run.state.params["a"]["b"].base.flags.owndata


def test_as_many_checkpoints_are_kept_as_asked(tmp_path, counted):
    path = _change(write(tmp_path, "vae", cache="false"), checkpoint_every=1, steps=5)
    run = Run(dataclasses.replace(config.load(path), keep_checkpoints=3), ONE)
    assert run.train()
    assert _checkpoints(tmp_path / "run") == [3, 4, 5]

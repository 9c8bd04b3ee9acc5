"""What a run writes as a model: its average, in place of a model and of nothing else."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from sdjax import train
from sdjax.training.config import TrainConfigError
from sdjax.weights import checkpoint
from tests.training.runs import begin, weights, write


@pytest.fixture
def begun(tmp_path):
    return begin(tmp_path)


def test_an_export_replaces_a_model_and_nothing_else(begun, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    for path in (tmp_path / "work", tmp_path / "vae.toml"):
        with pytest.raises(TrainConfigError, match="holds something other than a model"):
            begun.export(path)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    folder.mkdir()
    begun.export(folder)
    (folder / "README.md").write_text("my card")
    (folder / "vae" / "older.bin").write_text("")
    begun.export(folder)
    assert (folder / "README.md").read_text() == "my card"
    assert not (folder / "vae" / "older.bin").exists()
    here = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(begun.networks, "export", full)
    with pytest.raises(OSError, match="No space"):
        begun.export(folder)
    assert (folder / "model_index.json").exists()
    assert sorted(tmp_path.iterdir()) == here


def test_a_model_that_a_kill_left_between_two_names_is_found_again(begun, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    begun.export(folder)
    (folder / "README.md").write_text("my card")
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            begun.export(folder)
    assert not folder.exists()
    begun.export(folder)
    assert (folder / "README.md").read_text() == "my card"
    assert not list(tmp_path.glob(".model.*"))


def test_what_a_kill_left_half_written_goes_with_the_next_export(begun, tmp_path, monkeypatch):
    def killed(path, _):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as a kill lets nothing be tidied
        with pytest.raises(KeyboardInterrupt):
            begun.export(tmp_path / "model")
    assert list(tmp_path.glob(".*/**/*.safetensors"))
    begun.export(tmp_path / "model")
    assert not list(tmp_path.glob(".*"))


def test_what_is_exported_is_the_average(begun, tmp_path):
    begun.export(tmp_path / "model")
    average = np.asarray(begun.state.ema["vae"]["decoder.conv_in.bias"])
    np.testing.assert_array_equal(weights(tmp_path / "model")["vae"]["decoder.conv_in.bias"], average)


@pytest.mark.parametrize(("target", "message"), [("new", "holds no checkpoint"), ("used", "other than a model")])
def test_what_cannot_be_exported_is_one_line(tmp_path, capsys, target, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "picture.png").write_bytes(b"")
    path = write(tmp_path, "vae", cache="false")
    path.write_text(path.read_text().replace("batch_size = 4", "batch_size = 8"))
    assert train.main(["--config", str(path), "--export", str(tmp_path / target)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "used").iterdir()) == ["picture.png"]
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--output", "--export"])
def test_a_url_is_no_folder(tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(write(tmp_path, "vae", cache="false")), option, "gs://bucket/run"]) == 2
    assert "gs://bucket/run is a URL; give a folder on this machine" in capsys.readouterr().err
    assert not (tmp_path / "gs:").exists()

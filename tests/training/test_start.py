"""What a single file leaves unsaid, and a run that starts from one says."""

import pytest
import safetensors.torch
import torch

from sdjax.training import config, identity
from sdjax.training.loop import Run
from sdjax.weights.safetensors import CheckpointError
from tests.training.runs import ONE
from tests.weights.test_single_file import write


def _settings(folder, init, **options):
    table = {"task": "unet", "output": str(folder / "run"), "steps": 1, "batch_size": 1, "init": str(init), **options}
    data = {"generator": "sdjax.training.data:Scenes", "options": {"count": 2}, "size": 32}
    return config.build(config.Train, table | {"data": data})


def test_a_run_says_what_a_single_file_leaves_unsaid(tiny, tmp_path):
    file = write("2", tmp_path / "second.safetensors")
    torch.save(safetensors.torch.load_file(file), tmp_path / "second.ckpt")
    said = {"tokenizer": str(tiny), "prediction_type": "v_prediction"}
    with pytest.raises(CheckpointError, match="give prediction_type: v_prediction for the models of 768"):
        Run(_settings(tmp_path, file), ONE)
    with pytest.raises(CheckpointError, match=r"give tokenizer, a folder with CLIP's vocab\.json"):
        Run(_settings(tmp_path, file, **said | {"tokenizer": str(tmp_path)}), ONE)
    with pytest.raises(CheckpointError, match=r"a pickle, .* with allow_pickle \(--allow-ckpt, or allow_ckpt"):
        Run(_settings(tmp_path, tmp_path / "second.ckpt", **said), ONE)
    for settings in (
        _settings(tmp_path, file, **said),
        _settings(tmp_path, tmp_path / "second.ckpt", **said, allow_ckpt=True),
    ):
        assert Run(settings, ONE).networks.scheduler["prediction_type"] == "v_prediction"


def test_where_a_tokenizer_lies_is_not_what_a_run_is_made_from(tmp_path):
    one, other = (_settings(tmp_path, "x", tokenizer=folder, allow_ckpt=bool(folder)) for folder in ("", "b"))
    identity.write(tmp_path, identity.of_run(one, [], None))
    identity.check(tmp_path, identity.of_run(other, [], None))

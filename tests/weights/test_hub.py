"""Checkpoints on the hub: from its cache, at a revision, and of a repository no more than is read."""

import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from sdjax.spec import Spec
from sdjax.weights.checkpoint import CheckpointError
from tests.weights import fake_hub

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


def test_a_hub_id_loads_from_the_hubs_cache(tiny, tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "0123abc"
    shutil.copytree(tiny, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    code = "import sys; from sdjax.spec import Spec; print(Spec(sys.argv[1]).fingerprint)"

    def run(name):
        environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "", "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True)

    assert run("someone/tiny").stdout.strip() == Spec(tiny).fingerprint
    assert "someone/other is no folder here, and the hub did not give it" in run("someone/other").stderr


def test_a_repository_is_read_at_the_revision_that_is_named(tiny, tmp_path):
    old = shutil.copytree(tiny, tmp_path / "old")
    config = old / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    repositories = {"some/model": Path(tiny), "some/model@v1.0": old}
    commit = fake_hub.commit("some/model@v1.0")
    code = (
        "from sdjax.spec import Spec\n"
        f"for revision in ('', '@v1.0', '@{commit}'):\n"
        "    print(Spec(f'some/model{revision}').fingerprint)\n"
    )
    expected = [Spec(tiny).fingerprint, Spec(old).fingerprint, Spec(old).fingerprint]
    with fake_hub.serve(repositories) as (address, _):
        assert fake_hub.run(code, tmp_path / "cache", address).splitlines() == expected
    assert fake_hub.run(code, tmp_path / "cache", None).splitlines() == expected


def test_of_a_repository_the_files_that_are_read_are_fetched(tiny, tmp_path):
    def renamed(name, change):
        for file in shutil.copytree(tiny, tmp_path / name).rglob("*.safetensors"):
            change(file, file.with_name(f"{file.stem}.fp16.safetensors"))
        return tmp_path / name

    half, both = renamed("half", Path.rename), renamed("both", shutil.copy)
    (both / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (both / "unet" / "diffusion_pytorch_model.bin").touch()
    (both / "unet" / "diffusion_pytorch_model.non_ema.safetensors").touch()
    sharded = renamed("sharded", lambda file, other: None)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    for options in ({}, {"variant": "fp16"}):
        unet.save_pretrained(sharded / "unet", max_shard_size="900KB", **options)
    (sharded / UNET).unlink()
    vae = shutil.copytree(tiny / "vae", tmp_path / "vae")
    repositories = {f"some/{path.name}": path for path in (half, both, sharded, vae)}
    asked = [("half", None), ("both", None), ("both", "fp16"), ("sharded", None), ("sharded", "fp16"), ("both", "bf16")]
    code = (
        "from sdjax.spec import Spec\n"
        "from sdjax.weights.safetensors import CheckpointError\n"
        f"for name, variant in {asked}:\n"
        "    try:\n"
        "        print(len(Spec(f'some/{name}', variant=variant, vae='some/vae').entries('unet')))\n"
        "    except CheckpointError as error:\n"
        "        print(error)\n"
    )
    with fake_hub.serve(repositories) as (address, fetched):
        lines = fake_hub.run(code, tmp_path / "cache", address).splitlines()
    count = len(Spec(tiny).entries("unet"))
    assert lines == [*[str(count)] * 5, "some/both has no safetensors file of the variant 'bf16'"]
    assert fake_hub.run(code, tmp_path / "cache", None).splitlines() == lines
    of_unet = {name for name in fetched if "/unet/" in name and "config.json" not in name}
    stem = "unet/diffusion_pytorch_model"
    expected = {f"some/{name}/{stem}.safetensors" for name in ("both",)}
    expected |= {f"some/{name}/{stem}.fp16.safetensors" for name in ("half", "both")}
    expected |= {f"some/sharded/{path.relative_to(sharded)}" for path in (sharded / "unet").glob("*safetensors*")}
    assert of_unet == expected
    assert len(expected) > 6
    assert "some/both/vae/diffusion_pytorch_model.safetensors" in fetched
    assert "some/vae/diffusion_pytorch_model.safetensors" in fetched


def test_a_branch_may_have_slashes(monkeypatch):
    asked = []

    def model_info(self, name, *, revision):
        asked.append((name, revision))
        raise OSError("not reached")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        Spec("some/model@refs/pr/3")
    assert asked == [("some/model", "refs/pr/3")]

"""Checkpoints in the diffusers layout: every way to name one, every way for one to be broken, and the way back."""

import shutil
from pathlib import Path

import diffusers
import fsspec
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from sdjax import StableDiffusion
from sdjax.config import ConfigError
from sdjax.spec import Spec
from sdjax.weights.checkpoint import Checkpoint, CheckpointError, tensors_of
from tests import checkpoints

ONE = {"devices": jax.devices()[:1]}


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the small checkpoint, to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def parameters(pipe: StableDiffusion) -> dict[str, np.ndarray]:
    first = jax.tree.map(lambda array: array[0], pipe._networks)
    return {f"{name} {key}": array for name, module in first.items() for key, array in tensors_of(module).items()}


def same(a: StableDiffusion, b: StableDiffusion) -> bool:
    left, right = parameters(a), parameters(b)
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def loaded(tiny):
    return StableDiffusion.from_pretrained(tiny, **ONE)


def test_a_url_loads_like_its_folder(tiny, loaded):
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny), "/bucket/models/tiny", recursive=True)
    pipe = StableDiffusion.from_pretrained("memory://bucket/models/tiny", **ONE)
    assert same(pipe, loaded)
    assert pipe.spec.fingerprint == loaded.spec.fingerprint
    assert pipe.spec.name == "tiny"
    assert pipe.spec.tokenizers[0].tokens("a red circle") == loaded.spec.tokenizers[0].tokens("a red circle")


def test_a_path_may_begin_with_the_users_folder(copy, loaded, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    spec = Spec("~/copy", vae="~/copy/vae")
    assert spec.checkpoint.fingerprint(["unet"]) == loaded.spec.checkpoint.fingerprint(["unet"])


@pytest.mark.parametrize(("at", "source"), [("", "."), ("", "./"), ("unet", ".."), ("", "../copy"), ("..", "copy")])
def test_a_checkpoint_is_called_as_its_folder(copy, monkeypatch, at, source):
    """Manifests and pictures name the model."""
    monkeypatch.chdir(copy / at)
    assert Spec(source).name == "copy"


def test_folders_may_be_links(tiny, loaded, tmp_path):
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    spec = Spec(tmp_path)
    assert spec.fingerprint == loaded.spec.fingerprint
    assert same(StableDiffusion.from_pretrained(spec, **ONE), loaded)


def test_sharded_weights_load_like_whole_ones(copy, loaded):
    unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", max_shard_size="500KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 2
    assert same(StableDiffusion.from_pretrained(copy, **ONE), loaded)
    next((copy / "unet").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks unet/diffusion_pytorch_model-00002-of-.*index.json names"):
        StableDiffusion.from_pretrained(copy, **ONE)
    checkpoints.edit(copy / "unet" / "diffusion_pytorch_model.safetensors.index.json", weight_map={"conv_in.bias": 2})
    with pytest.raises(CheckpointError, match="has no weight_map of files' names"):
        StableDiffusion.from_pretrained(copy, **ONE)


def test_a_folder_of_pickles_loads_when_it_is_allowed(copy, loaded):
    """As diffusers and transformers wrote them, one in shards; where there are safetensors too, they are read."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet")
    unet.save_pretrained(copy / "unet", safe_serialization=False, max_shard_size="500KB")
    assert len(list((copy / "unet").glob("*-of-*.bin"))) > 2
    (copy / UNET).unlink()
    text = copy / "text_encoder" / "model.safetensors"
    torch.save(safetensors.torch.load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()
    vae = diffusers.AutoencoderKL.from_pretrained(copy / "vae")
    vae.save_pretrained(copy / "vae", safe_serialization=False)
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(
        CheckpointError, match=r"has its weights as a pickle .* with allow_pickle \(--allow-ckpt, or allow_ckpt"
    ):
        StableDiffusion.from_pretrained(copy, **ONE)
    pipe = StableDiffusion.from_pretrained(copy, allow_pickle=True, **ONE)
    assert same(pipe, loaded)
    before = pipe.spec.fingerprint
    edited = torch.load(text.with_name("pytorch_model.bin"))
    next(iter(edited.values()))[0] += 1
    torch.save(edited, text.with_name("pytorch_model.bin"))
    assert Spec(copy, allow_pickle=True).fingerprint != before


def test_a_variant_is_taken_where_it_is_asked_for_or_alone(tiny, copy, loaded):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(copy, variant="fp16")
    half = StableDiffusion.from_pretrained(copy, variant="fp16", **ONE)
    key = "unet conv_in.weight"
    expected = parameters(loaded)[key].astype(np.float16).astype(np.float32)
    assert np.array_equal(parameters(half)[key], expected)
    assert np.array_equal(parameters(StableDiffusion.from_pretrained(copy, **ONE))[key], parameters(loaded)[key])
    for file in [*copy.rglob("model.safetensors"), *copy.rglob("diffusion_pytorch_model.safetensors")]:
        file.unlink()
    assert np.array_equal(parameters(StableDiffusion.from_pretrained(copy, **ONE))[key], expected)
    with pytest.raises(CheckpointError, match="copy has no safetensors file of the variant 'bf16'"):
        StableDiffusion.from_pretrained(copy, variant="bf16", **ONE)


def test_a_component_without_the_variant_is_its_plain_one(copy, loaded):
    """As diffusers has it, and as repositories are that hold non_ema of the UNet alone."""
    shutil.copy(copy / UNET, copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    edit_tensors(copy / UNET, lambda tensors: tensors["conv_out.bias"].add_(1))
    assert same(StableDiffusion.from_pretrained(copy, variant="non_ema", **ONE), loaded)
    assert not same(StableDiffusion.from_pretrained(copy, **ONE), loaded)
    assert diffusers.StableDiffusionPipeline.from_pretrained(copy, variant="non_ema", safety_checker=None)
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae has no safetensors file of the variant 'non_ema', and no plain one"):
        StableDiffusion.from_pretrained(copy, variant="non_ema", **ONE)


def test_a_vae_of_its_own_has_the_variant_or_not(tiny, copy):
    plain, half = copy / "vae", copy / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(copy / UNET, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert [*Spec(copy, vae=plain, variant="fp16").entries("vae")]
    safetensors.torch.save_file({"other": torch.ones(1)}, half)
    assert [*Spec(copy, vae=plain, variant="fp16").entries("vae")] == ["other"]
    assert len(Spec(copy, vae=plain).entries("vae")) > 1


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_parameters_are_kept_in_the_asked_dtype(tiny, loaded, dtype, stored):
    pipe, exact = StableDiffusion.from_pretrained(tiny, dtype=dtype, **ONE), parameters(loaded)
    for key, array in parameters(pipe).items():
        assert array.dtype == stored
        assert np.array_equal(array, exact[key].astype(stored)), key
    assert pipe.spec.fingerprint != loaded.spec.fingerprint


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_files_of_other_dtypes_load(copy, loaded, dtype):
    for file in copy.rglob("*.safetensors"):
        tensors = {key: tensor.to(getattr(torch, dtype)) for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file)
    found = parameters(StableDiffusion.from_pretrained(copy, **ONE))
    for key, array in parameters(loaded).items():
        assert np.array_equal(found[key], array.astype(getattr(ml_dtypes, dtype)).astype(np.float32)), key


def test_old_vae_and_text_keys_load(copy, loaded):
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in safetensors.torch.load_file(file).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        renamed[key] = tensor[:, :, None, None] if "proj_attn.weight" in key else tensor
    assert any(".query." in key for key in renamed)
    safetensors.torch.save_file(renamed, file)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {
        f"text_model.{key.removeprefix('text_model.')}": t for key, t in safetensors.torch.load_file(file).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(4, 4)}  # of a whole CLIP
    tensors |= {"vision_model.embeddings.class_embedding": torch.ones(4), "visual_projection.weight": torch.ones(4, 4)}
    safetensors.torch.save_file(tensors, file)
    assert same(StableDiffusion.from_pretrained(copy, **ONE), loaded)


def test_diffusers_loads_what_save_pretrained_writes(loaded, tiny, tmp_path):
    loaded.save_pretrained(tmp_path / "saved")
    assert same(StableDiffusion.from_pretrained(tmp_path / "saved", **ONE), loaded)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*.*")} == {0o644}  # for all to read
    before = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    after = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    for pipeline in (before, after):
        pipeline.set_progress_bar_config(disable=True)
    a, b = (
        p("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (before, after)
    )
    assert np.array_equal(a, b)
    with pytest.raises(FileExistsError, match="is there already"):
        loaded.save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def edit_tensors(file: Path, change) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
BROKEN = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index is no JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json of .* is not JSON"),
    "index never ends": (
        lambda f: (f / "model_index.json").write_text("[" * 100_000),
        "model_index.json of .* is not JSON",
    ),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "is not a JSON object"),
    "another pipeline": (
        lambda f: checkpoints.edit(f / "model_index.json", _class_name="FluxPipeline"),
        "is a FluxPipeline; supported are StableDiffusionPipeline",
    ),
    "an encoder that is a number": (
        lambda f: checkpoints.edit(f / "model_index.json", text_encoder=7),
        "model_index.json of .* has a text_encoder that is neither null nor a library and a class",
    ),
    "a value that never ends": (
        lambda f: (f / "unet" / "config.json").write_text('{"norm_eps": ' + "[" * 700 + "]" * 700 + "}"),
        "unet/config.json of .*(lists within lists without end|is not JSON)",
    ),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), "lacks unet/config.json"),
    "unknown config value": (
        lambda f: checkpoints.edit(f / "unet" / "config.json", act_fn="sine"),
        "unet/config.json of .*act_fn='sine'",
    ),
    "unknown scheduler": (
        lambda f: checkpoints.edit(f / "scheduler" / "scheduler_config.json", _class_name="MagicScheduler"),
        "MagicScheduler",
    ),
    "text encoder of another width": (
        lambda f: checkpoints.edit(f / "unet" / "config.json", cross_attention_dim=48),
        "the UNet attends to 48 channels, the text encoder gives 32",
    ),
    "no weights": (lambda f: (f / UNET).unlink(), "unet has no safetensors file"),
    "a pickle": (
        lambda f: (f / UNET).rename(f / UNET.with_suffix(".bin")),
        r"pickle \(unet/diffusion_pytorch_model.bin\), a format that can carry code; with allow_pickle",
    ),
    "truncated": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-100]),
        "unet/diffusion_pytorch_model.safetensors is truncated",
    ),
    "a missing tensor": (
        lambda f: edit_tensors(f / UNET, lambda tensors: tensors.pop("conv_in.bias")),
        "unet of copy lacks conv_in.bias",
    ),
    "a surplus tensor": (
        lambda f: edit_tensors(f / UNET, lambda tensors: tensors.update(extra=torch.ones(1))),
        "unet of copy has keys that the configuration does not: extra",
    ),
    "a misshapen tensor": (
        lambda f: edit_tensors(f / UNET, lambda tensors: tensors.update({"conv_in.weight": torch.ones(32, 4, 1, 1)})),
        r"conv_in.weight has shape \[32, 4, 1, 1\]; the configuration makes it \[32, 4, 3, 3\]",
    ),
    "a tokenizer that is not UTF-8": (
        lambda f: (f / "tokenizer" / "notes.txt").write_bytes(b"caf\xe9"),
        "tokenizer of .* has a text file that is not UTF-8",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer folder lacks vocab.json and merges.txt"),
    "a tokenizer of another text encoder": (
        lambda f: (
            checkpoints.edit(f / "text_encoder" / "config.json", vocab_size=400),
            edit_tensors(
                f / "text_encoder" / "model.safetensors",
                lambda tensors: tensors.update(
                    {key: tensor[:400].clone() for key, tensor in tensors.items() if "token_embedding" in key}
                ),
            ),
        ),
        r"the tokenizer has 52\d tokens, the text encoder 400; they are not a pair",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_and_named(copy, name):
    breakage, message = BROKEN[name]
    breakage(copy)
    with pytest.raises((CheckpointError, ConfigError, ValueError), match=message) as refused:
        StableDiffusion.from_pretrained(copy, **ONE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["no-such-folder", "/no/such/folder", "a/b/c"])
def test_what_is_nowhere_is_refused(source):
    with pytest.raises(CheckpointError, match="neither a folder, nor a hub id"):
        Checkpoint(source)


def test_the_fingerprint_is_of_content_alone(tiny, copy):
    (copy / "notes.md").write_text("of no interest")
    assert Spec(copy).fingerprint == Spec(tiny).fingerprint
    edit_tensors(copy / UNET, lambda tensors: tensors["conv_out.bias"].add_(1e-3))
    assert Spec(copy).fingerprint != Spec(tiny).fingerprint

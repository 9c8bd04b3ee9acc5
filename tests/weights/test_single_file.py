"""Single files in the original layout: every family, what they leave unsaid, and what is no such file."""

import dataclasses
import functools
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdjax import Request, StableDiffusion
from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from sdjax.models.unet import UNet2DCondition
from sdjax.models.vae import AutoencoderKL
from sdjax.parallel import Devices
from sdjax.spec import Spec
from sdjax.training.config import Data, Train
from sdjax.training.loop import Run
from sdjax.weights import checkpoint, ldm, single_file
from sdjax.weights.safetensors import CheckpointError
from sdjax.weights.single_file import SingleFile
from tests import checkpoints
from tests.weights import original

ONE = {"devices": jax.devices()[:1]}
PIPELINES = {
    "1": "StableDiffusionPipeline",
    "1 deeper": "StableDiffusionPipeline",
    "1 inpainting": "StableDiffusionInpaintPipeline",
    "1 instruct": "StableDiffusionInstructPix2PixPipeline",
    "2": "StableDiffusionPipeline",
    "XL": "StableDiffusionXLPipeline",
    "XL refiner": "StableDiffusionXLImg2ImgPipeline",
}
KINDS = {
    "unet": (UNetConfig, UNet2DCondition),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextModel),
    "text_encoder_2": (CLIPTextConfig, CLIPTextModelWithProjection),
}
FULL_XL = {
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SAID = {"modelspec.prediction_type": "v"}


def states(sample: original.Sample) -> dict[str, original.Tensors]:
    return {name: network.state_dict() for name, network in original.networks(sample).items()}


@pytest.mark.parametrize("name", original.SAMPLES)
def test_a_family_is_recognised_and_every_tensor_found(name, tmp_path):
    sample = original.SAMPLES[name]
    components = states(sample)
    file = original.write(sample, components)
    for component, theirs in original.as_diffusers_reads(sample, file).items():
        assert theirs.keys() == components[component].keys(), "diffusers reads this file otherwise"
        for key, tensor in theirs.items():
            assert torch.equal(tensor, components[component][key]), key
    leftovers = {
        "model_ema.decay": torch.ones(1),
        "betas": torch.ones(3),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    safetensors.torch.save_file(file | leftovers, tmp_path / "a.safetensors", metadata=SAID)

    found = SingleFile(tmp_path / "a.safetensors")
    assert found.index["_class_name"] == PIPELINES[name]
    configs = {"unet": sample.unet, "vae": sample.vae} | {key: config for key, (_, config) in sample.text.items()}
    for component, config in configs.items():
        kind, module = KINDS[component]
        ours = kind.from_dict(found.json(component, "config.json"))
        assert normal(ours) == normal(kind.from_dict(config)), component
        filled = checkpoint.fill(module(ours, rngs=None), found.tensors(component), what="a")
        arrays = checkpoint.tensors_of(filled)
        expected = {key.removeprefix("text_model."): tensor for key, tensor in components[component].items()}
        assert {key.removeprefix("text_model."): array.shape for key, array in arrays.items()} == {
            key: tensor.shape for key, tensor in expected.items()
        }
        for key, array in arrays.items():
            assert np.array_equal(array, expected[key.removeprefix("text_model.")].numpy()), key


def normal(config):
    """A configuration without what only sets defaults, its values for each block spread out."""
    values = dataclasses.asdict(config)
    for key in ("sample_size", "scaling_factor", "force_upcast", "transformer_layers_per_block", "attention_head_dim"):
        values.pop(key, None)
    if isinstance(config, UNetConfig):
        values |= {"down": config.down_stages, "mid": config.mid_stage, "up": config.up_stages}
    return values


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_table_has_every_module_of_a_network_at_full_size(name):
    xl = name == "sdxl"
    config = UNetConfig.from_dict(FULL_XL if xl else {"cross_attention_dim": 768})
    assert set(ldm.unet(config)) == modules(UNet2DCondition(config, rngs=None))
    text = CLIPTextConfig(num_hidden_layers=32 if xl else 12)
    kind = CLIPTextModelWithProjection if xl else CLIPTextModel
    assert set(ldm.open_clip(text, projection=xl)) == modules(kind(text, rngs=None))
    types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = VAEConfig.from_dict({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **types})
    assert set(ldm.vae(vae)) == modules(AutoencoderKL(vae, rngs=None))


def modules(network) -> set[str]:
    return {key.rpartition(".")[0] for key in checkpoint.shapes_of(network)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Stable Diffusion 1 in a folder, of widths that the original's rules give."""
    folder = tmp_path_factory.mktemp("single") / "folder"
    sample = original.SAMPLES["1"]
    text = sample.text["text_encoder"][1]
    made = checkpoints.saved(folder, unet=sample.unet, vae=sample.vae, text=text, scheduler=checkpoints.scheduler())
    components = {name: getattr(made, name).state_dict() for name in ("unet", "vae", "text_encoder")}
    tensors = original.write(sample, components)
    safetensors.torch.save_file(tensors, folder.parent / "made.safetensors")
    torch.save({"state_dict": tensors, "global_step": 5, "callbacks": {}}, folder.parent / "made.ckpt")
    return folder


def images(pipe: StableDiffusion) -> list[np.ndarray]:
    """Of two prompts, one with a negative."""
    shared = {"width": 32, "height": 48, "num_inference_steps": 3, "sampler": "euler"}
    requests = [
        Request(prompt="a red circle", seed=3, **shared),
        Request(prompt="cat", negative_prompt="red", **shared),
    ]
    return [result.pixels for result in pipe.generate(requests)]


@pytest.fixture(scope="module")
def expected(folder):
    return images(StableDiffusion.from_pretrained(folder, **ONE))


def test_a_single_file_makes_the_images_of_its_folder(folder, expected, tmp_path):
    file = folder.parent / "made.safetensors"
    pipe = StableDiffusion.from_single_file(file, tokenizer=folder / "tokenizer", **ONE)
    assert np.array_equal(images(pipe), expected)
    assert pipe.spec.name == "made"
    there = pickle.loads(pickle.dumps(pipe.spec))
    assert there.fingerprint == pipe.spec.fingerprint != Spec(folder).fingerprint
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(images(StableDiffusion.from_pretrained(tmp_path / "saved", **ONE)), expected)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(theirs.scheduler, diffusers.PNDMScheduler)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1 deeper", "2", "XL"])
def test_a_familys_single_file_makes_diffusers_images(name, tmp_path):
    """The same weights as a folder that diffusers runs and as a single file."""
    sample = original.SAMPLES[name]
    texts = dict(zip(("text", "text_2"), (config for _, config in sample.text.values()), strict=False))
    make = checkpoints.pipeline_xl
    if name != "XL":
        make = functools.partial(checkpoints.pipeline, tokens={"pad_token": "!"} if name == "2" else {})
    published = {"timestep_spacing": "leading", "prediction_type": "v_prediction" if name == "2" else "epsilon"}
    scheduler = checkpoints.scheduler("EulerDiscreteScheduler", **published)
    made = checkpoints.saved(tmp_path / "folder", make, unet=sample.unet, vae=sample.vae, scheduler=scheduler, **texts)
    components = {key: getattr(made, key).state_dict() for key in ("unet", "vae", *sample.text)}
    file = original.write(sample, components)
    safetensors.torch.save_file(file, tmp_path / "made.safetensors", metadata=SAID if name == "2" else None)
    pipe = StableDiffusion.from_single_file(tmp_path / "made.safetensors", tokenizer=tmp_path / "folder", **ONE)
    shared = {"prompt": "a red circle", "width": 48, "height": 32, "num_inference_steps": 4, "guidance_scale": 7.5}
    for negative in (None, "cat"):
        asked = shared | {"negative_prompt": negative}
        result = pipe.generate([Request(seed=3, sampler="euler", noise="torch", **asked)])[0]
        expected = made(**asked, generator=torch.Generator().manual_seed(3), output_type="np").images[0]
        error = np.abs(result.pixels - (expected * 255).round())
        assert error.max() <= 2
        assert result.pixels.std() > 10


def test_half_precision_and_later_attention_names_load(folder, tmp_path):
    tensors = safetensors.torch.load_file(folder.parent / "made.safetensors")
    old = {".attn_1.q.": ".attn_1.query.", ".attn_1.proj_out.": ".attn_1.proj_attn.", ".attn_1.k.": ".attn_1.to_k."}
    renamed = {}
    for key, tensor in tensors.items():
        for name, other in old.items():
            key = key.replace(name, other)
        renamed[key] = tensor.squeeze().half() if ".attn_1." in key else tensor.half()
    assert len(renamed.keys() - tensors.keys()) == 12
    safetensors.torch.save_file(renamed, tmp_path / "half.safetensors")
    found = dict(SingleFile(tmp_path / "half.safetensors").tensors("vae"))
    whole = dict(SingleFile(folder.parent / "made.safetensors").tensors("vae"))
    assert found.keys() == whole.keys()
    for key, array in found.items():
        assert array.dtype == np.float16
        assert np.array_equal(array, whole[key].astype(np.float16).reshape(array.shape)), key


def test_a_ckpt_is_read_only_when_asked(folder, expected):
    file = folder.parent / "made.ckpt"
    with pytest.raises(CheckpointError, match=r"made\.ckpt is a pickle, a format that can carry code"):
        StableDiffusion.from_single_file(file, tokenizer=folder, **ONE)
    pipe = StableDiffusion.from_single_file(file, tokenizer=folder, allow_pickle=True, **ONE)
    assert np.array_equal(images(pipe), expected)


def test_a_tokenizer_comes_from_the_hubs_cache_or_is_asked_for(folder, tmp_path):
    file = folder.parent / "made.safetensors"
    snapshot = tmp_path / "hub" / "models--openai--clip-vit-large-patch14" / "snapshots" / "0123abc"
    shutil.copytree(folder / "tokenizer", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123abc")
    code = "import sys; from sdjax.spec import Spec; print(Spec(sys.argv[1]).tokenizers[0].tokens('a red circle'))"

    def run(cache):
        environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "", "JAX_PLATFORMS": "cpu"}
        return subprocess.run([sys.executable, "-c", code, file], env=environment, capture_output=True, text=True)

    assert run(tmp_path / "hub").stdout.strip() == str(Spec(folder).tokenizers[0].tokens("a red circle"))
    error = run(tmp_path / "empty").stderr
    assert "made.safetensors holds no tokenizer; give tokenizer, a folder with CLIP's vocab.json and merges" in error


def test_a_run_starts_from_one_as_from_its_folder(folder, tmp_path, monkeypatch):
    """Training, which takes the tokenizer from the hub."""
    monkeypatch.setattr(single_file, "CLIP", str(folder))
    data = Data(folder=str(tmp_path), size=32)
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red circle")
    start = Train(task="unet", output=str(tmp_path / "run"), steps=1, batch_size=1, data=data)
    one, other = (
        Run(dataclasses.replace(start, init=str(source)), Devices(jax.devices()[:1]))
        for source in (folder.parent / "made.safetensors", folder)
    )
    one.state = one.state._replace(step=np.int32(1))
    one.export(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, one.networks.params, other.networks.params)
    drawn, expected = (
        images(StableDiffusion.from_pretrained(source, **ONE)) for source in (tmp_path / "model", folder)
    )
    assert np.array_equal(drawn, expected)


def test_open_clips_padding_is_its_own(folder, tmp_path):
    write("2", tmp_path / "second.safetensors", metadata=SAID)
    spec = Spec(tmp_path / "second.safetensors", tokenizer=folder)
    (ids,) = spec.text(Request(prompt="a red circle")).ids
    vocabulary = checkpoints.vocabulary()
    assert ids[0, 0, -1] == vocabulary["!"]
    assert (ids[1, 0, :2] == [vocabulary[checkpoints.START], vocabulary[checkpoints.END]]).all()


def write(name: str, file: Path, metadata: dict[str, str] | None = None, **extra: torch.Tensor) -> Path:
    sample = original.SAMPLES[name]
    safetensors.torch.save_file(original.write(sample, states(sample)) | extra, file, metadata=metadata)
    return file


def test_what_a_network_predicts_is_said_or_asked_for(tmp_path):
    file = write("2", tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match=r"second.safetensors is a Stable Diffusion 2.*give prediction_type"):
        SingleFile(file)

    def schedule(file, **options):
        found = SingleFile(file, **options)
        config = found.json("scheduler", "scheduler_config.json")
        return config["prediction_type"], config["_class_name"], found.json("unet", "config.json")["sample_size"]

    assert schedule(file, prediction_type="epsilon") == ("epsilon", "PNDMScheduler", 64)
    assert schedule(file, prediction_type="v_prediction") == ("v_prediction", "DDIMScheduler", 96)
    with pytest.raises(CheckpointError, match="'sample'; prediction_type is epsilon or v_prediction"):
        SingleFile(file, prediction_type="sample")
    xl = write("XL", tmp_path / "xl.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    assert schedule(xl) == ("v_prediction", "EulerDiscreteScheduler", 128)
    assert schedule(
        write("XL", tmp_path / "kept.safetensors", {"modelspec.prediction_type": "epsilon"}, v_pred=torch.zeros(0))
    ) == schedule(xl)
    assert SingleFile(xl).json("scheduler", "scheduler_config.json")["rescale_betas_zero_snr"] is True


def test_a_full_lcm_has_its_own_scheduler(folder, tmp_path):
    """Of this kind is every UNet that is told of the guidance."""
    file = write(
        "1", tmp_path / "a.safetensors", **{"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(32, 256)}
    )
    spec = Spec(file, tokenizer=folder)
    assert spec.index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert spec.resolve(Request(prompt="a cat")).sampler == "lcm"


@pytest.mark.parametrize("names", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max", "edm_vpred.sigma_min")])
def test_edms_parametrisation_is_refused_by_name(tmp_path, names):
    """As Playground 2.5 and CosXL have it."""
    file = write("XL", tmp_path / "a.safetensors", **{name: torch.ones(1) for name in names})
    with pytest.raises(CheckpointError, match=rf"a Stable Diffusion XL trained as EDM \({names[0]}, {names[1]}\)"):
        SingleFile(file, prediction_type="v_prediction")


@pytest.mark.parametrize("shape", [(), (7,)])
def test_three_matrices_in_one_are_refused_where_they_are_none(tmp_path, shape):
    key = "transformer.resblocks.0.attn.in_proj_bias"
    file = write("2", tmp_path / "a.safetensors", **{f"cond_stage_model.model.{key}": torch.ones(shape)})
    with pytest.raises(CheckpointError, match=rf"{key} of shape \[7?\] is not 3 in one"):
        list(SingleFile(file, prediction_type="epsilon").tensors("text_encoder"))


NO_CHECKPOINTS = {
    "a lora": ({"lora_unet_mid_block.lora_down.weight": torch.ones(1)}, "in the original layout; it is a LoRA"),
    "an embedding": ({"emb_params": torch.ones(1, 32)}, "it may be a textual inversion"),
    "a component": (
        {name: torch.ones(1) for name in ("conv_in.weight", "conv_in.bias", "conv_out.weight")},
        "it is one component in the diffusers layout",
    ),
    "a UNet alone": (
        {f"model.diffusion_model.{name}": torch.ones(1) for name in "abc"},
        r"it has a UNet, and no text encoder: no keys conditioner\.embedders\.0\.model\.\*, cond_stage_model",
    ),
    "something else": (
        {name: torch.ones(1) for name in "abc"},
        "no keys model.diffusion_model",
    ),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_and_named(name, tmp_path):
    tensors, message = NO_CHECKPOINTS[name]
    safetensors.torch.save_file(tensors, tmp_path / "it.safetensors")
    with pytest.raises(CheckpointError, match=message) as refused:
        Spec(tmp_path / "it.safetensors")
    assert "\n" not in str(refused.value)


def test_a_broken_file_is_refused_and_named(folder, tmp_path):
    tensors = safetensors.torch.load_file(folder.parent / "made.safetensors")

    def refused(**change):
        safetensors.torch.save_file(
            {key: tensor for key, tensor in (tensors | change).items() if tensor is not None},
            tmp_path / "it.safetensors",
        )
        with pytest.raises(CheckpointError) as error:
            StableDiffusion.from_single_file(tmp_path / "it.safetensors", tokenizer=folder, **ONE)
        assert "\n" not in str(error.value)
        return str(error.value)

    unet = "model.diffusion_model."
    assert "is a Stable Diffusion 1 that lacks decoder.conv_in.weight" in refused(
        **{"first_stage_model.decoder.conv_in.weight": None}
    )
    assert "unet of it lacks conv_out.bias" in refused(**{f"{unet}out.2.bias": None})
    assert "unet of it has keys that the configuration does not: extra.weight" in refused(
        **{f"{unet}extra.weight": torch.ones(1)}
    )
    assert "UNet of 7 channels for a VAE of 4" in refused(**{f"{unet}input_blocks.0.0.weight": torch.ones(32, 7, 3, 3)})
    for name in (f"{unet}input_blocks.1.0.out_layers.3.weight", "first_stage_model.decoder.conv_in.weight"):
        assert "it.safetensors has a tensor of more or fewer axes than" in refused(**{name: torch.ones(())})
    with pytest.raises(CheckpointError, match="is no file"):
        StableDiffusion.from_single_file(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is no single file"):
        StableDiffusion.from_single_file(folder)
    with pytest.raises(CheckpointError, match="tokenizer is for single files"):
        Spec(folder, tokenizer=folder)
    for unknown in ({"revision": "main"}, {"local_files_only": False}, {"dtpye": "bfloat16"}):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{next(iter(unknown))}'"):
            StableDiffusion.from_pretrained(folder, **unknown)

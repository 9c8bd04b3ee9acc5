"""Training configurations: the shipped ones load, and a wrong key is named."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.text import MAX_CHUNKS
from sdjax.training import config
from sdjax.training.config import TrainConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST = {"task": "vae", "output": "x", "steps": 10, "batch_size": 2, "data": {"folder": "y"}}
CONTROL = {"task": "controlnet", "init": "x"}


def _load(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config.load(path)


@pytest.mark.parametrize("name", ["bundled-vae", "bundled-unet"])
def test_the_bundled_models_configurations(name):
    path = CONFIGS / f"{name}.toml"
    assert path.read_text().startswith(f"# python -m sdjax.train --config configs/{name}.toml\n")
    loaded = config.load(path)
    kinds = {"vae": VAEConfig, "unet": UNetConfig, "text_encoder": CLIPTextConfig}
    made = [kind.from_dict(table) for key, kind in kinds.items() if (table := getattr(loaded.model, key)) is not None]
    assert len(made) == (1 if name == "bundled-vae" else 2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[bl]*.toml")), ids=lambda path: path.stem)
def test_every_configuration_is_taken_and_begins_with_its_command(path):
    config.load(path)
    assert path.read_text().startswith(f"# python -m sdjax.train --config configs/{path.name}\n")


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('task = "vae"\noutput = "x"\nsteps = 10\nbatch_size = 2\n[data]\nfolder = "y"\n')
    assert config.load(path) == config.build(config.Train, LEAST)
    assert config.load(path, output="z", init=None).output == "z"
    assert config.load(path, output="z", init=None).init is None


def test_the_output_and_the_start_may_lie_in_the_home_folder_as_the_data_may(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = 'task = "{}"\noutput = "~/run"\ninit = "~/sd"\nsteps = 10\nbatch_size = 2\n[data]\nfolder = "~/pictures"\n{}'
    loaded = _load(tmp_path, text.format("unet", '[lora]\nrank = 2\ninit = "~/lora"'))
    found = (loaded.output, loaded.init, loaded.lora.init)
    assert found == (str(tmp_path / "run"), str(tmp_path / "sd"), str(tmp_path / "lora"))
    assert loaded.lora.rank == 2
    loaded = _load(tmp_path, text.format("controlnet", '[controlnet]\ninit = "~/net"'))
    assert loaded.controlnet.init == str(tmp_path / "net")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 1}, "stepz is no option; there are allow_ckpt, batch_size"),
        ({"steps": "ten"}, "steps is 'ten'; it must be of type int"),
        ({"sheet_prompts": 8}, "sheet_prompts is 8; it must be of type list"),
        ({"steps": True}, "steps is True"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"task": "lora"}, "task is 'lora'; it can be 'vae' or 'unet'"),
        ({"data": {}}, "data must name exactly one"),
        ({"data": {"folder": "a", "shards": "b"}}, "data must name exactly one"),
        ({"data": {"folder": "a", "sise": 3}}, "data.sise is no option"),
        ({"data": {"folder": "a", "options": {"count": 3}}}, "data.options does nothing without data.generator"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate is 'fast'; it must be of type float"),
        ({"optimizer": {"warmup_steps": 8, "decay_steps": 8}}, "together are more than steps"),
        (
            {"optimizer": {"weight_decay": 0.1}, "reconstruction": {"decoder_only": True}},
            "weight_decay does not go with reconstruction.decoder_only",
        ),
        ({"optimizer": {"ema_decay": 1.5}}, "optimizer.ema_decay is 1.5; it must lie between 0 and 1"),
        ({"optimizer": {"clip_norm": -1.0}}, "optimizer.clip_norm is -1.0; it must be at least 0"),
        ({"optimizer": {"clip_norm": float("nan")}}, "optimizer.clip_norm is nan; it must be at least 0"),
        ({"diffusion": {"min_snr_gamma": 0.0}}, "diffusion.min_snr_gamma is 0.0; it must be above 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 2**32}, "seed is 4294967296; it must be at least 0 and below 2**32"),
        ({"optimizer": {"warmup_steps": -5}}, "optimizer.warmup_steps is -5; it must be at least 0"),
        ({"optimizer": {"decay_steps": -5}}, "optimizer.decay_steps is -5; it must be at least 0"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate is 0.0; it must be above 0"),
        ({"optimizer": {"learning_rate": -1e-4}}, "optimizer.learning_rate is -0.0001; it must be above 0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan; it must be above 0"),
        ({"optimizer": {"learning_rate": float("inf")}}, "it must be above 0 and finite"),
        ({"optimizer": {"beta1": 1.5}}, "optimizer.beta1 is 1.5; it must be at least 0 and below 1"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2 is 1.0; it must be at least 0 and below 1"),
        ({"optimizer": {"weight_decay": -0.1}}, "optimizer.weight_decay is -0.1; it must be at least 0"),
        ({"diffusion": {"offset_noise": -3}}, "diffusion.offset_noise is -3.0; it must be at least 0"),
        ({"reconstruction": {"kl": -1}}, "reconstruction.kl is -1.0; it must be at least 0"),
        ({"reconstruction": {"edges": float("nan")}}, "reconstruction.edges is nan; it must be at least 0 and finite"),
        ({"diffusion": {"offset_noise": 0.1}}, "diffusion.offset_noise does nothing where task is 'vae'; take it out"),
        ({"data": {"folder": "y", "cache_latents": True}}, "data.cache_latents does nothing where task is 'vae'"),
        ({"task": "unet", "data": {"latents": "y", "size": 64}}, "data.size does not go with data.latents"),
        ({"remat": True}, "remat does nothing where task is 'vae'"),
        ({"sheet_prompts": ["a"]}, "sheet_prompts does nothing where task is 'vae'"),
        ({"model": {"tokenizer": {"merges": 3}}}, "model.tokenizer does nothing where task is 'vae'"),
        (
            {"task": "unet", "reconstruction": {"decoder_only": True}},
            "reconstruction.decoder_only does nothing where task is 'unet'; take it out",
        ),
        ({"diffusion": 3}, "diffusion is a table, not 3"),
        ({"sheet_prompts": ["a", 3]}, "sheet_prompts is 3"),
        ({"task": "controlnet"}, "init is missing: the model that the ControlNet is for"),
        (CONTROL | {"lora": {"rank": 4}}, "lora.rank does nothing where task is 'controlnet'; take it out"),
        (
            CONTROL | {"diffusion": {"train_text_encoder": True}},
            "diffusion.train_text_encoder does nothing where task is 'controlnet'",
        ),
        (CONTROL | {"data": {"latents": "y"}}, "task controlnet does not go with data.latents"),
        (CONTROL | {"sheet_prompts": ["a"]}, "sheet_images has 0 for 1 sheet_prompts; give one for each"),
        ({"task": "unet", "sheet_images": ["a.png"]}, "sheet_images has 1 for 0 sheet_prompts; give one for each"),
        ({"task": "unet", "controlnet": {"init": "x"}}, "controlnet.init does nothing where task is 'unet'"),
        ({"task": "unet", "diffusion": {"in_channels": 0}}, "diffusion.in_channels is 0; it must be at least 1"),
        (
            {"task": "unet", "diffusion": {"in_channels": 8}, "lora": {"rank": 4}},
            "diffusion.in_channels does not go with lora.rank: it widens the whole UNet of init",
        ),
        (
            {"task": "unet", "diffusion": {"in_channels": 8}, "model": {"unet": {}}},
            "diffusion.in_channels does not go with model.unet",
        ),
        (
            {"task": "unet", "init": "x", "model": {"tokenizer": {"merges": 3, "max_length": 9}}},
            "model.tokenizer does not go with the text encoder of init, which knows other ids",
        ),
        (
            {"task": "unet", "data": {"folder": "y", "flip": True, "cache_latents": True}},
            "data.flip does not go with data.cache_latents: pictures are encoded once",
        ),
        ({"task": "unet", "data": {"latents": "y", "flip": True}}, "data.flip does not go with data.latents"),
        ({"task": "unet", "data": {"latents": "y", "caption": "a"}}, "data.caption does not go with data.latents"),
        ({"data": {"folder": "y", "caption": "a"}}, "data.caption does nothing where task is 'vae'; take it out"),
        (
            {"task": "unet", "data": {"generator": "x:y", "caption": "a"}},
            "data.caption does nothing with data.generator, which has its own; take it out",
        ),
        (
            {"data": {"folder": "y", "aspect_ratio_buckets": [[64, 64]]}},
            "data.aspect_ratio_buckets does nothing where task is 'vae'; take it out",
        ),
        (
            {"task": "unet", "data": {"latents": "y", "aspect_ratio_buckets": [[64, 64]]}},
            "data.aspect_ratio_buckets does not go with data.latents",
        ),
        (
            {"task": "unet", "data": {"generator": "x:y", "aspect_ratio_buckets": [[64, 64]]}},
            "data.aspect_ratio_buckets does not go with data.generator, whose pictures have one size",
        ),
        *(
            (
                {"task": "unet", "data": {"folder": "y", "aspect_ratio_buckets": [[64, 64], shape]}},
                f"data.aspect_ratio_buckets has {shape}{why}",
            )
            for shape, why in (
                ([], "; each is [height, width] in pixels"),
                ([64], "; each is"),
                ([64, 0], "; each is"),
                ([64, 64], " twice; take one out"),
            )
        ),
        ({"task": "unet", "data": {"folder": "y", "aspect_ratio_buckets": [64]}}, "data.aspect_ratio_buckets is 64"),
        (
            {"task": "unet", "data": {"folder": "y", "caption_chunks": 1 + MAX_CHUNKS}},
            f"data.caption_chunks is {1 + MAX_CHUNKS}; it must lie between 1 and {MAX_CHUNKS}",
        ),
        (
            {"task": "unet", "data": {"latents": "y", "caption_chunks": 2}},
            "data.caption_chunks does not go with data.latents",
        ),
        ({"data": {"folder": "y", "caption_chunks": 2}}, "data.caption_chunks does nothing where task is 'vae'"),
        ({"optimizer": {"schedule": "cosine"}}, "optimizer.schedule does nothing without optimizer.decay_steps"),
        ({"optimizer": {"schedule": "step"}}, "optimizer.schedule is 'step'; it can be 'linear' or 'cosine'"),
        ({"task": "unet", "lora": {"init": "x"}}, "lora.init does nothing without lora.rank; take it out"),
        ({"tokenizer": "x"}, "tokenizer does nothing without init; take it out"),
        ({"prediction_type": "epsilon"}, "prediction_type does nothing without init; take it out"),
        ({"dtype": "float8"}, "dtype is 'float8'; it can be 'float32' or 'bfloat16'"),
    ],
)
def test_a_wrong_key_is_named_in_one_line(change, message):
    with pytest.raises(TrainConfigError) as error:
        config.check(config.build(config.Train, LEAST | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_documentation_names_every_key_and_its_default():
    page = (CONFIGS.parent / "docs" / "training.md").read_text()
    told = dict(re.findall(r"^\| `([\w.]+)` \| `?(.*?)`? \|", page, re.MULTILINE))
    # A tuple is TOML's array.
    words = {
        "None": "none",
        "True": "true",
        "False": "false",
        "()": "[]",
        "'float32'": '"float32"',
        "'linear'": '"linear"',
    }
    values = config.flat(config.Train(task="vae", output="", steps=1, batch_size=1, data=config.Data()))
    required = dict.fromkeys(("task", "output", "steps", "batch_size"), "-")
    assert told == {name: words.get(repr(value), repr(value)) for name, value in values.items()} | required


def test_what_is_missing_is_named():
    with pytest.raises(TrainConfigError, match="batch_size is missing"):
        config.build(config.Train, {key: value for key, value in LEAST.items() if key != "batch_size"})


@pytest.mark.parametrize("text", ["task = ", "= 3", "\x00"])
def test_a_file_that_is_not_toml(tmp_path, text):
    with pytest.raises(TrainConfigError, match="is not TOML"):
        _load(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TrainConfigError, match="is not there"):
        config.load(tmp_path / "none.toml")


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read: Is a directory"), (b"\xff", "is not TOML")])
def test_what_is_no_text_is_one_line(tmp_path, content, message):
    path = tmp_path / "run"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(TrainConfigError, match=message):
        config.load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(tomllib.loads((CONFIGS / "bundled-unet.toml").read_text()))), value=JSON)
def test_any_value_is_taken_or_refused_by_name(key, value):
    try:
        made = config.build(config.Train, LEAST | {key: value})
    except TrainConfigError as error:
        assert str(error).startswith(key)
    else:
        assert isinstance(made, config.Train)

"""LoRAs: what is trained, that it is the formula's, and that the file is what everybody's readers take it for."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdjax import train
from sdjax.config import CLIPTextConfig, UNetConfig
from sdjax.generate import StableDiffusion
from sdjax.models.clip import CLIPTextModel
from sdjax.models.layers import Linear
from sdjax.models.unet import UNet2DCondition
from sdjax.parallel import Devices
from sdjax.training import config, lora
from sdjax.training.config import TrainConfigError
from sdjax.training.loop import Run
from sdjax.training.networks import bind, flat
from sdjax.weights.safetensors import CheckpointError
from tests.training.runs import ONE, write

RANK = 3
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of tiny networks, none of whose weights is zero."""
    folder = tmp_path_factory.mktemp("model")
    run = Run(config.load(write(folder)), ONE)
    rng = np.random.default_rng(0)
    drawn = {
        network: {name: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32) for name, leaf in params.items()}
        for network, params in run.state.ema.items()
    }
    run.state = run.state._replace(step=np.int32(1), ema=drawn)
    run.export(folder / "model")
    return folder / "model"


def settings(folder, model, **changes):
    whole = dataclasses.replace(config.load(write(folder)), init=str(model), model=config.Model())
    return dataclasses.replace(whole, lora=config.Lora(rank=RANK), **changes)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run that is done, in which UNet and text encoder have factors."""
    folder = tmp_path_factory.mktemp("trained")
    run = Run(settings(folder, model), ONE)
    assert run.train()
    run.export(folder / "lora")
    return run, folder / "lora"


def test_a_run_begins_as_the_model_that_it_starts_from(model, tmp_path):
    run = Run(settings(tmp_path, model), ONE)
    for network, params in lora.joined(run.frozen, run.state.params).items():
        for name, leaf in params.items():
            np.testing.assert_array_equal(leaf, run.networks.params[network][name], err_msg=name)
    first = {name for name in run.state.params["unet"] if name.endswith("lora_A.weight")}
    assert all(np.all(run.state.params["unet"][name]) for name in first)


def test_what_stays_is_that_of_the_model_and_factors_move(model, trained):
    run, _ = trained
    networks = StableDiffusion.from_pretrained(model, devices=jax.devices()[:1])._networks
    for name in ("unet", "text_encoder"):
        for key, leaf in flat(networks[name]).items():
            np.testing.assert_array_equal(run.frozen[name][key], leaf[0], err_msg=key)
        assert all(np.any(factor) for factor in run.state.params[name].values())
    assert run.state.params.keys() == {"unet", "text_encoder"}


def test_attentions_projections_have_factors():
    """Of Stable Diffusion's networks in small: each of to_q, to_k, to_v and to_out.0, of q_proj to out_proj."""
    unet = UNet2DCondition(UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=8), rngs=nnx.Rngs(0))
    sizes = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3)
    text = CLIPTextModel(sizes, rngs=nnx.Rngs(0))
    made = {"unet": lora.start(flat(unet), 2, np.random.default_rng(0))}
    made["text_encoder"] = lora.start(flat(text), 2, np.random.default_rng(0))
    assert {network: len(factors) // 2 for network, factors in made.items()} == {"unet": 16 * 2 * 4, "text_encoder": 12}
    assert all(not name.startswith(("conv", "time_embedding")) for name in made["unet"])
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k."
    a, b = (made["unet"][f"{name}lora_{factor}.weight"] for factor in "AB")
    assert (a.shape, b.shape) == ((2, 8), (32, 2))
    assert 0.3 < np.std(np.concatenate([leaf.ravel() for key, leaf in made["unet"].items() if "_A" in key])) < 0.7


def test_one_goes_on_from_another_of_any_scale(model, trained, tmp_path):
    """What it does not have begins anew; it is a part of what the run is made from."""
    run, folder = trained
    other = {key: leaf for key, leaf in load_file(folder / lora.FILE).items() if key.startswith("unet.")}
    told = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 2 * RANK})}
    path = tmp_path / "a.safetensors"
    save_file(other, path, metadata=told)
    started = dataclasses.replace(settings(tmp_path, model), lora=config.Lora(rank=RANK, init=str(path)))
    again = Run(started, ONE)
    for name, factor in again.state.params["unet"].items():
        scale = 2 if "lora_B" in name else 1
        np.testing.assert_array_equal(factor, scale * other[f"unet.{name}"], err_msg=name)
    assert not any(np.any(leaf) for name, leaf in again.state.params["text_encoder"].items() if "lora_B" in name)
    assert again.networks.init != run.networks.init
    frozen = dataclasses.replace(started.diffusion, train_text_encoder=False)
    factors = {"hada_w1_a": (8, 3), "hada_w1_b": (3, 8), "hada_w2_a": (8, 3), "hada_w2_b": (3, 8)}
    q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    hada = {f"{q}.{name}": np.ones(shape, np.float32) for name, shape in factors.items()}
    save_file(hada, tmp_path / "hada.safetensors")
    for changes, message in (
        (
            {"lora": config.Lora(rank=RANK, init=f"{tmp_path}/hada.safetensors")},
            r"hada\.safetensors is no plain LoRA at",
        ),
        ({"lora": config.Lora(rank=RANK + 1, init=str(path))}, r"a\.safetensors has rank 3; lora\.rank is 4"),
        (
            {"lora": config.Lora(rank=RANK, init=str(folder)), "diffusion": frozen},
            r"changes text_encoder\.\S+, which this run does not train",
        ),
    ):
        with pytest.raises(TrainConfigError, match=message):
            Run(dataclasses.replace(started, **changes), ONE)


def test_joined_is_the_papers_formula():
    class Two(nnx.Module):
        def __init__(self):
            self.to_q = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
            self.other = nnx.Linear(5, 4, rngs=nnx.Rngs(1))

    rng = np.random.default_rng(0)
    base = {f"m.{name}": leaf for name, leaf in flat(Two()).items()}
    factors = {name: rng.standard_normal(leaf.shape) for name, leaf in lora.start(base, 2, rng).items()}
    made = lora.joined({"a": base, "b": base}, {"a": factors, "c": base})
    x = rng.standard_normal((3, 5))
    expected = x @ base["m.to_q.kernel"] + x @ factors["m.to_q.lora_A.weight"].T @ factors["m.to_q.lora_B.weight"].T
    np.testing.assert_allclose(x @ made["a"]["m.to_q.kernel"], expected, rtol=1e-5)
    assert made["a"] | {"m.to_q.kernel": base["m.to_q.kernel"]} == base
    assert made["b"] is base
    assert made["c"] is base


def networks_in_small(dtype=jnp.float32):
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "cross_attention_dim": 8}
    unet = UNetConfig(**sizes, down_block_types=DOWN, up_block_types=UP)
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
    return [partial(UNet2DCondition, unet, dtype=dtype), partial(CLIPTextModel, text, dtype=dtype)]


@pytest.mark.parametrize("number", [0, 1], ids=["unet", "text encoder"])
def test_factors_beside_kernels_say_what_joined_ones_say(number):
    build = networks_in_small()[number]
    rng = np.random.default_rng(0)
    base = flat(build(rngs=nnx.Rngs(0)))
    factors = {name: rng.normal(0, 0.3, leaf.shape) for name, leaf in lora.start(base, 2, rng).items()}
    factors = {name: leaf.astype(np.float32) for name, leaf in factors.items()}
    inputs = [
        (rng.standard_normal((2, 8, 8, 4)), np.array([3.0, 900.0]), rng.standard_normal((2, 5, 8))),
        (rng.integers(0, 9, (2, 6)),),
    ][number]
    inputs = [jnp.asarray(array) for array in inputs]
    plain = build(rngs=None)
    beside, without = (
        jax.jit(lambda params, module=module: jax.tree.leaves(bind(module, params)(*inputs)))
        for module in (lora.adapted(plain, 2), plain)
    )
    found, expected = beside(base | factors), without(lora.joined({"a": base}, {"a": factors})["a"])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert max(np.abs(one - other).max() for one, other in zip(found, without(base), strict=True)) > 0.01
    assert len(nnx.to_flat_state(nnx.state(plain))) == len(base)  # it has no factors itself


def test_factors_follow_the_rows_and_columns_that_a_kernel_is_given():
    rng = np.random.default_rng(0)

    class One(nnx.Module):
        def __init__(self, rngs):
            self.m = nnx.List([])
            self.attn = nnx.Module()
            self.attn.to_q = Linear(6, 4, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)

    base = flat(One(nnx.Rngs(0)))
    factors = {name: rng.standard_normal(leaf.shape) for name, leaf in lora.start(base, 2, rng).items()}
    factors = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in factors.items()}
    beside = bind(lora.adapted(One(None), 2), base | factors).attn.to_q
    whole = bind(One(None), lora.joined({"a": base}, {"a": factors})["a"]).attn.to_q

    def wider(leaf):
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(1, 2)])

    x = jnp.asarray(rng.standard_normal((3, 9)), jnp.float32)
    for way, given in (({"columns": wider}, x[:, :6]), ({"rows": wider}, x)):
        np.testing.assert_allclose(beside.project(given, **way), whole.project(given, **way), rtol=1e-4, atol=1e-5)


def test_a_small_change_of_a_large_kernel_counts_in_half_precision():
    linear = Linear(2, 1, bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=None)
    layer = lora._Adapted(linear, 1)
    ones = {
        "kernel": jnp.full((2, 1), 1024.0),
        "lora_A.weight": jnp.array([[0.5, 0]]),
        "lora_B.weight": jnp.ones((1, 1)),
    }
    assert float(bind(layer, ones)(jnp.array([[1.0, -1.0]]))[0, 0]) == 0.5  # 1024.5 is none of bfloat16's numbers


def test_a_base_in_half_precision_keeps_the_whole_of_a_change():
    base = {"m.to_q.kernel": jnp.full((1, 1), 1024, jnp.bfloat16)}
    factors = {"m.to_q.lora_A.weight": jnp.full((1, 1), 0.5), "m.to_q.lora_B.weight": jnp.ones((1, 1))}
    assert float(lora.joined({"unet": base}, {"unet": factors})["unet"]["m.to_q.kernel"][0, 0]) == 1024.5


def test_the_file_is_read_as_what_was_trained(model, trained):
    run, folder = trained
    pipe = StableDiffusion.from_pretrained(model, loras=[folder], devices=jax.devices()[:1])
    networks = lora.joined(run.networks.params, run.state.ema)
    for name in ("unet", "text_encoder"):
        for key, leaf in flat(pipe._networks[name]).items():
            np.testing.assert_allclose(leaf[0], networks[name][key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_the_file_is_named_as_diffusers_names_it(trained):
    _, folder = trained
    [file] = folder.iterdir()
    assert file.name == "pytorch_lora_weights.safetensors"
    assert file.stat().st_mode & 0o777 == 0o644
    tensors = load_file(file)
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in tensors
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_more_devices_change_nothing(model, trained, tmp_path):
    run = Run(settings(tmp_path, model), Devices(jax.devices()[:2]))
    assert run.train()
    for name, leaf in trained[0].state.params["unet"].items():
        np.testing.assert_allclose(run.state.params["unet"][name], leaf, atol=2e-4, err_msg=name)


def test_a_run_goes_on_and_a_run_of_another_rank_is_refused(model, trained, tmp_path):
    whole = settings(tmp_path, model)
    half = Run(dataclasses.replace(whole, steps=4), ONE)
    assert half.train()
    again = Run(whole, ONE)
    assert again.train()
    for name, leaf in trained[0].state.params["unet"].items():
        np.testing.assert_allclose(again.state.params["unet"][name], leaf, atol=1e-6, err_msg=name)
    for rank, message in ((RANK + 1, "lora.rank 3, not 4"), (0, "lora.rank 3, not 0")):
        with pytest.raises(TrainConfigError, match=message):
            Run(dataclasses.replace(whole, lora=config.Lora(rank=rank)), ONE)


def test_an_export_replaces_a_lora_and_nothing_else(model, trained, tmp_path):
    run, _ = trained
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(TrainConfigError, match="something other than a LoRA"):
        run.export(tmp_path / "model")
    for dtype in ("float32", "float16", "bfloat16"):
        run.export(tmp_path / "lora", dtype)
    with safe_open(tmp_path / "lora" / lora.FILE, "np") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118
    assert not list(tmp_path.glob(".lora*"))


def test_the_command_writes_a_lora(model, tmp_path):
    path = write(tmp_path, prompts=["a red circle"])
    text = path.read_text().replace("batch_size = 4", "batch_size = 8")
    kept = text[: text.index("[model.vae]")] + text[text.index("[optimizer]") : text.index("[model.unet]")]
    path.write_text(f'init = "{model}"\n{kept}\n[lora]\nrank = 2\n')
    assert train.main(["--config", str(path), "--steps", "2", "--export-dtype", "float16"]) == 0
    tensors = load_file(tmp_path / "run" / "lora" / lora.FILE)
    assert {leaf.dtype for leaf in tensors.values()} == {np.dtype("float16")}
    assert not any(name.startswith("text_encoder") for name in tensors)
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "sheets" / "000002.png").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lora.rank"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"unet": {"sample_size": 8}}}, "model.unet does not go with lora.rank"),
        ({"model": {"tokenizer": {"merges": 1, "max_length": 9}}}, "model.tokenizer does not go with lora.rank"),
        ({"task": "vae"}, "lora.rank does nothing where task is 'vae'"),
        ({"lora": {"rank": -1}}, "lora.rank is -1; it must be at least 0"),
        ({"lora": {"rank": 0.5}}, "lora.rank is 0.5; it must be of type int"),
    ],
)
def test_what_goes_with_no_lora_is_named(change, message):
    least = {"task": "unet", "output": "x", "steps": 10, "batch_size": 2, "data": {"folder": "y"}, "lora": {"rank": 4}}
    with pytest.raises(TrainConfigError, match=message):
        config.check(config.build(config.Train, least | change))


def test_a_lora_needs_a_model(tmp_path):
    whole = dataclasses.replace(config.load(write(tmp_path)), model=config.Model(), lora=config.Lora(rank=2))
    with pytest.raises((TrainConfigError, CheckpointError), match="init"):
        Run(whole, ONE)

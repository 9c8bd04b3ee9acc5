"""LoRAs: every format against the formula and against diffusers' names, and the pairs that do not fit."""

import dataclasses
import pickle
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import lora_conversion_utils
from diffusers.utils import state_dict_utils
from hypothesis import given
from hypothesis import strategies as st

from sdjax import StableDiffusion
from sdjax.config import CLIPTextConfig, UNetConfig
from sdjax.model_options import add_model_options, model_options
from sdjax.models.clip import CLIPTextModel
from sdjax.models.unet import UNet2DCondition
from sdjax.spec import Spec
from sdjax.weights import ldm
from sdjax.weights.checkpoint import shapes_of, tensors_of
from sdjax.weights.lora import Lora, fused
from sdjax.weights.safetensors import CheckpointError
from tests.weights import original

RANK, ALPHA = 3, 1.5
CONFIGS = {
    name: {"unet": UNetConfig.from_dict(sample.unet)}
    | {key: CLIPTextConfig.from_dict(config) for key, (_, config) in sample.text.items()}
    for name, sample in original.SAMPLES.items()
}
FIRST, XL = CONFIGS["1"], CONFIGS["XL"]
UNET_SHAPES = {name: shapes_of(UNet2DCondition(CONFIGS[name]["unet"], rngs=None)) for name in ("1", "XL")}
TEXT_SHAPES = shapes_of(CLIPTextModel(FIRST["text_encoder"], rngs=None))
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYER = "text_model.encoder.layers.1"
MODULES = {
    "unet": [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn2.to_out.0",
        f"{BLOCK}.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
    ]
    + ["down_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"]
    + ["time_embedding.linear_1"],
    "text_encoder": [f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.out_proj", f"{LAYER}.mlp.fc2"],
}
SHAPES = {"unet": UNET_SHAPES["1"], "text_encoder": TEXT_SHAPES}


def factors(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The down and the up factor of a module's weight."""
    spatial = [1] * (len(shape) - 2)
    down = torch.randn(RANK, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], RANK, *spatial, generator=generator)


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.einsum("or,ri...->oi...", up.reshape(len(up), -1), down)


def kohya(component: str, module: str) -> str:
    return f"{'lora_unet' if component == 'unet' else 'lora_te'}_{module.replace('.', '_')}"


def older(component: str, module: str) -> str:
    """How diffusers named attention's LoRAs before it used PEFT."""
    for new, old in {"q_proj": "to_q", "out_proj": "to_out", "to_out.0": "to_out"}.items():
        module = module.removesuffix(new) + old if module.endswith(new) else module
    return f"{component}.{module.replace('attn1.', 'attn1.processor.').replace('attn2.', 'attn2.processor.')}_lora"


# The names of the down and up factors and of alpha, where the format has one.
FORMATS = {
    "kohya": lambda c, m: [f"{kohya(c, m)}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")],
    "diffusers": lambda c, m: [f"{c}.{m}.{end}" for end in ("lora.down.weight", "lora.up.weight", "alpha")],
    "diffusers, linear": lambda c, m: [f"{c}.{m}.lora_linear_layer.{end}.weight" for end in ("down", "up")],
    "diffusers, processors": lambda c, m: [f"{older(c, m)}.{end}.weight" for end in ("down", "up")],
    "PEFT in diffusers": lambda c, m: [f"{c}.{m}.lora_{end}.weight" for end in "AB"],
    "PEFT": lambda c, m: [f"base_model.model.{m}.lora_{end}.default.weight" for end in "AB"],
    "without the old prefix": lambda c, m: [f"{c}.{m.removeprefix('text_model.')}.lora_{end}.weight" for end in "AB"],
    "the original's names": lambda c, m: [
        f"{kohya(c, ldm.unet(FIRST['unet']).get(m, m))}.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    ],
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_formula(name, tmp_path):
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    for component, modules in MODULES.items():
        for module in modules:
            down, up = factors(SHAPES[component][f"{module}.weight"], generator)
            keys = FORMATS[name](component, module)
            tensors |= zip(keys, (down, up, torch.tensor(ALPHA)), strict=False)
            scale = 0.7 * (ALPHA / RANK if len(keys) == 3 else 1)
            expected[component, f"{module}.weight"] = scale * product(down, up)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    lora = pickle.loads(pickle.dumps(Lora(tmp_path / "a.safetensors", 0.7, FIRST, what="it")))
    edits = {component: fused([lora], component) for component in SHAPES}
    for component, shapes in SHAPES.items():
        for key, shape in shapes.items():
            weight = np.random.default_rng(0).normal(size=shape).astype(np.float16)
            changed = edits[component](key, weight)
            if (component, key) not in expected:
                assert changed is weight
                continue
            assert changed.dtype == np.float32
            theirs = torch.from_numpy(weight).float() + expected[component, key].reshape(shape)
            assert np.abs(changed - theirs.numpy()).max() < 1e-5, key


@pytest.mark.parametrize("name", ["1", "XL"])
def test_kohyas_names_mean_what_they_mean_to_diffusers(name, tmp_path):
    """Each module's factors, by diffusers' own converters: for SDXL, kohya names the modules as the original does."""
    config, generator, tensors = CONFIGS[name]["unet"], torch.Generator().manual_seed(0), {}
    for here, there in ldm.unet(config).items():
        shape = UNET_SHAPES[name][f"{here}.weight"]
        if len(shape) == 1 or here.startswith(("conv_", "time_", "add_")):
            continue
        stem = f"lora_unet_{(there if name == 'XL' else here).replace('.', '_')}"
        down, up = factors(shape, generator)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    ours = Lora(tmp_path / "a.safetensors", 1.0, CONFIGS[name], what="it").deltas("unet")

    class Config:
        layers_per_block = config.layers_per_block

    renamed = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(dict(tensors), Config)
    renamed, alphas = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(renamed)
    theirs = state_dict_utils.convert_unet_state_dict_to_peft(renamed)
    modules = {key.partition(".lora_A")[0] for key in theirs if ".lora_A" in key}
    assert {f"{module.removeprefix('unet.').replace('.processor', '')}.weight" for module in modules} == ours.keys()
    assert len(alphas) == len(modules)
    for module in modules:
        down, up = theirs[f"{module}.lora_A.weight"], theirs[f"{module}.lora_B.weight"]
        delta = ours[f"{module.removeprefix('unet.').replace('.processor', '')}.weight"].product()
        assert np.abs(delta - (2 / RANK * product(down, up)).reshape(delta.shape).numpy()).max() < 1e-5, module


def lone(tmp_path, stem: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The only change that a file makes."""
    safetensors.torch.save_file(
        {f"{stem}.{key}": t.contiguous() for key, t in tensors.items()}, tmp_path / "a.safetensors"
    )
    (delta,) = Lora(tmp_path / "a.safetensors", 1.0, FIRST, what="it").deltas("unet").values()
    return delta.product()


def test_a_middle_factor_is_a_convolution_between_two(tmp_path):
    down, mid, up = torch.randn(3, 32, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(64, 3, 1, 1)
    names = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(3.0)}
    delta = lone(tmp_path, "lora_unet_down_blocks_1_resnets_0_conv1", names)
    x, conv = torch.randn(1, 32, 8, 8), torch.nn.functional.conv2d
    expected = conv(conv(conv(x, down), mid), up)
    ours = conv(x, torch.from_numpy(delta.reshape(64, 32, 3, 3)))
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_products_of_hadamard_and_kronecker(tmp_path):
    stem, conv = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_down_blocks_1_resnets_0_conv1"
    one, two = (torch.randn(64, 2) @ torch.randn(2, 64) for _ in range(2))
    a, b = (torch.linalg.svd(matrix, full_matrices=False) for matrix in (one, two))
    halves = {}
    for i, (u, s, v) in enumerate((a, b), 1):
        halves |= {f"hada_w{i}_a": (u * s)[:, :2], f"hada_w{i}_b": v[:2]}
    delta = lone(tmp_path, stem, halves | {"alpha": torch.tensor(1.0)})
    assert np.abs(delta - (one * two / 2).numpy()).max() < 1e-4

    w1, w2 = torch.randn(4, 8), torch.randn(16, 4, 3, 3)
    expected = torch.einsum("ab,cdkl->acbdkl", w1, w2).reshape(64, 32, 3, 3).numpy()
    delta = lone(tmp_path, conv, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)})
    assert np.abs(delta.reshape(expected.shape) - expected).max() < 1e-5
    core, out, into = torch.randn(2, 2, 3, 3), torch.randn(2, 16), torch.randn(2, 4)
    w2 = torch.einsum("ijkl,ip,jr->prkl", core, out, into)
    expected = torch.einsum("ab,cdkl->acbdkl", w1, w2).reshape(64, 32, 3, 3).numpy() / 2
    parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": out, "lokr_w2_b": into, "alpha": torch.tensor(1.0)}
    delta = lone(tmp_path, conv, parts)
    assert np.abs(delta.reshape(expected.shape) - expected).max() < 1e-5


@pytest.mark.parametrize("module", [f"{BLOCK}.ff.net.0.proj", "down_blocks.1.resnets.0.conv1"])
@pytest.mark.parametrize("kind", ["LyCORIS, by output", "LyCORIS, by input", "PEFT"])
def test_a_dora_gives_what_it_makes_other_lengths(module, kind, tmp_path):
    """As its trainers' layers do: the sum's own norms, along all axes but the output's or the input's."""
    torch.manual_seed(0)
    shape = UNET_SHAPES["1"][f"{module}.weight"]
    weight, (down, up) = torch.randn(shape), factors(shape, torch.Generator().manual_seed(0))
    axis = 1 if kind.endswith("input") else 0
    lengths = torch.rand([size if i == axis else 1 for i, size in enumerate(shape)]) + 0.5
    if kind == "PEFT":
        names = [f"unet.{module}.lora_{end}" for end in ("A.weight", "B.weight", "magnitude_vector")]
        saved, scale = lengths.reshape(1, -1, 1, 1) if len(shape) == 4 else lengths.ravel(), 1
    else:
        stem = kohya("unet", module)
        names = [f"{stem}.{end}" for end in ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha")]
        saved, scale = lengths, ALPHA / RANK
    safetensors.torch.save_file(
        dict(zip(names, (down, up, saved, torch.tensor(ALPHA)), strict=False)), tmp_path / "a.safetensors"
    )
    made = weight + scale * product(down, up)
    expected = (
        made * lengths / torch.linalg.vector_norm(made, dim=[i for i in range(len(shape)) if i != axis], keepdim=True)
    )
    for share in (1.0, 0.25, 0.0):
        edit = fused([Lora(tmp_path / "a.safetensors", share, FIRST, what="it")], "unet")
        theirs = weight + share * (expected - weight)
        assert np.abs(edit(f"{module}.weight", weight.numpy()) - theirs.numpy()).max() < 1e-5
    plain = {f"{kohya('unet', module)}.diff": torch.ones(shape)}
    safetensors.torch.save_file(plain, tmp_path / "b.safetensors")
    loras = [Lora(tmp_path / f"{name}.safetensors", 1.0, FIRST, what="it") for name in "ab"]
    assert np.abs(fused(loras, "unet")(f"{module}.weight", weight.numpy()) - (expected + 1).numpy()).max() < 1e-5


def test_whole_tensors_are_added_as_they_are(tmp_path):
    """As LyCORIS saves full changes (`diff`), norms and biases; no alpha scales them."""
    stem = "lora_unet_down_blocks_1_resnets_0"
    kernel, down, up = torch.randn(64, 32, 3, 3), torch.randn(2, 64, 3, 3), torch.randn(64, 2, 1, 1)
    tensors = {
        f"{stem}_conv1.diff": kernel,
        f"{stem}_conv1.diff_b": torch.arange(64.0),
        f"{stem}_conv1.alpha": torch.tensor(9.0),
        f"{stem}_norm1.w_norm": torch.ones(32),
        f"{stem}_norm1.b_norm": torch.full((32,), 2.0),
        f"{stem}_conv2.lora_down.weight": down,
        f"{stem}_conv2.lora_up.weight": up,
        f"{stem}_conv2.diff_b": torch.ones(64),
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    edit = fused([Lora(tmp_path / "a.safetensors", 0.5, FIRST, what="it")], "unet")
    expected = {
        "conv1.weight": kernel / 2,
        "conv1.bias": torch.arange(64) / 2,
        "norm1.weight": torch.full((32,), 0.5),
        "norm1.bias": torch.ones(32),
        "conv2.weight": product(down, up) / 2,
        "conv2.bias": torch.full((64,), 0.5),
    }
    for key, added in expected.items():
        changed = edit(f"down_blocks.1.resnets.0.{key}", np.zeros(added.shape, np.float16))
        assert np.abs(changed - added.numpy()).max() < 1e-5, key


def test_products_are_made_when_their_tensor_comes(tmp_path):
    """What is held between tensors is of the file's size, not of the network's."""
    tensors = {}
    for i in range(4):
        for end in ("mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj"):
            stem = f"lora_te_text_model_encoder_layers_{i}_{end.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": torch.ones(1, 512), f"{stem}.lora_up.weight": torch.ones(512, 1)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    configs = {"unet": FIRST["unet"], "text_encoder": dataclasses.replace(FIRST["text_encoder"], num_hidden_layers=4)}
    lora = Lora(tmp_path / "a.safetensors", 1.0, configs, what="it")
    lora.deltas("text_encoder")  # what is traced once
    tracemalloc.start()
    try:
        edit = fused([lora, lora], "text_encoder")
        assert tracemalloc.get_traced_memory()[0] < 512 * 512 * 4
        changed = edit("text_model.encoder.layers.0.mlp.fc1.weight", np.zeros((512, 512), np.float16))
    finally:
        tracemalloc.stop()
    assert (changed == 2).all()


SHAPES_OF_FACTORS = st.lists(st.integers(0, 3), max_size=4).map(tuple)
ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    **{name: name for half in ("hada_w1", "hada_w2") for name in (f"{half}_a", f"{half}_b")},
    **{name: name for name in ("hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha")},
    **{name: name for name in ("diff", "w_norm", "dora_scale")},
}


@given(st.dictionaries(st.sampled_from([*ROLES]), SHAPES_OF_FACTORS, min_size=1))
def test_factors_of_any_shape_make_what_they_say_or_are_refused(tmp_path_factory, shapes):
    file = tmp_path_factory.mktemp("factors") / "a.safetensors"
    safetensors.torch.save_file({f"{GOOD}.{name}": torch.ones(shape) for name, shape in shapes.items()}, file)
    try:
        for delta in Lora(file, 1.0, FIRST, what="it").deltas("unet").values():
            assert delta.product().shape == delta.shape
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """Two LoRAs for the small checkpoint, and what each adds to one tensor of the UNet and one of the text encoder."""
    folder, added = tmp_path_factory.mktemp("loras"), []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        unet, text = (torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)), None
        text = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
        tensors = dict(zip(FORMATS["kohya"]("unet", f"{BLOCK}.attn1.to_q"), unet, strict=False))
        tensors |= zip(FORMATS["kohya"]("text_encoder", f"{LAYER}.self_attn.q_proj"), text, strict=False)
        safetensors.torch.save_file(tensors, folder / f"{seed}.safetensors")
        added.append({"unet": product(*unet).numpy(), "text_encoder": product(*text).numpy()})
    return folder, added


def test_several_are_added_at_load_and_named_by_the_fingerprint(tiny, two):
    folder, added = two
    files = [folder / f"{seed}.safetensors" for seed in (0, 1)]
    one = {"devices": jax.devices()[:1]}
    plain = StableDiffusion.from_pretrained(tiny, **one)
    changed = StableDiffusion.from_pretrained(tiny, loras=[(files[0], 0.8), str(files[1])], **one)
    keys = {"unet": f"{BLOCK}.attn1.to_q.weight", "text_encoder": f"{LAYER}.self_attn.q_proj.weight"}
    for component, key in keys.items():
        before, after = (
            tensors_of(jax.tree.map(lambda array: array[0], pipe._networks[component])) for pipe in (plain, changed)
        )
        expected = before[key] + 0.8 * added[0][component] + added[1][component]
        assert np.abs(after.pop(key) - expected).max() < 1e-5
        assert all(np.array_equal(array, before[name]) for name, array in after.items())
    specs = [[], [files[0]], [(files[0], 0.5)], [files[1]], [files[0], files[1]]]
    prints = [Spec(tiny, loras=loras).fingerprint for loras in specs]
    assert len(set(prints)) == len(specs)
    assert prints[0] == plain.spec.fingerprint
    assert pickle.loads(pickle.dumps(changed.spec)).fingerprint == changed.spec.fingerprint


def test_the_option_is_a_path_and_perhaps_a_weight():
    import argparse

    parser = argparse.ArgumentParser()
    add_model_options(parser)
    given = ["a.safetensors", "b:0.5", "gs://bucket/c:-1", "https://host:8080/d", "org/e"]
    options = parser.parse_args([word for text in given for word in ("--lora", text)])
    assert model_options(options)["loras"] == [
        ("a.safetensors", 1.0),
        ("b", 0.5),
        ("gs://bucket/c", -1.0),
        ("https://host:8080/d", 1.0),
        ("org/e", 1.0),
    ]


def weights(name: str, shape: tuple[int, int] = (32, 32)) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(2, shape[1]), f"{name}.lora_up.weight": torch.ones(shape[0], 2)}


GOOD = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q"
CONTEXT = GOOD.replace("attn1_to_q", "attn2_to_k")


def test_a_pickled_lora_is_read_when_it_is_allowed(tiny, tmp_path):
    torch.save(weights(GOOD), tmp_path / "pytorch_lora_weights.bin")
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.bin"):
        with pytest.raises(CheckpointError, match="a pickle is read with allow_pickle only"):
            Spec(tiny, loras=[source])
        edit = Spec(tiny, loras=[(source, 0.5)], allow_pickle=True).edit("unet")
        assert (edit(f"{BLOCK}.attn1.to_q.weight", np.zeros((32, 32))) == 1).all()


def test_a_width_for_each_block_is_one_width(tmp_path):
    unet = dataclasses.replace(FIRST["unet"], cross_attention_dim=(32, 32))
    safetensors.torch.save_file(weights(CONTEXT), tmp_path / "a.safetensors")
    assert Lora(tmp_path / "a.safetensors", 1.0, FIRST | {"unet": unet}, what="it").deltas("unet")
    safetensors.torch.save_file(weights(CONTEXT, (32, 48)), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="attends to 48 channels; that of it attends to 32 channels"):
        Lora(tmp_path / "b.safetensors", 1.0, FIRST | {"unet": unet}, what="it")


def test_a_network_without_attention_in_the_middle_takes_loras(tmp_path):
    """As in SSD-1B, which is SDXL without some of its layers."""
    config = FIRST | {"unet": dataclasses.replace(FIRST["unet"], mid_block_type="UNetMidBlock2D")}
    safetensors.torch.save_file(weights(GOOD), tmp_path / "a.safetensors")
    assert Lora(tmp_path / "a.safetensors", 1.0, config, what="it").deltas("unet").keys() == {
        f"{BLOCK}.attn1.to_q.weight"
    }
    modules = {key.rpartition(".")[0] for key in shapes_of(UNet2DCondition(config["unet"], rngs=None))}
    assert ldm.unet(config["unet"]).keys() == modules

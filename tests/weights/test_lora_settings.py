"""PEFT's settings beside or inside a LoRA, which give the alphas that its file lacks."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdjax.config import UNetConfig
from sdjax.spec import Spec
from sdjax.weights.lora import Lora
from sdjax.weights.safetensors import CheckpointError
from tests.weights import original

CONFIG = {"unet": UNetConfig.from_dict(original.SAMPLES["1"].unet)}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
RANK_4 = {"A": (4, 32), "B": (32, 4)}


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_pefts_settings_give_the_alphas_that_the_file_lacks(where, tmp_path):
    module, other = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"
    prefix = "" if where == "beside" else "unet."
    down, up = torch.ones(4, 32), torch.ones(32, 4)
    tensors = {
        f"{prefix}{name}.lora_{end}.weight": t.clone()
        for name in (module, other)
        for end, t in zip("AB", (down, up), strict=True)
    }
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}, "use_rslora": where == "beside"}
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    else:
        text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    deltas = Lora(tmp_path, 1.0, CONFIG, what="it").deltas("unet")
    divisor = 2 if where == "beside" else 4  # the root of the rank, or the rank
    assert deltas[f"{module}.weight"].product()[0, 0] == 4 * 8 / divisor
    assert deltas[f"{other}.weight"].product()[0, 0] == 4 * 2 / divisor


def test_settings_beside_a_file_of_another_name_are_anothers(tmp_path):
    """Of PEFT's own file, what it holds itself counts before them."""
    tensors = {f"unet.{BLOCK}.attn1.to_q.lora_{end}.weight": torch.ones(shape) for end, shape in RANK_4.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 32}))
    inside = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8})}
    for name, metadata, scale in (("style", None, 1), ("style", inside, 2), ("adapter_model", inside, 2)):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata)
        deltas = Lora(tmp_path / f"{name}.safetensors", 1.0, CONFIG, what="it").deltas("unet")
        assert deltas[f"{BLOCK}.attn1.to_q.weight"].scale == scale


def test_settings_beside_a_file_are_in_the_fingerprint(tiny, tmp_path):
    tensors = {f"unet.{BLOCK}.attn1.to_q.lora_{end}.weight": torch.ones(shape) for end, shape in RANK_4.items()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    prints = [Spec(tiny, loras=[tmp_path]).fingerprint]
    for alpha in (2, 32):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        prints.append(Spec(tiny, loras=[tmp_path]).fingerprint)
    assert len(set(prints)) == 3


def with_patterns(tmp_path, patterns: object, **settings: object) -> dict[str, float]:
    """The scale of each of two modules' products, of rank 2."""
    modules = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k")
    tensors = {f"unet.{m}.lora_{end}.weight": torch.ones(2, 32) for m in modules for end in "AB"}
    tensors = {key: t if "_A" in key else t.T.contiguous() for key, t in tensors.items()}
    text = json.dumps({"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": patterns, **settings})
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": text})
    deltas = Lora(tmp_path / "a.safetensors", 1.0, CONFIG, what="it").deltas("unet")
    return {module[-4:]: deltas[f"{module}.weight"].scale for module in modules}


@pytest.mark.parametrize(
    ("patterns", "q", "k"),
    [
        ({}, 4, 4),
        ({"to_q": 1}, 0.5, 4),
        ({f"^{BLOCK}.attn1.to_q": 1}, 0.5, 4),
        ({"^attn1.to_q": 1}, 4, 4),
        ({r"attn1\.to_q$": 1, "to_k": 2}, 0.5, 1),
        ({"attn1.to..": 6, "to_k": 2}, 3, 3),
        ({"to_k": 2, "attn1.to..": 6}, 3, 1),
        ({"n1.to_q": 1}, 4, 4),
    ],
)
def test_patterns_of_alphas_are_matched_as_peft_matches_them(patterns, q, k, tmp_path):
    assert with_patterns(tmp_path, patterns) == {"to_q": q, "to_k": k}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"alpha": 8, "r": 2}, 4),
        ({"alpha": 8, "r": 2, "alpha_pattern": {"to_q": 6}}, 3),
        ({"alpha": 8, "r": 2, "rank_pattern": {"to_q": 4}}, 2),
        ({"alpha": 8, "r": 2, "rank_pattern": {"to_k": 4}}, 4),
        ({"alpha": 8, "r": 0}, 1),
        ({"r": 2}, 1),
        ({}, 1),
    ],
)
def test_whole_factors_of_peft_are_scaled_by_the_rank_that_its_settings_say(settings, scale, tmp_path):
    """https://github.com/huggingface/peft: `scaling` is alpha / r, also of a LoKr whose factors are no products."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", **settings}))
    name = f"base_model.model.{BLOCK}.attn1.to_q"
    tensors = {f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(8, 8)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert Lora(tmp_path, 1.0, CONFIG, what="it").deltas("unet")[f"{BLOCK}.attn1.to_q.weight"].scale == scale
    products = {
        f"{name}.hada_w{i}_{end}": torch.ones(*size)
        for i in "12"
        for end, size in zip("ab", ((32, 4), (4, 32)), strict=True)
    }
    safetensors.torch.save_file(products, tmp_path / "adapter_model.safetensors")
    delta = Lora(tmp_path, 1.0, CONFIG, what="it").deltas("unet")[f"{BLOCK}.attn1.to_q.weight"]
    alpha = settings.get("alpha_pattern", {}).get("to_q", settings.get("alpha"))
    assert delta.scale == (1 if alpha is None else alpha / 4)  # the factors show their rank


def test_ranks_that_factors_show_are_not_read_of_the_settings(tmp_path):
    """So whatever is written there costs nothing."""
    scales = with_patterns(tmp_path, {}, **{"unet.r": "many", "unet.rank_pattern": {"(a+)+b": None}})
    assert scales == {"to_q": 4, "to_k": 4}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(a+)+b": 1}, r"alpha_pattern of .*a.safetensors has '\(a\+\)\+b'; read are names"),
        ({"": 1}, "alpha_pattern of .* has ''"),
        ({"to_q": "8"}, "an alpha in the settings of .* is no number"),
        ({"to_q": float("nan")}, "an alpha in the settings of .* is no number"),
        ({"to_q": 10**400}, "an alpha in the settings of .* is no number"),
        ({"to_q": None}, "an alpha in the settings of .* is no number"),
        ([1], "alpha_pattern of .* is no JSON object"),
    ],
)
def test_other_patterns_are_refused(patterns, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        with_patterns(tmp_path, patterns)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda v: (
            st.lists(v)
            | st.dictionaries(
                st.sampled_from(["unet.lora_alpha", "unet.alpha_pattern", "unet.use_rslora", "to_q", "to_.", "x"]), v
            )
        ),
    )
)
def test_any_settings_are_read_or_refused(tmp_path_factory, settings):
    try:
        with_patterns(tmp_path_factory.mktemp("settings"), {}, **(settings if isinstance(settings, dict) else {}))
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("key", ["use_dora", "unet.use_dora"])
def test_a_dora_without_its_lengths_is_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match=r"a.safetensors is a DoRA by its settings, and has no lora_magnitude_ve"):
        with_patterns(tmp_path, {}, **{key: True})

"""LoRAs that do not fit, that are something else, or whose keys are made to take long: each is refused in a line."""

import time

import jax
import pytest
import safetensors.torch
import torch

from sdjax import StableDiffusion
from sdjax.spec import Spec
from sdjax.weights.safetensors import CheckpointError
from tests.weights.test_lora import BLOCK, CONTEXT, GOOD, weights

REFUSED = {
    "of SDXL": (
        weights(CONTEXT, (32, 2048)),
        r"a.safetensors is for a UNet that attends to 2048 channels \(SDXL\); that of tiny attends to 32 channels",
    ),
    "with a second text encoder": (
        weights(GOOD) | weights("lora_te2_text_model_encoder_layers_0_self_attn_q_proj"),
        r"a.safetensors has keys that tiny does not: lora_te2_text_model\S+down.weight, lora_te2\S+up.weight$",
    ),
    "with unknown keys": (
        weights(GOOD) | {f"x{i}": torch.ones(1) for i in range(5)},
        "has keys that tiny does not: x0, x1, x2 and 2 more",
    ),
    "of a DoRA's lengths that do not fit": (
        weights(GOOD) | {f"{GOOD}.dora_scale": torch.ones(32)},
        r"a.safetensors: \S+attn1.to_q.weight has magnitudes \[32\] for \[32, 32\]",
    ),
    "of a DoRA's lengths alone": (
        {f"unet.{BLOCK}.attn1.to_q.lora_magnitude_vector.default.weight": torch.ones(32)},
        "attn1.to_q cannot be made of magnitudes alone",
    ),
    "of OneTrainer with its embeddings": (
        weights(GOOD) | {"bundle_emb.thing.string_to_param.*": torch.ones(1, 32)},
        r"a.safetensors holds embeddings too \(bundle_emb",
    ),
    "of another shape": (weights(GOOD, (64, 32)), r"to_q.weight would add \[64, 32\]; the checkpoint's is \[32, 32\]"),
    "with a bias where there is none": (
        weights(GOOD) | {f"{GOOD}.diff_b": torch.ones(32)},
        "has keys that tiny does not: lora_unet_down_blocks_0.*_to_q.diff_b",
    ),
    "with a bias that is a number": (
        {f"{GOOD.replace('to_q', 'to_out_0')}.diff_b": torch.ones(())},
        r"to_out.0 cannot be made of diff \[\]",
    ),
    "with half of its factors": (
        {f"{GOOD}.lora_down.weight": torch.ones(2, 32)},
        r"attn1.to_q cannot be made of down \[2, 32\]",
    ),
    "with an alpha that is no number": (weights(GOOD) | {f"{GOOD}.alpha": torch.ones(0)}, r"alpha \[0\] is no number"),
    "with a factor of one axis": (
        weights(GOOD) | {f"{CONTEXT}.lora_down.weight": torch.ones(3)},
        r"attn2.to_k cannot be made of down \[3\]",
    ),
    "with two adapters": (
        {
            f"unet.{BLOCK}.attn1.to_q.lora_{end}.{name}.weight": torch.ones(4, 4)
            for end in "AB"
            for name in ("one", "two")
        },
        r"has both \S+to_q.lora_A.one.weight and \S+to_q.lora_A.two.weight; give a file for each adapter",
    ),
    "empty": ({}, "holds no LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lora_that_does_not_fit_is_refused_in_a_line(tiny, tmp_path, name):
    tensors, message = REFUSED[name]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message) as refused:
        StableDiffusion.from_pretrained(tiny, loras=[tmp_path / "a.safetensors"], devices=jax.devices()[:1])
    assert "\n" not in str(refused.value)


def test_keys_as_long_as_may_be_are_matched_at_once(tiny, tmp_path):
    keys = [f"{'attn2.to_k.A.' * 75}{i}" for i in range(2000)]
    safetensors.torch.save_file({key: torch.ones(1) for key in keys}, tmp_path / "a.safetensors")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="has keys that tiny does not: attn2"):
        Spec(tiny, loras=[tmp_path / "a.safetensors"])
    assert time.process_time() - start < 2
    safetensors.torch.save_file({"attn2.to_k.A." * 100: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="has 1,300 characters; allowed are 1,000"):
        Spec(tiny, loras=[tmp_path / "a.safetensors"])


def test_what_is_no_lora_file_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors is no file"):
        Spec(tiny, loras=[tmp_path / "nowhere.safetensors"])
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"a\.pt is no safetensors file; a pickle is read with allow_pickle only"):
        Spec(tiny, loras=[tmp_path / "a.pt"])
    with pytest.raises(CheckpointError, match="has 0 safetensors files; name one"):
        Spec(tiny, loras=[tmp_path])
    safetensors.torch.save_file(weights(GOOD), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="the weight nan of"):
        Spec(tiny, loras=[(tmp_path, float("nan"))])

"""Textual inversions: the ids and embeddings that diffusers makes of every format, and those that do not fit."""

import pickle

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from sdjax import Request, StableDiffusion, text
from sdjax.config import CLIPTextConfig
from sdjax.spec import Spec
from sdjax.weights.checkpoint import tensors_of
from sdjax.weights.safetensors import CheckpointError
from sdjax.weights.textual_inversion import TABLE, TextualInversion, extended

ONE = {"devices": jax.devices()[:1]}
VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a <thing> red", "<thing>", "red circle", "a <thing>, a <thing> " * 20, "my<thing>"]


@pytest.fixture
def file(tmp_path):
    def save(tensors: dict[str, torch.Tensor], name: str = "thing.safetensors"):
        safetensors.torch.save_file(tensors, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("vectors", [VECTORS[0], VECTORS[:1], VECTORS])
def test_ids_and_embeddings_are_diffusers(tiny, file, vectors):
    path = file({"<thing>": vectors})
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    theirs.load_textual_inversion(path)
    spec = Spec(tiny, textual_inversions=[path])
    for prompt in PROMPTS:
        expected = theirs.tokenizer(
            theirs.maybe_convert_prompt(prompt, theirs.tokenizer), padding="max_length", max_length=77, truncation=True
        )["input_ids"]
        assert spec.tokenizers[0]([prompt])[0][0].tolist() == expected, prompt
        assert text.encode(spec.tokenizers, [(prompt, "")], "plain").ids[0, 0, 0].tolist() == expected, prompt
    pipe = StableDiffusion.from_pretrained(spec, **ONE)
    table = tensors_of(jax.tree.map(lambda array: array[0], pipe._networks["text_encoder"]))[TABLE]
    assert np.array_equal(table, theirs.text_encoder.get_input_embeddings().weight.detach().numpy())


def test_a1111s_files_are_used_by_their_name_or_a_given_token(tiny, file, tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "a"}, tmp_path / "old.pt")
    path = file({"emb_params": VECTORS}, "mythingy.safetensors")
    both = [path, (tmp_path / "old.pt", "<old>")]
    with pytest.raises(
        CheckpointError, match=r"old.pt is no safetensors file; a pickle is read with allow_pickle only"
    ):
        Spec(tiny, textual_inversions=both)
    tokens = Spec(tiny, textual_inversions=both, allow_pickle=True).tokenizers[0].tokens
    assert len(tokens("<old>")) == 3
    first = min(tokens("mythingy"))
    assert tokens("(mythingy), red")[1:4] == [first, first + 1, first + 2]
    assert max(tokens("amythingyb")) < first, "the token is looked for inside of words"


def test_an_image_uses_it_and_its_id_says_so(tiny, file):
    path = file({"emb_params": 3 * VECTORS}, "a.safetensors")
    pipe = StableDiffusion.from_pretrained(tiny, textual_inversions=[(path, "<a>")], **ONE)
    shared = {"width": 32, "height": 32, "num_inference_steps": 2}
    with_it, without = pipe.generate([Request(prompt=prompt, **shared) for prompt in ("red <a>", "red")])
    assert not np.array_equal(with_it.pixels, without.pixels)
    prints = [Spec(tiny, textual_inversions=given).fingerprint for given in ([], [(path, "<a>")], [(path, "<b>")])]
    assert len(set(prints)) == 3
    there = pickle.loads(pickle.dumps(pipe.spec))
    assert there.fingerprint == prints[1]
    assert there.tokenizers[0].tokens("red <a>") == pipe.spec.tokenizers[0].tokens("red <a>")
    with pytest.raises(ValueError, match="with textual inversions cannot be saved"):
        pipe.save_pretrained(path.parent / "saved")


def test_sdxls_two_encoders_get_a_table_each(file):
    configs = {name: CLIPTextConfig(hidden_size=size) for name, size in (("text_encoder", 32), ("text_encoder_2", 64))}
    one, two = VECTORS[:2], torch.ones(2, 64)
    both = TextualInversion(file({"clip_l": one, "clip_g": two}), None, configs, what="it")
    alone = TextualInversion(file({"<x>": two}, "x.safetensors"), None, configs, what="it")
    assert (both.token, alone.token) == ("thing", "<x>")
    assert [both.count("text_encoder"), alone.count("text_encoder"), alone.count("text_encoder_2")] == [2, 0, 2]
    table = np.ones((6, 32), np.float16)
    changed = extended([both, alone], "text_encoder", 5)(TABLE, table)
    assert np.array_equal(changed, np.concatenate([table[:5], one.numpy()]).astype(np.float32))
    assert len(extended([both, alone], "text_encoder_2", 6)(TABLE, np.ones((6, 64)))) == 10
    assert extended([both], "text_encoder", 5)("other", table) is table


REFUSED = {
    "of another width": (
        {"<x>": torch.ones(1, 768)},
        r"has vectors <x> of shape \[1, 768\]; of tiny, text_encoder takes 32 numbers",
    ),
    "of SDXL": ({"clip_l": torch.ones(32), "clip_g": torch.ones(64)}, r"has vectors clip_g of shape \[64\]; of tiny"),
    "of no vectors": ({"<x>": torch.ones(0, 32)}, r"has vectors <x> of shape \[0, 32\]"),
    "with a known token": ({"red</w>": torch.ones(32)}, "has the token red</w> already"),
    "with spaces": ({"a b": torch.ones(32)}, "'a b' cannot be a token; give one without spaces"),
    "something else": ({"a": torch.ones(32), "b": torch.ones(32)}, "holds no textual inversion, but keys such as a, b"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(tiny, file, name):
    tensors, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as refused:
        Spec(tiny, textual_inversions=[file(tensors)])
    assert "\n" not in str(refused.value)


def test_a_pickle_in_a_folder_is_read_when_it_is_allowed(tiny, tmp_path):
    """As in the sd-concepts-library."""
    torch.save({"<thing>": VECTORS[0]}, tmp_path / "learned_embeds.bin")
    with pytest.raises(
        CheckpointError, match=r"has no safetensors file but learned_embeds\.bin; a pickle is read with"
    ):
        Spec(tiny, textual_inversions=[tmp_path])
    spec = Spec(tiny, textual_inversions=[tmp_path], allow_pickle=True)
    assert len(spec.tokenizers[0].tokens("<thing>")) == 1

"""The text encoder beside transformers' on random weights, over configurations that differ in every field."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax import programs
from sdjax.config import CLIPTextConfig
from sdjax.models import clip
from sdjax.models.clip import CLIPTextModel
from tests.torch_models import CLIP, our_clip, relative_error, torch_clip

# name: (changes to torch_models.CLIP, with projection, batch, tokens)
PARITY = {
    "sd15, eos_token_id of old": ({"eos_token_id": 2, "layer_norm_eps": 1e-3}, False, 3, 16),
    "sd15, eos_token_id of today": ({}, False, 2, 16),
    "sd21": ({"hidden_act": "gelu", "num_hidden_layers": 3, "num_attention_heads": 2}, False, 1, 9),
    "sdxl's first": ({"max_position_embeddings": 77, "intermediate_size": 128, "vocab_size": 120}, False, 2, 77),
    "sdxl's second": ({"hidden_act": "gelu", "hidden_size": 40, "projection_dim": 24}, True, 2, 16),
    "sdxl's second, eos_token_id of old": ({"eos_token_id": 2, "num_hidden_layers": 1}, True, 3, 5),
    "one token": ({"hidden_size": 64}, True, 1, 1),
}


@jax.jit
def run(network, ids):
    return network(ids)


def prompts(config: CLIPTextConfig, batch: int, tokens: int) -> np.ndarray:
    """Random ids with the end-of-text token (98) at a different place in each row, then padding by it."""
    ids = np.random.default_rng(0).integers(3, 97, (batch, tokens))
    for row, end in zip(ids, range(tokens // 2, tokens), strict=False):
        row[end:] = 98
    return ids


def compare(ours, theirs, ids, projection):
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)
    output = run(ours, ids)
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < 1e-4
    assert relative_error(output.pooled, expected.text_embeds if projection else expected.pooler_output) < 1e-4
    for ours_state, their_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(ours_state, their_state) < 1e-4


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    overrides, projection, batch, tokens = PARITY[name]
    theirs = torch_clip(CLIP | overrides, projection=projection)
    ours = our_clip(CLIP | overrides, theirs)
    compare(ours, theirs, prompts(ours.config, batch, tokens), projection)


def test_the_parity_table_varies_every_field():
    configs = [CLIPTextConfig.from_dict(CLIP | overrides) for overrides, *_ in PARITY.values()]
    for field in dataclasses.fields(CLIPTextConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name


def test_a_prompt_without_an_end_pools_its_first_token():
    theirs = torch_clip(CLIP)
    compare(our_clip(CLIP, theirs), theirs, np.full((1, 16), 7), False)


def test_the_final_norm_of_the_last_state_is_the_output():
    ours = our_clip(CLIP, torch_clip(CLIP))
    output = run(ours, prompts(ours.config, 2, 16))
    normed = ours.text_model.final_layer_norm(output.hidden_states[-1])
    np.testing.assert_allclose(normed, output.last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("is_xl", [False, True])
def test_texts_in_chunks_are_read_as_prompts_are(is_xl):
    kinds = [(CLIP, False), (CLIP | {"hidden_size": 40, "projection_dim": 24}, True)][: 1 + is_xl]
    encoders = tuple(our_clip(config, torch_clip(config, projection=projection)) for config, projection in kinds)
    ids = jnp.asarray(prompts(encoders[0].config, 12 * len(kinds), 16).reshape(4, len(kinds), 3, 16))
    read = jax.jit(partial(clip.read, is_xl=is_xl))
    context, pooled = read(encoders, ids)
    rows = jnp.ones((4, len(kinds), 1, 3, 16)), jnp.zeros((4, 1), int), jnp.zeros((4, 1), bool)
    told = programs.encode_text(encoders, ids[:, :, None], *rows, None, is_xl=is_xl)
    np.testing.assert_allclose(context, told.context[:, 0], atol=1e-5)
    if is_xl:
        np.testing.assert_allclose(pooled, told.pooled[:, 0], atol=1e-5)
    for one, other in zip(read(encoders, ids[:, :, 0]), read(encoders, ids[:, :, :1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_too_many_tokens_are_refused():
    network = CLIPTextModel(CLIPTextConfig.from_dict(CLIP), rngs=None)
    with pytest.raises(ValueError, match="17 tokens; this text encoder takes at most 16"):
        network(jnp.zeros((1, 17), jnp.int32))


@pytest.mark.slow
def test_parity_at_the_size_of_stable_diffusion_15():
    config = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "eos_token_id": 2,
    }
    theirs = torch_clip(config)
    ours = our_clip(config, theirs)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 123_060_480
    ids = np.random.default_rng(0).integers(3, 49406, (2, 77))
    ids[0, 12:] = ids[1, 40:] = 49407
    compare(ours, theirs, ids, False)

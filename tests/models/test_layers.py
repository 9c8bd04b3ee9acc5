"""Attention in chunks, norms with exact statistics, and the other layers' own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sdjax.config import ACTIVATIONS as UNET_ACTIVATIONS
from sdjax.config import TEXT_ACTIVATIONS
from sdjax.models import layers
from sdjax.models.layers import GroupNorm, LayerNorm, Upsample, attention, timestep_embedding

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}


def qkv(batch, queries, keys, heads, dim, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((batch, n, heads, dim), np.float32)) for n in (queries, keys, keys)]


def torch_attention(q, k, v, causal=False):
    q, k, v = (torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (77, 77), (512, 77), (513, 77), (600, 600), (1024, 300), (1500, 7)]
)
def test_attention_is_torch_attention(queries, keys):
    arrays = qkv(2, queries, keys, 3, 8)
    np.testing.assert_allclose(jax.jit(attention)(*arrays), torch_attention(*arrays), atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "chunk"), [(5, 3, 1), (34, 9, 17), (33, 1, 17), (16, 40, 17)])
def test_chunks_change_nothing(monkeypatch, queries, keys, chunk):
    monkeypatch.setattr(layers, "QUERY_CHUNK", chunk)
    arrays = qkv(2, queries, keys, 2, 4)
    np.testing.assert_allclose(attention(*arrays), torch_attention(*arrays), atol=1e-5)


def test_causal_attention():
    arrays = qkv(2, 77, 77, 2, 8)
    out = jax.jit(lambda *a: attention(*a, causal=True))(*arrays)
    np.testing.assert_allclose(out, torch_attention(*arrays, causal=True), atol=1e-5)


def test_large_scores_stay_finite():
    q, k, v = (100 * x for x in qkv(1, 600, 64, 1, 8))
    np.testing.assert_allclose(attention(q, k, v), torch_attention(q, k, v), rtol=1e-3, atol=1e-2)


def test_gradients_of_chunks_and_their_memory():
    arrays = qkv(1, 2048, 2048, 2, 8)

    def loss(q, k, v):
        return jnp.square(attention(q, k, v)).sum()

    tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in arrays]
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))
    out.square().sum().backward()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    for ours, theirs in zip(compiled(*arrays), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-4)
    all_scores = 2 * 2048 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores


@pytest.mark.parametrize(("queries", "causal", "dtype"), [(700, False, jnp.bfloat16), (77, True, jnp.float16)])
def test_on_a_gpu_half_precision_goes_to_cudnn(monkeypatch, queries, causal, dtype):
    """The choice and the arguments only: cuDNN itself is played by XLA here."""
    asked = []
    original = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    arrays = qkv(1, queries, 77, 2, 40)
    out = attention(*(x.astype(dtype) for x in arrays), causal=causal)
    assert asked == ["cudnn"]
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), torch_attention(*arrays, causal=causal), atol=0.05)
    attention(*arrays)  # float32, which cuDNN's flash attention does not take
    attention(*(x.astype(dtype) for x in qkv(1, 8, 8, 1, 512)))  # nor the VAE's one large head
    assert asked == ["cudnn"]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_group_norm_is_exact_however_far_the_mean(offset):
    x = np.random.default_rng(0).standard_normal((2, 9, 7, 24), np.float32) + np.float32(offset)
    norm = GroupNorm(6, 24, 1e-5, **F32)
    expected = torch.nn.functional.group_norm(torch.from_numpy(x).double().permute(0, 3, 1, 2), 6, eps=1e-5)
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), expected.permute(0, 2, 3, 1).numpy(), atol=2e-3 if offset else 1e-5
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_layer_norm_is_exact_however_far_the_mean(offset):
    x = np.random.default_rng(0).standard_normal((2, 7, 24), np.float32) + np.float32(offset)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (24,)).numpy()
    np.testing.assert_allclose(LayerNorm(24, 1e-5, **F32)(jnp.asarray(x)), expected, atol=2e-3 if offset else 1e-5)


def test_norms_of_half_precision_input_use_float32_statistics():
    half = F32 | {"dtype": jnp.bfloat16}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 64, 8)) + 30, jnp.bfloat16)
    for norm in (GroupNorm(2, 8, 1e-5, **half), LayerNorm(8, 1e-5, **half)):
        assert norm(x).dtype == jnp.bfloat16
        mean, variance = (f(np.float64(norm(x)), axis=None) for f in (np.mean, np.var))
        assert abs(mean) < 1e-2
        assert abs(variance - 1) < 1e-2


@pytest.mark.parametrize("size", [None, (8, 10), (7, 10), (8, 9), (7, 9)])
def test_upsample_is_nearest_interpolation(size):
    upsample = Upsample(3, **F32)
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[1, 1] = np.eye(3)
    upsample.conv.kernel[...] = jnp.asarray(kernel)
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 3), np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size=size or (8, 10))
    np.testing.assert_allclose(upsample(jnp.asarray(x), size), expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_timestep_embedding_is_float32_and_takes_fractions():
    t = jnp.asarray([0.0, 0.25, 999.0], jnp.float32)
    flipped = timestep_embedding(t, 8, flip_sin_to_cos=True, freq_shift=0)
    plain = timestep_embedding(t, 8, flip_sin_to_cos=False, freq_shift=0)
    assert flipped.dtype == jnp.float32
    np.testing.assert_array_equal(flipped, np.roll(plain, 4, axis=-1))
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(flipped[:, :4], np.cos(np.asarray(t)[:, None] * frequencies), atol=1e-4)


def test_every_activation_that_a_config_may_name():
    assert set(layers.ACTIVATIONS) == {*UNET_ACTIVATIONS, *TEXT_ACTIVATIONS}
    x = np.linspace(-6, 6, 50, dtype=np.float32)
    for name in UNET_ACTIVATIONS:
        torch_name = {"swish": "silu"}.get(name, name)
        expected = getattr(torch.nn.functional, torch_name)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(layers.ACTIVATIONS[name](x), expected, atol=1e-6)


def test_initialisation_has_torch_variance():
    kernel = layers.Conv(64, 96, **F32).kernel[...]
    bound = 1 / np.sqrt(64 * 9)
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)

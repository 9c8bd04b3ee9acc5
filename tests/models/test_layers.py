"""Norms with exact statistics, and the other layers' own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sdjax.config import ACTIVATIONS as UNET_ACTIVATIONS
from sdjax.config import TEXT_ACTIVATIONS
from sdjax.models import convolution, layers
from sdjax.models.layers import GroupNorm, LayerNorm, timestep_embedding
from sdjax.models.resnet import ResnetBlock, Upsample

F32 = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}


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


@pytest.mark.parametrize("out", [8, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_resnets_input_may_come_in_two_parts(monkeypatch, out, dtype, platform):
    """24 channels in groups of 6, of which one lies in both parts; as many come out, without a shortcut, or fewer."""
    kw = {**F32, "dtype": dtype, "rngs": nnx.Rngs(0)}
    block = ResnetBlock(24, out, groups=4, eps=1e-5, act_fn="silu", **kw)
    block.norm1.bias[...] = jnp.arange(24, dtype=jnp.float32) / 24
    x = 1 + jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 5, 24), np.float32))
    x, skip = x[..., :16].astype(dtype), x[..., 16:].astype(dtype)
    joined = block(jnp.concatenate([x, skip], axis=-1)).astype(jnp.float32)
    monkeypatch.setattr(convolution, "_APART", 1)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **ways: ways.get(platform, default)(*args)
    )
    apart = block(x, skip=skip).astype(jnp.float32)
    np.testing.assert_allclose(apart, joined, atol=1e-5 if dtype == jnp.float32 else 0.05)


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
        np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=1e-6)


def test_initialisation_has_torch_variance():
    kernel = layers.Conv(64, 96, **F32).kernel[...]
    bound = 1 / np.sqrt(64 * 9)
    assert np.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.02)

"""The autoencoder beside diffusers' on random weights, over configurations that differ in every field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.config import VAEConfig
from sdjax.models.vae import AutoencoderKL
from tests.torch_models import VAE, nhwc, our_vae, relative_error, torch_vae

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"

# name: (changes to torch_models.VAE, batch, image height, image width)
PARITY = {
    "sd15": (
        {
            "block_out_channels": [16, 32, 32, 32],
            "down_block_types": [DOWN] * 4,
            "up_block_types": [UP] * 4,
            "layers_per_block": 2,
            "sample_size": 64,
        },
        *(1, 32, 48),
    ),
    "sdxl": ({"scaling_factor": 0.13025, "block_out_channels": [32, 64]}, 2, 20, 12),
    "fp16 fix": ({"force_upcast": False, "act_fn": "gelu", "norm_num_groups": 32}, 1, 6, 8),
    "odd sizes": (
        {
            "block_out_channels": [16, 24, 32],
            "down_block_types": [DOWN] * 3,
            "up_block_types": [UP] * 3,
            "sample_size": [27, 41],
        },
        *(2, 27, 41),
    ),
    "16 channels, no quantisation": (
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 3},
        *(1, 10, 14),
    ),
    "no attention": ({"mid_block_add_attention": False, "act_fn": "relu"}, 3, 9, 8),
    "one block, masks out": (
        {
            "block_out_channels": [40],
            "down_block_types": [DOWN],
            "up_block_types": [UP],
            "in_channels": 4,
            "out_channels": 1,
            "act_fn": "mish",
        },
        *(2, 5, 3),
    ),
}


# Compiles in half the time so; the tests at full size and of half precision keep the usual level.
encode = jax.jit(lambda network, x: network.encode(x))
decode = jax.jit(lambda network, z: network.decode(z))


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    overrides, batch, height, width = PARITY[name]
    theirs = torch_vae(VAE | overrides)
    ours = our_vae(VAE | overrides, theirs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, ours.config.in_channels, height, width), generator=generator)
    with torch.no_grad():
        latents = theirs.encode(x).latent_dist
        z = torch.randn(latents.mean.shape, generator=generator)
        images = theirs.decode(z).sample
    mean, logvar = encode(ours, nhwc(x))
    assert mean.shape[1:3] == (height // ours.config.downscale, width // ours.config.downscale)
    assert relative_error(mean, nhwc(latents.mean)) < 1e-4
    assert relative_error(logvar, nhwc(latents.logvar)) < 1e-4
    assert relative_error(decode(ours, nhwc(z)), nhwc(images)) < 1e-4


def test_the_parity_table_varies_every_field():
    configs = [VAEConfig.from_dict(VAE | overrides) for overrides, *_ in PARITY.values()]
    for field in dataclasses.fields(VAEConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name


def test_extreme_log_variances_are_limited():
    config = VAE | {"block_out_channels": [16], "down_block_types": [DOWN], "up_block_types": [UP]}
    theirs = torch_vae(config)
    with torch.no_grad():
        theirs.quant_conv.bias += 100 * torch.tensor([0, 0, 0, 0, 1, 1, -1, -1])
        expected = theirs.encode(torch.zeros(1, 3, 4, 4)).latent_dist.logvar
    _, logvar = encode(our_vae(config, theirs), np.zeros((1, 4, 4, 3), np.float32))
    assert logvar.min() == -30
    assert logvar.max() == 20
    np.testing.assert_array_equal(logvar, nhwc(expected))


def test_half_precision():
    theirs = torch_vae(VAE)
    ours, half = our_vae(VAE, theirs), our_vae(VAE, theirs, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    z = np.random.default_rng(0).standard_normal((1, 6, 5, 4), np.float32)
    out = jax.jit(lambda network, z: network.decode(z))(half, z)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, np.asarray(decode(ours, z))) < 0.05


@pytest.mark.slow
def test_parity_at_the_size_of_stable_diffusion_15():
    config = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": [DOWN] * 4,
        "up_block_types": [UP] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    theirs = torch_vae(config)
    ours: AutoencoderKL = our_vae(config, theirs)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 83_653_863
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((1, 3, 512, 512), generator=generator) * 2 - 1
    z = torch.randn((1, 4, 64, 64), generator=generator)
    with torch.no_grad():
        latents = theirs.encode(x).latent_dist
        images = theirs.decode(z).sample
    mean, logvar = jax.jit(lambda network, x: network.encode(x))(ours, nhwc(x))
    assert relative_error(mean, nhwc(latents.mean)) < 1e-4
    assert relative_error(logvar, nhwc(latents.logvar)) < 1e-4
    out = jax.jit(lambda network, z: network.decode(z))(ours, nhwc(z))
    assert relative_error(out, nhwc(images)) < 1e-4

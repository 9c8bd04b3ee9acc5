"""The tiny autoencoder beside diffusers' on random weights."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.config import AutoencoderTinyConfig, ConfigError
from tests.models.test_vae import decode, encode
from tests.torch_models import TINY, nhwc, our_tiny, relative_error, torch_tiny

# name: (changes to torch_models.TINY, batch, image height, image width)
PARITY = {
    "taesd": (
        {
            "encoder_block_out_channels": [16] * 4,
            "decoder_block_out_channels": [16] * 4,
            "num_encoder_blocks": [1, 3, 3, 3],
            "num_decoder_blocks": [3, 3, 3, 1],
        },
        *(1, 32, 48),
    ),
    "odd sizes, another activation": ({"act_fn": "gelu", "decoder_block_out_channels": [12, 12]}, 2, 9, 15),
    "sixteen latent channels": ({"latent_channels": 16, "scaling_factor": 1.5, "in_channels": 4}, 3, 6, 8),
    "one block": (
        {
            "encoder_block_out_channels": [8],
            "decoder_block_out_channels": [8],
            "num_encoder_blocks": [2],
            "num_decoder_blocks": [1],
            "out_channels": 1,
        },
        *(1, 5, 3),
    ),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    overrides, batch, height, width = PARITY[name]
    theirs = torch_tiny(TINY | overrides)
    ours = our_tiny(TINY | overrides, theirs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, ours.config.in_channels, height, width), generator=generator)
    with torch.no_grad():
        latents = theirs.encode(x).latents
        z = 2 * torch.randn(latents.shape, generator=generator)
        images = theirs.decode(z).sample
    mean, logvar = encode(ours, nhwc(x))
    assert mean.shape[1:3] == (-(-height // ours.config.downscale), -(-width // ours.config.downscale))
    assert relative_error(mean, nhwc(latents)) < 1e-4
    assert np.all(jnp.exp(0.5 * logvar) == 0)
    assert relative_error(decode(ours, nhwc(z)), nhwc(images)) < 1e-4


def test_the_parity_table_varies_every_field():
    configs = [AutoencoderTinyConfig.from_dict(TINY | overrides) for overrides, *_ in PARITY.values()]
    for field in dataclasses.fields(AutoencoderTinyConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name


def test_configs():
    written = json.loads(torch_tiny(TINY).to_json_string())
    assert AutoencoderTinyConfig.from_dict(written) == AutoencoderTinyConfig.from_dict(TINY)
    for change in (
        {"encoder_block_out_channels": [8, 16]},
        {"decoder_block_out_channels": [8]},
        {"num_decoder_blocks": [1, 1, 1]},
        {"upsample_fn": "bilinear"},
        {"scaling_factor": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            AutoencoderTinyConfig.from_dict(TINY | change)

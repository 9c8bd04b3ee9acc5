"""ControlNets beside diffusers' on random weights, over configurations that differ in every field."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from sdjax.config import ConfigError, ControlNetConfig
from tests.models.test_unet import PARITY as UNETS
from tests.models.test_unet import inputs, numpy
from tests.torch_models import CONTROLNET, nhwc, our_controlnet, relative_error, torch_controlnet

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def like(unet: str) -> dict:
    """The configuration of a ControlNet for one of the UNets."""
    fields = {field.name for field in dataclasses.fields(ControlNetConfig)}
    return {key: value for key, value in UNETS[unet][0].items() if key in fields}


# name: (changes to torch_models.CONTROLNET, batch, latent height, latent width, text tokens)
PARITY = {
    "sd15": ({"conditioning_embedding_out_channels": [4, 8, 12, 16], "act_fn": "silu"}, 2, 4, 6, 77),
    "sd21, odd sizes": (
        {
            "use_linear_projection": True,
            "upcast_attention": True,
            "attention_head_dim": [2, 8],
            "cross_attention_dim": 40,
            "in_channels": 5,
            "controlnet_conditioning_channel_order": "bgr",
            "norm_num_groups": 16,
            "norm_eps": 1e-3,
        },
        *(1, 7, 9, 7),
    ),
    "sdxl": (like("sdxl") | {"layers_per_block": 1, "conditioning_embedding_out_channels": [6, 4, 10]}, 2, 6, 4, 9),
    "no attention, pooled": (
        {
            "down_block_types": [PLAIN, PLAIN],
            "mid_block_type": "UNetMidBlock2D",
            "mid_block_scale_factor": 1.5,
            "layers_per_block": 2,
            "conditioning_channels": 4,
            "global_pool_conditions": True,
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        *(3, 6, 4, 5),
    ),
    "sdxl, no layers": (
        like("sdxl") | {"layers_per_block": 1, "transformer_layers_per_block": [1, 0, 0]},
        *(2, 4, 8, 5),
    ),
    "one block": (
        {"block_out_channels": [16], "down_block_types": [CROSS], "only_cross_attention": True},
        *(1, 3, 5, 4),
    ),
}


@jax.jit
def run(network, x, t, context, image, scale, guess_mode, added):
    return network(x, t, context, network.embed(image), scale, guess_mode, added)


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    overrides, batch, height, width, tokens = PARITY[name]
    config = CONTROLNET | overrides
    theirs = torch_controlnet(config)
    ours = our_controlnet(config, theirs)
    x, t, context, added, _ = inputs(ours.config, batch, height, width, tokens)
    side = ours.config.downscale
    image = torch.rand((batch, ours.config.conditioning_channels, height * side, width * side))
    for guess in (False, True):
        with torch.no_grad():
            expected = theirs(x, t, context, image, 0.7, added_cond_kwargs=added, guess_mode=guess)
        scale, guessing = np.full(batch, 0.7, np.float32), np.full(batch, guess)
        downs, middle = run(ours, nhwc(x), t.numpy(), context.numpy(), nhwc(image), scale, guessing, numpy(added))
        assert len(downs) == len(expected.down_block_res_samples)
        for out, reference in zip(downs, expected.down_block_res_samples, strict=True):
            assert relative_error(out, nhwc(reference)) < 1e-4
        assert relative_error(middle, nhwc(expected.mid_block_res_sample)) < 1e-4


def test_the_parity_table_varies_every_field():
    configs = [ControlNetConfig.from_dict(CONTROLNET | overrides) for overrides, *_ in PARITY.values()]
    for field in dataclasses.fields(ControlNetConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name


def test_each_row_has_its_own_scale():
    config = CONTROLNET | PARITY["one block"][0]
    ours = our_controlnet(config, torch_controlnet(config))
    x, t, context, *_ = inputs(ours.config, 1, 3, 5, 4)
    image = np.random.default_rng(0).random((1, 6, 10, 3), np.float32)
    args = [np.repeat(a, 3, 0) for a in (nhwc(x), t.numpy(), context.numpy(), image)]
    _, middle = run(ours, *args, np.array([1, 0, 0.5], np.float32), np.zeros(3, bool), None)
    assert np.abs(middle[0]).max() > 0
    assert np.abs(middle[1]).max() == 0
    np.testing.assert_allclose(middle[2], middle[0] / 2, rtol=1e-4, atol=1e-5)


def test_configs():
    assert ControlNetConfig.from_dict(json.loads(torch_controlnet(CONTROLNET).to_json_string())) == (
        ControlNetConfig.from_dict(CONTROLNET)
    )
    for change in (
        {"layers_per_block": [1, 2]},
        {"mid_block_type": None},
        {"conditioning_embedding_out_channels": []},
        {"controlnet_conditioning_channel_order": "gray"},
        {"up_block_types": ["UpBlock2D"] * 2},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            ControlNetConfig.from_dict(CONTROLNET | change)

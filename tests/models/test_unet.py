"""The UNet beside diffusers' on random weights, over configurations that differ in every field."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sdjax.config import DownConfig, UNetConfig
from sdjax.models import blocks
from sdjax.models.unet import UNet2DCondition, skip_channels
from tests.torch_models import UNET, nhwc, our_unet, relative_error, torch_unet

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"

# name: (changes to torch_models.UNET, batch, latent height, latent width, text tokens)
PARITY = {
    "sd15": (
        {
            "block_out_channels": [16, 32, 32, 32],
            "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
            "up_block_types": [UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS],
        },
        *(2, 16, 24, 77),
    ),
    "odd sizes": (
        {
            "block_out_channels": [16, 16, 16, 32],
            "down_block_types": [PLAIN, CROSS, PLAIN, PLAIN],
            "up_block_types": [UP_PLAIN, UP_PLAIN, UP_CROSS, UP_PLAIN],
            "sample_size": [13, 23],
            "norm_eps": 1e-3,
        },
        *(1, 13, 23, 5),
    ),
    "sd21 inpainting": (
        {
            "in_channels": 9,
            "use_linear_projection": True,
            "upcast_attention": True,
            "attention_head_dim": [2, 8],
            "cross_attention_dim": 40,
            "sample_size": None,
        },
        *(3, 8, 8, 7),
    ),
    "sdxl": (
        {
            "block_out_channels": [32, 32, 64],
            "down_block_types": [PLAIN, CROSS, CROSS],
            "up_block_types": [UP_CROSS, UP_CROSS, UP_PLAIN],
            "layers_per_block": [1, 2, 1],
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 4, 8],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
        *(2, 10, 6, 9),
    ),
    "lcm, asymmetric depths": (
        {
            "block_out_channels": [32, 64],
            "down_block_types": [CROSS, CROSS],
            "up_block_types": [UP_CROSS, UP_CROSS],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, [2, 1]],
            "reverse_transformer_layers_per_block": [[1, 2, 1], 2],
            "time_cond_proj_dim": 12,
            "cross_attention_dim": [24, 24],
            "mid_block_scale_factor": 1.5,
        },
        *(2, 7, 8, 16),
    ),
    "no middle, own timestep": (
        {
            "mid_block_type": None,
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "center_input_sample": True,
            "act_fn": "gelu",
            "norm_num_groups": 16,
            "out_channels": 8,
        },
        *(1, 12, 5, 3),
    ),
    "scale and shift, wide kernels": (
        {
            "resnet_time_scale_shift": "scale_shift",
            "conv_in_kernel": 5,
            "conv_out_kernel": 1,
            "only_cross_attention": [True, False],
            "act_fn": "mish",
        },
        *(2, 6, 14, 4),
    ),
    "one block, no attention but in the middle": (
        {
            "block_out_channels": [48],
            "down_block_types": [PLAIN],
            "up_block_types": [UP_PLAIN],
            "act_fn": "relu",
            "only_cross_attention": True,
        },
        *(1, 3, 5, 6),
    ),
    "no attention in the middle": ({"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 2}, 1, 5, 4, 3),
}


@jax.jit
def run(network, *args, **kwargs):
    return network(*args, **kwargs)


def inputs(config: DownConfig, batch: int, height: int, width: int, tokens: int, seed: int = 0):
    """Random arguments as torch tensors: latents, timesteps, context, added_cond, timestep_cond; images NCHW."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    added = None
    if config.addition_embed_type:
        dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ids = torch.randint(0, 2000, (batch, 6), generator=generator)
        added = {"text_embeds": normal(batch, dim), "time_ids": ids.float()}
    width_of_cond = getattr(config, "time_cond_proj_dim", None)
    cond = normal(batch, width_of_cond) if width_of_cond else None
    dim = config.mid_stage.context_dim if config.mid_stage else config.cross_attention_dim
    t = torch.rand(batch, generator=generator) * 1000
    return normal(batch, config.in_channels, height, width), t, normal(batch, tokens, dim), added, cond


def numpy(tree):
    return jax.tree.map(lambda x: x.numpy(), tree)


def both(overrides, batch, height, width, tokens):
    config = UNET | overrides
    theirs = torch_unet(config)
    ours = our_unet(config, theirs)
    x, t, context, added, cond = inputs(ours.config, batch, height, width, tokens)
    with torch.no_grad():
        expected = theirs(x, t, context, added_cond_kwargs=added, timestep_cond=cond).sample
    out = run(ours, nhwc(x), t.numpy(), context.numpy(), numpy(added), timestep_cond=numpy(cond))
    return out, nhwc(expected)


@pytest.mark.parametrize("name", PARITY)
def test_parity(name):
    assert relative_error(*both(*PARITY[name])) < 1e-4


def test_the_parity_table_varies_every_field():
    configs = [UNetConfig.from_dict(UNET | overrides) for overrides, *_ in PARITY.values()]
    for field in dataclasses.fields(UNetConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name


@pytest.fixture(scope="module")
def small():
    """diffusers' network, ours with its weights, and arguments for both."""
    theirs = torch_unet(UNET)
    ours = our_unet(UNET, theirs)
    return theirs, ours, inputs(ours.config, 2, 7, 10, 5)


# The least that has a block of each kind of layer but the resampling ones.
TINY = UNET | {"block_out_channels": [16], "down_block_types": [CROSS], "up_block_types": [UP_PLAIN]}


@pytest.fixture(scope="module")
def tiny():
    """diffusers' network, ours with its weights, and our arguments."""
    theirs = torch_unet(TINY)
    ours = our_unet(TINY, theirs)
    x, t, context, _, _ = inputs(ours.config, 2, 5, 4, 3)
    return theirs, ours, jax.tree.map(jnp.asarray, (nhwc(x), t.numpy(), context.numpy()))


def test_controlnet_residuals(small):
    theirs, ours, (x, t, context, _, _) = small
    sizes = [(7, 10), (7, 10), (4, 5), (4, 5)]
    assert len(skip_channels(ours.config)) == len(sizes)
    downs = [torch.randn(2, c, *size) for c, size in zip(skip_channels(ours.config), sizes, strict=True)]
    middle = torch.randn(2, 64, 4, 5)
    with torch.no_grad():
        expected = theirs(
            x, t, context, down_block_additional_residuals=tuple(downs), mid_block_additional_residual=middle
        ).sample
    out = run(
        ours,
        *(nhwc(x), t.numpy(), context.numpy()),
        down_block_additional_residuals=[nhwc(d) for d in downs],
        mid_block_additional_residual=nhwc(middle),
    )
    assert relative_error(out, nhwc(expected)) < 1e-4


def test_conditions_that_the_network_does_not_take(tiny):
    _, ours, args = tiny
    added = {"text_embeds": np.zeros((2, 20), np.float32), "time_ids": np.zeros((2, 6), np.float32)}
    with pytest.raises(ValueError, match="takes \\[\\]"):
        jax.eval_shape(run, ours, *args, added)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        jax.eval_shape(run, ours, *args, timestep_cond=np.zeros((2, 4), np.float32))
    sdxl = UNet2DCondition(UNetConfig.from_dict(UNET | PARITY["sdxl"][0]), rngs=None)
    assert jax.eval_shape(run, sdxl, *args, added).shape == args[0].shape
    del added["text_embeds"]
    with pytest.raises(ValueError, match="added_cond has keys \\['time_ids'\\]; this network takes"):
        jax.eval_shape(run, sdxl, *args, added)


def test_remat_changes_no_value_and_no_gradient(tiny):
    theirs, ours, args = tiny

    @jax.jit
    def gradient(network):
        return jax.value_and_grad(lambda network: jnp.square(network(*args)).mean())(network)

    value, kept = gradient(ours)
    again, recomputed = gradient(our_unet(TINY, theirs, remat=True))
    np.testing.assert_allclose(value, again, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()) + 1e-7)


def test_a_tpu_takes_a_transformers_images_in_parts(tiny, monkeypatch):
    shapes = [(16, 64, 64, 320), (6, 64, 64, 640), (7, 96, 96, 320), (1, 256, 256, 320), (4, 64, 64, 320)]
    assert [blocks._images_at_once(shape) for shape in shapes] == [4, 2, 1, 1, 4]
    _, ours, args = tiny

    def gradient():
        gradient = jax.value_and_grad(lambda network: jnp.square(network(*args)).mean())
        return jax.tree.leaves(jax.jit(gradient)(ours))

    whole = gradient()
    monkeypatch.setattr(blocks, "VALUES_AT_ONCE", 0)
    monkeypatch.setattr(blocks.Transformer, "__call__", blocks.Transformer._in_parts)
    for a, b in zip(whole, gradient(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()) + 1e-7)


def test_every_parameter_has_a_gradient_and_half_precision_keeps_it_float32(tiny):
    theirs, _, args = tiny
    half = our_unet(TINY, theirs, dtype=jnp.bfloat16)

    @jax.jit
    def gradient(network):
        return jax.grad(lambda network: jnp.square(network(*args).astype(jnp.float32)).mean())(network)

    for path, leaf in jax.tree.leaves_with_path(gradient(half)):
        assert leaf.dtype == jnp.float32
        assert 0 < np.abs(leaf).max() < np.inf, path


def test_half_precision_computes_near_float32(tiny):
    theirs, ours, args = tiny
    out = run(our_unet(TINY, theirs, dtype=jnp.bfloat16), *args)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, np.asarray(run(ours, *args))) < 0.05
    stored = our_unet(TINY, theirs, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(run, stored, *args).dtype == jnp.bfloat16


def test_a_network_is_an_ordinary_argument(tiny):
    theirs, ours, args = tiny
    traces = []

    @jax.jit
    def call(network, *args):
        traces.append(1)
        return network(*args)

    expected = call(ours, *args)
    call(our_unet(TINY, theirs), *args)
    call(jax.tree.map(jnp.zeros_like, ours), *args)
    assert len(traces) == 1  # one program for every network of a config

    doubled = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (ours, args))
    out = jax.pmap(lambda network, args: network(*args), devices=jax.local_devices()[:2])(*doubled)
    for each in out:
        np.testing.assert_allclose(each, expected, atol=1e-5)


def test_abstract_construction_initialises_nothing_and_is_quick():
    config = UNetConfig(cross_attention_dim=768)
    start = time.perf_counter()
    shapes = UNet2DCondition(config, rngs=None)
    traced = nnx.eval_shape(lambda: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    assert time.perf_counter() - start < 30  # about 2 s alone on the machine
    assert jax.tree.structure(shapes) == jax.tree.structure(traced)
    leaves = jax.tree.leaves(shapes)
    assert leaves == jax.tree.leaves(traced)
    assert sum(leaf.size for leaf in leaves) == 859_520_964  # Stable Diffusion 1.5


@pytest.mark.slow
def test_parity_at_the_size_of_stable_diffusion_15():
    config = {"sample_size": 64, "cross_attention_dim": 768}
    theirs = torch_unet(config)
    ours = our_unet(config, theirs)
    x, t, context, _, _ = inputs(ours.config, 1, 64, 64, 77)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
    assert relative_error(run(ours, nhwc(x), t.numpy(), context.numpy()), nhwc(expected)) < 1e-4

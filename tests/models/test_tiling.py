"""Strips and slices of images give the values of whole images, in less memory."""

import functools

import jax
import numpy as np
import pytest

from sdjax.flops import flops
from sdjax.models import tiling
from tests.torch_models import TINY, VAE, our_tiny, our_vae, relative_error, torch_tiny, torch_vae

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
encode, decode = (jax.jit(function, static_argnames="tiling") for function in (tiling.encode, tiling.decode))

DEEP = VAE | {"block_out_channels": [8, 16, 16], "down_block_types": [DOWN] * 3, "up_block_types": [UP] * 3}


def networks():
    yield our_vae(DEEP, torch_vae(DEEP))
    plain = VAE | {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}
    yield our_vae(plain, torch_vae(plain))
    yield our_tiny(TINY, torch_tiny(TINY))


@pytest.mark.parametrize("height", [40, 43], ids=["strips that divide it", "strips that overlap"])
@pytest.mark.parametrize("vae", networks(), ids=["kl", "kl without attention", "tiny"])
def test_strips_give_the_whole_image(vae, height, monkeypatch):
    monkeypatch.setattr(tiling, "_ROWS", 8)  # so that small images have several strips
    side = vae.config.downscale
    generator = np.random.default_rng(0)
    # Images whose top and bottom differ, so that the statistics of a strip are not those of the whole.
    z = generator.normal(size=(2, height, 5, vae.config.latent_channels)) + np.linspace(-3, 3, height)[:, None, None]
    x = generator.normal(size=(2, height * side, 3 * side, 3)) * np.linspace(0, 2, height * side)[:, None, None]
    z, x = z.astype(np.float32), x.astype(np.float32)
    assert relative_error(decode(vae, z, tiling=True), np.asarray(decode(vae, z, tiling=False))) < 1e-5
    strips, whole = encode(vae, x, tiling=True), encode(vae, x, tiling=False)
    assert relative_error(strips[0], np.asarray(whole[0])) < 1e-5
    np.testing.assert_allclose(strips[1], whole[1], rtol=1e-4, atol=1e-4)


def test_no_height_takes_more_than_about_twice_the_arithmetic():
    vae = our_vae(DEEP, torch_vae(DEEP))
    for height in (256, 257, 263):
        z = jax.ShapeDtypeStruct((1, height, 8, vae.config.latent_channels), np.float32)
        strips, whole = (flops(functools.partial(tiling.decode, tiling=tiled), vae, z) for tiled in (True, False))
        assert strips < 2.3 * whole


@pytest.mark.slow
def test_a_large_image_takes_a_part_of_the_memory():
    config = DEEP | {"mid_block_add_attention": False}
    vae = our_vae(config, torch_vae(config))

    def memory(function, *shape, **options):
        function = jax.jit(functools.partial(function, **options))
        return (
            function.lower(vae, jax.ShapeDtypeStruct(shape, np.float32)).compile().memory_analysis().temp_size_in_bytes
        )

    assert tiling.TILED < 1536 * 1536
    assert memory(tiling.decode, 1, 384, 384, 4) < 0.4 * memory(tiling.decode, 1, 384, 384, 4, tiling=False)
    assert memory(tiling.encode, 1, 1536, 1536, 3) < 0.5 * memory(tiling.encode, 1, 1536, 1536, 3, tiling=False)
    # Of smaller ones, one at a time.
    assert memory(tiling.decode, 4, 192, 192, 4) < 0.3 * memory(lambda vae, z: vae.decode(z), 4, 192, 192, 4)

"""What stands for convolutions on a CPU and on a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax.models import convolution as convolution_room
from sdjax.models.convolution import (
    convolution,
    convolution_of_doubled,
    convolution_of_parts,
    doubled,
    filtered,
    in_strips,
    row_pairs,
    summed,
    unfolded,
)

SAME = ((1, 1), (1, 1))


def arrays(batch, height, width, channels, out, size=3, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((size, size, channels, out), np.float32) / np.float32(size * np.sqrt(channels))
    return jnp.asarray(rng.standard_normal((batch, height, width, channels), np.float32)), jnp.asarray(kernel)


def of_torch(x, kernel, stride=1, padding=SAME):
    """In float64."""
    (top, bottom), (left, right) = padding
    x = torch.from_numpy(np.array(x)).double().permute(0, 3, 1, 2)
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    kernel = torch.from_numpy(np.array(kernel)).double().permute(3, 2, 0, 1)
    return torch.nn.functional.conv2d(x, kernel, stride=stride).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [SAME, ((0, 1), (0, 1)), ((2, 0), (3, 1))])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 8), (16, 16)])
def test_unfolding_is_the_convolution(height, width, stride, padding):
    x, kernel = arrays(2, height, width, 5, 3)
    made = jax.jit(lambda *pair: unfolded(*pair, stride=stride, padding=padding))(x, kernel)
    np.testing.assert_allclose(made, of_torch(x, kernel, stride, padding), atol=1e-5)


@pytest.mark.parametrize("made", [summed, in_strips])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 8, 5), (3, 12, 7), (1, 19, 3)])
def test_what_is_made_for_a_tpu_is_the_convolution(made, batch, height, width):
    """19 rows are cut into no equal strips."""
    x, kernel = arrays(batch, height, width, 5, 3)
    np.testing.assert_allclose(jax.jit(made, static_argnums=2)(x, kernel, SAME), of_torch(x, kernel), atol=1e-5)
    for two, rows in ((kernel[:2], (1, 0)), (kernel[1:], (0, 1))):
        padding = rows, (1, 1)
        np.testing.assert_allclose(made(x, two, padding), of_torch(x, two, padding=padding), atol=1e-5)


def of_doubled(x, kernel):
    return of_torch(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


@pytest.mark.parametrize("made", [row_pairs, functools.partial(filtered, is_doubled=True), convolution_of_doubled])
@pytest.mark.parametrize(
    ("batch", "height", "width", "tiles"), [(1, 1, 1, 4096), (2, 8, 5, 4096), (9, 6, 7, 20), (2, 13, 7, 1)]
)
def test_of_a_doubled_image(monkeypatch, made, batch, height, width, tiles):
    monkeypatch.setattr(convolution_room, "_TILES", tiles)
    x, kernel = arrays(batch, height, width, 5, 3)
    np.testing.assert_allclose(jax.jit(made)(x, kernel), of_doubled(x, kernel), atol=1e-5)


def test_a_doubled_image_in_bfloat16():
    """The sums of a kernel's rows are rounded, as the result is: the error is that of two roundings in place of one."""
    x, kernel = (y.astype(jnp.bfloat16) for y in arrays(8, 8, 8, 128, 128))
    expected = of_doubled(x.astype(jnp.float32), kernel.astype(jnp.float32))
    plain = convolution(x.repeat(2, axis=1).repeat(2, axis=2), kernel, padding=SAME)
    ours, theirs = (np.abs(np.asarray(y, np.float32) - expected).mean() for y in (row_pairs(x, kernel), plain))
    assert theirs < ours < 2 * theirs


def test_the_platform_that_a_program_is_for_chooses():
    """Lowered for a TPU on a machine without one."""

    def of_parts(x, kernel):
        return convolution_of_parts(jnp.split(x, 2, axis=-1), kernel, padding=SAME)

    def operations(batch, side, name, made=lambda *pair: convolution(*pair, padding=SAME)):
        shapes = (batch, side, side, 128), (3, 3, 128, 128)
        exported = jax.export.export(jax.jit(made), platforms=["tpu"])
        return exported(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).mlir_module().count(name)

    assert operations(4, 64, "stablehlo.dot_general") == 9
    assert operations(4, 128, "tensor<8x66x128x128x") > 0  # strips
    assert operations(8, 64, "stablehlo.dot_general") == 0
    assert operations(4, 8, "stablehlo.dot_general") == 0
    assert operations(4, 32, "stablehlo.dot_general", convolution_of_doubled) == 12
    assert operations(8, 32, "stablehlo.convolution", convolution_of_doubled) == 2
    assert operations(4, 128, "stablehlo.convolution", of_parts) == 2
    assert operations(8, 16, "stablehlo.convolution", of_parts) == 2
    assert operations(4, 64, "stablehlo.dot_general", of_parts) == 9


@pytest.mark.parametrize(
    ("height", "width", "tiles"), [(1, 1, 4096), (8, 5, 4096), (16, 16, 20), (13, 7, 20), (13, 7, 1)]
)
def test_filtering_is_the_convolution(monkeypatch, height, width, tiles):
    monkeypatch.setattr(convolution_room, "_TILES", tiles)
    x, kernel = arrays(2, height, width, 5, 3)
    np.testing.assert_allclose(jax.jit(filtered)(x, kernel), of_torch(x, kernel), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "height", "channels", "stride", "padding"),
    [
        (3, 24, 128, 1, SAME),
        (3, 8, 128, 1, SAME),
        (3, 24, 16, 1, SAME),
        (3, 64, 128, 2, SAME),
        (3, 24, 128, 2, SAME),
        (3, 24, 128, 2, ((0, 1), (0, 1))),
        (1, 24, 128, 1, ((0, 0), (0, 0))),
        (5, 24, 128, 1, ((2, 2), (2, 2))),
    ],
)
def test_any_convolution_is_torchs(size, height, channels, stride, padding):
    x, kernel = arrays(1, height, height, channels, channels, size)
    made = jax.jit(lambda *pair: convolution(*pair, stride=stride, padding=padding))(x, kernel)
    np.testing.assert_allclose(made, of_torch(x, kernel, stride, padding), atol=2e-5)


@pytest.mark.parametrize("is_doubled", [False, True])
@pytest.mark.parametrize("height", [24, 8])
def test_its_gradients_are_those_of_xlas(height, is_doubled):
    x, kernel = arrays(1, height, height, 128, 128)

    def total(x, kernel):
        y = convolution_of_doubled(x, kernel) if is_doubled else convolution(x, kernel, padding=SAME)
        return jnp.sin(y).sum()

    def plain(x, kernel):
        x = doubled(x) if is_doubled else x
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sin(y).sum()

    for ours, theirs in zip(*(jax.jit(jax.grad(f, (0, 1)))(x, kernel) for f in (total, plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())

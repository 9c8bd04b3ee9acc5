"""torch's generator in NumPy, and what noise may depend on."""

from itertools import pairwise

import jax
import numpy as np
import torch
import torchsde
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.sampling import Schedule, make_table, noise
from tests.sampling.toy import config

draw = jax.jit(noise.jax_latents, static_argnums=2)
SHAPES = st.one_of(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 70).map(lambda n: [n]))


@given(st.integers(-(2**63), 2**64 - 1), st.lists(SHAPES, min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_a_seed_draws_what_torch_draws(seed, shapes):
    """Any order of sizes: below sixteen (a scalar path that keeps every second value), odd, multiples of sixteen."""
    ours, theirs = noise.TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in shapes:
        expected = torch.randn(shape, generator=theirs).numpy()
        actual = ours.normal(shape)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_a_latent_is_drawn_channels_first():
    expected = torch.randn((1, 4, 8, 6), generator=torch.Generator("cpu").manual_seed(7))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(noise.torch_latent(noise.TorchGenerator(7), (8, 6, 4)), expected, atol=2e-6)


def test_torch_noise_is_drawn_only_where_rows_use_it():
    table = make_table(Schedule.from_config(config()), sampler="euler_ancestral", num_inference_steps=4)
    drawn = np.stack(list(noise.torch_step_noise(table, noise.TorchGenerator(0), (8, 8, 4))))
    assert drawn.shape == (4, 8, 8, 4)
    assert [bool(np.any(row)) for row in drawn] == [True, True, True, False]


def test_a_brownian_motion_is_torchsdes():
    tree = torchsde.BrownianInterval(
        t0=0.03, t1=14.6, size=(1, 4, 2, 3), entropy=7, tol=1e-6, pool_size=24, halfway_tree=True
    )
    times = [9.0, 8.999999, 2.5, 0.1, 0.03]
    steps = noise.brownian_steps(7, [14.6, *times], (2, 3, 4))
    for step, (above, below) in zip(steps, pairwise(times), strict=True):
        expected = -tree(below, above)[0].permute(1, 2, 0) / (above - below) ** 0.5
        np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-2 if above - below < 1e-5 else 1e-5)


def test_a_brownian_motion_depends_on_its_seed_and_ends_alone():
    def path(seed, *times):
        steps = noise.brownian_steps(seed, [14.6, *times], (64, 64, 4))
        return np.cumsum([step * (a - b) ** 0.5 for step, (a, b) in zip(steps, pairwise(times), strict=True)], 0)

    few, many, other = path(1, 9, 2.5, 0.03), path(1, 9, 5, 4.2, 2.5, 2.5, 1, 0.03), path(2, 9, 2.5, 0.03)
    np.testing.assert_allclose(few, many[[2, 5]], atol=1e-5)
    assert np.abs(few - other).min(0).mean() > 0.1
    np.testing.assert_allclose(few.var((1, 2, 3)), [6.5, 8.97], rtol=0.05)


def test_jax_noise_depends_on_seed_and_stream_alone():
    seeds = [0, 1, 2**32, 2**63 + 5, 7]
    together = draw(noise.keys(seeds), noise.START, (4, 4, 4))
    backwards = draw(noise.keys(seeds[::-1]), noise.START, (4, 4, 4))
    np.testing.assert_array_equal(together, backwards[::-1])
    assert len({row.tobytes() for row in np.asarray(together)}) == len(seeds)
    other = draw(noise.keys(seeds), noise.ROWS, (4, 4, 4))
    assert not np.any(np.asarray(other) == np.asarray(together))


def test_jax_noise_is_the_same_whatever_is_set_of_threefry():
    keys, found = noise.keys([7]), []
    for is_set in (False, True):
        with jax.threefry_partitionable(is_set):
            found.append(jax.jit(lambda keys: noise.jax_latents(keys, noise.START, (8, 8, 4)))(keys))
    np.testing.assert_array_equal(*found)


def test_jax_noise_is_normal():
    drawn = np.asarray(draw(noise.keys(range(4)), noise.ROWS + 3, (64, 64, 4)))
    assert drawn.dtype == np.float32
    assert np.all(np.abs(drawn.mean((1, 2, 3))) < 0.03)
    assert np.all(np.abs(drawn.std((1, 2, 3)) - 1) < 0.02)

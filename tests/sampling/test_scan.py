"""The scan against NumPy, what it calls, and what an image may depend on."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.sampling import SAMPLERS, Schedule, make_table, noise, stack
from sdjax.sampling.scan import Given, Known, advance, begin
from tests.sampling.toy import SHAPE, Toy, config, relative, run_table

SCHEDULE = Schedule.from_config(config("sample"))  # no division by sigma: float32 loses nothing in the toy itself
N, ROWS = len(SAMPLERS), 24
draw = jax.jit(noise.jax_latents, static_argnums=2)


def network(scale, record=None):
    """The toy in JAX; half 1 sees a shifted latent. record: called with (half,) for each call that really happens."""
    toy = Toy(SCHEDULE)
    log_ratios = jnp.asarray(np.log(toy.ratios), jnp.float32)

    def call(half, x, t, told, kept):
        if record is not None:
            jax.debug.callback(record, half)
        ratio = jnp.exp(jnp.interp(t, jnp.arange(len(log_ratios)), log_ratios))[:, None, None, None]
        alpha = 1 / jnp.sqrt(1 + ratio**2)
        x = x + scale * jnp.asarray(half, jnp.float32)
        return toy.image(x, alpha, ratio * alpha, jnp.tanh), kept

    return call


def weights_of(guidance):
    """Those of one prompt and the negative one."""
    return np.stack([guidance, 1 - guidance], axis=-1)


def batch():
    """A request for each sampler, no two alike in anything else either."""
    tables = [
        make_table(SCHEDULE, sampler=name, num_inference_steps=2 + i % 10, eta=0.25 * (i % 4))
        for i, name in enumerate(SAMPLERS)
    ]
    guidance = np.linspace(1, 9, N, dtype=np.float32)[:, None] * np.ones((N, ROWS), np.float32)
    seeds = noise.keys(range(100, 100 + N))
    start = np.array([t.start_noise for t in tables], np.float32)[:, None, None, None]
    return tables, guidance, seeds, start * np.asarray(draw(seeds, noise.START, SHAPE))


@jax.jit
def run(tables, latents, keys, weights, rescale):
    return sample(network(0.1), tables, latents, keys=keys, weights=weights, rescale=rescale)


def sample(network, tables, latents, **options):
    """A whole run in one call."""
    tables, latents, options = jax.tree.map(jnp.asarray, (tables, latents, options))
    return advance(network, tables, begin(latents, ()), **options).latents


def numpy_run(table, latent, key, guidance, rescale):
    """One request in float64, literally."""
    toy = Toy(SCHEDULE)
    step_noise = [np.asarray(draw(key[None], noise.ROWS + r, SHAPE))[0] for r in range(table.calls)]

    def guided(x, t):
        conditional, unconditional = toy(x, t), toy(x + 0.1, t)
        out = unconditional + guidance * (conditional - unconditional)
        return rescale * out * np.std(conditional, ddof=1) / np.std(out, ddof=1) + (1 - rescale) * out

    return run_table(table, guided, latent.astype(np.float64), step_noise)


def test_a_mixed_batch_is_each_request_alone_and_the_numpy_loop():
    tables, guidance, keys, latents = batch()
    rescale = np.linspace(0, 1, N, dtype=np.float32)

    def pick(members):
        return run(
            stack([tables[i] for i in members], ROWS),
            latents[members],
            keys[members],
            weights_of(guidance[members]),
            rescale[members],
        )

    together = np.asarray(pick(np.arange(N)))
    order = np.random.RandomState(0).permutation(N)
    np.testing.assert_array_equal(pick(order), together[order])
    for i, table in enumerate(tables):
        np.testing.assert_array_equal(pick(np.full(N, i))[3], together[i])
        expected = numpy_run(table, latents[i], keys[i], float(guidance[i, 0]), float(rescale[i]))
        assert relative(together[i], expected) < 2e-5
    assert run._cache_size() == 1


def plain(batch, rows=ROWS):
    """Settings of a batch that needs no guidance."""
    return {
        "keys": noise.keys(range(batch)),
        "weights": np.ones((batch, rows, 1), np.float32),
        "rescale": np.zeros(batch, np.float32),
    }


def test_calls_that_no_row_needs_do_not_happen():
    """Padding calls nothing; guidance 1 calls one half; a batch calls as often as its longest member."""
    seen = []
    counted = network(0.0, lambda half: seen.append(int(half)))
    latents = np.ones((2, *SHAPE), np.float32)
    fn = jax.jit(lambda tables, weights: sample(counted, tables, latents, **{**plain(2), "weights": weights}))

    def calls(tables, weights):
        seen.clear()
        jax.block_until_ready(fn(stack(tables, ROWS), weights))
        jax.effects_barrier()
        return seen.count(0), seen.count(1)

    short = make_table(SCHEDULE, sampler="euler", num_inference_steps=3)
    long = make_table(SCHEDULE, sampler="heun", num_inference_steps=5)
    assert long.calls == 9
    both = np.full((2, ROWS), 7.5, np.float32)
    assert calls([short, long], weights_of(both)) == (9, 9)
    assert calls([short, short], weights_of(np.ones_like(both))) == (3, 0)
    interval = np.where(np.arange(ROWS) < 2, 1, both)
    assert calls([short, short], weights_of(interval)) == (3, 1)
    one_guided = np.stack([np.ones(ROWS, np.float32), both[0]])
    assert calls([long, short], weights_of(one_guided)) == (9, 3)


def test_an_unneeded_half_cannot_reach_an_image():
    """The unconditional half is NaN everywhere; a request at guidance 1 beside one that needs it stays as it was."""
    table = make_table(SCHEDULE, sampler="euler", num_inference_steps=3)

    def broken(half, x, t, told, kept):
        return jnp.where(half == 1, jnp.nan, 0.1 * x), kept

    weights = weights_of(np.array([[1.0] * 3, [7.5] * 3], np.float32))
    latents = np.ones((2, *SHAPE), np.float32)
    out = sample(broken, stack([table, table]), latents, **{**plain(2), "weights": weights})
    assert np.all(np.isfinite(out[0]))
    assert np.all(np.isnan(out[1]))


def test_given_step_noise_replaces_the_keys():
    table = make_table(SCHEDULE, sampler="euler_ancestral", num_inference_steps=6)
    given = np.stack(list(noise.torch_step_noise(table, noise.TorchGenerator(5), SHAPE)))
    latent = np.ones((1, *SHAPE), np.float32)
    out = sample(network(0.0), stack([table]), latent, given=Given(given[None], np.ones(1, bool)), **plain(1, 6))
    assert relative(out[0], run_table(table, Toy(SCHEDULE), latent[0].astype(np.float64), given)) < 2e-5


def test_known_parts_of_an_image_stay_and_the_rest_is_painted_as_alone():
    """Pixels do not mix in the toy, so the painted half is what it is without a mask, whatever a sampler saves."""
    names = list(SAMPLERS)
    tables = [make_table(SCHEDULE, sampler=name, num_inference_steps=5) for name in names]
    rng = np.random.RandomState(0)
    shape = (len(names), *SHAPE)
    latents, image, fixed = (rng.randn(*shape).astype(np.float32) for _ in range(3))
    mask = np.broadcast_to(np.arange(SHAPE[1])[:, None] < 3, (*shape[:3], 1)).astype(np.float32)

    @jax.jit
    def paint(mask):
        return sample(network(0.0), stack(tables, ROWS), latents, known=Known(image, fixed, mask), **plain(len(names)))

    free, kept = paint(np.ones_like(mask)), paint(mask)
    np.testing.assert_allclose(kept, mask * np.asarray(free) + (1 - mask) * image, atol=2e-5)


def test_rows_past_a_tables_end_leave_what_is_known_at_its_level():
    """Where a refiner goes on, in whatever company."""
    table = make_table(SCHEDULE, sampler="ddim", num_inference_steps=6, denoising_end=0.5)
    latents, image, fixed = np.random.RandomState(0).randn(3, 1, *SHAPE).astype(np.float32)
    known = Known(image, fixed, np.zeros((1, *SHAPE[:2], 1), np.float32))
    kept = sample(network(0.0), stack([table], ROWS), latents, known=known, **plain(1))
    np.testing.assert_allclose(kept, table.signal[-1] * image + table.noise[-1] * fixed, atol=1e-6)


def test_a_run_may_be_cut_into_calls_anywhere():
    tables, guidance, keys, latents = batch()
    rescale = np.full(N, 0.3, np.float32)
    whole = run(stack(tables, ROWS), latents, keys, weights_of(guidance), rescale)
    part = jax.jit(
        lambda tables, state, weights: advance(
            network(0.1), tables, state, weights=weights, keys=jnp.asarray(keys), rescale=jnp.asarray(rescale)
        )
    )
    state, stacked = begin(jnp.asarray(latents), ()), stack(tables, ROWS)
    for first in range(0, ROWS, 6):
        rows = slice(first, first + 6)
        cut = jax.tree.map(lambda column, rows=rows: column[:, rows], stacked)
        state = part(cut, state, weights_of(guidance[:, rows]))
    assert part._cache_size() == 1
    np.testing.assert_allclose(state.latents, whole, rtol=1e-5, atol=1e-5)

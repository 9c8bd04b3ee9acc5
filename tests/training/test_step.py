"""One optimizer step: parts and devices add up, and each option does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.parallel import Devices
from sdjax.training.config import Optimizer
from sdjax.training.step import initial, learning_rate, make_step, microbatches, optimizer

PLAIN = Optimizer(learning_rate=0.1, clip_norm=0.0, ema_decay=0.5)
START = {"net": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


def _linear(trained, frozen, batch, key):
    """A linear model's squared error, with a target that depends on the example's place and on the step's key."""
    noise = jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), (2,)))(batch["place"])
    output = batch["x"] @ trained["net"]["kernel"] + trained["net"]["bias"] - frozen["other"]["offset"]
    error = ((output - noise) ** 2).mean(axis=1)
    return error, {"error": error}


def _batch(number):
    x = np.random.default_rng(number).normal(size=(16, 3)).astype(np.float32)
    return {"x": x, "place": np.arange(16, dtype=np.int32)}


def _run(options, count, devices=1, steps=100):
    on = Devices(jax.devices()[:devices])
    step = make_step(_linear, options, steps=steps, batch_size=16, seed=0, devices=on)
    copies = jax.tree.map(
        lambda leaf: on.replicate(np.array(leaf)), (initial(START, options, steps), {"other": {"offset": 1.0}})
    )
    state, history = copies[0], []
    for number in range(count):
        state, metrics = step(state, copies[1], microbatches(_batch(number), options.accumulate, on))
        history.append({name: float(value[0]) for name, value in metrics.items()})
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state), history


def _close(a, b, tolerance=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize(("devices", "accumulate"), [(8, 1), (1, 4), (4, 2)])
def test_parts_and_devices_make_the_same_step(devices, accumulate):
    options = Optimizer(learning_rate=0.1, accumulate=accumulate)
    _close(_run(options, 3, devices), _run(Optimizer(learning_rate=0.1), 3))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_first_state_is_optax_own_and_the_hosts(clip):
    options = Optimizer(learning_rate=0.1, clip_norm=clip, warmup_steps=3, decay_steps=5)
    state = initial(START, options, 10)
    own = optimizer(options, 10).init(START)
    assert jax.tree.structure(state.optimizer) == jax.tree.structure(own)
    for ours, theirs in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(own), strict=True):
        assert isinstance(ours, np.ndarray)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_a_step_is_adamw():
    state, history = _run(PLAIN, 2)
    params, rule = START, optax.adamw(0.1, weight_decay=0.0)
    slots = rule.init(params)
    for number in range(2):
        batch, key = _batch(number), jax.random.fold_in(jax.random.key(0), number)
        loss = lambda p, b=batch, k=key: _linear(p, {"other": {"offset": 1.0}}, b, k)[0].mean()  # noqa: E731
        value, gradients = jax.value_and_grad(loss)(params)
        assert history[number]["loss"] == pytest.approx(float(value), rel=1e-5)
        assert history[number]["gradient_norm"] == pytest.approx(float(optax.global_norm(gradients)), rel=1e-5)
        updates, slots = rule.update(gradients, slots, params)
        params = optax.apply_updates(params, updates)
    _close(state.params, params)
    assert state.step == 2


def test_the_average_follows_the_parameters():
    first, _ = _run(PLAIN, 1)
    second, _ = _run(PLAIN, 2)
    # The first decays are (1 + step) / (10 + step), until that passes ema_decay.
    _close(first.ema, jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, START, first.params))
    _close(second.ema, jax.tree.map(lambda a, b: 2 / 11 * a + 9 / 11 * b, first.ema, second.params))
    still, _ = _run(Optimizer(learning_rate=0.1, ema_decay=0.0), 2)
    assert not still.ema
    assert still.average is still.params


@pytest.mark.parametrize("most", [0.01, 0.0])
def test_clipping_bounds_what_the_optimizer_sees_and_zero_is_no_bound(most):
    # Adam forgets a gradient's scale but for epsilon: its second moment shows what it was given.
    clipped, history = _run(Optimizer(learning_rate=0.1, clip_norm=most), 1)
    moments = next(
        slot.nu
        for slot in jax.tree.leaves(clipped.optimizer, is_leaf=lambda x: hasattr(x, "nu"))
        if hasattr(slot, "nu")
    )
    norm = history[0]["gradient_norm"]
    assert norm > 1
    assert sum(leaf.sum() for leaf in jax.tree.leaves(moments)) / 0.001 == pytest.approx((most or norm) ** 2, rel=1e-3)


def test_weights_decay_but_biases_do_not():
    decayed, _ = _run(Optimizer(learning_rate=0.1, weight_decay=0.5), 1)
    plain, _ = _run(Optimizer(learning_rate=0.1), 1)
    np.testing.assert_allclose(decayed.params["net"]["kernel"], plain.params["net"]["kernel"] - 0.05, rtol=1e-5)
    np.testing.assert_array_equal(decayed.params["net"]["bias"], plain.params["net"]["bias"])


def test_the_rate_rises_stays_and_falls():
    rate = learning_rate(Optimizer(learning_rate=1.0, warmup_steps=4, decay_steps=5), 20)
    rates = [float(rate(count)) for count in range(21)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(rates[4:16], 1)
    np.testing.assert_allclose(rates[15:], [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose([float(learning_rate(Optimizer(learning_rate=0.5), 20)(n)) for n in (0, 19)], 0.5)
    _, history = _run(Optimizer(learning_rate=1.0, warmup_steps=4, decay_steps=5), 2, steps=20)
    assert [row["learning_rate"] for row in history] == [0.25, 0.5]


def test_the_rate_falls_along_a_cosine():
    rate = learning_rate(Optimizer(learning_rate=2.0, warmup_steps=2, decay_steps=4, schedule="cosine"), 10)
    rates = [float(rate(count)) for count in range(11)]
    np.testing.assert_allclose(rates[:7], [1, *[2] * 6])
    np.testing.assert_allclose(rates[6:], [1 + np.cos(np.pi * part) for part in (0, 0.25, 0.5, 0.75, 1)], atol=1e-6)


def test_steps_draw_different_noise():
    options = Optimizer(learning_rate=0.0)
    on = Devices(jax.devices()[:1])
    step = make_step(_linear, options, steps=9, batch_size=16, seed=0, devices=on)
    copies = jax.tree.map(
        lambda leaf: on.replicate(np.array(leaf)), (initial(START, options, 9), {"other": {"offset": 1.0}})
    )
    state, first = step(copies[0], copies[1], microbatches(_batch(0), 1, on))
    _, second = step(state, copies[1], microbatches(_batch(0), 1, on))
    assert float(first["loss"][0]) != float(second["loss"][0])

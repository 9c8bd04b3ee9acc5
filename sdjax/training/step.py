"""One optimizer step on all devices: gradients of the parts of a batch are summed, over parts and over devices."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from sdjax.parallel import Devices
from sdjax.training.config import Optimizer
from sdjax.training.networks import Params
from sdjax.training.objective import Objective


class State(NamedTuple):
    """All that a run changes: with it, any step can be taken again."""

    step: Array | np.ndarray  # int32 [], steps taken
    params: dict[str, Params]
    ema: dict[str, Params]  # empty where ema_decay is 0
    optimizer: optax.OptState

    @property
    def average(self) -> dict[str, Params]:
        """What is shown and exported."""
        return self.ema or self.params


def learning_rate(options: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, then linear or along a cosine to zero over the last `decay_steps` of `steps`."""
    rise = optax.linear_schedule(0.0, options.learning_rate, options.warmup_steps)
    begin, fall = steps - options.decay_steps, optax.linear_schedule(options.learning_rate, 0.0, options.decay_steps)
    if options.schedule == "cosine":
        fall = optax.cosine_decay_schedule(options.learning_rate, options.decay_steps)
    # The count is the number of steps taken before: the first step of a warm-up is not lost to a rate of zero.
    return lambda count: jnp.minimum(
        rise(count + 1) if options.warmup_steps else options.learning_rate,
        fall(jnp.maximum(count - begin, 0)) if options.decay_steps else options.learning_rate,
    )


def optimizer(options: Optimizer, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2017) after clipping by the whole gradient's norm."""
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(options, steps),
        b1=options.beta1,
        b2=options.beta2,
        weight_decay=options.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    return optax.chain(clip, adamw)


def initial(params: dict[str, Params], options: Optimizer, steps: int) -> State:
    """The state before the first step, on the host: what Adam keeps begins as zeros."""
    slots = jax.eval_shape(optimizer(options, steps).init, params)
    return State(
        np.zeros((), np.int32),
        params,
        params if options.ema_decay else {},
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), slots),
    )


def make_step(
    objective: Objective, options: Optimizer, *, steps: int, batch_size: int, seed: int, devices: Devices
) -> Callable[[State, dict[str, Params], Mapping[str, Any]], tuple[State, dict[str, Array]]]:
    """Return the function (state, frozen parameters, batch) -> (state, metrics), compiled for the devices.

    State and frozen parameters have a leading device axis; a batch is what `microbatches` returns, on the devices. The
    state passed in is given up.
    """
    update_rule, rate = optimizer(options, steps), learning_rate(options, steps)

    def step(state: State, frozen: dict[str, Params], batch: Mapping[str, Any]) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def total(params: dict[str, Params], part: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
            losses, metrics = objective(params, frozen, part, key)
            return losses.sum() / batch_size, {name: value.sum() / batch_size for name, value in metrics.items()}

        gradient = jax.value_and_grad(total, has_aux=True)

        def add(sums: Any, part: Mapping[str, Any]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(state.params, part)), None

        # The first part stands before the loop: in one, XLA's gradients of kernels are ~80 times slower on a CPU.
        sums = gradient(state.params, jax.tree.map(lambda leaf: leaf[0], batch))
        if options.accumulate > 1:
            sums, _ = jax.lax.scan(add, sums, jax.tree.map(lambda leaf: leaf[1:], batch))
        (loss, metrics), gradients = jax.lax.psum(sums, "device")

        updates, slots = update_rule.update(gradients, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        ema = state.ema
        if options.ema_decay:
            # Young averages follow the parameters more closely, as in TensorFlow's ExponentialMovingAverage.
            decay = jnp.minimum(options.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda mean, new: mean * decay + new * (1 - decay), ema, params)
        metrics = {
            "loss": loss,
            **metrics,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": rate(state.step),
        }
        return State(state.step + 1, params, ema, slots), metrics

    return devices.pmap(step, axis_name="device", donate_argnums=(0,))


def microbatches(batch: Mapping[str, Any], accumulate: int, devices: Devices) -> Any:
    """Put a batch onto the devices as [devices, accumulate, each, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(len(devices), accumulate, -1, *leaf.shape[2:]), devices.split(batch))

"""Adams methods over the noise prediction: PLMS, LMS, iPNDM and DEIS."""

import math

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.grid import CLEAN, train_level
from sdjax.sampling.solvers.lagrange import exponential_integrals
from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.trace import Form, Level, Trace

# Adams-Bashforth over even steps, newest output first, by order.
_EVEN = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(trace: Trace, plan: Plan) -> None:
    """Liu et al. 2022 (arXiv 2202.09778) without Runge-Kutta warm-up, the way Stable Diffusion's checkpoints want it.

    The first step is taken twice, the second time with the mean of both ends' outputs: one call more than steps.
    As in diffusers it is the network's outputs that are combined, not the noise they amount to (under v-prediction that
    differs), steps are T // steps long, and image-to-image begins in the middle of the list of calls, where it takes
    its first step twice too.
    """
    schedule, stride = plan.schedule, plan.schedule.num_train_timesteps // plan.total
    visited = [int(level.t) for level in plan.levels[:-1]]
    if plan.listed:
        raise SamplingError("plms needs even timesteps; list them for another sampler, or leave them out")
    if plan.first.alpha == 0:
        raise SamplingError(
            "plms cannot leave zero signal-to-noise ratio (rescale_betas_zero_snr); use another sampler"
        )
    calls = [*visited[:2], *visited[1:]][plan.begin :]
    x, saved, outputs = trace.start, trace.start, []
    for i, t in enumerate(calls):
        trace.step = max(i - 1, 0)
        raw = trace.raw(x, train_level(schedule, t))
        if i == 1:
            here, there = t + stride, t
            x, combined = saved, 0.5 * raw + 0.5 * outputs[0]
        else:
            here, there = t, t - stride
            outputs = [raw, *outputs[:3]]
            combined = _combine(_EVEN[len(outputs) - 1], outputs)
        x = _transfer(x, _noise_of(trace, combined, x, _level(plan, here)), _level(plan, here), _level(plan, there))
    trace.finish(x)


def _level(plan: Plan, t: int) -> Level:
    if t < 0:
        return CLEAN if plan.schedule.option("set_alpha_to_one", False) else train_level(plan.schedule, 0)
    return train_level(plan.schedule, t)


def _noise_of(trace: Trace, raw: Form, x: Form, level: Level) -> Form:
    """The noise that an output of the network amounts to at x."""
    if trace.prediction_type == "epsilon":
        return raw
    if trace.prediction_type == "v_prediction":
        return level.alpha * raw + level.sigma * x
    return (x - level.alpha * raw) / level.sigma


def _transfer(x: Form, eps: Form, here: Level, there: Level) -> Form:
    """DDIM's step."""
    return there.alpha / here.alpha * x + (there.sigma - there.alpha * here.ratio) * eps


def _combine(weights: tuple[float, ...] | list[float], outputs: list[Form]) -> Form:
    total = Form({})
    for weight, output in zip(weights, outputs, strict=True):
        total = total + weight * output
    return total


def ipndm(trace: Trace, plan: Plan) -> None:
    """Zhang & Chen 2022 (arXiv 2204.13902): even-step Adams-Bashforth weights from the start, of lower order at first.

    diffusers' class has the same steps over a schedule of its own, which no Stable Diffusion was trained on; this one
    takes the checkpoint's.
    """
    x, outputs = trace.over_alpha(plan.first), []
    for here, there in plan.steps(trace):
        outputs = [trace.eps(x, here), *outputs[: plan.order - 1]]
        x = x + (there.ratio - here.ratio) * _combine(_EVEN[len(outputs) - 1], outputs)
    trace.finish(x)


def lms(trace: Trace, plan: Plan) -> None:
    """Adams-Bashforth over sigma with the true uneven steps, as k-diffusion has it.

    Image-to-image begins at order 1; diffusers takes the full order's weights there, without outputs to go with them.
    """
    x, outputs, nodes = trace.over_alpha(plan.first), [], []
    for here, there in plan.steps(trace):
        outputs = [trace.eps(x, here), *outputs[: plan.order - 1]]
        nodes = [here.ratio, *nodes[: plan.order - 1]]
        x = x + _combine(exponential_integrals(nodes, 0.0, here.ratio, there.ratio), outputs)
    trace.finish(x)


def deis(trace: Trace, plan: Plan) -> None:
    """Zhang & Chen 2022 (arXiv 2204.13902), tAB-DEIS with polynomials in log sigma."""
    x, outputs, nodes = trace.over_alpha(plan.first), [], []
    for done, (here, there) in enumerate(plan.steps(trace)):
        order = min(plan.order, done + 1, plan.allowed_order(plan.begin + done))
        outputs = [trace.eps(x, here), *outputs[:2]]
        nodes = [math.log(here.ratio), *nodes[:2]]
        weights = exponential_integrals(nodes[:order], 1.0, nodes[0], math.log(there.ratio))
        x = x + there.ratio * _combine(weights, outputs[:order])
    trace.finish(x * plan.levels[-1].alpha)

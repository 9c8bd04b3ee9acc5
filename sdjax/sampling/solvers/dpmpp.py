"""DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095), over lambda = log(alpha / sigma)."""

import math

from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.trace import Form, Level, Trace


def multistep(trace: Trace, plan: Plan, stochastic: bool = False) -> None:
    """Algorithm 2 and its third-order form, for the ODE.

    stochastic: for the SDE (appendix B); at order 3 as in diffusers, whose last coefficient is 1 off the expansion's.
        `multistep_3m_sde` has the expansion's.
    """
    x, outputs = trace.start, []
    for done, (here, there) in enumerate(plan.steps(trace)):
        outputs = [(here, trace.x0(x, here)), *outputs[:2]]
        order = min(plan.order, done + 1, _allowed_order(plan, plan.begin + done))
        noise, surplus = (trace.noise(), 1.0) if stochastic else (None, 0.0)
        x = _advance(x, here, there, outputs[:order], plan.solver_type, noise, surplus)
    trace.finish(x)


def multistep_3m_sde(trace: Trace, plan: Plan) -> None:
    """k-diffusion's third-order SDE solver: exponential-integrator coefficients, lower order only where it must."""
    x, outputs = trace.start, []
    for done, (here, there) in enumerate(plan.steps(trace)):
        outputs = [(here, trace.x0(x, here)), *outputs[:2]]
        order = 1 if there.sigma == 0 else min(3, done + 1)
        x = _advance(x, here, there, outputs[:order], "heun", trace.noise())
    trace.finish(x)


def singlestep(trace: Trace, plan: Plan, stochastic: bool = False) -> None:
    """Algorithm 1 and its third-order form, arranged as in diffusers: n calls in all, each stage at its own level.

    stochastic: for the SDE; every stage sets out from the same latent with noise of its own.
    """
    x, saved, outputs, orders = trace.start, trace.start, [], _orders(plan)
    for done, (here, there) in enumerate(plan.steps(trace)):
        outputs = [(here, trace.x0(x, here)), *outputs[:2]]
        order = min(orders[plan.begin + done], done + 1)
        if order == 1:
            saved = x
        noise, surplus = (trace.noise(), 1.0) if stochastic else (None, 0.0)
        base = outputs[order - 1][0]
        x = _advance(saved, base, there, outputs[:order][::-1], plan.solver_type, noise, surplus, nested=True)
    trace.finish(x)


def _orders(plan: Plan) -> list[int]:
    """The order of each call: 1, 2, .. within a step, and lower at the end."""
    orders = [i % plan.order + 1 for i in range(plan.total)]
    whole = plan.total % plan.order == 0
    if plan.levels[-1].sigma == 0 or (whole and plan.schedule.option("lower_order_final", False)):
        orders[-1] = 1
    return orders


def _allowed_order(plan: Plan, i: int) -> int:
    """Lower at the end; first where it is clean, since lambda is infinite there."""
    if i == plan.total - 1 and (plan.levels[-1].sigma == 0 or plan.schedule.option("euler_at_final", False)):
        return 1
    return plan.allowed_order(i)


def _advance(
    x: Form,
    here: Level,
    there: Level,
    outputs: list[tuple[Level, Form]],
    solver_type: str,
    noise: Form | None = None,
    surplus: float = 0.0,
    nested: bool = False,
) -> Form:
    """The latent at `there`, from x at `here` and as many outputs as the order, the one at `here` first.

    solver_type: "heun" for the integrator's own coefficients, else those of the midpoint rule.
    surplus: what is added to the expansion's last coefficient.
    nested: the outputs follow `here` (singlestep) rather than precede it (multistep).
    """
    if there.ratio == here.ratio:  # some schedules end where their last call is
        return x
    h = there.lam - here.lam
    # The SDE's mean decays twice as fast in lambda, and noise makes up for it.
    rate = h if noise is None else 2 * h
    gain = -math.expm1(-rate)
    x = there.sigma / here.sigma * (1.0 if noise is None else math.exp(-h)) * x + there.alpha * gain * outputs[0][1]
    if noise is not None:
        x = x + there.sigma * math.sqrt(gain) * noise
    if len(outputs) == 1:
        return x
    first, second = 1 - gain / rate, (rate - gain) / rate**2 - 0.5 + surplus
    (level0, x0_0), (level1, x0_1) = outputs[:2]
    r0 = (level0.lam - level1.lam) / h
    slope0 = (x0_0 - x0_1) / r0
    if len(outputs) == 2:
        return x + there.alpha * (first if solver_type == "heun" else 0.5 * gain) * slope0
    level2, x0_2 = outputs[2]
    r1 = (level1.lam - level2.lam) / h
    if nested and solver_type != "heun":
        return x + there.alpha * first / (r0 + r1) * (x0_0 - x0_2)
    curve = (slope0 - (x0_1 - x0_2) / r1) / (r0 + r1)
    # As published the multistep form has half of the second derivative.
    return x + there.alpha * (first * (slope0 + r0 * curve) - (2 if nested else 1) * second * curve)

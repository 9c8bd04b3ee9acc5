"""Multistep predictors whose every output also corrects the latent that it was computed at: UniPC and SA-Solver."""

import math

import numpy as np

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.solvers.lagrange import exponential_integrals
from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.trace import Form, Level, Trace


def uni_pc(trace: Trace, plan: Plan) -> None:
    """Zhao et al. 2023 (arXiv 2302.04867), UniPC over the image prediction, with B(h) of bh1 or bh2."""
    if not plan.schedule.option("predict_x0", True) or plan.schedule.option("solver_p", None):
        raise SamplingError("uni_pc is supported with predict_x0=true and no solver_p")
    variant = "bh1" if plan.solver_type == "bh1" else "bh2"
    uncorrected = plan.schedule.option("disable_corrector", [])
    if not isinstance(uncorrected, list | tuple):
        raise SamplingError(f"disable_corrector={uncorrected!r} is not supported; use a list of steps")
    lower = plan.schedule.option("lower_order_final", True)
    x, saved, outputs, order = trace.start, trace.start, [], 0
    for done, (here, there) in enumerate(plan.steps(trace)):
        i = plan.begin + done
        output = trace.x0(x, here)
        if done > 0 and i - 1 not in uncorrected:
            x = trace.settle(_uni_pc(saved, here, outputs[:order], variant, output))
        outputs = [(here, output), *outputs[:2]]
        saved, order = x, min(plan.order, done + 1, plan.total - i if lower or there.sigma == 0 else plan.order)
        x = _uni_pc(x, there, outputs[:order], variant)
    trace.finish(x)


def _uni_pc(
    x: Form, there: Level, outputs: list[tuple[Level, Form]], variant: str, corrector: Form | None = None
) -> Form:
    """From x at the newest output's level to `there`: the predictor, or the corrector given the output there."""
    here, newest = outputs[0]
    if there.ratio == here.ratio:
        return x
    h = here.lam - there.lam  # of the image prediction: the paper's -h
    gain = math.expm1(h)
    scale = h if variant == "bh1" else gain
    ratios = [(level.lam - here.lam) / -h for level, _ in outputs[1:]]
    slopes = [(output - newest) / ratio for ratio, (_, output) in zip(ratios, outputs[1:], strict=True)]
    if corrector is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, corrector - newest]
    x = there.sigma / here.sigma * x - there.alpha * gain * newest
    for weight, slope in zip(_uni_pc_weights(ratios, h, scale), slopes, strict=True):
        x = x - there.alpha * scale * weight * slope
    return x


def _uni_pc_weights(ratios: list[float], h: float, scale: float) -> list[float]:
    """The weights that match the expansion of the integral in powers of h (the paper's theorem 3.1)."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)  # the paper's choice for a single one, up to the method's order
    phi, moments = math.expm1(h) / h - 1, []
    for k in range(1, len(ratios) + 1):
        moments.append(phi * math.factorial(k) / scale)
        phi = phi / h - 1 / math.factorial(k + 1)
    return list(np.linalg.solve(np.vander(ratios, increasing=True).T, moments))


def sa_solver(trace: Trace, plan: Plan) -> None:
    """Xue et al. 2023 (arXiv 2309.05019), stochastic Adams over the image prediction, predictor and corrector.

    Noise is added between timesteps 800 and 200 only (tau 1 there and 0 elsewhere), as in diffusers.
    """
    schedule, most = plan.schedule, plan.schedule.option("corrector_order", 2)
    if most not in (1, 2, 3, 4):
        raise SamplingError(f"corrector_order={most!r} is not supported; use 1 to 4")
    lower = schedule.option("lower_order_final", True)
    x, saved, outputs, order = trace.start, trace.start, [], 0
    noise, tau = Form({}), 0.0
    for done, (here, there) in enumerate(plan.steps(trace)):
        left = plan.total - plan.begin - done
        outputs = [(here, trace.x0(x, here)), *outputs[:3]]
        if done > 0:
            x = trace.settle(_sa_step(saved, outputs[1][0], here, outputs[:order], noise, tau, corrector=True))
        saved, noise, tau = x, trace.noise(), 1.0 if 200 <= here.t <= 800 else 0.0
        order = min(plan.order, done + 1, left if lower else plan.order)
        x = _sa_step(x, here, there, outputs[:order], noise, tau, corrector=False)
        order = min(most, done + 2, left + 1 if lower else most)
    trace.finish(x)


def _sa_step(
    x: Form, here: Level, there: Level, outputs: list[tuple[Level, Form]], noise: Form, tau: float, corrector: bool
) -> Form:
    """One predictor or corrector step from x at `here`; outputs newest first, the corrector's first one at `there`."""
    h, rate = there.lam - here.lam, 1 + tau**2
    if h == 0:
        return x
    weights = exponential_integrals([level.lam for level, _ in outputs], rate, here.lam, there.lam)
    if len(outputs) == 2:
        # The paper's code moves order 2 a little, within its order, for the sake of few steps.
        curve = (rate * h + math.expm1(-rate * h)) / rate**2
        moved = h / 2 - curve / h if corrector else (h**2 / 2 - curve) / (here.lam - outputs[1][0].lam)
        weights = [weights[0] + moved, weights[1] - moved]
    x = math.exp(-(tau**2) * h) * there.sigma / here.sigma * x
    for weight, (_, output) in zip(weights, outputs, strict=True):
        x = x + rate * there.alpha * weight * output
    return x + there.sigma * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise

"""k-diffusion's one-step methods, over x / alpha, whose noise level is the ratio sigma / alpha."""

import math

from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.trace import Form, Level, Trace


def euler(trace: Trace, plan: Plan) -> None:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without churn and correction; DDIM in sigma."""
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        x0 = trace.x0(x, here)
        x = _towards(x, x0, here.ratio, there.ratio)
    trace.finish(x)


def euler_ancestral(trace: Trace, plan: Plan) -> None:
    """Euler to a lower level, then noise up to the next one: DDPM's posterior in sigma."""
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        down, up = _ancestral(here.ratio, there.ratio)
        x0 = trace.x0(x, here)
        x = _towards(x, x0, here.ratio, down) + up * trace.noise()
    trace.finish(x)


def heun(trace: Trace, plan: Plan) -> None:
    """The same algorithm with its correction: the mean of both ends' slopes, but for the last step, Euler's."""
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        x0 = trace.x0(x, here)
        guess = _towards(x, x0, here.ratio, there.ratio)
        if there.sigma == 0:
            x = guess
        else:
            slope = (x - x0) / here.ratio
            slope_there = (guess - trace.x0(guess, there)) / there.ratio
            x = x + (there.ratio - here.ratio) / 2 * (slope + slope_there)
    trace.finish(x)


def dpm_2(trace: Trace, plan: Plan, ancestral: bool = False) -> None:
    """DPM-Solver-2 (Lu et al. 2022, arXiv 2206.00927) in sigma: the slope is the one halfway in log sigma.

    ancestral: it is to a lower level, then noise leads up to the next one.
    """
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        down, up = _ancestral(here.ratio, there.ratio) if ancestral else (there.ratio, 0.0)
        x0 = trace.x0(x, here)
        if down == 0:
            x = _towards(x, x0, here.ratio, down)
        else:
            middle = _between(plan, here.ratio, down)
            guess = _towards(x, x0, here.ratio, middle.ratio)
            slope = (guess - trace.x0(guess, middle)) / middle.ratio
            x = x + (down - here.ratio) * slope
            if ancestral:
                x = x + up * trace.noise()
    trace.finish(x)


def dpmpp_2s_ancestral(trace: Trace, plan: Plan) -> None:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095) to a lower level, then noise up to the next one."""
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        down, up = _ancestral(here.ratio, there.ratio)
        x0 = trace.x0(x, here)
        if down == 0:
            x = _towards(x, x0, here.ratio, down)
        else:
            middle = _between(plan, here.ratio, down)
            guess = _towards(x, x0, here.ratio, middle.ratio)
            x = _towards(x, trace.x0(guess, middle), here.ratio, down) + up * trace.noise()
    trace.finish(x)


def dpmpp_sde(trace: Trace, plan: Plan) -> None:
    """DPM-Solver++ for the SDE in two stages.

    The noise of a step is one Brownian motion over sigma: the stage's own part of it, then all of it.
    """
    x = trace.over_alpha(plan.first)
    for here, there in plan.steps(trace):
        x0 = trace.x0(x, here)
        if there.sigma == 0:
            x = _towards(x, x0, here.ratio, there.ratio)
        else:
            middle = _between(plan, here.ratio, there.ratio)
            down, up = _ancestral(here.ratio, middle.ratio)
            early = trace.noise()
            guess = _towards(x, x0, here.ratio, down) + up * early
            x0 = trace.x0(guess, middle)
            down, up = _ancestral(here.ratio, there.ratio)
            share = (here.ratio - middle.ratio) / (here.ratio - there.ratio)
            noise = math.sqrt(share) * early + math.sqrt(1 - share) * trace.noise()
            x = _towards(x, x0, here.ratio, down) + up * noise
    trace.finish(x)


def _ancestral(here: float, there: float) -> tuple[float, float]:
    """The ratio to step down to, and the noise that leads back up to `there`."""
    up = there * math.sqrt(1 - (there / here) ** 2)
    return there * (there / here), up


def _between(plan: Plan, here: float, there: float) -> Level:
    """Halfway in log sigma."""
    ratio = math.sqrt(here * there)
    return Level.at(float(plan.schedule.timestep_of(ratio)), ratio)


def _towards(x: Form, x0: Form, here: float, there: float) -> Form:
    """x + (there - here) * (x - x0) / here, without its cancellation where `here` is large."""
    return there / here * x + (1 - there / here) * x0

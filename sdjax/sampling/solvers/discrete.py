"""Methods over the training timesteps themselves: DDIM, DDPM and the distilled students' samplers."""

import math

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.grid import CLEAN, train_level
from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.trace import Trace


def ddim(trace: Trace, plan: Plan) -> None:
    """Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16.

    As in diffusers a step goes T // steps timesteps down, even where the next call's timestep is a little off that
    (linspace and trailing spacing), and the last one to set_alpha_to_one's level. Timesteps that the request lists are
    gone down one by one.
    """
    x, stride = trace.start, plan.schedule.num_train_timesteps // plan.total
    end = CLEAN if plan.schedule.option("set_alpha_to_one", True) else train_level(plan.schedule, 0)
    for here, there in plan.steps(trace):
        if not plan.listed:
            t = int(here.t) - stride
            there = train_level(plan.schedule, t) if t >= 0 else end
        elif there.sigma == 0:
            there = end
        x0 = trace.x0(x, here)
        eps = (x - here.alpha * x0) / here.sigma
        spread = plan.eta * there.sigma / here.sigma * math.sqrt(1 - (here.alpha / there.alpha) ** 2)
        x = there.alpha * x0 + math.sqrt(max(there.sigma**2 - spread**2, 0.0)) * eps
        if plan.eta > 0:
            x = x + spread * trace.noise()
    trace.finish(x)


def ddpm(trace: Trace, plan: Plan) -> None:
    """Ho et al. 2020 (arXiv 2006.11239), eq. 6 and 7 over the timesteps that are visited."""
    kind = plan.schedule.option("variance_type", "fixed_small")
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise SamplingError(f"variance_type={kind!r} is not supported; use fixed_small, fixed_small_log or fixed_large")
    x = trace.start
    for here, there in plan.steps(trace):
        beta = 1 - (here.alpha / there.alpha) ** 2
        variance = beta if kind == "fixed_large" else beta * (there.sigma / here.sigma) ** 2
        x0 = trace.x0(x, here)
        mean = there.alpha * beta / here.sigma**2 * x0
        x = mean + here.alpha / there.alpha * (there.sigma / here.sigma) ** 2 * x
        if here.t > 0:
            x = x + math.sqrt(variance) * trace.noise()
    trace.finish(x)


def lcm(trace: Trace, plan: Plan) -> None:
    """Luo et al. 2023 (arXiv 2310.04378), multistep consistency sampling: to the image, and noised again."""
    scale = plan.schedule.option("timestep_scaling", 10.0)
    x = trace.start
    for here, there in plan.steps(trace):
        scaled = here.t * scale
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        x = out * trace.x0(x, here) + skip * x
        if there.sigma > 0:
            x = there.alpha * x + there.sigma * trace.noise()
    trace.finish(x)


def tcd(trace: Trace, plan: Plan) -> None:
    """Zheng et al. 2024 (arXiv 2402.19159), strategic stochastic sampling; eta is the paper's gamma."""
    x = trace.start
    for here, there in plan.steps(trace):
        last = there.sigma == 0
        middle = train_level(plan.schedule, math.floor((1 - plan.eta) * there.t))
        x0 = trace.x0(x, here)
        eps = (x - here.alpha * x0) / here.sigma
        x = middle.alpha * x0 + middle.sigma * eps
        if plan.eta > 0 and not last:
            share = there.alpha / middle.alpha
            x = share * x + math.sqrt(1 - share**2) * trace.noise()
    trace.finish(x)

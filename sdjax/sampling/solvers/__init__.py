"""Samplers by name, and the tables they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sdjax.sampling import grid as grids
from sdjax.sampling.errors import SamplingError
from sdjax.sampling.grid import Grid
from sdjax.sampling.schedule import CLASSES, SPACINGS, Schedule
from sdjax.sampling.solvers import correctors, discrete, dpmpp, kdiffusion, multistep
from sdjax.sampling.solvers.plan import Plan
from sdjax.sampling.table import Table
from sdjax.sampling.trace import Level, Row, Trace


@dataclass(frozen=True)
class Sampler:
    """A sampler: its loop, the levels it visits, and what may be chosen.

    order: the usual order of the method.  orders: those that it may have.  order_key: the config's word for it.
    solver_type: the variant, where the name fixes it.
    walks: whether its noise is a Brownian motion over sigma / alpha.
    """

    loop: Callable[[Trace, Plan], None]
    grid: Grid
    order: int = 1
    orders: tuple[int, ...] = ()
    order_key: str = "solver_order"
    solver_type: str | None = None
    walks: bool = False


_MULTISTEP = ("karras", "lu", "exponential", "beta")  # the switches of DPMSolverMultistepScheduler
_TRAIN = Grid("train", spacing="leading", switches=())
_DISTILLED = Grid("distilled", heeds_spacing=False, switches=())
_K = Grid("k", final="zero", scaled=True)
_K_PLAIN = Grid("k", final="zero", scaled=True, switches=())
_K_WHOLE = Grid("k", final="zero", scaled=True, whole=True)
_DPM = Grid("dpm", switches=_MULTISTEP, clips=True, whole=True)
_DPM_OWN = Grid("dpm", heeds_spacing=False, clips=True, whole=True)
_UNI_PC = Grid("dpm", bounded=True, whole=True)
_DEIS = Grid("dpm", final="least", bounded=True, whole=True)
_SA = Grid("dpm", final="least", bounded=True, clips=True, whole=True)

SAMPLERS = {
    "ddim": Sampler(discrete.ddim, _TRAIN),
    "ddpm": Sampler(discrete.ddpm, _TRAIN),
    "plms": Sampler(multistep.plms, _TRAIN),
    "lms": Sampler(multistep.lms, _K, order=4, orders=(1, 2, 3, 4), order_key=""),
    "euler": Sampler(kdiffusion.euler, Grid("k", scaled=True)),
    "euler_ancestral": Sampler(kdiffusion.euler_ancestral, _K_PLAIN),
    "heun": Sampler(kdiffusion.heun, _K),
    "dpm_2": Sampler(kdiffusion.dpm_2, _K_WHOLE),
    "dpm_2_ancestral": Sampler(partial(kdiffusion.dpm_2, ancestral=True), _K_WHOLE),
    "dpmpp_2s": Sampler(dpmpp.singlestep, _DPM_OWN, order=2, orders=(1, 2, 3)),
    "dpmpp_2s_sde": Sampler(partial(dpmpp.singlestep, stochastic=True), _DPM_OWN, order=2, orders=(1, 2, 3)),
    "dpmpp_2s_ancestral": Sampler(kdiffusion.dpmpp_2s_ancestral, _K),
    "dpmpp_2m": Sampler(dpmpp.multistep, _DPM, order=2, orders=(1, 2, 3)),
    "dpmpp_2m_sde": Sampler(partial(dpmpp.multistep, stochastic=True), _DPM, order=2, orders=(1, 2, 3)),
    "dpmpp_3m_sde": Sampler(dpmpp.multistep_3m_sde, _DPM),
    "dpmpp_sde": Sampler(kdiffusion.dpmpp_sde, _K, walks=True),
    "uni_pc": Sampler(correctors.uni_pc, _UNI_PC, order=2, orders=(1, 2, 3)),
    "uni_pc_bh1": Sampler(correctors.uni_pc, _UNI_PC, order=2, orders=(1, 2, 3), solver_type="bh1"),
    "uni_pc_bh2": Sampler(correctors.uni_pc, _UNI_PC, order=2, orders=(1, 2, 3), solver_type="bh2"),
    "deis": Sampler(multistep.deis, _DEIS, order=2, orders=(1, 2, 3)),
    "ipndm": Sampler(multistep.ipndm, _K_PLAIN, order=4, orders=(1, 2, 3, 4), order_key=""),
    "sa_solver": Sampler(correctors.sa_solver, _SA, order=2, orders=(1, 2, 3), order_key="predictor_order"),
    "lcm": Sampler(discrete.lcm, _DISTILLED),
    "tcd": Sampler(discrete.tcd, _DISTILLED),
}
"""Every sampler, by k-diffusion's name where it has one."""

ALIASES = {
    **CLASSES,
    "pndm": "plms",
    "euler_a": "euler_ancestral",
    "dpm2": "dpm_2",
    "dpm2_a": "dpm_2_ancestral",
    "dpm_2_a": "dpm_2_ancestral",
    "dpm++_2s": "dpmpp_2s",
    "dpm++_2s_a": "dpmpp_2s_ancestral",
    "dpm++_2m": "dpmpp_2m",
    "dpm++_2m_sde": "dpmpp_2m_sde",
    "dpm++_3m_sde": "dpmpp_3m_sde",
    "dpm++_sde": "dpmpp_sde",
    "dpmsolver++": "dpmpp_2m",
    "unipc": "uni_pc",
    "sa-solver": "sa_solver",
    "sasolver": "sa_solver",
}
"""Other names that are understood: diffusers' classes, and short names in common use."""


def canonical(name: str) -> str:
    """The name in SAMPLERS of a sampler by any of its names. Raises SamplingError listing what there is."""
    short = name.strip().lower().replace(" ", "_").removeprefix("k_")
    for known in (name, short, short.replace("-", "_")):
        known = ALIASES.get(known, known)
        if known in SAMPLERS:
            return known
    for sigmas in grids.NAMES:  # A1111 joins the two in one name
        if short.endswith(f"_{sigmas}"):
            first = canonical(short.removesuffix(f"_{sigmas}"))
            raise SamplingError(f"sampler {name!r} is two things; give sampler={first} and sigmas={sigmas}")
    raise SamplingError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")


def default_sampler(schedule: Schedule) -> str:
    """The sampler that a checkpoint's scheduler_config.json asks for (ddim where it names none)."""
    name = _class_sampler(schedule)
    if name == "plms" and not schedule.option("skip_prk_steps", False):
        raise SamplingError("skip_prk_steps=false (a Runge-Kutta warm-up) is not supported; set it, or name a sampler")
    return name


def is_distilled(sampler: str) -> bool:
    """Whether a sampler is for consistency models alone, by any of its names."""
    return SAMPLERS[canonical(sampler)].grid.kind == "distilled"


def default_sigmas(schedule: Schedule, sampler: str) -> str:
    """The `sigmas` that a checkpoint's config amounts to for a sampler; "" is its timestep spacing."""
    return grids.default_sigmas(schedule, SAMPLERS[canonical(sampler)].grid)


def _class_sampler(schedule: Schedule) -> str:
    name = CLASSES[schedule.option("_class_name", "DDIMScheduler")]
    if schedule.option("algorithm_type", "").startswith("sde"):
        return {"dpmpp_2m": "dpmpp_2m_sde", "dpmpp_2s": "dpmpp_2s_sde"}.get(name, name)
    return name


def make_table(
    schedule: Schedule,
    *,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    sigmas: str | Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    rho: float | None = None,
    eta: float = 0.0,
    order: int | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    all_steps: bool = False,
) -> Table:
    """The table of a run.

    sampler: any name that `canonical` knows; None is the checkpoint's own.
    num_inference_steps: 1 to the schedule's training steps; may be left out where a list of levels is given.
    sigmas: a name of `grid.NAMES`, or falling sigmas in k-diffusion's scale (with or without a final 0); "" is the
        timestep spacing, None the config's.
    timesteps: falling timesteps instead of a spacing.
    rho: of "karras" (7) and "polyexponential" (1).
    eta: 0 to 1, for ddim and tcd; the others ignore it.
    order: of the methods that have one; None is the config's where the config is the sampler's own, else the name's.
    strength: None starts from noise alone; a number in (0, 1] starts from an image, strength * steps from the end.
    denoising_end: the share of the training timesteps, from the noisiest on, that the run goes through; a number in
        (0, 1) ends it, after a whole step, on a latent that has noise left.
    denoising_start: the same share, gone through by a run whose latent this one starts from.
    all_steps: whether samplers of consistency models take all steps from an image too, over the strength's share of
        the timesteps that they were distilled at, as LatentConsistencyModelImg2ImgPipeline in diffusers does.

    Raises SamplingError, in one line, for what cannot be had.
    """
    name = default_sampler(schedule) if sampler is None else canonical(sampler)
    spec = SAMPLERS[name]
    order = _order(schedule, name, order)
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta={eta} is out of range; use 0 to 1")
    if strength is not None and not 0 < strength <= 1:
        raise SamplingError(f"strength={strength} is out of range; use more than 0, at most 1")
    sigmas = _sigmas(schedule, spec.grid, sigmas, timesteps)
    spacing = _spacing(schedule, spec.grid, sigmas)
    n = _steps(schedule, num_inference_steps, timesteps if isinstance(sigmas, str) else sigmas)

    listed = timesteps is not None
    all_steps = all_steps and spec.grid.kind == "distilled" and sigmas == "" and not listed
    share = strength if all_steps and strength is not None else 1.0
    levels = grids.levels(
        schedule, spec.grid, n, sigmas=sigmas, timesteps=timesteps, rho=rho, spacing=spacing, share=share
    )

    first = 0 if strength is None or all_steps else _begin(n, strength)
    begin, end = _part(schedule, name, levels, first, denoising_start, denoising_end)
    solver_type = spec.solver_type or schedule.option("solver_type", "")
    rows = _rows(name, Plan(schedule, levels, begin, order, eta, solver_type, listed=listed))

    start = rows[0].level
    if denoising_start is not None:
        signal, noise = 1.0, 0.0
    elif strength is not None:
        signal, noise = start.alpha, start.sigma
    else:
        signal, noise = 0.0, start.sigma if spec.grid.scaled and spacing != "leading" else 1.0
    walk_from = levels[0].ratio if spec.walks else None
    table = Table.from_rows(rows, start_signal=signal, start_noise=noise, walk_from=walk_from)
    return table.part(begin - first, end - first)


def _order(schedule: Schedule, name: str, order: int | None) -> int:
    """The order of the method: the request's, else the config's, else the usual one."""
    spec = SAMPLERS[name]
    # The config's order is meant for its own class, which may differ from a sampler that the request names; and a
    # config keeps the order of the class that the checkpoint had before, which its own may lack.
    own = name == _class_sampler(schedule) and spec.orders and spec.order_key
    usual = schedule.option(spec.order_key, spec.order) if own else spec.order
    chosen = usual if order is None else order
    if chosen not in (spec.orders or (spec.order,)):
        raise SamplingError(f"{name} has no order {chosen}; it has {spec.orders or 'only one'}")
    return int(chosen)


def _sigmas(
    schedule: Schedule, grid: Grid, sigmas: str | Sequence[float] | None, timesteps: Sequence[float] | None
) -> str | list[float]:
    """The sigma schedule's name, "" where timesteps say it, or the list without its final 0."""
    if sigmas is None:
        return grids.default_sigmas(schedule, grid) if timesteps is None else ""
    if timesteps is not None and not (isinstance(sigmas, str) and sigmas == ""):
        raise SamplingError("give sigmas or timesteps, not both")
    if isinstance(sigmas, str):
        return sigmas
    return list(sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas)


def _spacing(schedule: Schedule, grid: Grid, sigmas: str | list[float]) -> str:
    """The timestep spacing: the request's, else the config's where the sampler looks at that, else the sampler's."""
    if isinstance(sigmas, str) and sigmas in SPACINGS:
        return sigmas
    return schedule.option("timestep_spacing", grid.spacing) if grid.heeds_spacing else grid.spacing


def _steps(schedule: Schedule, n: int | None, listed: Sequence[float] | None) -> int:
    """The number of steps, from the list of levels where there is one."""
    if listed is not None:
        if len(listed) == 0 or n not in (None, len(listed)):
            raise SamplingError(f"num_inference_steps={n} does not fit the {len(listed)} levels that are listed")
        return len(listed)
    if n is None or not 1 <= n <= schedule.num_train_timesteps:
        raise SamplingError(f"num_inference_steps={n} is out of range; use 1 to {schedule.num_train_timesteps}")
    return n


def _reached(schedule: Schedule, levels: Sequence[Level], share: float) -> int:
    """The first step of which the timestep lies past a share of the training timesteps, as diffusers counts them."""
    cutoff = round(schedule.num_train_timesteps * (1 - share))
    return sum(level.t >= cutoff for level in levels[:-1])


def _begin(n: int, strength: float) -> int:
    """The first step of image-to-image, as diffusers counts it."""
    left = min(int(n * strength), n)
    if left == 0:
        raise SamplingError(f"strength={strength} of {n} steps leaves no step; use at least {1 / n:.3g}, or more steps")
    return n - left


def _part(
    schedule: Schedule,
    name: str,
    levels: Sequence[Level],
    first: int,
    denoising_start: float | None,
    denoising_end: float | None,
) -> tuple[int, int]:
    """The steps to take, from one and up to another, of those from `first` on."""
    begin, end = first, len(levels) - 1
    if denoising_start is not None:
        if name == "plms":
            raise SamplingError(
                "plms takes its first step twice, so it cannot go on from another run; use another sampler"
            )
        begin = max(first, _reached(schedule, levels, denoising_start))
    if denoising_end is not None:
        end = _reached(schedule, levels, denoising_end)
    if begin >= end:
        share, side = (denoising_end, "base") if denoising_start is None else (denoising_start, "refiner")
        left = len(levels) - 1 - first
        raise SamplingError(f"denoising_end={share} leaves the {side} no step of {left}; give another, or more steps")
    return begin, end


def _rows(name: str, plan: Plan) -> list[Row]:
    """The rows that a sampler's loop records."""
    trace = Trace(plan.schedule.prediction_type)
    try:
        SAMPLERS[name].loop(trace, plan)
    except SamplingError:
        raise
    except (ArithmeticError, LookupError, ValueError) as error:  # levels so near or so far that a formula has no value
        raise SamplingError(f"{name} has no steps through these levels ({type(error).__name__}: {error})") from None
    return trace.rows

"""Every sampler against diffusers' own class, with the same seed."""

import copy
import functools
import importlib
import sys
import types
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from sdjax.sampling import SAMPLERS, Schedule, default_sampler, make_table
from sdjax.sampling.noise import TorchGenerator, torch_latent, torch_step_noise
from tests.sampling.toy import SHAPE, Toy, config, diffusers_run, relative, run_table, torch_run

diffusers.logging.set_verbosity_error()

# sampler: (diffusers class, what its config adds, what step() is given)
CLASSES = {
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim_eta": ("DDIMScheduler", {}, {"eta": 0.7}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "ddpm_large": ("DDPMScheduler", {"variance_type": "fixed_large"}, {}),
    "plms": ("PNDMScheduler", {}, {}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler_least": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}, {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}, {}),
    "dpmpp_2s_heun_3": ("DPMSolverSinglestepScheduler", {"solver_order": 3, "solver_type": "heun"}, {}),
    "dpmpp_2s_least_3": ("DPMSolverSinglestepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {}),
    "dpmpp_2s_sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpmpp_2s_sde_3": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
        {},
    ),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, {}),
    "dpmpp_2m_heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun", "lower_order_final": False}, {}),
    "dpmpp_2m_1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    "dpmpp_2m_3": ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}, {}),
    "dpmpp_2m_least": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, {}),
    "dpmpp_2m_clipped": ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}, {}),
    "dpmpp_2m_lu": ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpmpp_2m_sde_3": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    "uni_pc": ("UniPCMultistepScheduler", {}, {}),
    "uni_pc_3": ("UniPCMultistepScheduler", {"solver_order": 3}, {}),
    "uni_pc_bh1": (  # to a clean end diffusers gives NaN
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "uni_pc_least": ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "disable_corrector": (0, 3)}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}, {}),
    "sa_solver": ("SASolverScheduler", {}, {}),
    "sa_solver_3": ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 4}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 0.0}),
    "tcd_eta": ("TCDScheduler", {}, {"eta": 0.3}),
}
SPACINGS = ("linspace", "leading", "trailing")
SWITCHES = ("karras", "exponential", "beta")
NO_SWITCHES = ("ddim", "ddpm", "plms", "euler_ancestral", "lcm", "tcd", "dpmpp_2m_lu")
MAIN = ({"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True})


@functools.cache
def _fresh(case, settings):
    """A scheduler as from_config makes it, but for the thousand steps that some classes first set, in a second."""
    kind = getattr(diffusers, CLASSES[case][0])
    set_timesteps = kind.set_timesteps
    with mock.patch.object(kind, "set_timesteps", lambda self, _, *rest: set_timesteps(self, 2, *rest)):
        return kind.from_config(dict(settings))


def compare(case, settings, n, strength=None):
    """The relative difference of two runs with the config's own sampler."""
    name, extra, step = CLASSES[case]
    settings = {**settings, **extra}
    schedule = Schedule.from_config({**settings, "_class_name": name})
    assert case.startswith(default_sampler(schedule))
    network = Toy(schedule)
    image = np.random.RandomState(1).randn(*SHAPE)
    scheduler = copy.deepcopy(_fresh(case, tuple(settings.items())))
    expected = diffusers_run(scheduler, network, n, 3, strength, image, **step)
    table = make_table(schedule, num_inference_steps=n, strength=strength, eta=step.get("eta", 0.0))
    return relative(torch_run(table, network, 3, None if strength is None else image), expected)


def differs(case, settings, n, strength):
    """Where this library parts from diffusers on purpose: see docs/samplers.md."""
    switched = any(f"use_{switch}_sigmas" in settings for switch in SWITCHES)
    return (
        (case == "lms" and strength is not None and n > 1)
        or (case.startswith(("deis", "sa_solver")) and switched and n == 1)
        or (case.startswith("sa_solver") and switched and strength is not None)
        or (case in ("uni_pc_least", "uni_pc_bh1") and switched and n == 1)
    )


@pytest.mark.parametrize("case", CLASSES)
def test_same_image_as_diffusers(case):
    """Spacings and sigma switches, both predictions, 1 to 50 steps, from noise and from an image."""
    settings = [{"timestep_spacing": spacing} for spacing in SPACINGS]
    if not case.startswith(NO_SWITCHES):
        settings += [{f"use_{switch}_sigmas": True} for switch in SWITCHES]
    for changes in settings:
        main = case in SAMPLERS and changes in MAIN
        for prediction in ("epsilon", "v_prediction") if main else ("epsilon",):
            for n in (1, 2, 5, 20, 50) if main else (1, 4, 17):
                for strength in (None, 1.0 if n == 1 else 0.6) if n <= 20 else (None,):
                    if not differs(case, changes, n, strength):
                        difference = compare(case, config(prediction, **changes), n, strength)
                        assert difference < 1e-4, (prediction, changes, n, strength)


@pytest.mark.parametrize(
    ("sampler", "settings", "options"),
    [
        ("euler", {}, {"sigmas": [14.0, 6.0, 2.5, 0.7, 0.1, 0.0]}),
        ("euler", {}, {"timesteps": [999, 850, 500, 300, 20]}),
        ("heun", {}, {"timesteps": [999, 850, 500, 300, 20]}),
        ("dpmpp_2m", {}, {"timesteps": [999, 850, 500, 300, 20]}),
        ("ddpm", {}, {"timesteps": [999, 850, 500, 300, 20]}),
        ("lcm", {}, {"timesteps": [999, 759, 499, 259]}),
    ],
)
def test_custom_levels_give_the_same_image(sampler, settings, options):
    name, extra, _ = CLASSES[sampler]
    settings = config(**settings, **extra)
    schedule = Schedule.from_config(settings)
    network = Toy(schedule)
    expected = diffusers_run(getattr(diffusers, name).from_config(settings), network, None, 3, **options)
    assert relative(torch_run(make_table(schedule, sampler=sampler, **options), network, 3), expected) < 1e-4


@pytest.mark.parametrize(
    "sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm", "tcd"]
)
def test_zero_terminal_snr_gives_the_same_image(sampler):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for n in (2, 10, 30):
        assert compare(sampler, config("v_prediction", **changes), n) < 2e-4


@pytest.mark.parametrize(
    "sampler", ["ddim", "ddpm", "lms", "euler", "dpmpp_2s", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "deis", "lcm", "tcd"]
)
def test_image_prediction_gives_the_same_image(sampler):
    """Of the classes that have it."""
    for n in (2, 17):
        assert compare(sampler, config("sample"), n) < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_dpmpp_sde_is_diffusers_on_the_same_brownian_motion(n, prediction):
    """To the digit, and without torchsde: in place of its motion, the steps that the table's noise amounts to."""
    with mock.patch.dict(sys.modules, torchsde=types.ModuleType("torchsde")):
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler = module.DPMSolverSDEScheduler.from_config(config(prediction))
    schedule = Schedule.from_config(config(prediction))
    table = make_table(schedule, sampler="dpmpp_sde", num_inference_steps=n)
    generator = TorchGenerator(3)
    start = table.start_noise * torch_latent(generator, SHAPE).astype(np.float64)
    noises = np.array(list(torch_step_noise(table, generator, SHAPE)), np.float64)
    drawn, walked = iter(noises), {}

    def brownian(high, low):
        key = round(float(high), 4)
        if key not in walked:  # from this step's beginning to its middle
            walked[key] = (low, next(drawn))
            motion = walked[key][1]
        else:
            middle, early = walked[key]
            motion = (early * (high - middle) ** 0.5 + next(drawn) * (middle - low) ** 0.5) / (high - low) ** 0.5
        return torch.as_tensor(motion).permute(2, 0, 1)[None]

    scheduler.set_timesteps(n)
    scheduler.noise_sampler = lambda high, low: brownian(float(high), float(low))
    network = Toy(schedule)
    x = torch.from_numpy(start / table.start_noise).permute(2, 0, 1)[None] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t).permute(0, 2, 3, 1)[0].double().numpy()
        x = scheduler.step(torch.from_numpy(network(seen, float(t))).permute(2, 0, 1)[None], t, x).prev_sample
    assert relative(run_table(table, network, start, noises), x.permute(0, 2, 3, 1)[0].numpy()) < 1e-4


@pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde's, of those roundings
@pytest.mark.parametrize(
    "changes", [{}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}]
)
def test_dpmpp_sde_is_diffusers_with_the_seed_as_its_noise_sampler_seed(changes):
    """Its Brownian motion knows times to six digits, to which float32 sigmas round either way; hence the tolerance."""
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    schedule = Schedule.from_config({**config(**changes), "_class_name": "DPMSolverSDEScheduler"})
    network, image, sampler = Toy(schedule), np.random.RandomState(1).randn(*SHAPE), module.BrownianTreeNoiseSampler
    for n, strength in ((1, None), (2, None), (5, None), (20, 0.6)):
        scheduler = module.DPMSolverSDEScheduler.from_config(config(**changes), noise_sampler_seed=3)
        with mock.patch.object(module, "BrownianTreeNoiseSampler", lambda x, *rest: sampler(x.float(), *rest)):
            expected = diffusers_run(scheduler, network, n, 3, strength, image)
        table = make_table(schedule, num_inference_steps=n, strength=strength)
        actual = torch_run(table, network, 3, None if strength is None else image)
        assert relative(actual, expected) < 3e-3, (n, strength)


@pytest.mark.parametrize("n", [3, 8, 30])
def test_ipndm_is_diffusers_on_its_own_levels(n):
    """diffusers' class knows one schedule, from pure noise; it is entered a step late, where a ratio is finite."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(1)
    ratios = (scheduler.betas / scheduler.alphas).double().numpy()[1:-1]
    schedule = Schedule.from_config(config("v_prediction"))
    table = make_table(schedule, sampler="ipndm", sigmas=list(ratios))
    network = Toy(schedule)
    start = np.random.RandomState(0).randn(*SHAPE)
    x = torch.from_numpy(start)
    for told in table.t:
        x = scheduler.step(torch.from_numpy(network(x.numpy(), told)), 0, x).prev_sample
    assert relative(run_table(table, network, start), x.numpy()) < 1e-4

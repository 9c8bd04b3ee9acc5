"""The schedule and the levels against diffusers, and configs that are refused."""

import importlib
import json
import sys
import types
from unittest import mock

import diffusers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.sampling import SAMPLERS, SamplingError, Schedule
from sdjax.sampling import grid as grids
from sdjax.sampling import schedule as schedules
from sdjax.sampling.schedule import CLASSES
from tests.sampling.toy import config


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1000, 400])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_alphas_are_diffusers_own(kind, steps, zero_snr):
    settings = config(beta_schedule=kind, num_train_timesteps=steps, rescale_betas_zero_snr=zero_snr)
    if kind == "trained":
        settings |= {"beta_schedule": "linear", "trained_betas": list(np.linspace(0.001, 0.03, steps))}
    ours, theirs = Schedule.from_config(settings), diffusers.DDIMScheduler.from_config(settings)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)
    if not zero_snr:  # 1 - alpha is small at first, and rounds to the same
        np.testing.assert_allclose(1 - ours.alphas_cumprod, 1 - theirs.alphas_cumprod.double(), rtol=1e-7)
    assert ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1] if zero_snr else ours.alphas_cumprod[-1] > 0
    if not (zero_snr and kind == "squaredcos_cap_v2"):  # whose last ratios are beyond what diffusers puts at the end
        euler = diffusers.EulerDiscreteScheduler.from_config(settings)
        np.testing.assert_allclose(ours.ratios[::-1], euler.sigmas[:-1].double(), rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
    ],
)
def test_levels_are_diffusers_own(name, changes):
    """Timesteps as the network is told them, and sigmas, over many numbers of steps."""
    settings = config(**changes)
    schedule, grid = Schedule.from_config(settings), SAMPLERS[CLASSES[name]].grid
    theirs = getattr(diffusers, name).from_config(settings)
    if "rescale_betas_zero_snr" in changes and "Singlestep" in name:
        pytest.skip("diffusers' class ignores the rescale")
    spacing = changes.get("timestep_spacing", "linspace") if grid.heeds_spacing else "linspace"
    for n in (1, 2, 3, 4, 7, 10, 13, 25, 28, 30, 33, 49, 50, 99, 100, 150):
        theirs.set_timesteps(n)
        sigmas = grids.default_sigmas(schedule, grid)
        levels = grids.levels(schedule, grid, n, sigmas=sigmas, timesteps=None, rho=None, spacing=spacing)
        ratios = theirs.sigmas.double().numpy()
        np.testing.assert_allclose([level.ratio for level in levels], ratios, rtol=5e-5)
        np.testing.assert_allclose([level.t for level in levels[:-1]], theirs.timesteps, rtol=1e-4, atol=2e-3)


def test_timesteps_and_ratios_invert_each_other():
    schedule = Schedule.from_config(config())
    np.testing.assert_allclose(schedule.timestep_of(schedule.ratios), np.arange(1000), atol=1e-3)
    assert schedule.timestep_of(1e9) == 999
    assert schedule.timestep_of(0.0) == 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"beta_start": 0.0}, "betas"),
        ({"trained_betas": [0.1, 0.2]}, r"\(2,\)"),
        ({"num_train_timesteps": 1.5}, "num_train_timesteps=1.5"),
        ({"num_train_timesteps": 10**8}, "2 to 100000"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"beta_start": 1e-9}, "betas must lie"),
        ({"beta_end": 10**400}, "beta_end=1000"),
        ({"beta_end": "0.012"}, "beta_end='0.012'"),
        ({"beta_end": 0.9999}, "betas leave no image"),
        ({"trained_betas": "linear"}, "trained_betas is no list"),
        ({"trained_betas": [1e39] * 1000}, "betas must lie"),
        ({"steps_offset": 0.5}, "steps_offset=0.5"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name="),
        ({"thresholding": True}, "thresholding=True"),
        ({"clip_sample": True}, "clip_sample=True"),
        ({"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic'"),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_an_unsupported_config_is_refused_by_key_and_value(changes, names):
    with pytest.raises(SamplingError, match=names) as caught:
        Schedule.from_config(config(**changes))
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=1),
    max_leaves=4,
)


@given(st.sampled_from(sorted(schedules._NUMBERS)) | st.sampled_from(["_class_name", "trained_betas"]), ANYTHING)
def test_a_config_is_read_or_refused_in_one_line(key, value):
    try:
        Schedule.from_config(config(num_train_timesteps=3) | {key: value})
    except SamplingError as error:
        assert "\n" not in str(error)


def test_a_null_is_a_missing_key():
    nulls = dict.fromkeys(("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"))
    np.testing.assert_array_equal(Schedule.from_config(nulls).alphas_cumprod, Schedule.from_config({}).alphas_cumprod)


def test_two_sigma_switches_are_refused():
    schedule = Schedule.from_config(config(use_karras_sigmas=True, use_beta_sigmas=True))
    with pytest.raises(SamplingError, match="use_karras_sigmas, use_beta_sigmas"):
        grids.default_sigmas(schedule, SAMPLERS["euler"].grid)


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_that_diffusers_saves_is_read(name, tmp_path):
    scheduler = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    with mock.patch.dict(sys.modules, torchsde=types.ModuleType("torchsde")):
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    kind = module.DPMSolverSDEScheduler if name == "DPMSolverSDEScheduler" else getattr(diffusers, name)
    kind(**scheduler).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule = Schedule.from_config(saved)
    assert schedule.num_train_timesteps == 1000
    missing = {key: value for key, value in saved.items() if key in ("_class_name", "clip_sample")}
    np.testing.assert_allclose(Schedule.from_config(missing).alphas_cumprod, schedule.alphas_cumprod)

"""Configs that kept keys of the class that the checkpoint had before, which diffusers' own class then ignores."""

import inspect
import json
from unittest import mock

import diffusers
import numpy as np
import pytest

from sdjax.sampling import SAMPLERS, Schedule, default_sigmas, make_table
from sdjax.sampling.schedule import CLASSES
from tests.sampling.toy import Toy, config, diffusers_run, relative, torch_run

diffusers.logging.set_verbosity_error()

# What the class before was set to.
BEFORE = [
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3, "euler_at_final": True}),
    (
        "DPMSolverMultistepScheduler",
        {"use_lu_lambdas": True, "use_beta_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True, "use_karras_sigmas": True, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0, "steps_offset": 2}),
    ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": -2.0, "lower_order_final": True, "use_lu_lambdas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "disable_corrector": [0], "final_sigmas_type": "sigma_min"}),
    (
        "UniPCMultistepScheduler",
        {"use_exponential_sigmas": True, "sigma_min": 0.05, "final_sigmas_type": "sigma_min"},
    ),
    ("SASolverScheduler", {"predictor_order": 3, "corrector_order": 3, "use_karras_sigmas": True}),
    ("DDIMScheduler", {"set_alpha_to_one": True, "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "leading"}),
    ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 5.0}),
]
NOT_HERE = ("DPMSolverSDEScheduler", "IPNDMScheduler")  # which need torchsde's motion, and a schedule of their own


def changed(before, after, settings):
    """A scheduler of the class `after`, and what it writes, where a pipeline had one of the class `before`."""
    kind = getattr(diffusers, after)
    # Some classes first set a thousand steps, in a second; and one refuses another's algorithm.
    quick = mock.patch.object(kind, "set_timesteps", lambda self, _, *rest, to=kind.set_timesteps: to(self, 2, *rest))
    algorithm = inspect.signature(kind).parameters.get("algorithm_type")
    own = {} if algorithm is None else {"algorithm_type": algorithm.default}
    with quick:
        old = getattr(diffusers, before).from_config(config(**settings))
        saved = json.loads(kind.from_config(old.config, **own).to_json_string())
        return kind.from_config(saved), saved


@pytest.mark.parametrize("after", [name for name in CLASSES if name not in NOT_HERE])
def test_a_scheduler_changed_before_it_was_saved_gives_the_image_of_its_own_class(after):
    step = {"eta": 0.0} if after == "TCDScheduler" else {}
    for before, settings in BEFORE:
        scheduler, saved = changed(before, after, settings)
        schedule = Schedule.from_config(saved)
        expected = diffusers_run(scheduler, Toy(schedule), 6, 3, **step)
        actual = torch_run(make_table(schedule, num_inference_steps=6), Toy(schedule), 3)
        assert saved["_class_name"] == after
        assert relative(actual, expected) < 1e-4, (before, settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_a_request_names_ignores_switches_that_its_class_lacks(sampler):
    """And a request may ask for what the switch would have."""
    schedule = Schedule.from_config(config(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True))
    without = ("ddim", "ddpm", "plms", "euler_ancestral", "ipndm", "lcm", "tcd")
    assert default_sigmas(schedule, sampler) == ("" if sampler in without else "karras")
    if SAMPLERS[sampler].grid.kind in ("k", "dpm"):
        named, spaced = (make_table(schedule, sampler=sampler, num_inference_steps=9, sigmas=s) for s in ("karras", ""))
        assert not np.array_equal(named.t, spaced.t)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_lu_lambdas_and_clipped_ones_are_for_the_classes_that_have_them(sampler):
    switched = Schedule.from_config(config(use_lu_lambdas=True))
    assert default_sigmas(switched, sampler) == (
        "lu" if sampler in ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde") else ""
    )
    clipped = Schedule.from_config(config(lambda_min_clipped=-2.0))
    first = make_table(clipped, sampler=sampler, num_inference_steps=9, sigmas="linspace").t[0]
    clips = sampler.startswith(("dpmpp_2m", "dpmpp_3m", "sa_solver")) or sampler in ("dpmpp_2s", "dpmpp_2s_sde")
    assert (first < 999) == clips

"""Tables against the loops that papers print, how fast they converge, and what is refused."""

import inspect
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.sampling import SAMPLERS, SamplingError, Schedule, canonical, default_sampler, make_table, stack
from sdjax.sampling import grid as grids
from sdjax.sampling.grid import NAMES
from sdjax.sampling.schedule import CLASSES, SPACINGS
from sdjax.sampling.solvers import kdiffusion
from sdjax.sampling.trace import HISTORY
from tests.sampling.convergence import ORDERS, error
from tests.sampling.loops import LOOPS, Run
from tests.sampling.toy import SHAPE, Toy, config, relative, run_table

FREE = [name for name, sampler in SAMPLERS.items() if sampler.grid.kind in ("k", "dpm")]


def visited(schedule, sampler, n, sigmas):
    """The levels that the table of these settings visits."""
    grid = SAMPLERS[sampler].grid
    spacing = sigmas if sigmas in SPACINGS else grid.spacing  # the tests' config has none
    return grids.levels(schedule, grid, n, sigmas=sigmas, timesteps=None, rho=None, spacing=spacing)


def test_every_sampler_has_a_loop():
    assert set(SAMPLERS) - {"uni_pc_bh2"} == set(LOOPS)  # bh2 is what uni_pc is where the config does not say


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", LOOPS)
def test_a_table_is_its_published_loop(sampler, prediction):
    """Default, Karras where defined, and trailing levels; 1 to 50 steps; the same noise; one part in a million."""
    schedule = Schedule.from_config(config(prediction))
    network, rng = Toy(schedule), np.random.RandomState(0)
    for sigmas in ("", "trailing", *(["karras"] if sampler in FREE else [])):
        for n in (1, 2, 5, 20, 50):
            eta = 0.6
            table = make_table(schedule, sampler=sampler, num_inference_steps=n, sigmas=sigmas, eta=eta)
            start = rng.randn(*SHAPE)
            noises = rng.randn(table.calls, *SHAPE)
            run = Run(network, schedule, visited(schedule, sampler, n, sigmas), start, noises, eta=eta)
            expected = LOOPS[sampler](run)
            assert run.calls == table.calls
            assert relative(run_table(table, network, start, noises), expected) < 1e-6, (sigmas, n)


@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_error_falls_at_the_order_of_the_method(sampler, order):
    (few, coarse), (many, fine) = error(sampler, order, 73), error(sampler, order, 145)
    slope = math.log(coarse / fine) / math.log(many / few)
    assert ORDERS[sampler, order] - 0.15 < slope < ORDERS[sampler, order] + 0.6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_are_steps_but_for_two_stage_methods_and_plms(sampler):
    table = make_table(Schedule.from_config(config()), sampler=sampler, num_inference_steps=9)
    two_stage = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")
    assert table.calls == (17 if sampler in two_stage else 10 if sampler == "plms" else 9)
    assert table.step[0] == 0
    assert table.step[-1] == 8
    assert set(np.diff(table.step)) <= {0, 1}
    assert np.argmax(table.signal) == table.calls - 1
    assert (table.signal[-1], table.noise[-1]) == (1, 0)


@given(
    sampler=st.sampled_from(list(SAMPLERS)),
    n=st.integers(1, 60),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    sigmas=st.sampled_from([None, *grids.NAMES]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    zero_snr=st.booleans(),
    spacing=st.sampled_from(SPACINGS),
    final=st.sampled_from(["zero", "sigma_min"]),
    eta=st.floats(0, 1),
    strength=st.none() | st.floats(0.01, 1),
)
@settings(max_examples=300, deadline=None)
def test_a_table_is_sound_or_refused_in_one_line(
    sampler, n, prediction, sigmas, beta_schedule, zero_snr, spacing, final, eta, strength
):
    """Whatever is asked: finite columns that look back no further than they may, or a line saying what is wrong."""
    schedule = Schedule.from_config(
        config(
            prediction,
            beta_schedule=beta_schedule,
            rescale_betas_zero_snr=zero_snr,
            timestep_spacing=spacing,
            final_sigmas_type=final,
        )
    )
    try:
        table = make_table(schedule, sampler=sampler, num_inference_steps=n, sigmas=sigmas, eta=eta, strength=strength)
    except SamplingError as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    stacked = stack([table], table.calls + 3)
    assert stacked.cm.shape == (1, table.calls + 3, HISTORY)
    assert all(np.all(np.isfinite(column)) for column in stacked)
    assert stacked.active.sum() == table.calls <= 2 * n + 1
    np.testing.assert_allclose(table.signal**2 + table.noise**2, 1, atol=1e-9)
    assert np.all(table.draws[table.uses_noise])
    assert np.all((table.t >= 0) & (table.t < 1000))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_from_an_image_starts_at_its_first_row(sampler):
    schedule = Schedule.from_config(config())
    whole = make_table(schedule, sampler=sampler, num_inference_steps=20)
    part = make_table(schedule, sampler=sampler, num_inference_steps=20, strength=0.5)
    assert whole.start_signal == 0
    assert part.calls < whole.calls
    assert part.start_signal**2 + part.start_noise**2 == pytest.approx(1)
    alpha, _ = Toy(schedule).level(part.t[0])
    assert part.start_signal == pytest.approx(alpha, rel=2e-2)  # DPM-Solver's classes tell the network whole timesteps


def test_a_custom_list_is_what_is_visited():
    schedule = Schedule.from_config(config())
    for sigmas in ([14.0, 5.0, 1.0, 0.2], [14.0, 5.0, 1.0, 0.2, 0.0]):
        table = make_table(schedule, sampler="euler", sigmas=sigmas)
        np.testing.assert_allclose(table.noise[:-1] / table.signal[:-1], [5.0, 1.0, 0.2])
    listed = make_table(schedule, sampler="dpmpp_2m", timesteps=[999, 500, 100])
    np.testing.assert_array_equal(listed.t, [999, 500, 100])
    np.testing.assert_array_equal(make_table(schedule, sampler="ddpm", timesteps=[900, 0]).t, [900, 0])


def test_ddim_goes_down_a_list_as_euler_does():
    """Without noise both are the same step, so an uneven list shows whether each level is heeded."""
    schedule = Schedule.from_config(config(set_alpha_to_one=True))
    network, start = Toy(schedule), np.random.RandomState(0).randn(*SHAPE)
    ddim, euler = (make_table(schedule, sampler=name, timesteps=[990, 700, 650, 20]) for name in ("ddim", "euler"))
    assert relative(run_table(ddim, network, start), run_table(euler, network, start)) < 1e-6


def test_the_sampler_that_architecture_md_shows_is_the_one_that_runs():
    shown = Path(__file__).parents[2].joinpath("ARCHITECTURE.md").read_text()
    assert inspect.getsource(kdiffusion.euler_ancestral) in shown


@pytest.mark.parametrize("name", grids.SIGMAS)
def test_sigma_schedules_fall_between_their_ends(name):
    for n in (1, 2, 10, 100):
        ratios = grids.SIGMAS[name](n, 0.03, 14.6)
        assert len(ratios) == n
        assert np.all(np.diff(ratios) < 0)
        assert ratios[0] == pytest.approx(14.6, rel=2e-3)
        if n > 1 and not name.startswith("ays"):
            assert ratios[-1] == pytest.approx(0.03)


def test_sigma_schedules_that_diffusers_has_not_are_their_formulas():
    polyexponential = [math.exp((1 - i / 4) ** 3 * math.log(14.6 / 0.03) + math.log(0.03)) for i in range(5)]
    np.testing.assert_allclose(grids.polyexponential(5, 0.03, 14.6, rho=3), polyexponential)
    kl_optimal = [math.tan(i / 4 * math.atan(0.03) + (1 - i / 4) * math.atan(14.6)) for i in range(5)]
    np.testing.assert_allclose(grids.kl_optimal(5, 0.03, 14.6), kl_optimal)
    table = make_table(Schedule.from_config(config()), sampler="euler", num_inference_steps=4, sigmas="sgm_uniform")
    np.testing.assert_allclose(table.t, [999, 749.25, 499.5, 249.75])


@pytest.mark.parametrize(
    ("name", "published"), [("ays", "StableDiffusionTimesteps"), ("ays_sdxl", "StableDiffusionXLTimesteps")]
)
def test_align_your_steps_is_the_published_list_at_ten(name, published):
    """diffusers keeps it as whole timesteps."""
    schedule = Schedule.from_config(config())
    found = schedule.timestep_of(grids.SIGMAS[name](10, 0, 0))
    np.testing.assert_allclose(found, AysSchedules[published], atol=1.5)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"sampler": "dpm_fast"}, "dpm_fast"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 10_000}, "1 to 1000"),
        ({"num_inference_steps": None}, "num_inference_steps=None"),
        ({"sampler": "ddim", "sigmas": "karras"}, "karras"),
        ({"sampler": "lcm", "sigmas": [3.0, 1.0], "num_inference_steps": None}, "a list"),
        ({"sampler": "lcm", "num_inference_steps": 80}, "original_inference_steps"),
        ({"sigmas": "carras"}, "carras"),
        ({"sigmas": [1.0, 5.0], "num_inference_steps": None}, "5 follows 1"),
        ({"sigmas": [1.0, float("nan")], "num_inference_steps": None}, "which nan does not"),
        ({"sigmas": [1e30, 1.0], "num_inference_steps": None}, "must lie in 0.0001 to 10000, which 1e\\+30 does not"),
        ({"sigmas": [5.0, -1.0], "num_inference_steps": None}, "-1"),
        ({"sigmas": [], "num_inference_steps": None}, "0 levels"),
        ({"sigmas": [5.0, 1.0]}, "2 levels"),
        ({"sigmas": [14.0, 0.0, 5.0, 0.0], "num_inference_steps": None}, "which 0 does not"),
        ({"sigmas": "karras", "timesteps": [900, 100]}, "not both"),
        ({"timesteps": [2000, 100], "num_inference_steps": None}, "0 to 999"),
        ({"sampler": "plms", "timesteps": [900, 20], "num_inference_steps": None}, "plms needs even timesteps"),
        ({"sampler": "ddpm", "timesteps": [20.5], "num_inference_steps": None}, "whole"),
        ({"strength": 0.01}, "leaves no step"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"order": 5}, "order 5"),
        ({"sampler": "heun", "order": 1 + 1}, "order 2"),
        ({"rho": 3.0}, "rho=3.0"),
        ({"sigmas": "karras", "rho": -1.0}, "rho=-1.0"),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 1000}, "must fall"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(changes, names):
    schedule = Schedule.from_config(config())
    with pytest.raises(SamplingError, match=names) as caught:
        make_table(schedule, **{"sampler": "dpmpp_2m", "num_inference_steps": 20, **changes})
    assert "\n" not in str(caught.value)


SIGMA = st.floats(allow_nan=True) | st.floats(1e-4, 1e4)
CLOSE = st.floats(0.1, 10).map(lambda sigma: [14.6, sigma, sigma * (1 - 1e-14), sigma / 3])


@given(st.sampled_from(sorted(SAMPLERS)), st.lists(SIGMA, min_size=1, max_size=5) | CLOSE, st.booleans(), st.booleans())
def test_any_list_of_sigmas_makes_a_table_or_is_refused(sampler, listed, ordered, lower):
    schedule = Schedule.from_config(config(lower_order_final=lower))
    listed = sorted(listed, reverse=True) if ordered else listed
    with suppress(SamplingError):
        table = make_table(schedule, sampler=sampler, sigmas=listed)
        assert all(np.all(np.isfinite(column)) for column in (table.a, table.b, table.cx, table.cm, table.cn))


NUMBERS = {  # of a scheduler_config.json, as far as they may go
    "num_train_timesteps": st.integers(2, 1200),
    "beta_start": st.floats(1e-7, 1e-3) | st.floats(0, 1),
    "beta_end": st.floats(1e-7, 0.1) | st.floats(0, 1),
    "sigma_min": st.floats(0, 10_000) | st.just(0),
    "sigma_max": st.floats(0, 10_000) | st.just(14.6),
    "steps_offset": st.integers(0, 2000),
    "lambda_min_clipped": st.floats(max_value=10_000, allow_nan=False) | st.integers(max_value=-(10**400)),
    "original_inference_steps": st.integers(1, 2000),
    "timestep_scaling": st.floats(0, 100_000),
    "solver_order": st.integers(),
    "predictor_order": st.integers(),
    "corrector_order": st.integers(),
    "disable_corrector": st.lists(st.integers()) | st.integers(),
    "rescale_betas_zero_snr": st.booleans(),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "_class_name": st.sampled_from(sorted(CLASSES)),
}


@given(
    st.fixed_dictionaries({}, optional=NUMBERS),
    st.none() | st.sampled_from(sorted(SAMPLERS)),
    st.integers(1, 30),
    st.tuples(st.none() | st.sampled_from(["", *NAMES]), st.none())
    | st.tuples(st.sampled_from(["karras", "polyexponential"]), st.floats(0, 100) | st.floats()),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("error")
def test_any_numbers_of_a_config_make_a_table_or_are_refused_in_one_line(numbers, sampler, n, sigmas_and_rho, eta):
    sigmas, rho = sigmas_and_rho
    try:
        schedule = Schedule.from_config(config("v_prediction", **numbers))
        table = make_table(schedule, sampler=sampler, num_inference_steps=n, sigmas=sigmas, rho=rho, eta=eta)
    except SamplingError as error:
        assert "\n" not in str(error)
    else:
        assert all(np.all(np.isfinite(column)) for column in stack([table]))


@pytest.mark.parametrize(
    ("numbers", "changes", "names"),
    [
        ({"sigma_max": 14.6}, {"sigmas": "karras", "rho": 0.001}, "rho=0.001"),
        ({"sigma_min": 0}, {"sigmas": "exponential"}, "sigma_min=0"),
        ({"sigma_max": 0}, {"sigmas": "karras"}, "sigma_max=0"),
    ],
)
def test_a_sigma_schedule_without_values_is_refused_by_what_made_it_so(numbers, changes, names):
    with pytest.raises(SamplingError, match=names):
        make_table(Schedule.from_config(config(**numbers)), sampler="euler", num_inference_steps=9, **changes)


def test_uni_pc_ends_at_first_order_where_the_image_is_clean():
    ends = [Schedule.from_config(config(lower_order_final=lower)) for lower in (True, False)]
    full, lower = (make_table(schedule, sampler="uni_pc", num_inference_steps=2) for schedule in ends)
    assert np.array_equal(full.cm, lower.cm)


def test_names_of_all_kinds_are_understood():
    for name in [*SAMPLERS, *CLASSES]:
        assert canonical(name) in SAMPLERS
    assert canonical("DPM++ 2M SDE") == "dpmpp_2m_sde"
    assert canonical("k_euler_a") == canonical("Euler a") == "euler_ancestral"
    assert canonical("uni-pc") == canonical("UniPC") == "uni_pc"
    assert canonical("PNDM") == "plms"
    for sigmas in ("Karras", "SGM Uniform"):
        own = sigmas.lower().replace(" ", "_")
        with pytest.raises(SamplingError, match=f"two things; give sampler=dpmpp_2m and sigmas={own}"):
            canonical(f"DPM++ 2M {sigmas}")


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_names_its_sampler_and_makes_a_table(name):
    schedule = Schedule.from_config(config(_class_name=name))
    assert make_table(schedule, num_inference_steps=7).calls >= 7
    assert default_sampler(schedule) == CLASSES[name]


def test_a_config_of_one_class_serves_another_sampler():
    """As from_config does in diffusers: spacing and offset carry over, the order only to the same sampler."""
    schedule = Schedule.from_config(config(_class_name="UniPCMultistepScheduler", solver_order=3))
    assert np.any(make_table(schedule, num_inference_steps=20).cm[:, 3])
    assert not np.any(make_table(schedule, sampler="dpmpp_2m", num_inference_steps=20).cm[:, 2:])
    assert np.any(make_table(schedule, sampler="dpmpp_2m", num_inference_steps=20, order=3).cm[:, 2:])


@pytest.mark.parametrize("name", CLASSES)
def test_an_order_left_over_from_another_class_serves_samplers_that_have_one(name):
    """from_config(old.config) keeps the old class's keys, and save_pretrained writes them."""
    order = make_table(Schedule.from_config(config(_class_name=name, solver_order=2)), num_inference_steps=20)
    plain = make_table(Schedule.from_config(config(_class_name=name)), num_inference_steps=20)
    assert np.array_equal(order.cm, plain.cm)

"""What the launcher says of a job before it is sent: machines, time and cost, and from which plan."""

import json
from pathlib import Path

import pytest

from pipelines import launch
from pipelines.dataflow import Preset
from tests.pipelines.test_dataflow import PRESETS
from tests.pipelines.test_launch import PLACES, PRESET, never


def test_plan_counts_time_and_cost(terraform, tmp_path, capsys):
    preset = tmp_path / "dataflow-own.toml"
    stated = 'images_per_second = 0.438\nimages_per_second_source = "measured here"'
    preset.write_text(Path(PRESET).read_text().replace('plan = "plans/v5e-sdxl.json"', stated))
    argv = ["--config", str(preset), *PLACES, terraform, "--dry-run", "--num-images=1000000", "--price-per-chip-hour=2"]
    assert launch.main(argv, ask=never) == 0
    plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert plan["workers"] == "up to 8 ct5lp-hightpu-4t in us-central1-a"
    assert plan["accelerator"] == "type:tpu-v5-lite-podslice;topology:2x2, 4 a worker, 32 in all"
    assert plan["quota"] == "32 of 'TPU v5 Lite PodSlice chips' in us-central1"
    # A million at 0.438 a second and chip is 634.2 chip-hours; over 32 chips, 19.82 hours.
    assert plan["speed"].startswith("0.438 images/s a chip, 14.02 with all workers up (measured here)")
    assert plan["time"] == "19.82 h, 634.2 chip-hours for 1,000,000 images; start-up not in it"
    assert plan["cost"] == "1,268.39 USD at 2 a chip-hour (given on the command line; check the current price)"


@pytest.mark.parametrize(
    "preset", [path for path in PRESETS if Preset.load(path).machine.topology], ids=lambda p: p.stem
)
def test_the_presets_of_tpus_have_the_compilers_estimate(preset, terraform, capsys):
    assert launch.main([f"--config={preset}", *PLACES, terraform, "--dry-run", "--num-images=1000000"], ask=never) == 0
    plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "(compiler estimate: sdjax.plan of sd" in plan["speed"]
    assert float(plan["cost"].split()[0].replace(",", "")) > 0


PLAN = {"model": "sdxl", "target": "v5e", "chips": 4, "dtype": "bfloat16", "width": 1024, "height": 1024, "steps": 20}
PLAN |= {"batch_size": 4, "price": 1.2, "estimated_images_per_second": 2.0, "asked": {}}


def test_plan_takes_what_the_compiler_estimated(terraform, tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    preset = tmp_path / "dataflow-own.toml"
    text = Path(PRESET).read_text()
    preset.write_text(text.replace("plans/v5e-sdxl.json", "plan.json"))
    shown = []
    for argv in (["--config", PRESET, f"--plan={tmp_path}/plan.json"], [f"--config={preset}"]):
        assert launch.main([*argv, *PLACES, terraform, "--dry-run", "--num-images=1800000"], ask=never) == 0
        shown.append(dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()))
    for plan in shown:
        # Half an image a second and chip; a million and 800,000 are a thousand chip-hours.
        assert plan["speed"].startswith("0.5 images/s a chip, 16.00 with all workers up (compiler estimate: sdjax.plan")
        assert plan["time"] == "31.25 h, 1,000.0 chip-hours for 1,800,000 images; start-up not in it"
        assert plan["cost"].startswith("1,200.00 USD at 1.2 a chip-hour (list price of Cloud TPU on demand")


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (json.dumps({**PLAN, "target": "v6e"}), "is a plan for target v6e, and the job has v5e"),
        (json.dumps({**PLAN, "width": 512}), "is a plan for width 512, and the job has 1024"),
        (json.dumps({**PLAN, "steps": 50}), "is a plan for steps 50, and the job has 20"),
        (json.dumps({**PLAN, "batch_size": 8}), "is a plan for batch_size 8, and the job has 4"),
        (json.dumps({**PLAN, "asked": {"vae": 1}}), "is a plan for vae 1, and the job has no vae"),
        (json.dumps({"chips": 4}), "is not what `python -m sdjax.plan --json` writes"),
        ("[]", "is not what `python -m sdjax.plan --json` writes"),
        (None, "No such file"),
    ],
)
def test_another_programs_plan_is_refused(terraform, tmp_path, capsys, plan, says):
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    argv = ["--config", PRESET, *PLACES, terraform, f"--plan={tmp_path}/plan.json", "--dry-run"]
    assert launch.main(argv, ask=never) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"refused: {tmp_path}/plan.json: ")
    assert says in line


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        ('sampler = "heun"', "is a plan for no sampler, and the job has heun"),
        ("hires_scale = 2", "is a plan for no hires_scale, and the job has 2.0"),
        ('refiner = "gs://dataset/refiner"', "is a plan for no refiner, and the job has 1"),
        ("padding_mask_crop = 32", "no plan is for this job: padding_mask_crop is given without mask_image"),
        (None, "is a plan for dtype bfloat16, and the job has float32"),
        ('dtype = "bfloat16"', "is a plan for steps 20, and the job has 30"),
        ('dtype = "bfloat16"\nnum_inference_steps = 20\nbatch_size = 8', "for batch_size 4, and the job has 8"),
        ('negative_prompt = "blurry"\nguidance_scale = 5', None),
    ],
)
def test_a_plan_is_for_all_that_takes_time_the_jobs_own_defaults_included(terraform, tmp_path, capsys, pipeline, says):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    head, own = Path(PRESET).read_text().replace("plans/v5e-sdxl.json", "plan.json").split("[pipeline]")
    own, estimate = own.split("[estimate]")
    own = own if pipeline and "dtype" not in pipeline else ""
    (tmp_path / "dataflow-own.toml").write_text(f"{head}[pipeline]\n{own}{pipeline or ''}\n[estimate]{estimate}")
    argv = [f"--config={tmp_path}/dataflow-own.toml", *PLACES, terraform, "--dry-run"]
    assert launch.main(argv, ask=never) == (2 if says else 0)
    assert (says or "") in capsys.readouterr().err


def test_plan_invents_nothing(terraform, capsys):
    argv = ["--config=configs/dataflow-h100-sdxl.toml", *PLACES, terraform, "--dry-run", "--num-images=9"]
    assert launch.main([*argv, "--price-per-chip-hour=2"], ask=never) == 0
    plan = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert plan["speed"].startswith("unknown")
    assert (plan["time"], plan["cost"]) == ("unknown", "unknown")

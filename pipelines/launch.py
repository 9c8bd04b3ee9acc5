"""Start a Dataflow job from a preset, on what Terraform made, and follow it to its end.

    python -m pipelines.launch --config configs/dataflow-v5e-sdxl.toml --prompts gs://... --output gs://... --model gs://...

prints the plan, asks, submits, and shows the same progress line as pipelines.generate_images. Combinations that cannot
work are refused before anything is sent. Credentials are the application default ones: let them be the launcher
account's, by `gcloud auth application-default login --impersonate-service-account`. Tried against a loopback service
and never against Google's own.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google.auth
import requests
from google.api_core.exceptions import GoogleAPICallError, NotFound, ServerError, TooManyRequests
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud import dataflow_v1beta3 as api

from pipelines import estimates, generate_images
from pipelines.dataflow import Deployment, Job, LaunchError, Preset, arguments, faults, flex_request
from pipelines.job import cancelling, listing
from pipelines.options import parse
from pipelines.progress import ProgressLine
from pipelines.storage import Store
from sdjax.console import show
from sdjax.request_options import refuse_empty
from sdjax.values import one_line

_SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
POLL_SECONDS = 20.0
ANSWER_SECONDS = 60.0  # the client's own is for ever
_PATIENCE = 30
_ENDED = {"JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_UPDATED", "JOB_STATE_DRAINED"}


class Service:
    """The Dataflow API, with the application default credentials; one on localhost without."""

    def __init__(self, deployment: Deployment, endpoint: str | None = None):
        self._project, self._region = deployment.project, deployment.region
        together: dict[str, Any] = {
            "credentials": AnonymousCredentials() if _is_local(endpoint) else google.auth.default(scopes=_SCOPES)[0],
            "client_options": {"api_endpoint": endpoint} if endpoint else None,
            "transport": "rest",
        }
        self._templates = api.FlexTemplatesServiceClient(**together)
        self._jobs = api.JobsV1Beta3Client(**together)
        self._messages = api.MessagesV1Beta3Client(**together)

    def launch(self, job: Job) -> str:
        """Submit the Flex Template; returns the job's id."""
        return self._templates.launch_flex_template(flex_request(job), timeout=ANSWER_SECONDS).job.id

    def state(self, job_id: str) -> str:
        """Such as "JOB_STATE_RUNNING"."""
        request = api.GetJobRequest(project_id=self._project, location=self._region, job_id=job_id)
        return self._jobs.get_job(request, timeout=ANSWER_SECONDS).current_state.name

    def errors(self, job_id: str) -> list[str]:
        """What Dataflow says went wrong, oldest first."""
        request = api.ListJobMessagesRequest(
            project_id=self._project,
            location=self._region,
            job_id=job_id,
            minimum_importance=api.JobMessageImportance.JOB_MESSAGE_ERROR,
        )
        messages = self._messages.list_job_messages(request, timeout=ANSWER_SECONDS)
        return [message.message_text for message in messages]


def plan(job: Job, num_images: int | None) -> str:
    """What would run, for how long and for how much; "unknown" where no figure has a source."""
    preset, machine = job.preset, job.preset.machine
    chips = machine.chips * preset.max_workers
    rows = {
        "job": f"{job.name} in {job.deployment.project}, {job.deployment.region}",
        "workers": f"up to {preset.max_workers} {machine.machine_type} in {preset.dataflow['worker_zone']}",
        "accelerator": f"{preset.service_options['worker_accelerator']}, {machine.chips} a worker, {chips} in all",
        "quota": f"{chips} of {machine.quota!r} in {job.deployment.region}",
        "image": job.image,
        "prompts": job.prompts,
        "output": job.output,
        "options": ", ".join(f"{name}={value}" for name, value in preset.pipeline.items()) or "the pipeline's defaults",
        **estimates.told(preset, num_images),
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def follow(service: Service, job: Job, job_id: str) -> bool:
    """Wait for the job to end, with the progress line of its output; whether it succeeded.

    A job can be unknown for seconds after its launch, and the service can be away for minutes: `_PATIENCE` polls in a
    row may fail before the error is raised. The job runs on all the same.
    """
    last, failed = "", 0
    with ProgressLine(Store(job.output)):
        while last not in _ENDED:
            try:
                state, failed = service.state(job_id), 0
            except (ServerError, NotFound, TooManyRequests, TransportError, requests.RequestException):
                state, failed = last, failed + 1
                if failed > _PATIENCE:
                    raise
            if state != last:
                print(f"\r{datetime.now():%H:%M:%S} {state.removeprefix('JOB_STATE_').lower()}", file=sys.stderr)
                last = state
            if last not in _ENDED:
                time.sleep(POLL_SECONDS)
    if last == "JOB_STATE_DONE":
        return True
    for message in service.errors(job_id):
        print(message, file=sys.stderr)
    return False


def prepare(options: argparse.Namespace) -> Job:
    """The job that a command line describes; LaunchError with a line for each thing wrong with it."""
    preset = Preset.load(options.config)
    over: dict[str, Any] = {"max_num_workers": options.max_workers, "worker_zone": options.zone}
    estimate: dict[str, Any] = {"plan": options.plan} if options.plan else {}
    if options.price_per_chip_hour is not None:
        estimate |= {"price_per_chip_hour": options.price_per_chip_hour, "price_source": "given on the command line"}
    preset = dataclasses.replace(
        preset,
        dataflow={**preset.dataflow, **{name: value for name, value in over.items() if value is not None}},
        pipeline={**preset.pipeline, **({"model": options.model} if options.model else {})},
        estimate={**preset.estimate, **estimate},
    )
    name = f"sdjax-{preset.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}".lower().replace("_", "-").replace(".", "-")
    job = Job(name, preset, Deployment.read(options.terraform), options.prompts, options.output, options.direct)
    wrong = list(faults(job))
    if options.model is None and "model" not in preset.pipeline:
        wrong.append("no model is named; give --model, or `model` in the preset's [pipeline]")
    if options.num_images is not None and options.num_images < 1:
        wrong.append(f"--num-images={options.num_images} are none; give how many the prompts ask for")
    if not wrong:
        try:
            refuse_empty(options)
            parse(arguments(job))
        except ValueError as error:
            wrong = [str(error)]
    if wrong:
        raise LaunchError("\n".join(wrong))
    estimates.speed(preset)
    return job


def _is_local(endpoint: str | None) -> bool:
    return bool(endpoint) and str(endpoint).startswith("http://localhost")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.launch", description="Start a Dataflow job and follow it."
    )
    parser.add_argument("--config", required=True, type=Path, help="a preset, such as configs/dataflow-v5e-sdxl.toml")
    parser.add_argument("--prompts", required=True, help="file or glob on Cloud Storage")
    parser.add_argument("--output", required=True, help="folder on Cloud Storage; a second run makes what is missing")
    parser.add_argument("--model", help="checkpoint on Cloud Storage or in the image; needed if the preset has none")
    parser.add_argument("--terraform", type=Path, default=Path("terraform"), help="its folder, or `output -json` of it")
    parser.add_argument("--max-workers", type=int, help="default: the preset's")
    parser.add_argument("--zone", help="default: the preset's")
    parser.add_argument(
        "--num-images", type=int, help="how many the prompts ask for, for the estimate of time and cost"
    )
    parser.add_argument(
        "--plan", help="what `python -m sdjax.plan --json` wrote, for the estimate; default: the preset's"
    )
    parser.add_argument("--price-per-chip-hour", type=float, help="US dollars; default: a TPU's list price on demand")
    parser.add_argument("--direct", action="store_true", help="build and submit the job here, not by the Flex Template")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and submit nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dataflow-endpoint", help="another Dataflow; one on http://localhost is a test's")
    return parser


def main(
    argv: list[str] | None = None,
    *,
    ask: Callable[[str], str] = input,
    generate: Callable[[list[str]], int] = generate_images.main,
) -> int:
    """Plan, ask, submit and follow; returns the exit status: 0 done, planned or declined, 1 failed, 2 refused.

    Ctrl-C at the question returns 130, and so it does while a job is followed directly, which runs on.

    `ask` puts the question and `generate` submits a direct job; tests put their own in.
    """
    options = _parser().parse_args(argv)
    try:
        job = prepare(options)
    except LaunchError as error:
        for line in str(error).splitlines():
            print(f"refused: {line}", file=sys.stderr)
        return 2
    show(plan(job, options.num_images))
    if options.dry_run:
        return 0
    try:
        agreed = options.yes or ask("Start it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print("\nNothing was sent; --yes starts it without asking", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nNothing was sent.", file=sys.stderr)
        return 130
    if not agreed:
        show("Nothing was sent.")
        return 0

    endpoint = options.dataflow_endpoint
    if options.direct:
        local = [f"--dataflow_endpoint={endpoint}", *(["--no_auth"] if _is_local(endpoint) else [])] if endpoint else []
        return generate([*arguments(job), *local])
    try:
        service = Service(job.deployment, endpoint)
        job_id = service.launch(job)
    except (ServerError, requests.RequestException, KeyboardInterrupt) as error:
        listed = listing(job.deployment.project, job.deployment.region)
        print(f"no answer ({one_line(error)}); whether the job runs says: {listed}", file=sys.stderr)
        return 1
    except (GoogleAPICallError, GoogleAuthError) as error:
        print(f"not started: {error}", file=sys.stderr)
        return 1
    show(f"started {job_id}; to stop it: {cancelling(job_id, job.deployment.project, job.deployment.region)}")
    try:
        return 0 if follow(service, job, job_id) else 1
    except (KeyboardInterrupt, GoogleAPICallError, GoogleAuthError, requests.RequestException) as stop:
        print(f"\nno longer followed ({stop!r}); {job_id} may run on", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

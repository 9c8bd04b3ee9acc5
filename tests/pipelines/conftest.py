"""Fixtures of the jobs' tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from sdjax import retrying
from tests.pipelines import outputs, standin
from tests.pipelines.faulty import FaultyFileSystem


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return outputs.write_csv(tmp_path_factory.mktemp("prompts") / "p.csv", outputs.table())


@pytest.fixture(scope="module")
def made(tmp_path_factory, prompts) -> Path:
    """A finished dataset; tests only read it."""
    output = tmp_path_factory.mktemp("made") / "out"
    assert standin.run("--prompts", prompts, "--output", output, "--unit-size", 32, "--price-per-hour", 3.6) == 0
    return output


@pytest.fixture
def terraform(tmp_path) -> str:
    """The launcher's option that names what Terraform made."""
    from tests.pipelines.test_dataflow import DEPLOYMENT, outputs

    file = tmp_path / "outputs.json"
    file.write_text(outputs(DEPLOYMENT))
    return f"--terraform={file}"


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = []
    return FaultyFileSystem


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def service():
    """Starts Beam modules that listen on a port, waits until they do, and ends them with the test."""
    processes = []
    # The worker pool starts its workers by `python`.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

    def start(module: str, *arguments: str, port: int) -> subprocess.Popen:
        command = [sys.executable, "-m", module, *arguments]
        processes.append(subprocess.Popen(command, env={**os.environ, "PATH": path}))
        deadline = time.monotonic() + 90
        while not answers(port):
            assert processes[-1].poll() is None, f"{module} ended"
            assert time.monotonic() < deadline, f"{module} does not listen"
            time.sleep(0.1)
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
        process.wait()


@pytest.fixture
def worker_pool(service):
    """A job server and an external worker pool: the options that run a job there, and the pool's process."""
    jobs, workers = free_port(), free_port()
    service("apache_beam.runners.portability.local_job_service_main", f"--job_port={jobs}", port=jobs)
    pool = service("apache_beam.runners.worker.worker_pool_main", f"--service_port={workers}", port=workers)
    options = ["--runner=PortableRunner", f"--job_endpoint=127.0.0.1:{jobs}"]
    return [*options, "--environment_type=EXTERNAL", f"--environment_config=127.0.0.1:{workers}"], pool

"""Other runners: workers that are processes of their own, behind a job server and an external worker pool."""

import socket
import subprocess
import sys
import time

import pytest

from pipelines import verify
from tests.pipelines import standin
from tests.pipelines.test_generate_images import assert_same, direct, images, table, write_csv


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

    def start(module: str, *arguments: str, port: int) -> None:
        processes.append(subprocess.Popen([sys.executable, "-m", module, *arguments]))
        deadline = time.monotonic() + 90
        while not answers(port):
            assert processes[-1].poll() is None, f"{module} ended"
            assert time.monotonic() < deadline, f"{module} does not listen"
            time.sleep(0.1)

    yield start
    for process in processes:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_a_portable_runner_with_an_external_worker_pool(service, tmp_path):
    jobs, workers = free_port(), free_port()
    service("apache_beam.runners.portability.local_job_service_main", f"--job_port={jobs}", port=jobs)
    service("apache_beam.runners.worker.worker_pool_main", f"--service_port={workers}", port=workers)
    prompts = write_csv(tmp_path / "p.csv", table())
    portable = ("--runner=PortableRunner", f"--job_endpoint=127.0.0.1:{jobs}")
    portable += ("--environment_type=EXTERNAL", f"--environment_config=127.0.0.1:{workers}")
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--unit-size", 32)
    assert standin.run(*arguments, *portable) == 0
    assert_same(images(tmp_path / "out"), direct(table()))
    assert verify.main([str(tmp_path / "out")]) == 0

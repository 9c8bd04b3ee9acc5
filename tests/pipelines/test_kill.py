"""Kill -9 at random moments: nothing half, nothing twice, nothing lost, and the same bytes in the end."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial

import psutil
import pyarrow.parquet as pq
import pytest

from pipelines import verify
from pipelines.storage import Store
from tests.pipelines import standin
from tests.pipelines.outputs import files

IMAGES = 600
PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job's arguments, and what an uninterrupted run makes of them."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(IMAGES)))
    arguments = ["--prompts", str(folder / "p.txt"), "--unit-size", "16"]
    assert standin.run(*arguments, "--output", folder / "whole") == 0
    return arguments, folder / "whole"


# Forked from a process that has imported the job and started no thread: a run begins at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.pipelines.standin"])


def run_quietly(arguments):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        status = standin.run(*arguments, load=standin.load_slowly)
    sys.exit(status)


def run_telling(arguments, told):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with open(told, "w") as file, redirect_stdout(file), redirect_stderr(file):
        status = standin.run(*arguments, load=standin.load_slowly)
    sys.exit(status)


def start(arguments, output, run=run_quietly, *more):
    process = PROCESSES.Process(target=run, args=([*arguments, "--output", str(output)], *more))
    process.start()
    return process


def kill_at_random(arguments, output, draw: random.Random) -> None:
    """Start the job, wait until it makes units, and kill it some units later."""
    process = start(arguments, output)
    wait_for_units(process, output, draw.randint(0, 6))
    time.sleep(draw.random() * 0.08)
    process.kill()
    process.join()


def kill_a_worker(arguments, output, draw: random.Random, *, pool: int | None = None) -> None:
    """Start the job, kill one of its workers some units later, and let the rest end as the runner would have it.

    The workers are those of the process `pool`, or else of the job's own.
    """
    process = start(arguments, output)
    wait_for_units(process, output, draw.randint(1, 4))
    workers = []
    with suppress(psutil.NoSuchProcess):  # the job may be done before its worker is found
        family = filter(lives, psutil.Process(pool or process.pid).children(recursive=True))
        workers = [each for each in family if "sdk_worker" in " ".join(each.cmdline()) and not each.children()]
        time.sleep(draw.random() * 0.08)
        draw.choice(workers).kill()
    process.join(PATIENCE)
    process.kill()  # where the runner waits on for a worker that is gone
    process.join()
    deadline = time.monotonic() + PATIENCE
    while any(map(lives, workers)):
        assert time.monotonic() < deadline, "a worker goes on without its job"
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_units(process, output, more: int) -> None:
    """Wait until so many more units are committed, or the job ends."""
    wanted = len(committed(output)) + more
    while process.is_alive() and len(committed(output)) < wanted:
        time.sleep(0.002)


def committed(output) -> list[str]:
    return [name for name in Store(str(output)).find("manifest") if name.endswith(".parquet")]


def hashes(output) -> dict[str, str]:
    """Of a dataset's image files, by id."""
    rows = pq.read_table(output / "manifest", columns=["id", "sha256"]).to_pylist()
    return {row["id"]: row["sha256"] for row in rows}


def survives(job, output, kills: int, seed: int, *options: str, kill=kill_at_random) -> None:
    arguments, whole = job
    draw = random.Random(seed)
    for _ in range(kills):
        kill([*arguments, *options], output, draw)
        if committed(output):
            assert verify.verify(str(output)).faults == []
    process = start([*arguments, *options], output)
    process.join()
    assert process.exitcode == 0
    found = verify.verify(str(output))  # the files' bytes against the hashes in the manifests among others
    assert (found.images, found.orphans, found.faults) == (IMAGES, [], [])
    assert hashes(output) == hashes(whole)
    told = json.loads((output / "summary.json").read_text())
    assert told["images"] + told["already_done"] == told["rows"] == IMAGES
    leftover = [p for p in output.rglob("*") if p.is_file() and p.name.startswith(".")]
    assert leftover == []


def test_a_job_killed_again_and_again_ends_as_if_it_never_was(job, tmp_path):
    survives(job, tmp_path / "out", kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tar", "files"])
def test_twenty_kills(job, tmp_path, format):
    survives(job, tmp_path / "out", 20, 2, "--format", format)


@pytest.mark.slow
def test_a_killed_worker_among_several(job, tmp_path):
    several = ("--direct_num_workers=2", "--direct_running_mode=multi_processing", "--unit-size", "4")
    for seed in range(4):  # a job would be done before the twentieth
        survives(job, tmp_path / str(seed), 5, seed, *several, kill=kill_a_worker)


@pytest.mark.slow
def test_a_killed_worker_of_a_pool(job, worker_pool, tmp_path):
    portable, pool = worker_pool
    kill = partial(kill_a_worker, pool=pool.pid)
    survives(job, tmp_path / "out", 20, 4, *portable, "--unit-size", "4", kill=kill)


def test_a_job_that_is_not_killed_is_the_same_in_a_process_of_its_own(job, tmp_path):
    arguments, whole = job
    process = start(arguments, tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert files(tmp_path / "out") == files(whole)


def test_ctrl_c_ends_a_job_with_one_line(job, tmp_path):
    arguments, _ = job
    output, told = tmp_path / "out", tmp_path / "told.txt"
    process = start(arguments, output, run_telling, told)
    wait_for_units(process, output, 2)
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == 130, told.read_text()
    assert told.read_text().splitlines() == [
        "generate_images: interrupted; the same command goes on from the last whole unit"
    ]
    found = verify.verify(str(output))
    assert 0 < found.images < IMAGES
    assert found.faults == []

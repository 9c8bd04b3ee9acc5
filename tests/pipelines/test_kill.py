"""Kill -9 at random moments: nothing half, nothing twice, nothing lost, and the same bytes in the end."""

import json
import multiprocessing
import os
import random
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest

from pipelines import verify
from pipelines.storage import Store
from tests.pipelines import standin
from tests.pipelines.test_generate_images import files, images

IMAGES = 600


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


def start(arguments, output):
    process = PROCESSES.Process(target=run_quietly, args=([*arguments, "--output", str(output)],))
    process.start()
    return process


def kill_at_random(arguments, output, draw: random.Random) -> None:
    """Start the job, wait until it makes units, and kill it some units later."""
    process = start(arguments, output)
    wanted = len(committed(output)) + draw.randint(0, 6)
    while process.is_alive() and len(committed(output)) < wanted:
        time.sleep(0.002)
    time.sleep(draw.random() * 0.08)
    process.kill()
    process.join()


def committed(output) -> list[str]:
    return [name for name in Store(str(output)).find("manifest") if name.endswith(".parquet")]


def survives(job, output, kills: int, seed: int, *options: str) -> None:
    arguments, whole = job
    draw = random.Random(seed)
    for _ in range(kills):
        kill_at_random([*arguments, *options], output, draw)
        if committed(output):
            assert verify.verify(str(output)).faults == []
    process = start([*arguments, *options], output)
    process.join()
    assert process.exitcode == 0
    found = verify.verify(str(output))
    assert (found.images, found.orphans, found.faults) == (IMAGES, [], [])
    expected, resumed = images(whole), images(output)
    assert resumed.keys() == expected.keys()
    assert all((resumed[id] == pixels).all() for id, pixels in expected.items())
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


def test_a_job_that_is_not_killed_is_the_same_in_a_process_of_its_own(job, tmp_path):
    arguments, whole = job
    process = start(arguments, tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert files(tmp_path / "out") == files(whole)

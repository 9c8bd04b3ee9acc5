"""Other runners: workers that are processes of their own, behind a job server and an external worker pool."""

import pytest

from pipelines import verify
from tests.pipelines import standin
from tests.pipelines.outputs import assert_same, direct, images, table, write_csv


@pytest.mark.slow
def test_a_portable_runner_with_an_external_worker_pool(worker_pool, tmp_path):
    portable, _ = worker_pool
    prompts = write_csv(tmp_path / "p.csv", table())
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--unit-size", 32)
    assert standin.run(*arguments, *portable) == 0
    assert_same(images(tmp_path / "out"), direct(table()))
    assert verify.main([str(tmp_path / "out")]) == 0

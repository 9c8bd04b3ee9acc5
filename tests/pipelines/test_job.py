"""A job looks at what its output holds before it makes anything."""

import errno
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import encode_latents, latents, report
from pipelines.layout import manifest_name
from pipelines.storage import Store
from tests.pipelines import standin
from tests.pipelines.outputs import files, no_load
from tests.pipelines.test_encode_latents import write_set


@pytest.fixture
def output(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def everything(output) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def refusal(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_images_are_not_made_into_latents(prompts, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "manifest").mkdir(parents=True)
    rows = [{"id": "a" * 32, "shard": "shards/x.safetensors", "index": 0}]
    pq.write_table(pa.Table.from_pylist(rows, latents.MANIFEST), output / manifest_name("a" * 32))
    before = everything(output)
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 2
    assert refusal(capsys).endswith("out holds latents, and this job makes images; choose another --output")
    assert everything(output) == before


def test_latents_are_not_made_into_images(output, tiny, tmp_path, capsys):
    before = everything(output)
    images = write_set(tmp_path / "set", "folder")
    arguments = ["--images", images, "--output", str(output), "--model", str(tiny), "--size", "16"]
    assert encode_latents.main(arguments, load=no_load) == 2
    assert refusal(capsys).endswith("out holds images, and this job makes latents; choose another --output")
    assert everything(output) == before


def test_a_damaged_manifest_is_named_before_anything_is_made(output, prompts, capsys):
    manifest = min((output / "manifest").iterdir())
    manifest.write_bytes(manifest.read_bytes()[:-20])
    before = everything(output)
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 2
    assert f"manifest/{manifest.name} cannot be read: " in refusal(capsys)
    assert everything(output) == before


def test_an_output_that_may_not_be_written_is_refused(output, prompts, monkeypatch, capsys):
    def read_only(self, name, data, **options):
        raise OSError(errno.EROFS, "Read-only file system", name)

    monkeypatch.setattr(Store, "write", read_only)
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 2
    assert refusal(capsys) == f"generate_images: [Errno {errno.EROFS}] Read-only file system: 'summary.json'"


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"2",
        b'{"images": 2}',
        b'{"images": "two", "finished": 1}',
        '{"model": "Bär"}'.encode("latin-1"),
        b"",
        b"{",
    ],
)
def test_a_summary_that_is_none_of_a_job_hinders_none(output, prompts, text, capsys):
    before = files(output)
    (output / "summary.json").write_bytes(text)
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 0
    assert files(output) == before
    summary = Store(str(output)).read_json(report.SUMMARY)
    assert summary is not None
    assert summary["finished"]

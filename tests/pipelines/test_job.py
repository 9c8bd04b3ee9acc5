"""A job looks at what its output holds before it makes anything."""

import errno
import shutil
from datetime import UTC, datetime, timedelta

import aiohttp
import apache_beam as beam
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import encode_latents, generate_images, job, latents, report, sources, units
from pipelines.layout import manifest_name
from pipelines.options import parse
from pipelines.sources import SourceError
from pipelines.storage import Store
from sdjax.weights.safetensors import CheckpointError
from tests.pipelines import standin
from tests.pipelines.image_set import write_set
from tests.pipelines.outputs import files, no_load


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


def test_another_models_images_stay_and_the_job_says_so(output, prompts, monkeypatch, capsys):
    before = files(output)
    monkeypatch.setattr(standin, "spec", lambda model, **options: standin.Spec("other", "e" * 64))
    assert standin.run("--prompts", prompts, "--output", output, "--unit-size", 32) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "another model" in line]
    assert said == [
        "generate_images: what is there was made by another model or dtype (stand-in), and stays;"
        " its rows are made anew beside it; --overwrite deletes it"
    ]
    assert before.items() < files(output).items()
    assert len(files(output)) == 2 * len(before)


def test_what_is_refused_as_stages_are_added_costs_nothing(output, prompts, monkeypatch, capsys):
    def refused(rows):
        raise ValueError("no such thing")

    before = everything(output)
    monkeypatch.setattr(units, "shard_count", refused)
    assert standin.run("--prompts", prompts, "--output", output, "--overwrite") == 2
    assert refusal(capsys) == "generate_images: no such thing"
    assert everything(output) == before


class Sent:
    """A job on Dataflow; `state` may be an error of asking for it."""

    def __init__(self, state, error):
        self._state, self._error = state, error

    def run(self):
        return self

    def job_id(self):
        return "2026-11-29_job"

    def wait_until_finish(self):
        raise self._error

    @property
    def state(self):
        if isinstance(self._state, Exception):
            raise self._state
        return self._state


@pytest.mark.parametrize("state", ["RUNNING", PermissionError("an expired login")])
def test_a_sent_job_that_can_be_followed_no_more_runs_on(tmp_path, capsys, state):
    options = ["--prompts", "p", "--output", str(tmp_path), "--runner=DataflowRunner", "--project=p", "--region=r"]
    options.append("--temp_location=gs://a/b")
    sent = Sent(state, AssertionError("Job did not reach to a terminal state"))
    assert job._run(parse(options), sent, Store(str(tmp_path))) == 1
    assert refusal(capsys) == (
        "generate_images: Job did not reach to a terminal state; no longer followed; 2026-11-29_job runs on;"
        " to stop it: gcloud dataflow jobs cancel 2026-11-29_job --project=p --region=r"
    )
    with pytest.raises(RuntimeError, match="failed"):
        job._run(parse(options), Sent("FAILED", RuntimeError("failed")), Store(str(tmp_path)))


@pytest.mark.parametrize(
    "error",
    [
        SourceError("p.parquet: it is damaged"),
        FileNotFoundError(errno.ENOENT, "No such file", "unet.safetensors"),
        aiohttp.ClientPayloadError("cut"),
    ],
)
def test_what_the_world_does_amid_a_job_ends_it_with_a_line(prompts, tmp_path, monkeypatch, capsys, caplog, error):
    def read(piece):
        raise error

    monkeypatch.setattr(sources, "read", read)
    assert standin.run("--prompts", prompts, "--output", tmp_path / "out", load=no_load) == 1
    assert refusal(capsys) == f"generate_images: {error}"
    assert caplog.records == []


def test_a_job_whose_every_row_was_rejected_has_failed(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,seed\na cat,x\na dog,y\n")
    arguments = ("--prompts", tmp_path / "p.csv", "--output", tmp_path / "out")
    assert standin.run(*arguments, load=no_load) == 1
    assert capsys.readouterr().out.startswith("2 rows = 0 images + 2 rejected")
    (tmp_path / "p.csv").write_text("prompt,seed\na cat,x\na dog,1\n")
    assert [standin.run(*arguments) for _ in range(2)] == [0, 0]  # and where the others are made already


def test_the_description_of_a_job_that_goes_on_names_no_manifest(output, prompts, monkeypatch):
    """Those of a hundred million images would be more than Dataflow takes."""
    options = parse(["--prompts", str(prompts), "--output", str(output)])
    files = sources.find(options.prompts)
    monkeypatch.setattr(Store, "find", None)
    generate_images.plan(beam.Pipeline(options=options.beam), options, files, standin.Spec())


def test_a_fault_of_ours_amid_a_job_is_raised(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "read", lambda piece: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        standin.run("--prompts", prompts, "--output", tmp_path / "out", load=no_load)


def test_a_refusal_without_words_says_what_it_is(prompts, tmp_path, capsys):
    def spec(model, **options):
        raise TimeoutError

    assert generate_images.main(["--prompts", str(prompts), "--output", str(tmp_path)], spec=spec) == 2
    assert refusal(capsys) == "generate_images: TimeoutError"


def test_an_output_that_may_not_be_written_is_refused(output, prompts, monkeypatch, capsys):
    def read_only(self, name, data, **options):
        raise OSError(errno.EROFS, "Read-only file system", name)

    monkeypatch.setattr(Store, "write", read_only)
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 2
    assert refusal(capsys) == f"generate_images: [Errno {errno.EROFS}] Read-only file system: 'summary.json'"


def test_a_second_job_in_a_bucket_is_refused_while_the_first_tells_of_itself(prompts, monkeypatch, capsys):
    bucket = fsspec.filesystem("memory")
    bucket.store.clear()
    store = Store("memory://out")
    arguments = ("--prompts", prompts, "--output", store.url)
    store.write_json(report.SUMMARY, {"finished": False})
    store.write(f".progress/host-1-{'0' * 8}.json", b"{}")
    before = dict(bucket.store)
    for options in ((), ("--overwrite",)):
        assert standin.run(*arguments, *options, load=no_load) == 2
        assert refusal(capsys) == (
            "generate_images: another job wrote to memory://out within the last minute; wait for its end, or a minute"
        )
    assert bucket.store == before
    monkeypatch.setattr(type(bucket), "modified", lambda *_: datetime.now(UTC) - timedelta(seconds=61))
    assert standin.run(*arguments) == 0
    store.write(f".progress/host-1-{'0' * 8}.json", b"{}")
    monkeypatch.undo()
    assert standin.run(*arguments, load=no_load) == 0  # of a job that has ended


def test_a_job_that_failed_here_may_begin_again_at_once(prompts, capsys):
    def load(model, **options):
        raise CheckpointError("unet.safetensors is cut short")

    fsspec.filesystem("memory").store.clear()
    arguments = ("--prompts", prompts, "--output", "memory://out")
    assert standin.run(*arguments, load=load) == 1
    assert refusal(capsys) == "generate_images: unet.safetensors is cut short"
    assert standin.run(*arguments) == 0


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

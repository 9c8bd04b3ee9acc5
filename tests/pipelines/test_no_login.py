"""A bucket, or a server, that wants another login: every command says so in one line, and nothing is called absent."""

from http.server import ThreadingHTTPServer

import fsspec
import gcsfs
import pytest

from pipelines import encode_latents, verify
from sdjax import plan, sample
from tests.pipelines import standin
from tests.pipelines.network import Network


@pytest.fixture(params=[401, 403])
def answer(request, monkeypatch):
    """What Cloud Storage answers to everything."""
    # Of a client that waits for no answer's end the server would say so too.
    monkeypatch.setattr(ThreadingHTTPServer, "handle_error", lambda *_: None)
    network = Network("127.0.0.1", 0)
    network.faults = [request.param] * 1000
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", network.url)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "away"
    gcsfs.GCSFileSystem.clear_instance_cache()
    network.close()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (standin.run, ["--prompts", "gs://b/p.txt", "--output", "out"]),
        (standin.run, ["--prompts", "gs://b/*.txt", "--output", "out"]),
        (standin.run, ["--prompts", "p.txt", "--output", "gs://b/out"]),
        (encode_latents.main, ["--images", "gs://b/set", "--output", "out"]),
        (verify.main, ["gs://b/out"]),
        (sample.main, ["a cat", "--model", "gs://b/sd15"]),
        (sample.main, ["a cat", "--model", "gs://b/sd15.safetensors"]),
        (sample.main, ["a cat", "--lora", "gs://b/lora.safetensors"]),
        (plan.main, ["--model", "gs://b/sd15"]),
    ],
)
def test_what_may_not_be_read_is_said_in_a_line(answer, command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    assert (command(*arguments) if command is standin.run else command(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert answer in line
    assert not (tmp_path / "out").exists()

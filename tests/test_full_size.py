"""What only the full size of Stable Diffusion 1.5 shows: the memory that loading takes. Minutes and gigabytes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sdjax.architectures import ARCHITECTURES
from tests import checkpoints

LOAD = r"""
import json, pathlib, re, sys, time
import jax
from sdjax.generate import StableDiffusion
jax.block_until_ready(jax.numpy.ones(1))
started = time.perf_counter()
pipe = StableDiffusion.from_pretrained(sys.argv[1], dtype=sys.argv[2])
seconds = time.perf_counter() - started
# Not getrusage's maximum, which a child takes over from the process that started it.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak, "seconds": seconds, "parameters": pipe.parameters}))
"""


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A random checkpoint of the full size, in half precision as most are."""
    configs = ARCHITECTURES["sd15"]
    text = configs["text_encoder"] | {"vocab_size": 49408}
    pipeline = checkpoints.pipeline(unet=configs["unet"], vae=configs["vae"], text=text)
    folder = tmp_path_factory.mktemp("full") / "sd15"
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_little_more_memory_than_the_parameters(sd15, dtype, width):
    environment = os.environ | {"XLA_FLAGS": ""}  # one device, one copy
    command = [sys.executable, "-c", LOAD, sd15, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] > 1_000_000_000
    loaded = found["parameters"] * width
    print(f"{dtype}: {found['seconds']:.1f} s, {found['peak'] / loaded:.2f} x the parameters' bytes at the peak")
    assert found["peak"] < 1.4 * loaded

"""XLA's compiler for GPUs, which compiles for those that are not here; it says what a program takes, not how long."""

from typing import NamedTuple

import jax
from jax.experimental import topologies

from sdjax.planning.compiled import PlanError, Target

_SHARE = 0.75  # of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
_CONFIG = """\
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.ghz}
  device_memory_size: {gpu.bytes} memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache}
  shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {block} shared_memory_per_block: 49152
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {gpu.threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
device_description_str: "{gpu.description}"
dnn_version_info {{ major: 9 minor: 10 }}
"""
"""XLA's `GpuTargetConfigProto`."""


class Gpu(NamedTuple):
    """A GPU that programs can be compiled for without one, by NVIDIA's data sheets and tuning guides.

    Attributes:
        name: for messages.
        description: as CUDA names it.
        capability: its compute capability.
        cores: streaming multiprocessors.
        fpus: of each, for float32.
        ghz: their greatest clock.
        bytes: of its memory, about as CUDA counts it.
        bandwidth: bytes a second of it.
        cache: bytes of the second level.
        shared: bytes of shared memory of each core.
        threads: that a core holds.
    """

    name: str
    description: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    ghz: float
    bytes: int
    bandwidth: int
    cache: int
    shared: int
    threads: int

    @property
    def memory(self) -> int:
        """Bytes that a program may use."""
        return int(_SHARE * self.bytes)


_HOPPER = {"capability": (9, 0), "cores": 132, "fpus": 128, "ghz": 1.98, "cache": 50 << 20}
_HOPPER |= {"shared": 228 << 10, "threads": 2048}
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("l4", "NVIDIA L4", (8, 9), 58, 128, 2.04, 23_600_000_000, 300 * 10**9, 48 << 20, 100 << 10, 1536),
        Gpu(
            *("a100", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1.41),
            *(42_400_000_000, 1555 * 10**9, 40 << 20, 164 << 10, 2048),
        ),
        Gpu("h100", "NVIDIA H100 80GB HBM3", bytes=84_900_000_000, bandwidth=3350 * 10**9, **_HOPPER),
        Gpu("h200", "NVIDIA H200", bytes=150_000_000_000, bandwidth=4800 * 10**9, **_HOPPER),
    )
}


def target(gpu: Gpu) -> Target:
    """A GPU to compile for.

    Raises:
        PlanError: JAX's plugin for CUDA is not installed.
    """
    config = _CONFIG.format(gpu=gpu, block=gpu.shared - 1024)  # the rest of what a block may have is CUDA's
    try:
        found = topologies.get_topology_desc(gpu.name, "cuda", target_config=config, topology="1x1x1")
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        message = f"planning for a GPU needs its compiler: pip install 'sdjax[cuda]' ({error})"
        raise PlanError(message) from None
    # Which of Triton's tiles suit a product is found by trying on a device; without one some suit none.
    return Target(gpu.name, gpu.memory, found.devices[0], {"xla_gpu_enable_triton_gemm": False})

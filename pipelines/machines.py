"""Dataflow's worker machines with accelerators: which there are, and what a TPU's container must be told.

Standard library only, as the container's entry point reads this before anything else.

Sources, read in 2026: Dataflow's pages "Dataflow support for TPUs", "Dataflow support for GPUs", "Run a pipeline with
TPUs" and "Troubleshoot your Dataflow TPU job", and Compute Engine's page "GPU machine types".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A worker machine type, what it carries and how the Dataflow service option `worker_accelerator` names it.

    `chips` counts TPU chips or GPUs. `quota` is what to ask for in Compute Engine's quotas: chips of a region.
    """

    machine_type: str
    accelerator: str
    chips: int
    quota: str
    topology: str | None = None  # of a TPU
    generation: str | None = None  # of a TPU, as libtpu's TPU_ACCELERATOR_TYPE begins

    @property
    def target(self) -> str:
        """The Dockerfile target that its image is built from: "tpu" or "cuda"."""
        return "tpu" if self.topology else "cuda"

    @property
    def chip(self) -> str:
        """The accelerator by the name that it goes by: "v5e", "nvidia-l4"."""
        return {"v5litepod": "v5e"}.get(self.generation, self.generation) if self.generation else self.accelerator

    @property
    def worker_accelerator(self) -> str:
        """The value of the service option, with the newest driver for a GPU."""
        if self.topology:
            return f"type:{self.accelerator};topology:{self.topology}"
        return f"type:{self.accelerator};count:{self.chips};install-nvidia-driver:latest"

    def tpu_environment(self) -> dict[str, str]:
        """The variables that tell libtpu what it runs on, which it can't ask on a Dataflow worker; {} for a GPU.

        A worker is one host of its own slice. v5p counts cores, two a chip, where the others count chips.
        """
        if not self.topology:
            return {}
        bounds = (self.topology.split("x") + ["1"])[:3]
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_HOST_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_HOST_BOUNDS": ",".join(bounds),
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "TPU_ACCELERATOR_TYPE": f"{self.generation}-{self.chips * (2 if self.generation == 'v5p' else 1)}",
        }


_V5E = ("tpu-v5-lite-podslice", "TPU v5 Lite PodSlice chips", "v5litepod")
_V6E = ("tpu-v6e-slice", "TPU chips per TPU family, tpu_family:CT6E", "v6e")
_V5P = ("tpu-v5p-slice", "TPU v5p chips", "v5p")

_TPUS = [
    ("ct5lp-hightpu-1t", 1, "1x1", _V5E),
    ("ct5lp-hightpu-4t", 4, "2x2", _V5E),
    ("ct5lp-hightpu-8t", 8, "2x4", _V5E),
    ("ct6e-standard-1t", 1, "1x1", _V6E),
    ("ct6e-standard-4t", 4, "2x2", _V6E),
    ("ct6e-standard-8t", 8, "2x4", _V6E),
    ("ct5p-hightpu-4t", 4, "2x2x1", _V5P),
]

_L4 = ("nvidia-l4", "NVIDIA L4 GPUs")
_A100 = ("nvidia-tesla-a100", "NVIDIA A100 GPUs")
_A100_80 = ("nvidia-a100-80gb", "NVIDIA A100 80GB GPUs")
_H100 = ("nvidia-h100-80gb", "GPUs per GPU family, gpu_family:NVIDIA_H100")
_H100_MEGA = ("nvidia-h100-mega-80gb", "GPUs per GPU family, gpu_family:NVIDIA_H100_MEGA")

_GPUS = [
    *((f"g2-standard-{cores}", count, _L4) for cores, count in [(4, 1), (8, 1), (12, 1), (16, 1), (32, 1)]),
    *((f"g2-standard-{cores}", count, _L4) for cores, count in [(24, 2), (48, 4), (96, 8)]),
    *((f"a2-highgpu-{count}g", count, _A100) for count in (1, 2, 4, 8)),
    ("a2-megagpu-16g", 16, _A100),
    *((f"a2-ultragpu-{count}g", count, _A100_80) for count in (1, 2, 4, 8)),
    ("a3-highgpu-8g", 8, _H100),
    ("a3-megagpu-8g", 8, _H100_MEGA),
]

MACHINES: dict[str, Machine] = {
    machine_type: Machine(machine_type, accelerator, chips, quota, topology, generation)
    for machine_type, chips, topology, (accelerator, quota, generation) in _TPUS
} | {
    machine_type: Machine(machine_type, accelerator, count, quota)
    for machine_type, count, (accelerator, quota) in _GPUS
}

"""libtpu's compiler, which compiles for TPUs that are not here."""

import importlib.util
import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.planning.chips import Chip
from sdjax.planning.compiled import Compiled, PlanError, compiled_for
from sdjax.planning.record import Recorded

# libtpu asks the machine what it is unless told; nothing of it is used, only the compiler.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


class TpuCompiler:
    """libtpu's compiler for one chip.

    Raises:
        PlanError: libtpu is not installed, or knows no such chip.
    """

    def __init__(self, chip: Chip) -> None:
        if importlib.util.find_spec("libtpu") is None:
            raise PlanError("planning for a TPU needs its compiler: pip install 'sdjax[tpu]'")
        os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology, **chip.options)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            raise PlanError(f"libtpu compiles nothing for {chip.topology} here: {error}") from None
        self.name, self.memory = chip.name, chip.memory
        self._sharding = NamedSharding(Mesh(np.array(found.devices[:1]), ("device",)), PartitionSpec())

    def compile(self, recorded: Recorded, draft: bool = False) -> Compiled | None:
        """A program compiled for the chip, or its draft; None where it needs more memory than the chip has."""
        return compiled_for(recorded, draft, self._sharding)

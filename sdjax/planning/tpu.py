"""libtpu's compiler, which compiles for TPUs that are not here."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from sdjax.planning.chips import Chip
from sdjax.planning.compiled import PlanError, Target

# libtpu asks the machine what it is unless told; nothing of it is used, only the compiler.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def target(chip: Chip) -> Target:
    """A chip to compile for.

    Raises:
        PlanError: libtpu is not installed, or knows no such chip.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("planning for a TPU needs its compiler: pip install 'sdjax[tpu]'")
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology, **chip.options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise PlanError(f"libtpu compiles nothing for {chip.topology} here: {error}") from None
    return Target(chip.name, chip.memory, found.devices[0])

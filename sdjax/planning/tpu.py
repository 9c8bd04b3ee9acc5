"""Compiles a program for a TPU that is not here, with libtpu's compiler, and reads what it says of the result."""

import importlib.util
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sdjax.planning.chips import Chip
from sdjax.planning.hlo import Program
from sdjax.planning.record import Recorded

# libtpu asks the machine what it is unless told; nothing of it is used, only the compiler.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

# What compiles soonest, SDXL's UNet in under a minute and not half an hour: it would run slower, but takes about
# the memory that the program takes.
_DRAFT: dict[str, Any] = {"exec_time_optimization_effort": -1.0}


class PlanError(ValueError):
    """What was asked cannot be planned here; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a chip's main memory while a program runs.

    arguments include the network's parameters; aliased are results that take an argument's place.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """A program as the TPU compiler left it."""

    memory: Memory
    text: str

    @cached_property
    def program(self) -> Program:
        return Program(self.text)


class Compiler:
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
        self.chip, self.name, self.memory = chip, chip.name, chip.memory
        self._sharding = NamedSharding(Mesh(np.array(found.devices[:1]), ("device",)), PartitionSpec())

    def compile(self, recorded: Recorded, draft: bool = False) -> Compiled | None:
        """A program compiled for the chip, or its draft; None where it needs more memory than the chip has."""
        return compiled_for(recorded, draft, self._sharding)


def compiled_for(recorded: Recorded, draft: bool, sharding: Sharding) -> Compiled | None:
    """Compile a program, or its draft, for the device of a sharding; None where it needs more memory than that has."""
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), recorded.arguments
    )
    lowered = jax.jit(recorded.function, donate_argnums=recorded.donated).lower(*placed)
    try:
        compiled = lowered.compile(_DRAFT if draft else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    found: Any = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    return Compiled(memory, compiled.as_text() or "")

"""Programs compiled for devices that may not be here, and what their compilers say of them."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.parallel import COMPILER_OPTIONS, Device
from sdjax.planning.hlo import Program
from sdjax.planning.record import Recorded

# What compiles soonest, SDXL's UNet in under a minute and not half an hour: it would run slower, but takes about
# the memory that the program takes.
_DRAFT: dict[str, Any] = {"optimization_level": 9}  # XLA's O0


class PlanError(ValueError):
    """What was asked cannot be planned here; the message says why."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a device's main memory while a program runs.

    arguments include the network's parameters; aliased are results that take an argument's place.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int
    code: int

    @classmethod
    def of(cls, found: Any) -> Self:
        """What a compiler's `memory_analysis` says."""
        return cls(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """A program as the device's compiler left it."""

    memory: Memory
    text: str

    @cached_property
    def program(self) -> Program:
        return Program(self.text)


@dataclass(frozen=True)
class Target:
    """A device to compile for, which need not be here.

    name: for messages.
    memory: bytes of main memory that a program may use.
    device: what it is to JAX.
    options: of XLA, beside those that programs here are compiled with.
    """

    name: str
    memory: int
    device: Device
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, recorded: Recorded, draft: bool = False) -> Compiled | None:
        """A program compiled, or its draft; None where it needs more memory than the device has."""
        sharding = NamedSharding(Mesh(np.array([self.device]), ("device",)), PartitionSpec())
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), recorded.arguments
        )
        options = self.options | COMPILER_OPTIONS.get(self.device.platform, {})
        lowered = jax.jit(recorded.function, donate_argnums=recorded.donated).lower(*placed)
        try:
            compiled = lowered.compile(options | _DRAFT if draft else options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        return Compiled(Memory.of(compiled.memory_analysis()), compiled.as_text() or "")

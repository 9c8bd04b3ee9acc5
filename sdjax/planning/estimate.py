"""From compiled programs to how long a batch would take."""

import re
from dataclasses import dataclass
from functools import cached_property

from sdjax.flops import flops
from sdjax.planning.chips import Chip
from sdjax.planning.fit import Fit
from sdjax.planning.hlo import Cost, HloError
from sdjax.planning.record import Recorded
from sdjax.planning.tpu import Compiled, Compiler


def kernel_cycles(name: str, operands: tuple[tuple[int, ...], ...], chip: Chip) -> float:
    """What a Pallas kernel takes, for which the compiler has no estimate: its products, by how busy they are kept."""
    kernel = re.fullmatch(r"flash_attention_(\d+)", name)
    if kernel is None:
        raise HloError(f"the kernel {name} carries no estimate, and none is known here")
    dim = int(kernel[1])
    (batch, queries, channels), (_, keys, _) = operands[:2]
    padded = -(-dim // chip.multiplier) * chip.multiplier
    return 4 * batch * (channels // dim) * queries * keys * padded / (chip.peak / chip.clock) / chip.busy


@dataclass(frozen=True)
class Estimate:
    """One program of a batch on one chip. Its times are made of the compiler's estimates; nothing has run."""

    recorded: Recorded
    compiled: Compiled
    chip: Chip

    @cached_property
    def cost(self) -> Cost:
        """The compiler's estimates of one call, in the mean of all."""
        return self.compiled.program.cost(self.chip.bytes_per_cycle, self.recorded.taken)

    @property
    def kernel_cycles(self) -> float:
        """Of one call."""
        kernels = self.cost.kernels.items()
        return sum(count * kernel_cycles(name, operands, self.chip) for (name, operands), count in kernels)

    @property
    def seconds(self) -> float:
        """Of all calls of a batch."""
        cycles = self.cost.capped.total() + self.kernel_cycles
        return self.recorded.calls * cycles / self.chip.clock

    @cached_property
    def flops(self) -> float:
        """Operations of all calls of a batch, as the networks define them."""
        recorded = self.recorded
        return recorded.calls * flops(recorded.function, *recorded.arguments, taken=recorded.taken)


@dataclass(frozen=True)
class Plan:
    """A batch of one chip.

    memory: bytes on the chip while the greediest program runs, of all that it can use.
    """

    chip: Chip
    batch_size: int
    programs: tuple[Estimate, ...]
    memory: int

    @property
    def seconds(self) -> float:
        """Of a batch."""
        return sum(program.seconds for program in self.programs)

    @property
    def images_per_second(self) -> float:
        """Of one chip."""
        return self.batch_size / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Operations that the networks are defined by, over what the chip could do meanwhile."""
        return sum(program.flops for program in self.programs) / self.seconds / self.chip.peak


def plan(fit: Fit, compiler: Compiler, batch_size: int | None) -> Plan | None:
    """The plan for a batch of one chip, by default the largest that fits; None if it, or one image, does not."""
    batch_size = batch_size or fit.largest()
    placed = [found for name in fit.names if batch_size and (found := fit.place(name, batch_size)) is not None]
    if len(placed) < len(fit.names):
        return None
    programs = tuple(Estimate(found.recorded, found.compiled, compiler.chip) for found in placed)
    return Plan(compiler.chip, batch_size, programs, max(found.memory for found in placed))

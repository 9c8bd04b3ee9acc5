"""From compiled programs to how long a batch would take."""

import re
from dataclasses import dataclass
from functools import cached_property

from sdjax.planning.chips import Chip
from sdjax.planning.compiled import Compiled
from sdjax.planning.fit import Fitted
from sdjax.planning.hlo import Cost, HloError
from sdjax.planning.record import Recorded


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


@dataclass(frozen=True)
class Plan:
    """How long a batch of one chip would take."""

    chip: Chip
    fitted: Fitted

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """By program."""
        programs = self.fitted.programs
        return {placed.recorded.name: Estimate(placed.recorded, placed.compiled, self.chip) for placed in programs}

    @property
    def seconds(self) -> float:
        """Of a batch."""
        return sum(estimate.seconds for estimate in self.estimates.values())

    @property
    def images_per_second(self) -> float:
        """Of one chip."""
        return self.fitted.batch_size / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Operations that the networks are defined by, over what the chip could do meanwhile."""
        return self.fitted.flops / self.seconds / self.chip.peak

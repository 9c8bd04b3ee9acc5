"""From compiled programs to what a user asks: what fits a chip, and how long it would take."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx

from sdjax.flops import flops
from sdjax.generate import IN_FLIGHT, build
from sdjax.planning.chips import Chip
from sdjax.planning.hlo import Cost, HloError
from sdjax.planning.record import Recorded, record
from sdjax.planning.tpu import Compiled, Compiler
from sdjax.request import Request
from sdjax.spec import Spec

_MOST = 256  # images a chip makes at once; more would gain nothing
_FIRST = 4  # that are tried


def kernel_cycles(name: str, operands: tuple[tuple[int, ...], ...], chip: Chip) -> float:
    """What a Pallas kernel takes, for which the compiler has no estimate: its products, by how busy they are kept."""
    if name != "flash_attention":
        raise HloError(f"the kernel {name} carries no estimate, and none is known here")
    (heads, queries, dim), (_, keys, _) = operands[:2]
    padded = -(-dim // chip.multiplier) * chip.multiplier
    return 4 * heads * queries * keys * padded / (chip.peak / chip.clock) / chip.busy


@dataclass(frozen=True)
class Estimate:
    """One program of a batch on one chip. Its times are made of the compiler's estimates; nothing has run."""

    recorded: Recorded
    compiled: Compiled
    chip: Chip

    @cached_property
    def cost(self) -> Cost:
        """The compiler's estimates of one call."""
        return self.compiled.program.cost(self.chip.bytes_per_cycle)

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
    def flops(self) -> int:
        """Operations of all calls of a batch, as the networks define them."""
        return self.recorded.calls * flops(self.recorded.function, *self.recorded.arguments)


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


def _bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _networks(tree: Any) -> list[nnx.Module]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Module))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Module)]


class Planner:
    """Finds what fits a chip.

    Args:
        spec, request: all images of a batch are like this one.
        compiler: for the chip.
        say: is told what is being compiled, which takes minutes.
    """

    def __init__(self, spec: Spec, request: Request, compiler: Compiler, say: Callable[[str], None]) -> None:
        self._spec, self._request, self._compiler, self._say = spec, request, compiler, say
        self._recorded: dict[int, list[Recorded]] = {}
        self._compiled: dict[tuple[int, str], tuple[Estimate, int] | None] = {}

    def plan(self, batch_size: int | None = None) -> Plan | None:
        """The plan for a batch of one chip, by default the largest that fits; None if it, or one image, does not."""
        names = [recorded.name for recorded in self._programs(1)]
        if batch_size is None:
            batch_size = self._largest(names)
        made = [self._estimate(name, batch_size) for name in names] if batch_size else [None]
        if None in made:
            return None
        programs, memory = zip(*filter(None, made), strict=True)
        return Plan(self._compiler.chip, batch_size, programs, max(memory))

    def _largest(self, names: list[str]) -> int:
        """What fits of every program; the UNet's, which takes longest to compile, is tried last."""
        most = _MOST
        for name in sorted(names, key=lambda name: name == "advance"):
            good, bad, tried = 0, most + 1, min(_FIRST if most == _MOST else most, most)
            while good < tried < bad:
                found = self._estimate(name, tried)
                if found is None:
                    bad = tried
                    tried = max(1, tried // 2) if good == 0 else tried - max(1, tried // 16)
                else:
                    good = tried
                    tried = min(self._guess(tried, found[1]), bad - 1)
            most = good
        return most

    def _guess(self, batch_size: int, memory: int) -> int:
        """The largest batch that would fit if what a batch adds to the parameters grew in proportion to it."""
        fixed = self._parameters
        return int(batch_size * (self._compiler.chip.memory - fixed) / (memory - fixed))

    def _programs(self, batch_size: int) -> list[Recorded]:
        if batch_size not in self._recorded:
            self._recorded[batch_size] = record(self._spec, self._request, batch_size)
        return self._recorded[batch_size]

    @cached_property
    def _parameters(self) -> int:
        return _bytes(build(self._spec))

    def _estimate(self, name: str, batch_size: int) -> tuple[Estimate, int] | None:
        """A program and the bytes on the chip while it runs; None if they are too many."""
        key = batch_size, name
        if key not in self._compiled:
            self._say(f"compiling {name} for {batch_size} images on a {self._compiler.chip.name}")
            programs = self._programs(batch_size)
            recorded = next(program for program in programs if program.name == name)
            compiled, found = self._compiler.compile(recorded), None
            if compiled is not None:
                # The other networks stay on the chip, and so does what other batches in flight have been given.
                others = self._parameters - _bytes(_networks(recorded.arguments))
                waiting = (IN_FLIGHT - 1) * sum(_bytes(program.result) for program in programs)
                memory = compiled.memory.total + others + waiting
                if memory <= self._compiler.chip.memory:
                    found = Estimate(recorded, compiled, self._compiler.chip), memory
            self._compiled[key] = found
        return self._compiled[key]

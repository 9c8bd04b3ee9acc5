"""The largest batch that fits a device, by compiling the programs and reading how much memory they take."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
from flax import nnx

from sdjax.generate import IN_FLIGHT
from sdjax.models import tiling
from sdjax.networks import build
from sdjax.parallel import Device, Devices
from sdjax.planning.compiled import Compiled, Target
from sdjax.planning.record import Recorded, record
from sdjax.programs import Flat
from sdjax.request import Request
from sdjax.spec import Spec

_MOST = 256  # images a device makes at once; more would gain nothing
_FIRST = 4  # that are tried


def local(device: Device) -> Target:
    """A device of this machine.

    Raises:
        ValueError: it does not say how much memory it has, as CPUs do not.
    """
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if memory is None:
        raise ValueError(f"{device.device_kind} does not say how much memory it has; give the batch size as a number")
    return Target(device.device_kind, memory, device)


class Placed(NamedTuple):
    """A program that fits, and the bytes on the device while it runs."""

    recorded: Recorded
    compiled: Compiled
    memory: int


@dataclass(frozen=True)
class Fitted:
    """A batch of one device, and its programs."""

    batch_size: int
    programs: tuple[Placed, ...]

    @property
    def memory(self) -> int:
        """Bytes on the device while the greediest program runs."""
        return max(program.memory for program in self.programs)

    @property
    def flops(self) -> float:
        """Operations that the networks are defined by."""
        return sum(program.recorded.flops for program in self.programs)


class Fit:
    """What fits a device.

    Args:
        spec, request: all images of a batch are like this one.
        target: the device.
        say: is told what is being compiled, which takes minutes.
    """

    def __init__(self, spec: Spec, request: Request, target: Target, say: Callable[[str], None]) -> None:
        self._spec, self._request, self._target, self._say = spec, request, target, say
        self._recorded: dict[int, list[Recorded]] = {}
        self._placed: dict[tuple[int, str, bool], Placed | None] = {}
        self.names = [recorded.name for recorded in self._programs(1)]

    def fitted(self, batch_size: int | None) -> Fitted | None:
        """A batch, by default the largest that fits; None if it, or one image, does not."""
        batch_size = self.largest() if batch_size is None else batch_size
        if not batch_size or not self._greatest(batch_size, draft=False):
            return None
        placed = (self.place(name, batch_size) for name in self.names)
        return Fitted(batch_size, tuple(found for found in placed if found is not None))

    def largest(self, most: int | None = None) -> int:
        """What fits of every program, 0 if not one image does: found with drafts, then settled by the programs.

        most: more than that is not asked for, and it is tried first.
        """
        bad = (most or _MOST) + 1
        return self._search(max(1, self._search(most or _FIRST, bad, draft=True)), bad, draft=False)

    def _search(self, tried: int, bad: int, draft: bool) -> int:
        """From `tried` down to what fits, then up by what memory is left; a sixteenth is not worth a compilation.

        bad: what is too many.
        """
        good = 0
        while good + good // 16 < tried < bad:
            if memory := self._greatest(tried, draft):
                good, tried = tried, min(self._guess(tried, memory), bad - 1)
            else:
                bad, tried = tried, tried - max(1, tried // 16) if good else tried // 2
        return good

    def _greatest(self, batch_size: int, draft: bool) -> int:
        """Bytes on the device while the greediest program runs, 0 if one does not fit; the slowest compiles last."""
        greatest = 0
        for name in sorted(self.names, key=lambda name: name.startswith("advance")):
            placed = self.place(name, batch_size, draft)
            if placed is None:
                return 0
            greatest = max(greatest, placed.memory)
        return greatest

    def _guess(self, batch_size: int, memory: int) -> int:
        """The largest batch if what one adds to the parameters grows in proportion to it."""
        return int(batch_size * (self._target.memory - self._parameters) / (memory - self._parameters))

    def place(self, name: str, batch_size: int, draft: bool = False) -> Placed | None:
        """A program for a batch, or its draft; None if it and all that stays on the device beside it do not fit."""
        key = batch_size, name, draft
        if key not in self._placed:
            images = f"{batch_size} image{'s' * (batch_size > 1)}"
            self._say(f"{'drafting' if draft else 'compiling'} {name} for {images} on {self._target.name}")
            programs = self._programs(batch_size)
            recorded = next(program for program in programs if program.name == name)
            compiled = self._target.compile(recorded, draft)
            self._placed[key] = None
            if compiled is not None:
                # The other networks stay, and so does what the other batches in flight have been given.
                others = self._parameters - _bytes(_networks(recorded.arguments))
                waiting = (IN_FLIGHT - 1) * sum(_bytes(program.result) for program in programs)
                memory = compiled.memory.total + others + waiting
                if memory <= self._target.memory:
                    self._placed[key] = Placed(recorded, compiled, memory)
        return self._placed[key]

    def _programs(self, batch_size: int) -> list[Recorded]:
        if batch_size not in self._recorded:
            self._recorded[batch_size] = record(self._spec, self._request, batch_size)
        return self._recorded[batch_size]

    @cached_property
    def _parameters(self) -> int:
        return _bytes(build(self._spec))


def largest_here(spec: Spec, requests: Sequence[Request], say: Callable[[str], None]) -> int:
    """The most images that this machine's devices can each make at once, of whichever of the requests.

    Raises:
        ValueError: not one of a request fits, or the devices do not say how much memory they have.
    """
    target, found = local(Devices().devices[0]), None
    for request in _greediest(spec, requests):
        found = Fit(spec, request, target, say).largest(found)
        if not found:
            size = f"{request.width}x{request.height}"
            raise ValueError(f"{spec.name} at {size} does not fit the memory of a device, even alone")
    assert found is not None, "there are requests"
    return found


def _greediest(spec: Spec, requests: Sequence[Request]) -> list[Request]:
    """Requests beside which none asks for at least as much of everything that takes memory; of equals one."""
    asked: dict[tuple[float, ...], Request] = {}
    for request in requests:
        program = spec.program(request)
        first, final = program.width * program.height, program.final_width * program.final_height
        ratio, strips = program.token_merging_ratio, [pixels > tiling.TILED for pixels in (first, final)]
        grows = final, first, program.prompts, program.chunks, program.variants, *(program.refiner or (0, 0, 0))
        either_way = [sign * value for value in (ratio, *strips) for sign in (1, -1)]
        asked.setdefault((*grows, program.reuses, request.image is not None, *either_way), request)
    return [
        asked[key]
        for key in sorted(asked, reverse=True)
        if not any(key != other and all(map(operator.le, key, other)) for other in asked)
    ]


def _bytes(tree: Any) -> int:
    """Of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _networks(tree: Any) -> list[nnx.Module | Flat]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Module | Flat))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Module | Flat)]

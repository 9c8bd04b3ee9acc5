"""Reads a program that the TPU compiler has scheduled: the cycles it estimates, walked from the entry.

XLA's text form (https://openxla.org/xla/operation_semantics) is read as far as the walk needs: computations, their
instructions, and of those the result's shape, the opcode, the operands' names and the attributes. What is called runs
once, a loop's body as often as the constant in its condition says, and the dearest branch of a conditional, or as
often as is said of the conditional's `jax.named_scope`. Fusions are priced whole, by their own `estimated_cycles`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # of types whose names do not begin with a letter or two and the width
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(condition|body|to_apply|calls|called_computations|branch_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%([\w.\-]+))"
)
_SCOPE = re.compile(r'op_name="[^"]*?([^"/]+)/cond"')
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = 'custom_call_target="tpu_custom_call"'
_PRODUCTS = frozenset(("convolution", "dot"))


class HloError(ValueError):
    """The text is not what this reader takes for a scheduled TPU program."""


@dataclass(frozen=True)
class Instruction:
    """One line: `shape` is the text of its result's type, `rest` all that follows the operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    rest: str

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations that it calls, by attribute."""
        return {key: _OPERAND.findall(several or f"%{one}") for key, several, one in _CALLED.findall(self.rest)}

    @property
    def callees(self) -> list[str]:
        """All of them."""
        return [name for names in self.called.values() for name in names]

    @property
    def scope(self) -> str:
        """The `jax.named_scope` that a conditional is in; empty where it says none."""
        found = _SCOPE.search(self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it gives none."""
        found = _ESTIMATE.search(self.rest)
        return int(found[1]) if found else None


def nbytes(shape: str) -> int:
    """Bytes of a type's arrays."""
    total = 0
    for kind, sides in _SHAPE.findall(shape):
        bits = _BITS[kind] if kind in _BITS else int(re.sub(r"^[a-z]+|[a-z].*$", "", kind))
        total += bits * math.prod(int(side) for side in sides.split(",") if side) // 8
    return total


def _sides(shape: str) -> tuple[int, ...]:
    """Of an array's type."""
    found = _SHAPE.search(shape)
    return tuple(int(side) for side in found[2].split(",") if side) if found else ()


def _balanced(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i + 1
    raise HloError(f"no closing bracket: {text[start : start + 80]}")


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    begin = head.end()
    end = _balanced(line, begin) if line[begin] == "(" else line.index(" ", begin)
    shape, opened = line[begin:end], line.index("(", end)
    closed = _balanced(line, opened)
    arguments = line[opened + 1 : closed - 1]
    return Instruction(
        head[1], shape, line[end:opened].strip(), tuple(_OPERAND.findall(arguments)), arguments, line[closed:]
    )


@dataclass
class Cost:
    """What a walk adds up, each as often as it runs.

    cycles: the compiler's estimates, by kind: `product` (fusions with a product or convolution in them) and `other`.
    capped: the same, where what moves data and multiplies nothing counts no more than its bytes take.
    kernels: Pallas calls, which carry no estimate, by name and the sides of their operands.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    capped: Counter[str] = field(default_factory=Counter)
    kernels: Counter[tuple[str, tuple[tuple[int, ...], ...]]] = field(default_factory=Counter)

    def add(self, other: "Cost", times: float = 1) -> None:
        for name in ("cycles", "capped", "kernels"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, count in theirs.items():
                mine[key] += times * count


class Program:
    """A scheduled program.

    Args:
        text: `compiled.as_text()`.

    Raises:
        HloError: it has no entry computation.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and (head := _COMPUTATION.match(line)):
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith(" ") and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if not self.entry:
            raise HloError("no ENTRY computation in what should be a compiled program")

    def cost(self, bytes_per_cycle: float, taken: Mapping[str, float] | None = None) -> Cost:
        """What a run takes, of the compiler's estimates.

        bytes_per_cycle: main memory's bandwidth.
        taken: how often a conditional takes its dearest branch, 0 to 1, by its scope; else always.
        """
        return self._walk(self.entry, bytes_per_cycle, taken or {}, {})

    @cached_property
    def _multiplying(self) -> set[str]:
        """Computations that hold a product or a convolution, themselves or in what they call."""
        found: set[str] = set()
        while more := {
            name
            for name, body in self.computations.items()
            if name not in found and any(i.opcode in _PRODUCTS or found.intersection(i.callees) for i in body.values())
        }:
            found |= more
        return found

    def _walk(self, name: str, bandwidth: float, taken: Mapping[str, float], known: dict[str, Cost]) -> Cost:
        if name in known:
            return known[name]
        body, total = self.computations[name], Cost()
        for instruction in body.values():
            if instruction.opcode == "while":
                trips = self.trips(instruction.called["condition"][0])
                for inner in instruction.callees:
                    total.add(self._walk(inner, bandwidth, taken, known), trips)
            elif instruction.opcode == "conditional":
                branches = [self._walk(branch, bandwidth, taken, known) for branch in instruction.callees]
                branches.sort(key=lambda cost: (cost.cycles.total(), len(cost.kernels)))
                share = taken.get(instruction.scope, 1)
                total.add(branches[-1], share)
                total.add(branches[0], 1 - share)
            elif _KERNEL in instruction.rest:
                sides = tuple(_sides(body[name].shape) for name in instruction.operands)
                total.kernels[re.sub(r"\.\d+$", "", instruction.name), sides] += 1
            elif (cycles := instruction.cycles) is not None:
                self._price(instruction, cycles, body, bandwidth, total)
            elif instruction.opcode in ("call", "async-start"):
                for inner in instruction.callees:
                    total.add(self._walk(inner, bandwidth, taken, known))
        known[name] = total
        return total

    def _price(
        self, instruction: Instruction, cycles: int, body: dict[str, Instruction], bandwidth: float, total: Cost
    ) -> None:
        product = instruction.opcode in _PRODUCTS or not self._multiplying.isdisjoint(instruction.callees)
        kind = "product" if product else "other"
        total.cycles[kind] += cycles
        if not product:
            shapes = [instruction.shape, *(body[name].shape for name in instruction.operands if name in body)]
            cycles = min(cycles, math.ceil(sum(map(nbytes, shapes)) / bandwidth))
        total.capped[kind] += cycles

    def trips(self, condition: str) -> int:
        """How often a loop runs whose counter starts from 0, from the bound that its condition compares with.

        Raises:
            HloError: the condition has not one integer constant.
        """
        constants = [
            int(instruction.arguments)
            for instruction in self._all(condition)
            if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
        ]
        if len(constants) != 1:
            raise HloError(f"the loop condition {condition} has {len(constants)} integer constants; one says its bound")
        return constants[0]

    def _all(self, computation: str) -> list[Instruction]:
        body = list(self.computations[computation].values())
        return body + [i for outer in body for name in outer.callees for i in self._all(name)]

"""What `generate` would run for a request, recorded rather than run: no weights, no devices."""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from sdjax import programs
from sdjax.flops import flops
from sdjax.generate import StableDiffusion
from sdjax.networks import build
from sdjax.parallel import Devices, filled
from sdjax.request import Request
from sdjax.sampling import scan
from sdjax.spec import Spec


@dataclasses.dataclass
class Recorded:
    """A program as one device runs it.

    name: of the function in `sdjax.programs`, and which of its programs this is where there are several.
    function, arguments: what to compile; leaves are `jax.ShapeDtypeStruct`s.
    donated: places of the arguments whose buffers it may reuse, or the one.
    result: shapes of what it returns.
    calls: how often a batch runs it.
    asked, deep: of `advance`, which prompts the network is called with, and makes deep features for, over all calls.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int | tuple[int, ...]
    result: Any
    calls: int
    asked: Bool[np.ndarray, "rows prompts"] | None = None
    deep: Bool[np.ndarray, "rows prompts"] | None = None

    @cached_property
    def flops(self) -> float:
        """Operations of all calls of a batch, as the networks define them."""
        return self.calls * flops(self.function, *self.arguments, taken=self.taken)

    @property
    def taken(self) -> dict[str, float]:
        """How often the program's conditionals take their dearest branch in the mean of the calls, by their scopes."""
        if self.asked is None or self.deep is None:
            return {}
        return {scan.ASKED: self.asked.mean(), programs.DEEP: self.deep.sum() / self.asked.sum()}

    def count(self, rows: programs.Rows) -> None:
        """Note what a call's rows ask for."""
        rows = jax.tree.map(np.asarray, rows)
        asked = np.any((rows.weights != 0) & rows.tables.active[..., None], axis=(0, 1))
        deep = asked if rows.fresh is None else np.any(rows.fresh, axis=(0, 1))
        self.asked = asked if self.asked is None else np.concatenate([self.asked, asked])
        self.deep = deep if self.deep is None else np.concatenate([self.deep, deep])


class Recorder(Devices):
    """Stands in for the devices while `launch` is traced: one of them, and programs that are noted down."""

    def __init__(self) -> None:
        self.programs: dict[Any, Recorded] = {}

    def __len__(self) -> int:
        return 1

    def split(self, tree: Any, each: int = 0) -> Any:
        def first(leaf: Any) -> Any:
            if isinstance(leaf, np.ndarray):
                with jax.ensure_compile_time_eval():  # its values are there for `Recorded.count`
                    return jnp.asarray(filled(leaf, each)[None])
            return jnp.asarray(leaf)[None]

        return jax.tree.map(first, tree)

    def pmap(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        name, donated = getattr(function, "func", function).__name__, options.get("donate_argnums", ())
        program = jax.jit(function)

        def call(*arguments: Any) -> Any:
            first = jax.tree.map(lambda leaf: leaf[0], arguments)
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)
            key = function, tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
            if key not in self.programs:
                count = 1 + sum(other.name.split()[0] == name for other in self.programs.values())
                numbered = name if count == 1 else f"{name} {count}"
                self.programs[key] = Recorded(numbered, program, shapes, donated, jax.eval_shape(program, *shapes), 0)
            recorded = self.programs[key]
            recorded.calls += 1
            for rows in (argument for argument in arguments if isinstance(argument, programs.Rows)):
                recorded.count(rows)
            return self.split(program(*first))

        return call


def record(spec: Spec, request: Request, batch_size: int) -> list[Recorded]:
    """The programs that a device runs for a batch of `batch_size` images like `request`, in their order.

    Raises:
        RequestError: the checkpoint cannot make it.
    """
    recorder, resolved = Recorder(), spec.resolve(request)

    def launch(networks: dict[str, Any]) -> None:
        StableDiffusion(spec, recorder.split(networks), batch_size, recorder).launch([resolved])

    jax.eval_shape(launch, build(spec))
    return list(recorder.programs.values())

"""What `generate` would run for a request, recorded rather than run: no weights, no devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.generate import StableDiffusion
from sdjax.networks import build
from sdjax.parallel import Devices
from sdjax.request import Request
from sdjax.spec import Spec


@dataclasses.dataclass
class Recorded:
    """A program as one device runs it.

    name: of the function in `sdjax.programs`.
    function, arguments: what to compile; leaves are `jax.ShapeDtypeStruct`s.
    donated: places of the arguments whose buffers it may reuse.
    result: shapes of what it returns.
    calls: how often a batch runs it.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    result: Any
    calls: int


class Recorder(Devices):
    """Stands in for the devices while `launch` is traced: one of them, and programs that are noted down."""

    def __init__(self) -> None:
        self.programs: dict[Any, Recorded] = {}

    def __len__(self) -> int:
        return 1

    def split(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)

    def pmap(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        donated, static = (
            (places,) if isinstance(places, int) else tuple(places)
            for places in (options.get(name, ()) for name in ("donate_argnums", "static_broadcasted_argnums"))
        )

        def call(*arguments: Any) -> Any:
            traced = tuple(value for i, value in enumerate(arguments) if i not in static)
            traced = jax.tree.map(lambda leaf: leaf[0], traced)
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced)
            fixed = {i: arguments[i] for i in static}
            key = function, tuple(fixed.values()), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes))
            if key not in self.programs:
                program = _program(function, fixed)
                self.programs[key] = Recorded(
                    program.__name__, program, shapes, donated, jax.eval_shape(program, *shapes), 0
                )
            self.programs[key].calls += 1
            return self.split(self.programs[key].function(*traced))

        return call


def _program(function: Callable[..., Any], fixed: Mapping[int, Any]) -> Callable[..., Any]:
    """`function` of the arguments that are traced."""

    @jax.jit
    @functools.wraps(function.func if isinstance(function, functools.partial) else function)
    def program(*traced: Any) -> Any:
        rest = iter(traced)
        return function(*(fixed[i] if i in fixed else next(rest) for i in range(len(traced) + len(fixed))))

    return program


def record(spec: Spec, request: Request, batch_size: int) -> list[Recorded]:
    """The programs that a device runs for a batch of `batch_size` images like `request`, in their order.

    Raises:
        RequestError: the checkpoint cannot make it.
    """
    recorder, batch = Recorder(), [spec.resolve(request)] * batch_size

    def launch(networks: dict[str, Any]) -> None:
        StableDiffusion(spec, recorder.split(networks), batch_size, recorder).launch(batch)

    jax.eval_shape(launch, build(spec))
    return list(recorder.programs.values())

"""The operations that a function needs: products and convolutions, which are all but a percent of a network's."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


def flops(function: Callable[..., Any], *arguments: Any, taken: Mapping[str, float] | None = None) -> float:
    """Multiplications and additions of a call, counted before a compiler sees it.

    Loops of known length count each time round, and a conditional its dearest branch, so the count is the same on every
    platform. Pallas kernels count nothing: the attention that has one has a branch without, whose last chunk is padded.

    Args:
        function: anything that `jax.jit` takes.
        arguments: arrays, or `jax.ShapeDtypeStruct`s.
        taken: how often a conditional takes its dearest branch, 0 to 1, by its `jax.named_scope`; else always.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr, taken or {})


def _of(jaxpr: Any, taken: Mapping[str, float]) -> float:
    return sum(_of_equation(equation, taken) for equation in jaxpr.eqns)


def _of_equation(equation: Any, taken: Mapping[str, float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        sides = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(sides[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out_features = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2 * equation.outvars[0].aval.size * (kernel.size // kernel.shape[out_features])
    if name == "pallas_call":
        return 0
    inner = [_of(jaxpr, taken) for jaxpr in _inside(params)]
    if name == "cond":
        share = taken.get(str(equation.source_info.name_stack).rpartition("/")[2], 1)
        return share * max(inner) + (1 - share) * min(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr

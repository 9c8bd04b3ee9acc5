"""The integrals that multistep methods are made of."""

import math
from collections.abc import Sequence


def exponential_integrals(nodes: Sequence[float], rate: float, start: float, end: float) -> list[float]:
    """For each node the integral over [start, end] of its Lagrange polynomial times exp(rate * (u - end)).

    The polynomial is 1 at the node and 0 at the others. rate 0 gives Adams-Bashforth weights over uneven steps.
    """
    weights = []
    for i, node in enumerate(nodes):
        basis = [1.0]  # coefficients, the constant first, of v = u - end: so nothing large cancels
        for j, other in enumerate(nodes):
            if j != i:
                shifted = [0.0, *basis]
                scaled = [*(c * (end - other) for c in basis), 0.0]
                basis = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        if rate == 0:
            whole = [0.0, *(c / (k + 1) for k, c in enumerate(basis))]
        else:  # q with q' + rate * q = basis, from the highest power down
            whole = [0.0] * len(basis)
            for k in reversed(range(len(basis))):
                above = (k + 1) * whole[k + 1] if k + 1 < len(basis) else 0.0
                whole[k] = (basis[k] - above) / rate
        width = start - end
        at_start = sum(c * width**k for k, c in enumerate(whole))
        weights.append(whole[0] - math.exp(rate * width) * at_start)
    return weights

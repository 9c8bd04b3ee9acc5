"""Samplers as tables of coefficients, and the one scan that runs any of them. Knows no networks and no files."""

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.schedule import Schedule
from sdjax.sampling.solvers import SAMPLERS, canonical, default_sampler, default_sigmas, is_distilled, make_table
from sdjax.sampling.table import Table, Tables, stack

__all__ = [
    "SAMPLERS",
    "SamplingError",
    "Schedule",
    "Table",
    "Tables",
    "canonical",
    "default_sampler",
    "default_sigmas",
    "is_distilled",
    "make_table",
    "stack",
]

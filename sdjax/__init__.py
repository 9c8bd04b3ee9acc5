"""Stable Diffusion in JAX/Flax: `StableDiffusion` makes the images that `Request`s ask for."""

import importlib
from typing import TYPE_CHECKING, Any

from sdjax.request import Request
from sdjax.values import RequestError

if TYPE_CHECKING:
    from sdjax.generate import Result, StableDiffusion
    from sdjax.spec import Spec

__all__ = ["Request", "RequestError", "Result", "Spec", "StableDiffusion", "__version__"]
__version__ = "0.1.0"
_LATE = {"Result": "sdjax.generate", "Spec": "sdjax.spec", "StableDiffusion": "sdjax.generate"}

if not TYPE_CHECKING:  # to which any name would be one of the module's

    def __getattr__(name: str) -> Any:
        # A request can be read and checked without waiting for JAX to be imported.
        if name in _LATE:
            return getattr(importlib.import_module(_LATE[name]), name)
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")

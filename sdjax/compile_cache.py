"""Compiled programs kept on disk, so that only the first start on a machine compiles them."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_LEAST_SECONDS = 0.5  # of compiling, for a program to be kept


def use_default() -> None:
    """Keep programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR or jax.config name a place already."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        use(caches / "sdjax" / "compiled", least_seconds=_LEAST_SECONDS)


def use(folder: str | os.PathLike[str], *, least_seconds: float = 0.0) -> None:
    """Keep programs that took at least `least_seconds` to compile in a folder, which is made, or a bucket (gs://...).

    JAX keys them by program, versions and device. A folder that cannot be written costs a warning, no more.
    """
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()

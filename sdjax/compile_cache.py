"""Compiled programs kept on disk, so that only the first start on a machine compiles them."""

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from sdjax.files import user_cache


def use(folder: str | os.PathLike[str] | None = None, *, least_seconds: float = 0.5) -> None:
    """Keep programs that took at least `least_seconds` to compile in a folder, which is made, or a bucket (gs://...).

    None stands for the user's cache folder, unless JAX_COMPILATION_CACHE_DIR or jax.config name a place already.
    JAX keys programs by their text, versions and device. A place that cannot be written costs a warning, no more. XLA's
    own caches beside them, of what it timed on a GPU, know folders only: none are kept in a bucket.
    """
    if folder is None and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = user_cache("compiled")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    if "://" in str(jax.config.jax_compilation_cache_dir):  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    compilation_cache.reset_cache()

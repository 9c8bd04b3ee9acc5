"""Compiled programs are kept where the user has caches, unless a place is named already."""

import jax
import pytest

from sdjax import compile_cache

pytestmark = pytest.mark.usefixtures("own_compile_cache")


def test_a_place_that_is_named_stays(tmp_path):
    compile_cache.use(tmp_path / "mine")
    compile_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_else_programs_go_to_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sdjax" / "compiled")


def test_programs_are_kept(tmp_path):
    compile_cache.use(tmp_path / "kept", least_seconds=0)
    jax.jit(lambda x: x * 3 + 41)(2.0).block_until_ready()
    assert list((tmp_path / "kept").iterdir())


def test_xlas_own_caches_are_not_kept_in_a_bucket():
    """On a GPU it would write them itself, and it knows no gs://."""
    assert jax.config.jax_persistent_cache_enable_xla_caches != "none"
    compile_cache.use("gs://bucket/compiled")
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


def test_nor_in_a_bucket_that_the_environment_names():
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    compile_cache.use()
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"

"""Each way to compute attention gives torch's result."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.experimental import pallas

from sdjax.models import attention as attention_room
from sdjax.models.attention import attention, chunked_attention, flash_attention, wants_more_heads
from sdjax.models.layers import Attention


def qkv(batch, queries, keys, heads, dim, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((batch, n, heads, dim), np.float32)) for n in (queries, keys, keys)]


def torch_attention(q, k, v, causal=False):
    q, k, v = (torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (77, 77), (512, 77), (513, 77), (600, 600), (1024, 300), (1500, 7)]
)
def test_attention_is_torch_attention(queries, keys):
    arrays = qkv(2, queries, keys, 3, 8)
    np.testing.assert_allclose(jax.jit(attention)(*arrays), torch_attention(*arrays), atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "chunk"), [(5, 3, 1), (34, 9, 17), (35, 1, 17), (16, 40, 17)])
def test_chunks_change_nothing(monkeypatch, queries, keys, chunk):
    for name, value in {"FEW": 0, "QUERY_CHUNK": chunk, "CHUNK_SCORES": 1}.items():
        monkeypatch.setattr(attention_room, name, value)
    arrays = qkv(2, queries, keys, 2, 4)
    np.testing.assert_allclose(attention(*arrays), torch_attention(*arrays), atol=1e-5)


def test_causal_attention():
    arrays = qkv(2, 77, 77, 2, 8)
    out = jax.jit(lambda *a: attention(*a, causal=True))(*arrays)
    np.testing.assert_allclose(out, torch_attention(*arrays, causal=True), atol=1e-5)


def test_large_scores_stay_finite():
    q, k, v = (100 * x for x in qkv(1, 600, 64, 1, 8))
    np.testing.assert_allclose(attention(q, k, v), torch_attention(q, k, v), rtol=1e-3, atol=1e-2)


def test_gradients_of_chunks_and_their_memory():
    arrays = qkv(1, 2048, 2048, 2, 8)

    def loss(q, k, v):
        return jnp.square(attention(q, k, v)).sum()

    tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in arrays]
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))
    out.square().sum().backward()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
    for ours, theirs in zip(compiled(*arrays), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-4)
    all_scores = 2 * 2048 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores


@pytest.mark.parametrize(("queries", "causal", "dtype"), [(700, False, jnp.bfloat16), (77, True, jnp.float16)])
def test_on_a_gpu_half_precision_goes_to_cudnn(monkeypatch, queries, causal, dtype):
    """The choice and the arguments only: cuDNN itself is played by XLA here."""
    asked = []
    original = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **kwargs):
        asked.append(implementation)
        return original(*args, implementation="xla", **kwargs)

    def on_a_gpu(*args, default, cuda=None, **_):
        return (cuda or default)(*args)

    monkeypatch.setattr(attention_room, "_has_cudnn", lambda: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    arrays = qkv(1, queries, 77, 2, 40)
    out = attention(*(x.astype(dtype) for x in arrays), causal=causal)
    assert asked == ["cudnn"]
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), torch_attention(*arrays, causal=causal), atol=0.05)
    # The gradient of an odd number of tokens, which JAX refuses to ask cuDNN for.
    tensors = [torch.from_numpy(np.array(x)).requires_grad_() for x in arrays]
    heads_first = (x.transpose(1, 2) for x in tensors)
    torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal).sum().backward()
    gradients = jax.grad(lambda *qkv: attention(*qkv, causal=causal).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    for ours, theirs in zip(gradients(*(x.astype(dtype) for x in arrays)), tensors, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs.grad, rtol=0.02, atol=0.05)
    assert asked == ["cudnn"]
    attention(*arrays)  # float32, which cuDNN's flash attention does not take
    attention(*(x.astype(dtype) for x in qkv(1, 8, 8, 1, 512)))  # nor the VAE's one large head
    assert asked == ["cudnn"]


@pytest.mark.parametrize(("capability", "found"), [("7.5", False), ("8.0", True), ("9.0", True), ("10.0", True)])
def test_older_gpus_do_not_ask_cudnn(monkeypatch, capability, found):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(attention_room, "_has_cuda", lambda: True)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation: original(*args))
    assert attention_room._has_cudnn.__wrapped__() is found


def test_cudnn_that_is_not_there_is_not_asked(monkeypatch):
    def no_library(*args, implementation):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(attention_room, "_has_cuda", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", no_library)
    assert attention_room._has_cudnn.__wrapped__() is False


@pytest.mark.parametrize("heads_at_once", [0, 1, 4, 100])
def test_scores_of_many_heads_at_once_are_the_same_attention(heads_at_once):
    arrays = qkv(2, 1500, 1300, 3, 24)
    most = heads_at_once * 750 * 1300  # in two chunks
    np.testing.assert_allclose(chunked_attention(*arrays, most_scores=most), torch_attention(*arrays), atol=1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run by XLA on the CPU, in small tiles."""
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    monkeypatch.setattr(attention_room, "QUERY_TILE", 128)
    monkeypatch.setattr(attention_room, "KEY_TILE", 256)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "dim"), [(256, 256, 2, 64), (300, 700, 3, 40), (130, 277, 2, 160), (70, 130, 5, 32)]
)
def test_the_kernel_for_tpus_is_the_same_attention(interpreted, queries, keys, heads, dim):
    """Several tiles each way, lengths that fill none, and heads that share the lanes or do not."""
    arrays = qkv(2, queries, keys, heads, dim)
    expected = torch_attention(*arrays)
    np.testing.assert_allclose(flash_attention(*arrays), expected, atol=1e-5)
    half = flash_attention(*(x.astype(jnp.bfloat16) for x in arrays))
    np.testing.assert_allclose(half.astype(np.float32), expected, atol=0.02)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(3, 40), (5, 64), (2, 80)])
def test_more_heads_are_the_same_attention(interpreted, bias, heads, dim):
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    layer = Attention(heads * dim, heads * dim, heads, bias=bias, **half)
    if bias:
        layer.to_q.bias[...] = jnp.linspace(-1, 1, heads * dim)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 300, heads * dim), np.float32))
    plain, wide = (np.asarray(way(x, x), np.float32) for way in (layer._as_they_are, layer._with_more_heads))
    np.testing.assert_allclose(wide, plain, atol=0.02)

    assert wants_more_heads(600, 600, jnp.bfloat16, heads, dim)
    assert wants_more_heads(600, 600, "bfloat16", heads, dim)  # as a Spec names it
    assert not wants_more_heads(600, 77, jnp.bfloat16, heads, dim)
    assert not wants_more_heads(600, 600, jnp.bfloat16, 10, 64)


def test_the_kernel_keeps_large_scores_finite(interpreted):
    q, k, v = (30 * x for x in qkv(1, 64, 300, 1, 8))
    np.testing.assert_allclose(flash_attention(q, k, v), torch_attention(q, k, v), rtol=1e-3, atol=1e-2)


def test_gradients_through_the_kernel(interpreted):
    q, k, v = qkv(1, 130, 70, 1, 8)

    def gradients(function):
        return jax.grad(lambda *args: jnp.square(function(*args)).sum(), argnums=(0, 1, 2))(q, k, v)

    for ours, theirs in zip(gradients(flash_attention), gradients(chunked_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_platform_that_a_program_is_for_chooses():
    """Lowered for a TPU on a machine without one: the kernel for large bfloat16 images, XLA for the rest."""

    def kernels(queries, dim, dtype, keys=600, **options):
        arrays = [jax.ShapeDtypeStruct((1, n, 1, dim), dtype) for n in (queries, keys, keys)]
        exported = jax.export.export(jax.jit(lambda *a: attention(*a, **options)), platforms=["tpu"])(*arrays)
        return exported.mlir_module().count("tpu_custom_call")

    assert kernels(600, 40, jnp.bfloat16) == 1
    assert kernels(600, 40, jnp.float32) == 0
    assert kernels(600, 512, jnp.bfloat16) == 0  # the VAE's one large head
    assert kernels(600, 40, jnp.bfloat16, keys=77) == 0  # a prompt
    assert kernels(512, 40, jnp.bfloat16) == 0
    assert kernels(600, 40, jnp.bfloat16, causal=True) == 0

"""The local devices: parameters copied to each once, batches split over them by `jax.pmap`."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable

COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    # XLA's usual schedule begins with all that can be made of the parameters alone, and keeps it until it is used.
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    # Products of one input are made by themselves: of those that XLA joins, each part is copied for cuDNN.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
}
"""What XLA is told, by the devices' platform."""


def _local() -> list[Device]:
    try:
        return jax.local_devices()
    except (AssertionError, RuntimeError) as error:  # the former, where it finds no GPU, says nothing
        why = " ".join(str(error).split()) or "there is none"
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        raise ValueError(f"JAX finds no device with {asked}: {why}") from None


def filled(array: np.ndarray, count: int) -> np.ndarray:
    """`array` with copies of its last row up to `count` rows."""
    missing = count - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array


class Devices:
    """The devices of this host that share a batch.

    A worker is one host, so there is no mesh to manage: every array has a leading device axis.

    Args:
        devices: which to use; None takes all local devices.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, devices: Sequence[Device] | None = None) -> None:
        self.devices = list(_local() if devices is None else devices)
        if not self.devices:
            raise ValueError("devices is empty; give some, or None for all")
        # Programs compiled before there was anything to run them on: the shapes of what each returns, and itself.
        self._ahead: dict[Any, tuple[Any, Future[Any]]] = {}
        self._compilers = ThreadPoolExecutor(thread_name_prefix="compiler")
        self._sharding = NamedSharding(Mesh(np.array(self.devices), ("device",)), PartitionSpec("device"))

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return self.devices[0].platform

    def replicate(self, array: np.ndarray) -> jax.Array:
        """A copy of `array` on every device, as one array with a leading device axis."""
        copies = [jax.device_put(array[None], device) for device in self.devices]
        return jax.make_array_from_single_device_arrays((len(self), *array.shape), self._sharding, copies)

    def split(self, tree: Any, each: int = 0) -> Any:
        """Arrays of a whole batch, `[devices * each, ...]`, as `[devices, each, ...]`, each part on its device.

        each: rows of a device; arrays of fewer are filled up with copies of their last row.
        """

        def parts(array: np.ndarray) -> jax.Array:
            array = filled(array, len(self) * each)
            return jax.device_put(array.reshape(len(self), -1, *array.shape[1:]), self._sharding)

        return jax.tree.map(parts, tree)

    def join(self, array: jax.Array) -> np.ndarray:
        """The inverse of `split`, on the host; waits for the devices."""
        return np.asarray(array).reshape(-1, *array.shape[2:])

    def pmap(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`function` of one device's part as a function of all parts.

        Called while JAX traces, it is not run but compiled, beside what is traced next, and returns tracers. A later
        call with arrays of the same shapes, at the same precision, finds the program, also by another `pmap` of the
        function here.
        """
        mapped: Any = jax.pmap(function, devices=self.devices, **options)
        is_partial = isinstance(function, functools.partial)
        own = (function.func, *function.args, *sorted(function.keywords.items())) if is_partial else (function,)
        compiled: dict[Any, Any] = {}

        def call(*arguments: Any) -> Any:
            leaves, structure = jax.tree.flatten(arguments)
            precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
            key = own, precision, structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
            is_tracing = any(isinstance(leaf, Tracer) for leaf in leaves)
            if is_tracing:
                if key not in self._ahead:
                    lowered = mapped.lower(*jax.tree.map(_shape, arguments))
                    self._ahead[key] = lowered.out_info, self._compilers.submit(self.compile, function, lowered)
                return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._ahead[key][0])
            if key in self._ahead:
                return self._ahead[key][1].result()(*arguments)
            if key not in compiled:
                compiled[key] = self.compile(function, mapped.lower(*jax.tree.map(_shape, arguments)))
            return compiled[key](*arguments)

        return call

    def wait(self) -> None:
        """Return when all that was called while JAX traced is compiled; raises why one was not, which is forgotten."""
        for key, (_, compiling) in list(self._ahead.items()):
            if compiling.exception() is not None:
                del self._ahead[key]
            compiling.result()

    def compile(self, function: Callable[..., Any], lowered: Any) -> Any:
        """The program of a mapped `function`."""
        return lowered.compile(COMPILER_OPTIONS.get(self.platform))


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

"""The local devices: parameters copied to each once, batches split over them by `jax.pmap`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Device: TypeAlias = Any  # jax.Device, which type checkers take for a variable


class Devices:
    """The devices of this host that share a batch.

    A worker is one host, so there is no mesh to manage: every array has a leading device axis.

    Args:
        devices: which to use; None takes all local devices.
    """

    def __init__(self, devices: Sequence[Device] | None = None) -> None:
        self.devices = list(devices or jax.local_devices())
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

    def split(self, tree: Any) -> Any:
        """Arrays of a whole batch, `[devices * each, ...]`, as `[devices, each, ...]`, each part on its device."""
        return jax.tree.map(lambda a: jax.device_put(a.reshape(len(self), -1, *a.shape[1:]), self._sharding), tree)

    def join(self, array: jax.Array) -> np.ndarray:
        """The inverse of `split`, on the host; waits for the devices."""
        return np.asarray(array).reshape(-1, *array.shape[2:])

    def pmap(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`function` of one device's part as a function of all parts."""
        return jax.pmap(function, devices=self.devices, **options)

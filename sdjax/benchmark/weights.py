"""Random weights for a checkpoint that has none."""

from pathlib import Path

import numpy as np
from flax import nnx

from sdjax.networks import build
from sdjax.spec import Spec
from sdjax.weights import checkpoint


def add_random(folder: Path, dtype: str) -> None:
    """Write random weights into a checkpoint folder: products keep their input's scale, so images are finite.

    No device is touched: what is measured next may want its memory.
    """
    rng = np.random.default_rng(0)
    for name, network in build(Spec(folder, dtype=dtype)).items():
        drawn = {}
        for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param)):
            if len(leaf.shape) == 1:
                value = np.full(leaf.shape, path[-1] == "scale", np.float32)
            else:
                value = rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
            drawn[path] = leaf.replace(value.astype(leaf.dtype))
        nnx.update(network, nnx.from_flat_state(drawn))
        checkpoint.write_weights(folder, name, checkpoint.tensors_of(network))

"""Sample sheets: a picture of what the averaged networks do so far."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from sdjax.generate import StableDiffusion
from sdjax.images import contact_sheet
from sdjax.models import tiling
from sdjax.request import Request
from sdjax.spec import Spec
from sdjax.training.networks import Params, bind
from sdjax.training.objective import to_unit

if TYPE_CHECKING:
    from sdjax.training.loop import Run

_EXAMPLES, _COLUMNS = 16, 8


def reconstructed(
    module: nnx.Module, params: Params, pixels: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch height width 3"]:
    """Pictures through the VAE, from -1 to 1; large ones in the memory that one takes."""
    vae = bind(module, params)
    return tiling.decode(vae, tiling.encode(vae, to_unit(pixels))[0])


class Sheet:
    """Writes sheets/<step>.png: pictures above their reconstructions, or one sample for each of `sheet_prompts`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._networks: dict = {}
        self._pipe: StableDiffusion | None = None
        self._reconstruct = jax.jit(partial(reconstructed, run.networks.modules["vae"]))

    def write(self, step: int) -> None:
        """Write the sheet of the run's state."""
        config = self._run.config
        if config.task == "unet" and not config.sheet_prompts:
            return
        sheet = self._reconstructions() if config.task == "vae" else self._samples(config.sheet_prompts)
        path = self._run.folder / "sheets" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)

    def _reconstructions(self) -> Image.Image:
        source = self._run.pictures
        originals = [source.image(index % len(source)) for index in range(_EXAMPLES)]
        output = self._reconstruct(self._run.state.ema["vae"], np.stack(originals))
        images = list(np.round((np.clip(np.asarray(output, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8))
        rows = [part[at : at + _COLUMNS] for at in range(0, _EXAMPLES, _COLUMNS) for part in (originals, images)]
        return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))

    def _samples(self, prompts: tuple[str, ...]) -> Image.Image:
        run, devices = self._run, self._run.devices
        for name, params in {**run.networks.params, **run.state.ema}.items():
            copies = jax.tree.map(lambda leaf: devices.replicate(np.asarray(leaf)), params)
            self._networks[name] = bind(run.networks.modules[name], copies)
        if self._pipe is None:  # once: what it compiles serves every sheet, as it holds this very dictionary
            folder = run.folder / "sheets" / "model"
            run.export(folder)
            each = -(-len(prompts) // len(devices))
            self._pipe = StableDiffusion(Spec(folder), self._networks, each, devices)
        results = self._pipe.generate([Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)])
        for leaf in jax.tree.leaves(self._networks):  # of which the devices hold the run's own copy too
            leaf.delete()
        return contact_sheet([result.image for result in results], prompts, columns=min(4, len(prompts)), cell=128)

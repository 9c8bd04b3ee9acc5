"""Sample sheets: a picture of what the averaged networks do so far."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from sdjax import images
from sdjax.files import write_whole
from sdjax.generate import StableDiffusion
from sdjax.models import tiling
from sdjax.request import Request
from sdjax.spec import Spec
from sdjax.training import controlnet
from sdjax.training.config import Train, TrainConfigError
from sdjax.training.lora import joined
from sdjax.training.networks import Networks, Params, bind
from sdjax.training.objective import to_unit
from sdjax.values import RequestError

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
    """Writes sheets/<step>.png: pictures above their reconstructions, or one sample for each of `sheet_prompts`.

    Those of a ControlNet, or of a UNet that edits, are made from `sheet_images`, at the training pictures' size.

    Raises:
        TrainConfigError: a prompt cannot be made.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._requests = _requests(run.config)
        self._spec = _spec(run.networks, self._requests) if self._requests else None
        self._networks: dict = {}
        self._pipe: StableDiffusion | None = None
        self._reconstruct = jax.jit(partial(reconstructed, run.networks.modules["vae"]))

    def write(self, step: int) -> None:
        """Write the sheet of the run's state."""
        sheet = self._reconstructions() if self._spec is None else self._samples(self._spec)
        path = self._run.folder / "sheets" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, images.encode(np.asarray(sheet)))

    def _reconstructions(self) -> Image.Image:
        source = self._run.pictures
        originals = [source.image(index % len(source)) for index in range(_EXAMPLES)]
        params = jax.device_put(self._run.state.average["vae"], self._run.devices.devices[0])
        output = self._reconstruct(params, np.stack(originals))
        decoded = list(np.round((np.clip(np.asarray(output, np.float32), -1, 1) + 1) * 127.5).astype(np.uint8))
        rows = [part[at : at + _COLUMNS] for at in range(0, _EXAMPLES, _COLUMNS) for part in (originals, decoded)]
        return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))

    def _samples(self, spec: Spec) -> Image.Image:
        run, devices = self._run, self._run.devices
        for name, params in joined(run.networks.params, run.state.average).items():
            dtype, [called] = run.networks.dtypes[name], spec.controlnets if name == controlnet.NAME else [name]
            copies = {key: devices.replicate(np.asarray(leaf).astype(dtype)) for key, leaf in params.items()}
            self._networks[called] = bind(run.networks.modules[name], copies)
        if self._pipe is None:  # once: what it compiles serves every sheet, as it holds this very dictionary
            each = -(-len(self._requests) // len(devices))
            self._pipe = StableDiffusion(spec, self._networks, each, devices)
        results = self._pipe.generate(self._requests)
        for leaf in jax.tree.leaves(self._networks):  # of which the devices hold the run's own copy too
            leaf.delete()
        pictures, prompts = [result.image for result in results], run.config.sheet_prompts
        return images.contact_sheet(pictures, prompts, columns=min(4, len(prompts)), cell=128)


def _requests(config: Train) -> list[Request]:
    """What the sheet's prompts ask for."""
    images = config.sheet_images or (None,) * len(config.sheet_prompts)
    size, controlled = config.data.size if config.sheet_images else None, config.task == "controlnet"
    return [
        Request(
            prompt=prompt,
            seed=seed,
            width=size,
            height=size,
            image=None if controlled else image,
            control_image=image if controlled else None,
        )
        for seed, (prompt, image) in enumerate(zip(config.sheet_prompts, images, strict=True))
    ]


def _spec(networks: Networks, requests: list[Request]) -> Spec:
    """What a checkpoint of these networks would promise, once it was found to make the requests."""
    with tempfile.TemporaryDirectory() as folder:
        networks.export(Path(folder, "model"), None)
        beside = [Path(folder, controlnet.NAME)] * (controlnet.NAME in networks.modules)
        for own in beside:
            controlnet.save(own, networks, None)
        spec = Spec(Path(folder, "model"), controlnets=beside)
        _ = spec.tokenizers, spec.fingerprint  # read before their files are gone
    try:
        for request in requests:
            spec.resolve(request)
    except RequestError as error:
        raise TrainConfigError(f"sheet_prompts: {error}") from None
    return spec

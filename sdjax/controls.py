"""ControlNets beside a checkpoint: that they fit it, and the control images that a request names."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sdjax import inputs
from sdjax.config import ControlNetConfig
from sdjax.family import check_fit, read_config
from sdjax.request import Request
from sdjax.values import OF_CONTROLS, RequestError, lines, numbers
from sdjax.weights.checkpoint import Checkpoint, CheckpointError
from sdjax.weights.single_file import open_controlnet


def read(
    sources: Sequence[str | os.PathLike[str]],
    configs: Mapping[str, Any],
    *,
    what: str,
    variant: str | None,
    allow_pickle: bool,
) -> dict[str, tuple[Checkpoint, ControlNetConfig]]:
    """The ControlNets at folders, hub ids, URLs or files, by the names that they go by among a checkpoint's networks.

    Args:
        configs: of the networks that they are to fit.
        what: what errors call the checkpoint.
        variant, allow_pickle: see `open_controlnet`.

    Raises:
        CheckpointError, ConfigError: one is not there, or does not fit; the message says both sides.
    """
    found = {}
    for i, source in enumerate(sources):
        component = open_controlnet(source, variant=variant, allow_pickle=allow_pickle)
        config = read_config(ControlNetConfig, component, "")
        _check_config(config, configs, component.source, what)
        found[f"controlnet_{i}"] = component, config
    return found


def _check_config(config: ControlNetConfig, configs: Mapping[str, Any], source: str, what: str) -> None:
    unet, vae = configs["unet"], configs["vae"]
    if config.conditioning_channels != 3:
        raise CheckpointError(
            f"{source} takes images of {config.conditioning_channels} channels; a control image has 3"
        )
    if unet.in_channels == 2 * vae.latent_channels:
        raise CheckpointError(
            f"{what} edits images by instruction, for which there are no ControlNets; leave out {source}"
        )
    blocks = ([(stage.channels, stage.layers, stage.context_dim) for stage in it.down_stages] for it in (config, unet))
    told = (it.projection_class_embeddings_input_dim or 0 for it in (config, unet))
    sides: dict[str, Any] = {
        "latent channels": (config.in_channels, vae.latent_channels),
        "pixels a latent": (config.downscale, vae.downscale),
        "down blocks (channels x layers x width of the text)": tuple(blocks),
        "numbers told of prompt and size": tuple(told),
    }
    check_fit(f"the ControlNet {source}", what, sides)


def check(request: Request, count: int) -> None:
    """Raise RequestError where a request's control images and numbers are not as many as the ControlNets."""
    images = lines(request.control_image)
    if images and count == 0:
        raise RequestError("control_image is for ControlNets, and none is loaded; give controlnets (--controlnet PATH)")
    if images and len(images) != count:
        raise RequestError(
            f"control_image lists {len(images)} images for {count} ControlNets; give one for each, several as "
            '["a.png", "b.png"]'
        )
    for name in OF_CONTROLS:
        given = getattr(request, name)
        if images and len(numbers(given) or ()) not in (1, count):
            raise RequestError(f"{name}={given} is for {count} ControlNets; give one number, or {count}")


def load(request: Request) -> tuple[list[Image.Image], str | None]:
    """A request's control images, and their SHA-256 in hex, with commas between several.

    Raises:
        RequestError: one cannot be read, or is another than the request's control_image_sha256 says.
    """
    urls = lines(request.control_image)
    given = request.control_image_sha256
    known = [None] * len(urls) if given is None else given.split(",")
    if len(known) != len(urls):
        raise RequestError(f"control_image_sha256 lists {len(known)} hashes for {len(urls)} images; give one for each")
    loaded = [inputs.load(url, "control_image", sha256=sha256) for url, sha256 in zip(urls, known, strict=True)]
    return [image for image, _ in loaded], ",".join(sha256 for _, sha256 in loaded) or None


def measured(request: Request, multiple: int) -> Request:
    """A request with its control images' hashes, and with the first one's size where nothing else says what to make."""
    loaded, sha256 = load(request)
    size = zip(("width", "height"), loaded[0].size, strict=True) if request.image is None else ()
    found = {name: side // multiple * multiple for name, side in size if getattr(request, name) is None}
    if 0 in found.values():
        raise RequestError(f"control_image has {loaded[0].width}x{loaded[0].height} pixels; a side needs {multiple}")
    return dataclasses.replace(request, control_image_sha256=sha256, **found)

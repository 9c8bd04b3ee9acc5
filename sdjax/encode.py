"""Pictures and captions to what a diffusion model is trained on, on all devices of this host.

The VAE's latents and what the text encoders say, as `sdjax.train` would compute them at each step.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float16, Int, UInt8

from sdjax.models import clip, tiling
from sdjax.models.clip import CLIPTextModel
from sdjax.models.vae import AutoencoderKL
from sdjax.networks import load
from sdjax.parallel import Device, Devices
from sdjax.spec import Spec

_IN_FLIGHT = 2  # batches that the devices have been given and the host has not fetched


class Example(NamedTuple):
    """A picture, all of a run of one size, and its caption."""

    pixels: UInt8[np.ndarray, "height width 3"]
    caption: str


class Encoded(NamedTuple):
    """What a picture and its caption become.

    moments: the latent's mean, then its log-variance; not scaled.
    text: the caption's states.
    pooled: of Stable Diffusion XL its vector too.
    finite: all of them are.
    """

    moments: Float16[np.ndarray, "h w moments"]
    text: Float16[np.ndarray, "length hidden"]
    pooled: Float16[np.ndarray, " pooled"] | None
    finite: bool


def encode_pixels(
    vae: AutoencoderKL, pixels: UInt8[Array, "batch height width 3"], *, tiled: bool | None
) -> tuple[Float16[Array, "batch h w moments"], Bool[Array, " batch"]]:
    """Mean and log-variance of latents, and which are finite in half precision."""
    found = tiling.encode(vae, pixels.astype(jnp.float32) / 127.5 - 1, tiling=tiled)
    moments = jnp.concatenate(found, axis=-1).astype(jnp.float16)
    return moments, jnp.isfinite(moments).all(axis=(1, 2, 3))


def encode_captions(
    encoders: tuple[CLIPTextModel, ...], ids: Int[Array, "batch encoders length"], *, is_xl: bool
) -> tuple[Float16[Array, "batch length hidden"], Float16[Array, "batch pooled"], Bool[Array, " batch"]]:
    """What the UNet is told of captions, and for which that is finite in half precision."""
    states, pooled = (told.astype(jnp.float16) for told in clip.read(encoders, ids, is_xl=is_xl))
    finite = jnp.isfinite(states).all(axis=(1, 2))
    return states, pooled, finite & jnp.isfinite(pooled).all(axis=1) if is_xl else finite


class Encoder:
    """A checkpoint's VAE and text encoders; the UNet is not loaded.

    Attributes:
        spec: the checkpoint's promises.
        batch_size: pictures that a device takes at once; batches are filled up, so that one program is compiled.
        devices: what they run on.
    """

    def __init__(self, spec: Spec, networks: dict[str, nnx.Module], batch_size: int, devices: Devices) -> None:
        self.spec, self.batch_size, self.devices = spec, batch_size, devices
        self._networks = networks
        self._split = partial(devices.split, each=batch_size)
        self._encode_pixels = devices.pmap(partial(encode_pixels, tiled=spec.vae_tiling))
        self._encode_captions = devices.pmap(partial(encode_captions, is_xl=spec.family.is_xl))

    @classmethod
    def from_pretrained(
        cls, spec: Spec, *, batch_size: int | None = None, devices: Sequence[Device] | None = None
    ) -> "Encoder":
        """Load the networks onto the devices.

        Args:
            spec: of the checkpoint; its dtype is what they compute in.
            batch_size: pictures that a device takes at once; default 1 on CPU, 8 elsewhere.
            devices: default all local devices.

        Raises:
            CheckpointError: a network cannot be read, or is of a family that `sdjax.train` cannot train.
        """
        spec.family.check_trainable(spec.name)
        on = Devices(devices)
        if batch_size is None:
            batch_size = 1 if on.platform == "cpu" else 8
        networks = load(spec, on, (*spec.family.text_encoders, "vae"))
        return cls(spec, networks, batch_size, on)

    @cached_property
    def unconditional(
        self,
    ) -> tuple[Float16[np.ndarray, "length hidden"], Float16[np.ndarray, " pooled"] | None]:
        """The states and the vector of an empty caption, for captions that training drops."""
        text, pooled, _ = (self.devices.join(array)[0] for array in self._captions([""]))
        return text, pooled if self.spec.family.is_xl else None

    def stream(self, examples: Iterable[Example]) -> Iterator[Encoded]:
        """Each example encoded, in order, while the devices work on the next batch."""
        flight: deque[tuple[int, tuple[jax.Array, ...]]] = deque()
        iterator = iter(examples)
        while batch := list(islice(iterator, self.batch_size * len(self.devices))):
            flight.append((len(batch), self._launch(batch)))
            if len(flight) == _IN_FLIGHT:
                yield from self._land(*flight.popleft())
        for last in flight:
            yield from self._land(*last)

    def _launch(self, batch: list[Example]) -> tuple[jax.Array, ...]:
        pixels = self._split(np.stack([each.pixels for each in batch]))
        return *self._encode_pixels(self._networks["vae"], pixels), *self._captions([each.caption for each in batch])

    def _captions(self, captions: list[str]) -> tuple[jax.Array, jax.Array, jax.Array]:
        ids = np.stack([tokenizer(captions)[0] for tokenizer in self.spec.tokenizers], axis=1)
        encoders = tuple(self._networks[name] for name in self.spec.family.text_encoders)
        return self._encode_captions(encoders, self._split(ids))

    def _land(self, count: int, arrays: tuple[jax.Array, ...]) -> Iterator[Encoded]:
        moments, good, text, pooled, readable = map(self.devices.join, arrays)
        for i in range(count):
            vector = pooled[i] if self.spec.family.is_xl else None
            yield Encoded(moments[i], text[i], vector, bool(good[i] and readable[i]))

"""A UNet with what it is told, on the devices: requests as it takes them, and sampler tables run, a few rows a call."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sdjax import programs, sampling
from sdjax.batch import (
    HostNoise,
    control_pixels,
    control_scales,
    fresh_rows,
    guidance_embedding,
    guidance_weights,
    time_ids,
)
from sdjax.parallel import Devices
from sdjax.request import Request
from sdjax.sampling import noise, scan
from sdjax.spec import Program, Spec
from sdjax.text import Text

SCAN_ROWS = 5
"""Sampler rows in one call of the compiled scan: divides the usual step counts, and is long enough to hide dispatch."""

Ticks = list[tuple[int, jax.Array]]
"""For each call of the scan, its sampler rows, and an array that is ready when they are done."""


class Batch(NamedTuple):
    """Requests as a UNet takes them whatever the size; the arrays of JAX are on the devices.

    program: of all of them.
    cut: which prompts were too long and lost their end.
    """

    program: Program
    requests: list[Request]
    control_images: list[list[Image.Image]]
    cut: list[bool]
    clauses: np.ndarray
    conditions: programs.Conditions
    keys: jax.Array
    is_given: jax.Array
    rescale: jax.Array

    def draws(self, given: jax.Array) -> programs.Draws:
        """What a latent of noise is drawn with for each request; `given` are torch's."""
        return programs.Draws(self.keys, self.is_given, given)


class Denoiser:
    """A checkpoint's UNet, its text encoders and the ControlNets beside it.

    Args:
        spec: the checkpoint's promises.
        networks: by their names, on the devices.
        batch_size: rows that a device takes; smaller batches are filled up.
        devices: what they run on.
    """

    def __init__(self, spec: Spec, networks: dict[str, Any], batch_size: int, devices: Devices) -> None:
        self._spec, self._networks = spec, networks
        self._split = functools.partial(devices.split, each=batch_size)
        self._encode = devices.pmap(functools.partial(programs.encode_text, is_xl=spec.family.is_xl))
        self._embed_control = devices.pmap(programs.embed_control)
        kept = {"arrays": 2 if spec.controlnets else 1, "channels": spec.configs["unet"].block_out_channels[0]}
        self._start = devices.pmap(functools.partial(programs.start, **kept, dtype=spec.dtype))
        advance = functools.partial(programs.advance, last_is_told=not spec.family.edits)
        self._advance = devices.pmap(advance, donate_argnums=1)

    def batch(
        self, program: Program, requests: list[Request], control_images: list[list[Image.Image]], stage: int = 0
    ) -> Batch:
        """A batch's requests, of one program, given to the devices.

        Args:
            control_images: of each request.
            stage: see `keys`.
        """
        split, texts = self._split, [self._spec.text(request) for request in requests]
        return Batch(
            program=program,
            requests=requests,
            control_images=control_images,
            cut=[text.truncated for text in texts],
            clauses=np.stack([text.clauses for text in texts]),
            conditions=self._conditions(requests, texts),
            keys=self.keys(requests, stage),
            is_given=split(np.array([request.noise == "torch" for request in requests])),
            rescale=split(np.array([request.guidance_rescale for request in requests], np.float32)),
        )

    def keys(self, requests: list[Request], stage: int) -> jax.Array:
        """Keys of noise="jax", for each stage others: 0, 1 for the second of two UNets, 2 for a second pass."""
        return self._split(noise.keys([stage << 32 | request.seed for request in requests]))

    def _conditions(self, requests: list[Request], texts: list[Text]) -> programs.Conditions:
        """What the UNet is told of each request whatever the size."""
        split, family = self._split, self._spec.family
        ids, weights = (np.stack([getattr(text, name) for text in texts]) for name in ("ids", "weights"))
        variants = jax.tree.map(lambda *each: np.stack(each), *(text.variants for text in texts))
        is_negative = np.arange(ids.shape[2]) >= len(texts[0].clauses)
        clip_skip = np.array([np.where(is_negative, 0, request.clip_skip) for request in requests], np.int32)
        is_zero = np.array([is_negative & family.zeroes_empty & (each.negative_prompt is None) for each in requests])
        encoders = tuple(self._networks[name] for name in family.text_encoders)
        conditions = self._encode(
            encoders, split(ids), split(weights), split(clip_skip), split(is_zero), split(variants)
        )
        if family.embeds_guidance:
            channels = self._spec.configs["unet"].time_cond_proj_dim
            conditions = conditions._replace(guidance=split(guidance_embedding(requests, channels)))
        return conditions

    def start(
        self, batch: Batch, tables: list[sampling.Table], drawn: HostNoise, image: jax.Array, mask: jax.Array
    ) -> tuple[scan.State, scan.Known]:
        """A run's start from images' latents and noise, at the tables' first levels; and what the masks keep."""
        split = self._split
        levels = split(np.array([(table.start_signal, table.start_noise) for table in tables], np.float32))
        context = batch.conditions.context if batch.program.reuses else None
        return self._start(batch.draws(split(drawn.start)), levels, image, mask, context)

    def run(
        self,
        batch: Batch,
        tables: list[sampling.Table],
        drawn: HostNoise,
        state: scan.State,
        *,
        known: scan.Known | None = None,
        told: tuple[jax.Array, ...] | None = None,
    ) -> tuple[jax.Array, Ticks]:
        """The latents at the tables' end.

        known: what is blended in after each row.  told: further channels of the UNet.
        """
        split, spec, family = self._split, self._spec, self._spec.family
        length = max(table.calls for table in tables)
        padded = -(-length // SCAN_ROWS) * SCAN_ROWS
        size = tuple(side * spec.scale for side in drawn.start.shape[1:3])
        weights = guidance_weights(
            batch.requests, tables, batch.clauses, padded, edits=family.edits, embedded=family.embeds_guidance
        )
        conditions = batch.conditions
        if family.is_xl:
            joined = batch.clauses.shape[1]
            ids = time_ids(batch.requests, size, joined, weights.shape[2], refines=family.refines)
            conditions = conditions._replace(time_ids=split(ids))
        control = self._controls(batch, size)
        scales = control and control_scales(batch.requests, tables, padded, len(spec.controlnets))
        fresh = fresh_rows(batch.requests, tables, weights) if batch.program.reuses else None
        stacked = sampling.stack(tables, padded), weights, scales, fresh
        unet, ratio = self._networks["unet"], batch.program.token_merging_ratio
        unet = programs.Flat(*jax.tree.flatten(unet.merging(ratio) if ratio else unet))
        silence = None if drawn.is_drawn else split(drawn.rows(SCAN_ROWS))
        ticks = []
        for first in range(0, length, SCAN_ROWS):
            rows = slice(first, first + SCAN_ROWS)
            state, tick = self._advance(
                unet,
                state,
                conditions,
                programs.Rows(*split(jax.tree.map(lambda column, rows=rows: column[:, rows], stacked))),
                batch.keys,
                batch.rescale,
                scan.Given(split(drawn.rows(SCAN_ROWS)) if silence is None else silence, batch.is_given),
                known,
                told,
                control,
            )
            ticks.append((min(SCAN_ROWS, length - first), tick))
        return state.latents, ticks

    def _controls(self, batch: Batch, size: tuple[int, int]) -> programs.Controls | None:
        """The ControlNets and what they see at a size, without scales; None where there are none."""
        networks = tuple(self._networks[name] for name in self._spec.controlnets)
        if not networks:
            return None
        images = self._split(control_pixels(batch.control_images, size, len(networks)))
        seen = tuple(self._embed_control(*each) for each in zip(networks, images, strict=True))
        # As in diffusers, where the first of them pools, the negative prompt is not controlled.
        pools = self._spec.configs[self._spec.controlnets[0]].global_pool_conditions
        guess_mode = np.array([pools or request.guess_mode for request in batch.requests])
        return programs.Controls(networks, seen, self._split(guess_mode))

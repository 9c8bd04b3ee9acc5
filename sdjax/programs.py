"""What is compiled: the functions of one device's part of a batch that `sdjax.generate` runs."""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from sdjax.models import tiling
from sdjax.models.clip import CLIPTextModel
from sdjax.models.controlnet import ControlNet
from sdjax.models.tiling import Autoencoder
from sdjax.models.unet import UNet2DCondition
from sdjax.sampling import Tables, noise, scan

DEEP = "deep"
"""The scope of the conditional that makes a prompt's deep features anew or leaves them."""


class Conditions(NamedTuple):
    """What the UNet is told of a request besides its latent and timestep; None where it takes no such thing.

    context: text states.
    pooled, time_ids: each prompt's vector, and its sizes (Stable Diffusion XL).
    guidance: the guidance scale, embedded (consistency models).
    """

    context: Float[Array, "batch prompts tokens hidden"]
    pooled: Float[Array, "batch prompts pooled"] | None = None
    time_ids: Float[Array, "batch prompts ids"] | None = None
    guidance: Float[Array, "batch channels"] | None = None


class Draws(NamedTuple):
    """What a latent of noise for each request is drawn with: its key, or where `is_given` the host's own latent."""

    keys: Array
    is_given: Bool[Array, " batch"]
    given: Float[Array, "batch h w c"]

    def latents(self, stream: int) -> Float[Array, "batch h w c"]:
        """The noise.  stream: see `noise.jax_latents`."""
        drawn = noise.jax_latents(self.keys, stream, self.given.shape[1:])
        return jnp.where(self.is_given[:, None, None, None], self.given, drawn)


class Controls(NamedTuple):
    """ControlNets beside a UNet.

    seen: for each of the networks, what it sees of the control images.
    guess_mode: where the last prompt, the negative one, is not controlled.
    """

    networks: tuple[ControlNet, ...]
    seen: tuple[Float[Array, "batch h w _"], ...]
    guess_mode: Bool[Array, " batch"]


class Rows(NamedTuple):
    """What changes from sampler row to row.

    weights: how much each prompt's output counts.
    controls: how much each ControlNet does, where there are some.
    fresh: whether a prompt's deep features are made anew, where they are kept from call to call.
    """

    tables: Tables
    weights: Float[Array, "batch rows prompts"]
    controls: Float[Array, "batch rows nets"] | None = None
    fresh: Bool[Array, "batch rows prompts"] | None = None


def encode_text(
    text_encoders: tuple[CLIPTextModel, ...],
    ids: Int[Array, "batch encoders prompts chunks length"],
    weights: Float[Array, "batch encoders prompts chunks length"],
    clip_skip: Int[Array, "batch prompts"],
    is_zero: Bool[Array, "batch prompts"],
    variants: tuple[Array, ...] | None,
    *,
    is_xl: bool,
) -> Conditions:
    """Text states for joined prompts and the negative one, the encoders' side by side; zeros where `is_zero`.

    variants: what a prompt in compel's language is a sum of: `sdjax.text.Variants`, batched.

    Of Stable Diffusion XL also the last encoder's pooled vector of a prompt's first chunk. Tokens' weights do nothing
    to it; a blend's are summed by its shares.
    """
    read, fields = (_encode_text, (ids, weights)) if variants is None else (_blended, variants)
    encoded = [
        read(encoder, *(field[:, i] for field in fields), clip_skip=clip_skip, is_xl=is_xl)
        for i, encoder in enumerate(text_encoders)
    ]
    context = jnp.concatenate([states for states, _ in encoded], axis=-1)
    context = jnp.where(is_zero[..., None, None], 0, context)
    if not is_xl:
        return Conditions(context)
    return Conditions(context, jnp.where(is_zero[..., None], 0, encoded[-1][1]))


def _encode_text(
    text_encoder: CLIPTextModel,
    ids: Int[Array, "batch prompts chunks length"],
    weights: Float[Array, "batch prompts chunks length"],
    *,
    clip_skip: Int[Array, "batch prompts"],
    is_xl: bool,
) -> tuple[Float[Array, "batch prompts tokens hidden"], Float[Array, "batch prompts pooled"]]:
    """One encoder's states, from the layers that the request asks for, and pooled vectors.

    Stable Diffusion XL counts from the last layer but one, and leaves out the final norm. Weighted as A1111 does it:
    each token's state times its weight, then the chunk's mean as it was.
    """
    batch, prompts, chunks, length = ids.shape
    states, pooled = _states(text_encoder, ids, clip_skip, None, is_xl=is_xl)
    factors = weights.reshape(-1, length, 1)
    weighted = states.astype(jnp.float32) * factors
    ratio = states.mean((1, 2), keepdims=True, dtype=jnp.float32) / weighted.mean((1, 2), keepdims=True)
    plain = jnp.all(factors == 1, axis=1, keepdims=True)
    states = jnp.where(plain, states, (weighted * ratio).astype(states.dtype))
    return states.reshape(batch, prompts, chunks * length, -1), pooled[:, :, 0]


def _blended(
    text_encoder: CLIPTextModel,
    ids: Int[Array, "batch prompts variants chunks length"],
    weights: Float[Array, "batch prompts variants chunks length"],
    keep: Bool[Array, "batch prompts variants chunks length"],
    shares: Float[Array, "batch prompts variants chunks"],
    *,
    clip_skip: Int[Array, "batch prompts"],
    is_xl: bool,
) -> tuple[Float[Array, "batch prompts tokens hidden"], Float[Array, "batch prompts pooled"]]:
    """One encoder's states weighted as compel does it: from the empty text's, the first variant's, and summed.

    The pooled vectors are summed by the same shares.
    """
    batch, prompts, count, chunks, length = ids.shape
    rows, seen = (x.reshape(batch, prompts, count * chunks, length) for x in (ids, keep))
    states, pooled = _states(text_encoder, rows, clip_skip, seen, is_xl=is_xl)
    own = states.astype(jnp.float32).reshape(*ids.shape, -1)
    empty, factors = own[:, :, :1], weights[..., None]
    weighted = jnp.where(factors == 1, own, empty + factors * (own - empty))
    summed = jnp.sum(shares[..., None, None] * weighted, axis=2)
    states = summed.astype(states.dtype).reshape(batch, prompts, chunks * length, -1)
    first = pooled.reshape(batch, prompts, count, chunks, -1)[:, :, :, 0]
    return states, jnp.sum(shares[..., :1] * first, axis=2).astype(pooled.dtype)


def _states(
    text_encoder: CLIPTextModel,
    ids: Int[Array, "batch prompts chunks length"],
    clip_skip: Int[Array, "batch prompts"],
    keep: Bool[Array, "batch prompts chunks length"] | None,
    *,
    is_xl: bool,
) -> tuple[Float[Array, "rows length hidden"], Float[Array, "batch prompts chunks pooled"]]:
    """The states and the pooled vector of every chunk, unweighted."""
    batch, prompts, chunks, length = ids.shape
    output = text_encoder(ids.reshape(-1, length), None if keep is None else keep.reshape(-1, length))
    hidden = jnp.stack(output.hidden_states[1:])
    layer = len(hidden) - 1 - is_xl - jnp.repeat(clip_skip, chunks)
    states = hidden[layer, jnp.arange(batch * prompts * chunks)]
    if not is_xl:
        states = text_encoder.text_model.final_layer_norm(states)
    return states, output.pooled.reshape(batch, prompts, chunks, -1)


def encode_image(
    vae: Autoencoder,
    pixels: Float[Array, "batch height width 3"],
    there: Bool[Array, " batch"],
    draws: Draws,
    *,
    scale: float,
    tiled: bool | None,
) -> Float[Array, "batch h w c"]:
    """Latents of images in -1..1, sampled from the VAE's posterior; zeros for a request that has none."""
    mean, logvar = (moment.astype(jnp.float32) for moment in tiling.encode(vae, pixels, tiling=tiled))
    sampled = mean + jnp.exp(0.5 * logvar) * draws.latents(noise.POSTERIOR)
    return jnp.where(there[:, None, None, None], scale * sampled, 0)


def encode_mean(
    vae: Autoencoder, pixels: Float[Array, "batch height width 3"], *, tiled: bool | None
) -> Float[Array, "batch h w c"]:
    """What a UNet that edits images is told of one: the posterior's mean, unscaled."""
    return tiling.encode(vae, pixels, tiling=tiled)[0].astype(jnp.float32)


def enlarge(
    vae: Autoencoder,
    latents: Float[Array, "batch h w c"],
    directly: Bool[Array, " batch"],
    draws: Draws,
    *,
    scale: float,
    tiled: bool | None,
) -> Float[Array, "batch new_h new_w c"]:
    """Latents at a larger size: of the decoded images enlarged by Lanczos, or the latents themselves, bilinearly.

    directly: which are the latter.  draws: of the larger size, for `encode_image`.
    """
    height, width = (side * vae.config.downscale for side in draws.given.shape[1:3])

    def by_image() -> Float[Array, "batch new_h new_w c"]:
        image = jnp.clip(tiling.decode(vae, latents / scale, tiling=tiled).astype(jnp.float32), -1, 1)
        image = jax.image.resize(image, (len(image), height, width, image.shape[-1]), "lanczos3")
        image, there = jnp.clip(image, -1, 1), jnp.ones_like(directly)
        return encode_image(vae, image, there, draws, scale=scale, tiled=tiled)

    resized = jax.image.resize(latents, draws.given.shape, "bilinear")
    by_images = lax.cond(jnp.all(directly), lambda: resized, by_image)
    return jnp.where(directly[:, None, None, None], resized, by_images)


def start(
    draws: Draws,
    levels: Float[Array, "batch 2"],
    image: Float[Array, "batch h w c"],
    mask: Float[Array, "batch h w 1"],
    context: Float[Array, "batch prompts tokens hidden"] | None,
    *,
    arrays: int,
    channels: int,
    dtype: str,
) -> tuple[scan.State, scan.Known]:
    """A run's start: each request's image and its own noise, at its sampler's levels; and what its mask keeps.

    context: text states, where `advance` keeps something of each prompt from call to call.
    arrays, channels, dtype: of what it keeps.
    """
    fresh = draws.latents(noise.START)
    signal, scale = levels[:, :1, None, None], levels[:, 1:, None, None]
    nothing = () if context is None else (jnp.zeros((context.shape[1], *image.shape[:3], channels), dtype),) * arrays
    return scan.begin(signal * image + scale * fresh, nothing), scan.Known(image, fresh, mask)


def embed_control(
    network: ControlNet, image: Float[Array, "batch height width 3"]
) -> Float[Array, "batch h w channels"]:
    """What a ControlNet sees of control images in 0..1, at every step."""
    return network.embed(image)


def _residuals(
    controls: Controls,
    scales: Float[Array, "batch nets"],
    is_last: Bool[Array, ""],
    x: Float[Array, "batch h w c"],
    t: Float[Array, " batch"],
    context: Float[Array, "batch tokens hidden"],
    added: dict[str, Array] | None,
) -> tuple[list[Array], Array]:
    """The sum of what the ControlNets add to a prompt's UNet; one that no request has a use for is not called."""
    scales = jnp.where(is_last & controls.guess_mode[:, None], 0, scales)
    total = None
    for i, (network, seen) in enumerate(zip(controls.networks, controls.seen, strict=True)):
        call = functools.partial(network, x, t, context, seen, scales[:, i], controls.guess_mode, added)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(call))
        more = lax.cond(jnp.any(scales[:, i] != 0), call, lambda nothing=nothing: nothing)
        total = more if total is None else jax.tree.map(jnp.add, total, more)
    assert total is not None, "there are networks"
    return total


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Flat:
    """A network taken apart by `jax.tree.flatten`, which JAX does at each call that is given one, in milliseconds."""

    leaves: list[Any]
    structure: Any = field(metadata={"static": True})

    @property
    def network(self) -> Any:
        """It put together again, as programs take it."""
        return jax.tree.unflatten(self.structure, self.leaves)


def advance(
    flat: Flat,
    state: scan.State,
    conditions: Conditions,
    rows: Rows,
    keys: Array,
    rescale: Float[Array, " batch"],
    given: scan.Given,
    known: scan.Known | None,
    told: tuple[Array, ...] | None,
    controls: Controls | None,
    *,
    last_is_told: bool,
) -> tuple[scan.State, Int[Array, ""]]:
    """The next sampler rows of a device's part of the batch, and how many have been run.

    flat: the UNet.
    known: what is blended in.
    told: further channels, [batch, h, w, any], for a UNet that has them.
    last_is_told: whether the last prompt sees them; else it sees zeros.
    """
    unet: UNet2DCondition = flat.network

    def network(half: Int[Array, ""], x: Array, t: Array, of_row: Any, kept: tuple[Array, ...]) -> tuple[Array, Any]:
        scales, fresh = of_row
        context, is_last = conditions.context[:, half], half == conditions.context.shape[1] - 1
        added = None
        if conditions.pooled is not None and conditions.time_ids is not None:
            added = {"text_embeds": conditions.pooled[:, half], "time_ids": conditions.time_ids[:, half]}
        temb = unet.embed_time(t, added, conditions.guidance)
        seen = x
        if told is not None:
            hidden = jnp.logical_and(not last_is_told, is_last)
            seen = jnp.concatenate([x, *(jnp.where(hidden, 0, part) for part in told)], axis=-1)
        seen = unet.embed(seen)

        def deep() -> tuple[Array, ...]:
            if controls is None:
                return (unet.deep(seen, temb, context),)
            (outermost, *inner), middle = _residuals(controls, scales, is_last, x, t, context, added)
            # What is kept has the features' shape, also where a ControlNet pools what it adds.
            return unet.deep(seen, temb, context, inner, middle), jnp.broadcast_to(outermost, seen.shape)

        if fresh is None:
            return unet.outer(seen, temb, context, *deep()), kept
        now = fresh[:, half]
        with jax.named_scope(DEEP):
            made = lax.cond(jnp.any(now), deep, lambda: kept)
        made = jax.tree.map(lambda new, old: jnp.where(now[:, None, None, None], new, old), made, kept)
        return unet.outer(seen, temb, context, *made), made

    state = scan.advance(
        network,
        rows.tables,
        state,
        keys=keys,
        weights=rows.weights,
        rescale=rescale,
        given=given,
        known=known,
        told=(rows.controls, rows.fresh),
    )
    return state, state.row


def decode(
    vae: Autoencoder, latents: Float[Array, "batch h w c"], *, scale: float, tiled: bool | None
) -> tuple[UInt8[Array, "batch height width 3"], Bool[Array, " batch"]]:
    """Pixels, and which images are finite; the others are black."""
    image = tiling.decode(vae, latents / scale, tiling=tiled).astype(jnp.float32)
    finite = jnp.isfinite(image).all(axis=(1, 2, 3), keepdims=True)
    pixels = jnp.round(jnp.clip(jnp.where(finite, image, -1.0) / 2 + 0.5, 0, 1) * 255)
    return pixels.astype(jnp.uint8), finite.ravel()

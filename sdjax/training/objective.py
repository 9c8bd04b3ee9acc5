"""What is minimised: the VAE's reconstruction, the UNet's denoising. Losses are per example, in float32.

Everything random is drawn from a key and the example's place in the whole batch, so a loss depends neither on the
number of devices nor on how a batch is cut into parts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from sdjax.models import clip, tiling
from sdjax.sampling.schedule import Schedule
from sdjax.training import masks
from sdjax.training.config import Diffusion, Reconstruction
from sdjax.training.networks import Params, bind

Losses = tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]
# (trained parameters, other parameters, arrays of the batch, the step's key) -> losses, and other numbers to report
Objective = Callable[[dict[str, Params], dict[str, Params], Mapping[str, Any], Any], Losses]


def to_unit(pixels: UInt8[Array, "*batch h w 3"]) -> Float[Array, "*batch h w 3"]:
    """sRGB bytes to the range -1 to 1."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def _mean(x: Float[Array, "batch ..."]) -> Float[Array, " batch"]:
    return x.astype(jnp.float32).mean(axis=tuple(range(1, x.ndim)))


def _normal(key: Any, places: Int[Array, " batch"], shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """Unit normals of `shape` for each example, a function of its place in the whole batch."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def reconstruction(modules: Mapping[str, nnx.Module], options: Reconstruction) -> Objective:
    """The VAE's objective on `pixels` uint8 [batch, h, w, 3].

    Mean absolute plus mean squared error; `edges` times the mean absolute error of the differences between neighbouring
    pixels on both axes, without which small shapes come out soft; `kl` times the mean over the latent of its KL
    divergence from a unit normal (Kingma & Welling 2013). With `decoder_only` no gradient reaches the encoder.
    """

    def loss(trained: dict[str, Params], frozen: dict[str, Params], batch: Mapping[str, Any], key: Any) -> Losses:
        vae = bind(modules["vae"], trained["vae"])
        x = to_unit(batch["pixels"])
        mean, logvar = (part.astype(jnp.float32) for part in vae.encode(x))
        if options.decoder_only:
            mean, logvar = jax.lax.stop_gradient((mean, logvar))
        noise = _normal(key, batch["place"], mean.shape[1:])
        error = vae.decode(mean + jnp.exp(0.5 * logvar) * noise).astype(jnp.float32) - x
        edges = _mean(jnp.abs(jnp.diff(error, axis=1))) + _mean(jnp.abs(jnp.diff(error, axis=2)))
        kl = 0.5 * _mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        absolute, square = _mean(jnp.abs(error)), _mean(error**2)
        total = absolute + square + options.edges * edges + options.kl * kl
        return total, {"absolute": absolute, "square": square, "edges": edges, "kl": kl}

    return loss


def denoising(
    modules: Mapping[str, nnx.Module],
    schedule: Schedule,
    options: Diffusion,
    *,
    scaling_factor: float,
    batch_size: int,
    text_encoders: Sequence[str] = ("text_encoder",),
    is_xl: bool = False,
    inpaints: bool = False,
    edits: bool = False,
) -> Objective:
    """The UNet's objective on `pixels` or `moments` [batch, h, w, 2 c], and `ids` int32 [batch, encoders, length], or
    [batch, encoders, chunks, length], or `context`, the text encoders' states [batch, length, hidden].

    Stable Diffusion XL's is also told `time_ids` [batch, 6], `pooled` [batch, pooled] beside a `context`, and zeros of
    captions where `is_zero` [batch]. A UNet that `inpaints` is told a mask and the picture without what it covers; one
    that `edits` the latent's mean, unscaled, of `conditioning` [batch, h, w, 3] uint8, zeros where `is_unseen` [batch].
    With a ControlNet among `modules`, that sees `conditioning`, and what it says is added in the UNet.

    The mean squared error of the schedule's epsilon, v (Salimans & Ho 2022) or sample, with min-SNR weights (Hang et
    al. 2023) where `min_snr_gamma` is given. Timesteps are spread evenly over the whole batch with one common random
    shift (Kingma et al. 2021), which leaves each one uniform and makes the loss less noisy. `offset_noise` adds that
    much noise that is constant over the picture.
    """
    alphas = jnp.asarray(np.sqrt(schedule.alphas_cumprod), jnp.float32)
    sigmas = jnp.asarray(np.sqrt(1 - schedule.alphas_cumprod), jnp.float32)
    predicted = schedule.prediction_type

    def loss(trained: dict[str, Params], frozen: dict[str, Params], batch: Mapping[str, Any], key: Any) -> Losses:
        params = {name: frozen.get(name, {}) | trained.get(name, {}) for name in frozen | trained}
        networks = {name: bind(modules[name], own) for name, own in params.items()}
        key_latent, key_time, key_noise, key_offset, key_mask, key_known = jax.random.split(key, 6)
        place = batch["place"]

        def drawn(moments: Sequence[Array], key: Any) -> Float[Array, "batch h w c"]:
            mean, logvar = (part.astype(jnp.float32) for part in moments)
            return (mean + jnp.exp(0.5 * logvar) * _normal(key, place, mean.shape[1:])) * scaling_factor

        told: list[Array] = []
        if "moments" in batch:
            x = drawn(jnp.split(batch["moments"], 2, axis=-1), key_latent)
        else:
            pixels = to_unit(batch["pixels"])
            x = drawn(tiling.encode(networks["vae"], pixels), key_latent)
            if inpaints:
                mask = masks.draw(key_mask, place, *pixels.shape[1:3])
                known = drawn(tiling.encode(networks["vae"], jnp.where(mask, 0, pixels)), key_known)
                scale = pixels.shape[1] // x.shape[1]
                told = [mask[:, ::scale, ::scale], known]
            elif edits:
                mean, _ = tiling.encode(networks["vae"], to_unit(batch["conditioning"]))
                told = [jnp.where(batch["is_unseen"][:, None, None, None], 0, mean)]

        part = (jax.random.uniform(key_time) + place / batch_size) % 1
        t = jnp.minimum((part * len(alphas)).astype(jnp.int32), len(alphas) - 1)
        alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
        noise = _normal(key_noise, place, x.shape[1:])
        if options.offset_noise:
            noise += options.offset_noise * _normal(key_offset, place, (1, 1, x.shape[-1]))
        target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[predicted]

        if "context" in batch:
            context, pooled = batch["context"], batch.get("pooled")
        else:
            context, pooled = clip.read([networks[name] for name in text_encoders], batch["ids"], is_xl=is_xl)
        added = None
        if is_xl and pooled is not None:
            zero = batch["is_zero"][:, None]
            context = jnp.where(zero[..., None], 0, context)
            added = {"text_embeds": jnp.where(zero, 0, pooled), "time_ids": batch["time_ids"]}
        seen, times = jnp.concatenate([alpha * x + sigma * noise, *told], axis=-1), t.astype(jnp.float32)
        residuals = {}
        if (net := networks.get("controlnet")) is not None:
            condition = net.embed(batch["conditioning"].astype(jnp.float32) / 255)
            plain = jnp.ones(len(t)), jnp.zeros(len(t), bool)
            skips, middle = net(seen, times, context, condition, *plain, added)
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        output = networks["unet"](seen, times, context, added, **residuals)
        error = _mean((output.astype(jnp.float32) - target) ** 2)
        weight = jnp.ones_like(error)
        if options.min_snr_gamma is not None:
            snr = (alphas[t] / sigmas[t]) ** 2
            least = jnp.minimum(snr, options.min_snr_gamma)
            # Of epsilon, least / snr, which at a terminal SNR of zero is 0 / 0, and 1 as it is nearby.
            epsilon = jnp.minimum(options.min_snr_gamma / snr, 1)
            weight = {"epsilon": epsilon, "v_prediction": least / (snr + 1), "sample": least}[predicted]
        return weight * error, {"error": error}

    return loss

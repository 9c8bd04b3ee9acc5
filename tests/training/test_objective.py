"""The objectives, beside their formulas: networks are stand-ins that record what they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdjax.models.clip import TextOutput
from sdjax.sampling.schedule import Schedule
from sdjax.training import objective
from sdjax.training.config import Diffusion, Reconstruction

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
KEY = jax.random.key(3)
PLAIN = Diffusion()
BATCH = 64
MOMENTS = np.random.default_rng(0).normal(size=(BATCH, 8, 8, 8)).astype(np.float32)
MOMENTS[..., 4:] = -40.0  # no noise of the latent's own


class Text(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))

    def __call__(self, ids):
        states = self.w * ids[..., None].astype(jnp.float32)
        return TextOutput(states, (), states[:, 0])


class UNet(nnx.Module):
    """Returns what `answer` makes of its inputs."""

    def __init__(self, answer):
        self.answer, self.w = answer, nnx.Param(jnp.ones(()))

    def __call__(self, x, t, context, added):
        assert added is None
        return self.w * self.answer(x, t, context)


def _losses(answer, options=PLAIN, prediction="epsilon", batch=None, key=KEY, **scheduler):
    modules = {"unet": UNet(answer), "text_encoder": Text(), "vae": nnx.Module()}
    schedule = Schedule.from_config(SCHEDULER | {"prediction_type": prediction} | scheduler)
    loss = objective.denoising(modules, schedule, options, scaling_factor=0.5, batch_size=BATCH)
    batch = jax.tree.map(jnp.asarray, batch or _batch(range(BATCH)))
    one = {"w": jnp.ones(())}
    losses, metrics = loss({"unet": one}, {"text_encoder": one, "vae": {}}, batch, key)
    return schedule, np.asarray(losses), np.asarray(metrics["error"])


def _batch(places):
    places = np.array(places)
    ids = np.tile(places[:, None, None], (1, 1, 5)).astype(np.int32)
    return {"place": places.astype(np.int32), "moments": MOMENTS[places], "ids": ids}


def _inputs(options=PLAIN):
    """The UNet's inputs: x, t, context."""
    seen = []

    def answer(*inputs):
        seen.append(jax.tree.map(np.asarray, inputs))
        return jnp.zeros_like(inputs[0])

    schedule, _, _ = _losses(answer, options)
    return schedule, *seen[0]


def _alpha_sigma(schedule, t):
    share = schedule.alphas_cumprod[t.astype(int)][:, None, None, None]
    return np.sqrt(share), np.sqrt(1 - share)


def test_the_network_sees_a_noised_latent():
    schedule, x, t, context = _inputs()
    alpha, sigma = _alpha_sigma(schedule, t)
    noise = (x - alpha * MOMENTS[..., :4] * 0.5) / sigma
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    np.testing.assert_array_equal(context[:, 0, 0], np.arange(BATCH))


def test_timesteps_cover_the_schedule_evenly():
    _, _, t, _ = _inputs()
    np.testing.assert_allclose(np.diff(np.sort(t)), 1000 / BATCH, atol=1.01)
    assert 0 <= t.min() < t.max() <= 999


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_right_answer_has_no_loss(prediction):
    schedule = Schedule.from_config(SCHEDULER)
    alphas, sigmas = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)

    def answer(x, t, context):
        alpha, sigma = (jnp.asarray(table)[t.astype(int)][:, None, None, None] for table in (alphas, sigmas))
        clean = MOMENTS[..., :4] * 0.5
        noise = (x - alpha * clean) / sigma
        targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": jnp.asarray(clean)}
        return targets[prediction]

    _, losses, _ = _losses(answer, prediction=prediction)
    assert losses.max() < 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_by_its_formula(prediction):
    seen = []
    answer = lambda x, t, context: seen.append(np.asarray(t)) or jnp.zeros_like(x)  # noqa: E731
    schedule, losses, errors = _losses(answer, Diffusion(min_snr_gamma=5.0), prediction)
    snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod))[seen[0].astype(int)]
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    np.testing.assert_allclose(losses, errors * np.minimum(snr, 5) / divisor, rtol=1e-3)
    _, plain, errors = _losses(answer, Diffusion(), prediction)
    np.testing.assert_array_equal(plain, errors)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_finite_where_the_last_snr_is_zero(prediction):
    seen = []
    answer = lambda x, t, context: seen.append(np.asarray(t)) or x  # noqa: E731
    for seed in range(99):
        options = {"key": jax.random.key(seed), "rescale_betas_zero_snr": True}
        _, losses, errors = _losses(answer, Diffusion(min_snr_gamma=5.0), prediction, **options)
        assert np.isfinite(losses).all()
        if seen[-1].max() == 999:
            at = seen[-1].argmax()
            assert losses[at] == (errors[at] if prediction == "epsilon" else 0)
            return
    raise AssertionError("no last timestep was drawn")


def test_the_latent_is_drawn_and_scaled():
    """Of a latent whose log-variance is log 4 there is noise of half a scaled deviation of 2 around the scaled mean."""
    seen = []

    def answer(x, t, context):
        seen.append((np.asarray(x), np.asarray(t)))
        return jnp.zeros_like(x)

    batch = _batch(range(BATCH))
    schedule, _, _ = _losses(answer, batch=batch)
    batch["moments"] = np.concatenate(
        [batch["moments"][..., :4], np.full_like(batch["moments"][..., 4:], np.log(4))], -1
    )
    _losses(answer, batch=batch)
    (plain, t), (drawn, _) = seen
    alpha, _ = _alpha_sigma(schedule, t)
    latent = (drawn - plain) / alpha  # the same key draws the same noise of the step
    assert latent.std() == pytest.approx(0.5 * 2, rel=0.02)
    assert abs(latent.mean()) < 0.02


def test_offset_noise_moves_whole_pictures():
    def spread(strength):
        schedule, x, t, _ = _inputs(Diffusion(offset_noise=strength))
        alpha, sigma = _alpha_sigma(schedule, t)
        return ((x - alpha * MOMENTS[..., :4] * 0.5) / sigma).mean(axis=(1, 2)).std()

    assert spread(0.0) == pytest.approx(1 / 8, rel=0.15)
    assert spread(1.0) == pytest.approx(np.sqrt(1 + 1 / 64), rel=0.15)


def test_a_loss_does_not_depend_on_its_company():
    answer = lambda x, t, context: jnp.sin(x * 3) + t[:, None, None, None] / 1000 + context[:, :1, :1, None]  # noqa: E731
    _, whole, _ = _losses(answer)
    _, part, _ = _losses(answer, batch=_batch([40, 3, 17]))
    np.testing.assert_allclose(part, whole[[40, 3, 17]], rtol=1e-5)


class VAE(nnx.Module):
    """Encodes to the picture itself, changed by v; decodes what it is given, changed by w."""

    def __init__(self, logvar):
        self.logvar, self.v, self.w = logvar, nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    def encode(self, x):
        return x * self.v, jnp.full_like(x, self.logvar)

    def decode(self, z):
        return z * self.w


@pytest.mark.parametrize(("edges", "kl"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.1)])
def test_reconstruction_adds_its_terms(edges, kl):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    loss = objective.reconstruction({"vae": VAE(-60.0)}, Reconstruction(edges=edges, kl=kl))
    batch = {"pixels": jnp.asarray(pixels), "place": jnp.arange(4)}
    losses, metrics = loss({"vae": {"v": jnp.ones(()), "w": jnp.asarray(0.5)}}, {}, batch, KEY)
    x = pixels / 127.5 - 1
    wrong = -0.5 * x
    expected = np.abs(wrong).mean((1, 2, 3)) + (wrong**2).mean((1, 2, 3))
    expected += edges * (
        np.abs(np.diff(wrong, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(wrong, axis=2)).mean((1, 2, 3))
    )
    expected += kl * 0.5 * (x**2 + np.exp(-60.0) - 1 + 60).mean((1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert set(metrics) == {"absolute", "square", "edges", "kl"}


def test_reconstruction_draws_from_the_latents_distribution():
    pixels = np.full((8, 16, 16, 3), 128, np.uint8)
    loss = objective.reconstruction({"vae": VAE(np.log(0.25))}, Reconstruction(kl=0.0))
    _, metrics = loss(
        {"vae": {"v": jnp.ones(()), "w": jnp.ones(())}},
        {},
        {"pixels": jnp.asarray(pixels), "place": jnp.arange(8)},
        KEY,
    )
    assert float(metrics["square"].mean()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_the_decoder_alone_is_trained_where_asked(decoder_only):
    pixels = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    loss = objective.reconstruction({"vae": VAE(0.0)}, Reconstruction(decoder_only=decoder_only))
    batch = {"pixels": jnp.asarray(pixels), "place": jnp.arange(4)}
    params = {"vae": {"v": jnp.ones(()), "w": jnp.ones(())}}
    gradient = jax.grad(lambda trained: loss(trained, {}, batch, KEY)[0].sum())(params)["vae"]
    assert gradient["w"] != 0
    assert (gradient["v"] == 0) == decoder_only

"""Sixteen requests with sixteen samplers: one program, no call that none of them needs, each its own pixels."""

import jax
import numpy as np
import pytest

from sdjax import Request, StableDiffusion
from sdjax.models.unet import UNet2DCondition
from tests import checkpoints

SAMPLERS = {  # sampler: steps
    "ddim": 4,
    "ddpm": 50,
    "plms": 5,
    "lms": 6,
    "euler": 7,
    "euler_ancestral": 8,
    "heun": 9,
    "dpm_2": 10,
    "dpm_2_ancestral": 11,
    "dpmpp_2s": 12,
    "dpmpp_2m": 14,
    "dpmpp_2m_sde": 16,
    "dpmpp_3m_sde": 20,
    "dpmpp_sde": 4,
    "uni_pc": 22,
    "sa_solver": 24,
}
CHANGES = {
    "euler": {"sigmas": [14.0, 6.0, 2.5, 0.7, 0.3, 0.2, 0.1]},
    "heun": {"timesteps": [999, 800, 600, 500, 400, 300, 200, 100, 50]},
    "dpm_2": {"sigmas": "karras", "rho": 5.0, "noise": "torch"},
    "dpmpp_2m": {"sigmas": "exponential", "solver_order": 3},
    "uni_pc": {"guidance_scales": np.linspace(9, 1, 22)},
}


@pytest.fixture
def calls(monkeypatch):
    """A list that grows at every call of the UNet that really happens."""
    seen, deep = [], UNet2DCondition.deep

    def counted(self, x, *rest, **kw):
        jax.debug.callback(lambda _: seen.append(1), x)
        return deep(self, x, *rest, **kw)

    monkeypatch.setattr(UNet2DCondition, "deep", counted)
    return seen


def test_sixteen_samplers_share_a_program_and_its_calls(tmp_path, compilations, calls):
    widths = {"block_out_channels": [8, 16]}
    checkpoints.saved(tmp_path / "narrow", unet={**widths, "attention_head_dim": 2}, vae=widths)
    pipe = StableDiffusion.from_pretrained(tmp_path / "narrow", devices=jax.devices()[:1], batch_size=16)
    requests = [
        Request(
            prompt="a red circle",
            negative_prompt="cat" * (i % 3),
            seed=i,
            sampler=name,
            num_inference_steps=steps,
            guidance_scale=1 + i / 2,
            width=16,
            height=16,
            **CHANGES.get(name, {}),
        )
        for i, (name, steps) in enumerate(SAMPLERS.items())
    ]
    together = pipe.generate(requests)
    assert len({pipe.spec.program(result.request) for result in together}) == 1
    lengths = [pipe.spec.calls(result.request) for result in together]
    jax.effects_barrier()
    assert len(calls) == 2 * max(lengths) == 100

    compilations()
    for request, result, length in zip(requests, together, lengths, strict=True):
        calls.clear()
        alone = pipe.generate([request])[0]
        jax.effects_barrier()
        assert np.array_equal(alone.pixels, result.pixels), request
        unguided = request.sampler == "ddim"  # guidance 1: no unconditional half; uni_pc has a last step like that
        assert len(calls) == (1 if unguided else 2) * length - (request.sampler == "uni_pc"), request
    assert compilations() == 0

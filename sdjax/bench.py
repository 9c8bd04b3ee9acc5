"""`python -m sdjax.bench`: how fast each network is on this machine, on random weights, beside diffusers if asked."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sdjax.config import CLIPTextConfig, UNetConfig, VAEConfig
from sdjax.models.clip import CLIPTextModel
from sdjax.models.unet import UNet2DCondition
from sdjax.models.vae import AutoencoderKL

_TEXT = {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_UNET = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "text": {**_TEXT, "num_hidden_layers": 12, "vocab_size": 49408, "max_position_embeddings": 77},
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": _VAE,
    },
    "sd21": {
        "text": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "vocab_size": 49408,
            "max_position_embeddings": 77,
        },
        "unet": {
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "sample_size": 96,
        },
        "vae": _VAE,
    },
}
"""The networks' configurations by name: Stable Diffusion 1.1 to 1.5, and 2.0 and 2.1 at 768 pixels."""


class Measured(NamedTuple):
    """One network call on one side. Seconds but for `flops`, the operations in the compiled program, and `peak_bytes`.

    peak_bytes: arguments, results and temporaries of the compiled program; None where it is not known.
    """

    compile: float
    call: float
    spread: float
    flops: float | None = None
    peak_bytes: int | None = None


def measure(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and the range between the fastest and the slowest, after one call to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), max(seconds) - min(seconds)


def run(configs: dict[str, Any], *, batch: int, latent: int, dtype: str, repeats: int) -> dict[str, Measured]:
    """Each network's call in JAX; `latent` is the side of the latents."""
    options = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
    unet, text, vae = configs["unet"], configs["text"], configs["vae"]
    key = jax.random.key(0)
    context = jax.random.normal(key, (batch, text["max_position_embeddings"], unet["cross_attention_dim"]), dtype)
    latents = jax.random.normal(key, (batch, latent, latent, unet.get("in_channels", 4)))
    ids = jnp.ones((batch, text["max_position_embeddings"]), jnp.int32)
    steps = jnp.full((batch,), 500.0)
    cases: dict[str, tuple[Callable[[], nnx.Module], Callable[..., Any], tuple[Any, ...]]] = {
        "text encoder": (
            lambda: CLIPTextModel(CLIPTextConfig.from_dict(text), **options),
            lambda network, ids: network(ids).last_hidden_state,
            (ids,),
        ),
        "UNet": (
            lambda: UNet2DCondition(UNetConfig.from_dict(unet), **options),
            lambda network, *inputs: network(*inputs),
            (latents, steps, context),
        ),
        "VAE decoder": (
            lambda: AutoencoderKL(VAEConfig.from_dict(vae), **options),
            lambda network, z: network.decode(z),
            (latents,),
        ),
    }
    results = {}
    for name, (make, apply, inputs) in cases.items():
        network = make()
        started = time.perf_counter()
        program = jax.jit(apply).lower(network, *inputs).compile()
        compiled = time.perf_counter() - started
        median, spread = measure(lambda: jax.block_until_ready(program(network, *inputs)), repeats)  # noqa: B023
        memory, cost = program.memory_analysis(), program.cost_analysis() or {}
        peak = memory and memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        results[name] = Measured(compiled, median, spread, cost.get("flops"), peak)
        del network, program
    return results


def run_diffusers(configs: dict[str, Any], *, batch: int, latent: int, dtype: str, repeats: int) -> dict[str, Measured]:
    """The same calls in torch, eager, on the same kind of device."""
    import torch
    import transformers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as TorchVAE
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as TorchUNet

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    precision = getattr(torch, dtype)
    unet, text, vae = configs["unet"], configs["text"], configs["vae"]
    context = torch.randn(batch, text["max_position_embeddings"], unet["cross_attention_dim"])
    latents = torch.randn(batch, unet.get("in_channels", 4), latent, latent)
    ids = torch.ones(batch, text["max_position_embeddings"], dtype=torch.int64)
    cases: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "text encoder": (
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
            lambda network: network(ids.to(device)),
        ),
        "UNet": (
            lambda: TorchUNet(**unet),
            lambda network: network(latents.to(device, precision), 500, context.to(device, precision)),
        ),
        "VAE decoder": (
            lambda: TorchVAE(**vae),
            lambda network: network.decode(latents.to(device, precision)),
        ),
    }
    results = {}
    for name, (make, apply) in cases.items():
        network = make().to(device, precision).eval()

        def call(network: Any = network, apply: Callable[[Any], Any] = apply) -> None:
            with torch.inference_mode():
                apply(network)
            if device == "cuda":
                torch.cuda.synchronize()

        results[name] = Measured(0.0, *measure(call, repeats))
        del network
    return results


def table(ours: dict[str, Measured], theirs: dict[str, Measured]) -> str:
    """The measurements as Markdown; the ratio is our time over theirs."""
    lines = ["| call | compile s | s | +- s | TFLOP/s | program GiB | diffusers s | ratio |", "| --- " * 8 + "|"]
    for name, m in ours.items():
        rate = f"{m.flops / m.call / 1e12:.3g}" if m.flops else ""
        peak = f"{m.peak_bytes / 2**30:.2f}" if m.peak_bytes else ""
        other = f"{theirs[name].call:.3f} | {m.call / theirs[name].call:.2f}" if name in theirs else " | "
        lines.append(f"| {name} | {m.compile:.1f} | {m.call:.3f} | {m.spread:.3f} | {rate} | {peak} | {other} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m sdjax.bench", description=__doc__)
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="sd15", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a network call (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of the image in pixels (default: the model's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: %(default)s)")
    parser.add_argument("--compare", choices=("diffusers",), help="run the same in torch; needs torch and diffusers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    options = parser.parse_args(argv)
    configs = ARCHITECTURES[options.model]
    latent = options.size // 8 if options.size else configs["unet"]["sample_size"]
    same = {"batch": options.batch_size, "latent": latent, "dtype": options.dtype, "repeats": options.repeats}
    device, size = jax.devices()[0].device_kind, latent * 8
    print(f"{options.model}, batch {options.batch_size}, {size} px, {options.dtype}, jax {jax.__version__}, {device}")
    ours = run(configs, **same)
    theirs = run_diffusers(configs, **same) if options.compare else {}
    print(table(ours, theirs))
    if options.json:
        values = {"sdjax": ours, "diffusers": theirs}
        parts = {side: {name: m._asdict() for name, m in found.items()} for side, found in values.items()}
        options.json.write_text(json.dumps({**same, "model": options.model, "device": device, **parts}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The programs that generate runs, their operations, what the command says, and the compilers that are here."""

import importlib.util
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdjax import plan
from sdjax.config import Stage, UNetConfig
from sdjax.denoise import SCAN_ROWS
from sdjax.flops import flops
from sdjax.generate import StableDiffusion
from sdjax.models.attention import attention, flash_attention
from sdjax.models.blocks import TransformerBlock
from sdjax.models.unet import UNet2DCondition
from sdjax.parallel import Devices
from sdjax.planning import gpu, tpu
from sdjax.planning.asked import asked
from sdjax.planning.chips import CHIPS, Chip
from sdjax.planning.compiled import Compiled, Memory
from sdjax.planning.estimate import Estimate, Plan
from sdjax.planning.fit import Fit, Fitted, Placed
from sdjax.planning.gpu import GPUS
from sdjax.planning.record import Recorded, record
from sdjax.request import Request
from sdjax.request_options import request_fields
from sdjax.spec import Spec
from tests import checkpoints, torch_models
from tests.planning.test_hlo import TEXT as PROGRAM
from tests.test_controls import network

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, which the tpu extra brings (0.7 GB): pip install 'sdjax[tpu]'",
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None,
    reason="needs XLA's compiler for GPUs, which the cuda extra brings (4 GB): pip install 'sdjax[cuda]'",
)
REQUEST = Request(prompt="a red circle", num_inference_steps=7)


def test_the_programs_recorded_are_those_that_run(tiny, monkeypatch):
    given = {}

    def spy(self, function, **options):
        program = jax.pmap(function, devices=self.devices, **options)

        def call(*arguments):
            shapes = jax.tree.leaves(jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), arguments))
            given.setdefault(getattr(function, "func", function).__name__, []).append(shapes)
            return program(*arguments)

        return call

    spec = Spec(tiny)
    programs = record(spec, REQUEST, 2)
    monkeypatch.setattr(Devices, "pmap", spy)
    StableDiffusion.from_pretrained(spec, batch_size=2, devices=jax.local_devices()[:1]).generate([REQUEST] * 2)
    assert {program.name: program.calls for program in programs} == {name: len(calls) for name, calls in given.items()}
    assert {len(calls) for calls in given.values()} == {1, -(-7 // SCAN_ROWS)}
    for program in programs:
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), program.arguments)
        assert given[program.name] == [jax.tree.leaves(shapes)] * program.calls


def test_a_second_pass_has_programs_of_its_own(tiny):
    programs = {program.name: program for program in record(Spec(tiny), replace(REQUEST, hires_scale=2), 2)}
    assert {"advance", "advance 2", "enlarge", "decode"} <= programs.keys()
    first, second = programs["advance"], programs["advance 2"]
    assert second.flops / second.calls > 3 * first.flops / first.calls


def test_flops_are_torchs_count():
    config = torch_models.UNET
    network = torch_models.torch_unet(config, 0)
    # torch counts no fused attention, but the products that it is made of.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 77, config["cross_attention_dim"]))
    ours = UNet2DCondition(UNetConfig.from_dict(config), rngs=None)
    shapes = [(2, 16, 16, 4), (2,), (2, 77, config["cross_attention_dim"])]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert flops(lambda network, *inputs: network(*inputs), ours, *arguments) == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_flops_of_loops_and_branches():
    def function(x, pick):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
        return jax.lax.cond(pick, lambda x: x @ x @ x, lambda x: x, x)

    assert flops(function, jnp.ones((4, 4)), True) == (3 + 2) * 2 * 4**3


@pytest.mark.parametrize(
    ("options", "asked", "deep"),
    [
        ({}, 8, 8),
        ({"guidance_scale": 1}, 4, 4),
        ({"guidance_end": 0.5}, 6, 6),
        ({"cache_interval": 2}, 8, 4),
        ({"cache_interval": 3, "guidance_scale": 1}, 4, 2),
    ],
)
def test_what_a_request_leaves_out_is_not_counted(tiny, options, asked, deep):
    """Of four rows with two prompts each."""
    (advance,) = [
        program
        for program in record(Spec(tiny), Request(prompt="a red circle", num_inference_steps=4, **options), 2)
        if program.name == "advance"
    ]
    assert advance.asked.sum() == asked
    assert advance.deep.sum() == deep
    assert advance.taken == {"asked": asked / advance.asked.size, "deep": deep / asked}
    call = flops(advance.function, *advance.arguments, taken={"asked": 1, "deep": 0})
    whole = flops(advance.function, *advance.arguments)
    assert 0 < call < whole if "cache_interval" in options else call == whole
    counted = flops(advance.function, *advance.arguments, taken=advance.taken)
    assert counted == pytest.approx((call * asked + (whole - call) * deep) / advance.asked.size, rel=1e-3)


def test_times_and_prices_are_made_of_cycles_calls_and_chips():
    toy = Chip("toy", 1e3, 64e3, 8, 0.5, 4e3, 1.0, 2.0, "2x2")
    text = PROGRAM.replace("flash", "flash_attention_8").replace("bf16[8,16]", "bf16[1,8,16]")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (16, 16))]
    recorded = Recorded("advance", jnp.matmul, tuple(shapes), (), shapes[0], calls=3)
    compiled = Compiled(Memory(arguments=10, results=5, aliased=3, temporaries=7, code=1), text)
    found = Plan(toy, Fitted(4, (Placed(recorded, compiled, 2**29),)))
    assert compiled.memory.total == 20
    # A loop of five turns: a product of 1,000 cycles, and a kernel of 4 x 2 heads x 8 x 8 x 8 operations at 32 a cycle.
    cycles = 5 * 1000 + 512 / 4 + 5 * 128
    assert found.seconds == 3 * cycles / 1e3
    told = plan.estimated(found, chips=2, price=2.0)
    rate = 2 * 4 / found.seconds
    assert told["estimated_images_per_second"] == pytest.approx(rate)
    assert told["estimated_dollars_per_1000_images"] == pytest.approx(2 * 2.0 / 3600 * 1000 / rate)
    assert told["estimated_share_of_peak"] == pytest.approx(3 * 2 * 8 * 16 * 16 / found.seconds / 64e3)
    head, _, row = plan.table(told["programs"]).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert (cells["calls a batch"], cells["s a batch"]) == ("3", f"{found.seconds:.1f}")
    assert cells["M cycles a call"] == f"{told['programs']['advance']['estimated_cycles'] / 1e6:.3g}"
    assert [plan._digits(value) for value in (0.00012345, 12.345, 999.6, 1e4)] == ["0.000123", "12.3", "1000", "10000"]


def test_a_plan_says_what_takes_time_and_is_not_at_its_default():
    request = {"width": "512", "sampler": "heun", "hires_scale": "2", "control_image": "a.png\nb.png", "seed": "3"}
    options = plan.parser().parse_args(["--controlnet=a", "--controlnet=b", "--vae-tiling", "--lora=style"])
    made, _ = Request.from_row({"prompt": "a photo", "guidance_scale": "5", **request})
    fields = {"width": 512, "sampler": "heun", "hires_scale": 2.0, "control_image": 2}
    assert asked(made, options) == fields | {"controlnet": 2, "vae_tiling": 1}
    for scale in (0, 1):
        plain = replace(REQUEST, guidance_scale=scale, hires_strength=0.5)  # of no second pass
        assert asked(plain, plan.parser().parse_args([])) == {"guidance_scale": 1}


def test_a_file_that_cannot_be_written_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "make", lambda *_: pytest.fail("compiled"))
    file = tmp_path / "plan.json"
    file.write_text("")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) not in (file, tmp_path / "closed"))
    (tmp_path / "closed").mkdir()
    for path in (file, tmp_path / "closed" / "plan.json"):
        assert plan.main(["--json", str(path)]) == 2
        assert capsys.readouterr().err == f"python -m sdjax.plan: --json: {path} may not be written to\n"


def test_what_the_command_refuses(capsys):
    assert plan.main(["--topology", "2by2"]) == 2
    assert "topology '2by2' is not chips by chips" in capsys.readouterr().err
    assert plan.main(["--topology", ""]) == 2
    assert "--topology is empty" in capsys.readouterr().err
    assert plan.main(["--model", "/nowhere"]) == 2
    assert plan.main(["--batch-size", "0"]) == 2
    assert "--batch-size=0 makes nothing; allowed is 1 or more" in capsys.readouterr().err
    assert plan.main(["--json", "/nowhere/plan.json"]) == 2
    assert "--json: there is no folder /nowhere" in capsys.readouterr().err
    assert plan.main(["--json", "."]) == 2
    assert "--json: . is a folder; give a file" in capsys.readouterr().err
    for price in ("-1", "nan", "inf"):
        assert plan.main([f"--price={price}"]) == 2
        assert "is no price; allowed is 0 or more" in capsys.readouterr().err
    assert plan.main(["--target", "l4", "--price", "1"]) == 2
    assert "--topology and --price are for TPUs; l4 is a GPU, whose time is not estimated" in capsys.readouterr().err


LIBTPU = "0.0.42.1"
SIZES = {"v4": 2, "v5e": 8, "v5p": 2, "v6e": 2}  # from 8 on convolutions are not cut up
CYCLES = {  # a call's estimated cycles, of the bundled model's scan and of a block; from that libtpu
    "v4": (5_392_306, 1_954_765),
    "v5e": (12_675_797, 2_966_734),
    "v5p": (16_910_415, 1_699_934),
    "v6e": (13_382_077, 1_687_812),
}


def within_5_percent(cycles: float, recorded: float) -> bool:
    """No more than was recorded; by another compiler anything."""
    return version("libtpu") != LIBTPU or cycles < 1.05 * recorded


def names_of(argv: list[str], monkeypatch) -> list[str]:
    """Names of the programs that the command would compile."""
    monkeypatch.setattr(Fit, "fitted", lambda fit, batch_size: fit.names)
    options = plan.parser().parse_args(argv)
    names, *_ = plan.make(options, Request.from_row({"prompt": "a photo", **request_fields(options)})[0])
    return names


@needs_libtpu
def test_a_controlnet_is_part_of_the_plan(tiny, tmp_path, monkeypatch):
    made = network(0, diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet"))
    safetensors.torch.save_file(made.state_dict(), tmp_path / "canny.safetensors")
    Image.new("RGB", (32, 32)).save(tmp_path / "edges.png")
    given = {"model": tiny, "controlnet": tmp_path / "canny.safetensors", "control-image": tmp_path / "edges.png"}
    names = names_of([f"--{name}={value}" for name, value in given.items()], monkeypatch)
    assert "embed_control" in names


@needs_libtpu
def test_a_refiner_is_part_of_the_plan(tmp_path, monkeypatch):
    base, refiner = tmp_path / "base", tmp_path / "refiner"
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    checkpoints.saved(base, checkpoints.pipeline_xl)
    checkpoints.saved(refiner, checkpoints.pipeline_xl, kind=kind, requires_aesthetics_score=True)
    names = names_of([f"--model={base}", f"--refiner={refiner}"], monkeypatch)
    assert {"encode_text 2", "start 2", "advance 2"} <= {*names}


@needs_libtpu
@pytest.mark.parametrize("target", CHIPS)
def test_the_bundled_model_on_every_chip(target, tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = ["--target", target, "--batch-size", str(SIZES[target]), "--num-inference-steps", "20"]
    assert plan.main([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["model"], found["steps"], found["asked"]) == ("bundled", 20, {})
    assert found["memory_bytes"] < found["usable_bytes"]
    assert 0 < found["estimated_share_of_peak"] < 1
    said = capsys.readouterr().out
    assert said.startswith(f"bundled, 64x64, 20 steps, bfloat16, on 4 x {target};")
    assert "Estimated, not measured" in said
    assert within_5_percent(found["programs"]["advance"]["estimated_cycles"], CYCLES[target][0])


@needs_libtpu
def test_a_draft_is_told_from_what_it_is_of():
    """By a layer too large for anything but main memory."""
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2**15, 2**13), (2**13, 2**15)])
    recorded = Recorded("layer", lambda x, kernel: jax.nn.gelu(x @ kernel) @ kernel.T, shapes, (), None, calls=1)
    draft, program = (tpu.target(CHIPS["v5e"]).compile(recorded, draft) for draft in (True, False))
    assert draft is not None
    assert program is not None
    assert 0.5 < draft.memory.temporaries / program.memory.temporaries < 2
    assert draft.text != program.text


@needs_libtpu
@pytest.mark.parametrize("target", CHIPS)
def test_the_attention_kernel_fits_every_chips_vector_memory(target):
    """Of Stable Diffusion 2.1 at 768 px: 9,216 tokens and 5 heads, more keys than one step takes."""
    tokens = jax.ShapeDtypeStruct((1, 9216, 5, 64), jnp.bfloat16)
    recorded = Recorded("kernel", flash_attention, (tokens,) * 3, (), None, calls=1)
    assert tpu.target(CHIPS[target]).compile(recorded) is not None


@needs_libtpu
@pytest.mark.parametrize("target", CHIPS)
def test_a_full_width_block_on_every_chip(target):
    """SDXL's widest resolution with the kernel, at batch 4: the compiler takes it, and it is mostly multiplication."""

    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": None}
    block = TransformerBlock(Stage(640, 1, (1,), 10, 2048, False), **half)
    arguments = block, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(4, 4096, 640), (4, 77, 2048)])
    recorded = Recorded("block", lambda block, *inputs: block(*inputs, (64, 64)), arguments, (), None, calls=1)
    compiled = tpu.target(CHIPS[target]).compile(recorded)
    assert compiled is not None
    found = Estimate(recorded, compiled, CHIPS[target])
    assert sum(found.cost.kernels.values()) == 1
    assert recorded.flops / found.seconds < CHIPS[target].peak
    multiplying = found.cost.capped["product"] + found.kernel_cycles
    assert multiplying > 0.5 * found.seconds * CHIPS[target].clock
    assert within_5_percent(found.cost.cycles.total(), CYCLES[target][1])


@needs_cuda
@pytest.mark.parametrize("target", GPUS)
def test_the_bundled_model_on_every_gpu(target, tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.main(["--target", target, "--batch-size", "8", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["memory_bytes"] < found["usable_bytes"]
    assert capsys.readouterr().out.startswith(f"bundled, 64x64, 30 steps, bfloat16, on one {target};")


@needs_cuda
def test_on_a_gpu_a_networks_convolutions_and_attention_are_cudnns_and_images_stay_as_they_are():
    half = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": None}
    network = UNet2DCondition(UNetConfig.from_dict(torch_models.UNET), **half)
    shapes = [(2, 64, 64, 4), (2,), (2, 77, torch_models.UNET["cross_attention_dim"])]
    arguments = network, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    recorded = Recorded("unet", lambda network, *inputs: network(*inputs), arguments, (), None, calls=1)
    compiled = gpu.target(GPUS["h100"]).compile(recorded)
    assert compiled is not None
    convolutions = [line for line in compiled.text.splitlines() if '"__cudnn$conv' in line]
    assert convolutions
    assert all("dim_labels=b01f_o01i->b01f" in line for line in convolutions)
    assert '"__cudnn$fmhaSoftmax"' in compiled.text


@needs_cuda
@pytest.mark.parametrize(("queries", "keys"), [(1024, 1024), (1024, 77), (77, 77)])
def test_attention_on_a_gpu_has_a_gradient(queries, keys):
    shapes = tuple(jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16) for tokens in (queries, keys, keys))
    gradient = jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert gpu.target(GPUS["h100"]).compile(Recorded("gradient", gradient, shapes, (), None, calls=1)) is not None


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(Path("configs/plans").glob("*.json")), ids=lambda file: file.stem)
def test_the_plans_of_the_presets_still_hold(file, tmp_path):
    """Minutes each."""
    recorded = json.loads(file.read_text())
    options = [f"--{name}={recorded[name]}" for name in ("model", "target", "dtype", "width", "height")]
    options += [f"--num-inference-steps={recorded['steps']}", f"--batch-size={recorded['batch_size']}"]
    assert recorded["asked"].keys() <= {"width", "height"}
    assert plan.main([*options, "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["memory_bytes"] < found["usable_bytes"]
    for name, program in recorded["programs"].items():
        assert found["programs"][name]["estimated_cycles"] < 1.05 * program["estimated_cycles"], name

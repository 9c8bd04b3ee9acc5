"""The arrows between the rooms run one way (ARCHITECTURE.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room, and everything of this project that its files may import; a file in two rooms keeps to both.
MAY_IMPORT = {
    "sdjax/__init__.py": {"sdjax.generate", "sdjax.request", "sdjax.spec", "sdjax.values"},
    "sdjax/values.py": set(),
    "sdjax/request.py": {"sdjax.values"},
    "sdjax/config": {"sdjax.config"},
    "sdjax/images.py": {"sdjax.request", "sdjax.values"},
    "sdjax/inputs.py": {"sdjax.retrying", "sdjax.values"},
    "sdjax/canvas.py": {"sdjax.inputs", "sdjax.request", "sdjax.values"},
    "sdjax/parallel.py": set(),
    "sdjax/architectures.py": {"sdjax.family", "sdjax.parts", "sdjax.weights"},
    "sdjax/files.py": {"sdjax.retrying", "sdjax.values"},
    "sdjax/console.py": {"sdjax.retrying"},
    "sdjax/retrying.py": set(),
    "sdjax/compile_cache.py": {"sdjax.files"},
    "sdjax/flops.py": set(),
    "sdjax/models": {"sdjax.config", "sdjax.models"},
    "sdjax/sampling": {"sdjax.sampling"},
    "sdjax/weights": {"sdjax.weights", "sdjax.config", "sdjax.files"},
    "sdjax/prompts.py": {"sdjax.values"},
    "sdjax/compel.py": {"sdjax.prompts", "sdjax.values"},
    "sdjax/vocabulary.py": {"sdjax.files"},
    "sdjax/text.py": {"sdjax.compel", "sdjax.prompts", "sdjax.values", "sdjax.vocabulary", "sdjax.weights"},
    "sdjax/family.py": {"sdjax.config", "sdjax.request", "sdjax.values", "sdjax.weights"},
    "sdjax/controls.py": {
        *("sdjax.config", "sdjax.family", "sdjax.inputs", "sdjax.request", "sdjax.values", "sdjax.weights"),
    },
    "sdjax/tables.py": {"sdjax.request", "sdjax.sampling", "sdjax.values"},
    "sdjax/parts.py": {
        *("sdjax.controls", "sdjax.family", "sdjax.sampling", "sdjax.text", "sdjax.values", "sdjax.weights"),
    },
    "sdjax/spec.py": {
        *("sdjax.canvas", "sdjax.controls", "sdjax.parts", "sdjax.prompts", "sdjax.request", "sdjax.sampling"),
        *("sdjax.tables", "sdjax.text", "sdjax.values"),
    },
    "sdjax/postprocess.py": {"sdjax.values"},
    "sdjax/batch.py": {"sdjax.canvas", "sdjax.request", "sdjax.sampling", "sdjax.values"},
    "sdjax/programs.py": {"sdjax.models", "sdjax.sampling"},
    "sdjax/networks.py": {"sdjax.config", "sdjax.models", "sdjax.parallel", "sdjax.spec", "sdjax.weights"},
    "sdjax/denoise.py": {
        *("sdjax.batch", "sdjax.parallel", "sdjax.programs", "sdjax.request", "sdjax.sampling", "sdjax.spec"),
        "sdjax.text",
    },
    "sdjax/generate.py": {
        *("sdjax.batch", "sdjax.canvas", "sdjax.denoise", "sdjax.family", "sdjax.files", "sdjax.networks"),
        *("sdjax.parallel", "sdjax.parts", "sdjax.postprocess", "sdjax.programs", "sdjax.request", "sdjax.spec"),
        *("sdjax.values", "sdjax.weights"),
    },
    "sdjax/planning": {
        *("sdjax.flops", "sdjax.generate", "sdjax.models", "sdjax.networks", "sdjax.parallel", "sdjax.planning"),
        *("sdjax.programs", "sdjax.request", "sdjax.sampling", "sdjax.spec", "sdjax.values"),
    },
    "sdjax/planning/asked.py": {"sdjax.request", "sdjax.values"},
    "sdjax/benchmark": {
        *("sdjax.benchmark", "sdjax.compile_cache", "sdjax.generate", "sdjax.images", "sdjax.networks"),
        *("sdjax.parallel", "sdjax.planning", "sdjax.request", "sdjax.spec", "sdjax.weights"),
    },
    "sdjax/encode.py": {"sdjax.models", "sdjax.networks", "sdjax.parallel", "sdjax.spec"},
    "sdjax/training": {
        *("sdjax.config", "sdjax.console", "sdjax.controls", "sdjax.family", "sdjax.files", "sdjax.generate"),
        *("sdjax.images", "sdjax.inputs", "sdjax.retrying"),
        *("sdjax.models", "sdjax.parallel", "sdjax.parts", "sdjax.request", "sdjax.sampling", "sdjax.spec"),
        *("sdjax.text", "sdjax.training", "sdjax.values", "sdjax.weights"),
    },
    "sdjax/training/config.py": set(),
    "sdjax/training/scenes.py": set(),
    "sdjax/training/samples.py": {"sdjax.retrying"},
    "sdjax/training/framing.py": {"sdjax.inputs", "sdjax.training.samples", "sdjax.values"},
    "sdjax/training/buckets.py": {"sdjax.files"},
    "sdjax/training/stored.py": {
        *("sdjax.files", "sdjax.training.buckets", "sdjax.training.framing", "sdjax.training.samples"),
    },
    "sdjax/training/checker.py": {"sdjax.training.scenes"},
    "sdjax/describe.py": {"sdjax.family", "sdjax.request", "sdjax.sampling", "sdjax.spec", "sdjax.weights"},
    "sdjax/model_options.py": set(),
    "sdjax/request_options.py": {"sdjax.request"},
    "sdjax/sample.py": {
        *("sdjax.compile_cache", "sdjax.console", "sdjax.describe", "sdjax.files", "sdjax.generate"),
        *("sdjax.images", "sdjax.model_options", "sdjax.parts", "sdjax.planning", "sdjax.request"),
        *("sdjax.request_options", "sdjax.spec", "sdjax.values"),
    },
    "sdjax/train.py": {
        *("sdjax.compile_cache", "sdjax.console", "sdjax.files", "sdjax.request_options", "sdjax.training"),
    },
    "sdjax/plan.py": {
        *("sdjax.architectures", "sdjax.console", "sdjax.files", "sdjax.model_options", "sdjax.planning"),
        *("sdjax.request", "sdjax.request_options", "sdjax.spec", "sdjax.values"),
    },
    "sdjax/bench.py": {
        *("sdjax.architectures", "sdjax.benchmark", "sdjax.console", "sdjax.files", "sdjax.request"),
        *("sdjax.request_options", "sdjax.spec", "sdjax.values"),
    },
    "pipelines": {
        *("pipelines", "sdjax.compile_cache", "sdjax.console", "sdjax.encode", "sdjax.files", "sdjax.generate"),
        *("sdjax.images", "sdjax.inputs", "sdjax.model_options", "sdjax.parts", "sdjax.planning.asked"),
        *("sdjax.planning.chips", "sdjax.request", "sdjax.request_options", "sdjax.retrying", "sdjax.spec"),
        *(
            "sdjax.training.encoded",
            "sdjax.training.framing",
            "sdjax.training.samples",
            "sdjax.values",
            "sdjax.weights",
        ),
    },
}
NOT_IN_SDJAX = {"torch", "diffusers", "apache_beam", "pipelines"}
NO_JAX = ("sdjax/config", "sdjax/planning/asked.py", "sdjax/planning/chips.py", "sdjax/training/config.py") + tuple(
    f"sdjax/{name}.py"
    for name in (
        *("__init__", "canvas", "compel", "console", "files", "images", "inputs", "model_options", "prompts"),
        *("request", "request_options", "retrying", "values"),
    )
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, TYPE_CHECKING blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def within(module: str, rooms: set[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_every_file_is_in_a_room_and_every_room_is_there():
    assert [room for room in MAY_IMPORT if not files(room)] == []
    named = {file for room in MAY_IMPORT for file in files(room)}
    assert {*files("sdjax"), *files("pipelines")} - named == set()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    for file in files(room):
        for module in imports(file):
            if within(module, {"sdjax", "pipelines", "tests"}):
                assert within(module, MAY_IMPORT[room]), f"{file.relative_to(ROOT)} imports {module}"


def test_sdjax_imports_no_beam_and_no_torch():
    for file in sorted((ROOT / "sdjax").rglob("*.py")):
        # The bench alone may compare itself with diffusers, where that is installed.
        allowed = {"torch", "diffusers"} if file.name == "torch_side.py" else set()
        for module in imports(file):
            assert not within(module, NOT_IN_SDJAX - allowed), f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("room", NO_JAX)
def test_what_needs_no_devices_imports_no_jax(room):
    for file in files(room):
        assert not {module for module in imports(file) if within(module, {"jax", "flax"})}, file


def test_importing_sdjax_waits_for_no_jax():
    code = "import sys, sdjax; sdjax.Request(prompt='a'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

"""Checkpoints in the diffusers layout: a folder, a hub id or any fsspec URL, to parameters and back.

A module's path is its checkpoint key (`down_blocks.0.resnets.0.conv1`), so no table of names stands between the two:
`fill` walks a module that was built abstractly and takes each leaf's tensor.
"""

import contextlib
import hashlib
import itertools
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import fsspec
import jax
import numpy as np
from flax import nnx

from sdjax.files import below, is_file
from sdjax.weights import hub, names, torch_zip
from sdjax.weights.safetensors import CheckpointError, Entry, read_header, read_tensors, write_tensors

Module = TypeVar("Module", bound=nnx.Module)
Place = Callable[[np.ndarray], jax.Array | np.ndarray]
Edit = Callable[[str, np.ndarray], np.ndarray]
"""A checkpoint's tensor, in its layout, as it should be instead, by its key."""

CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}
"""What model_index.json calls each component: its library and its class."""

# What diffusers and transformers call a component's weights, by their ending.
_STEMS = {
    ".safetensors": ("diffusion_pytorch_model", "model"),
    ".bin": ("diffusion_pytorch_model", "pytorch_model"),
}
_TEXTS = (".json", ".txt")
_VARIANTS = (None, "fp16", "bf16", "fp32")  # in the order in which they are taken where none is asked for
_SHARD = re.compile(r"-\d+-of-\d+(?=\.)")
_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the components that are read; no safety checker


class Checkpoint:
    """A checkpoint that can be read: its configurations, its files' fingerprint, its tensors.

    Args:
        source: a folder, a hub id (`org/name` or `org/name@revision`, through huggingface_hub's cache) or an fsspec URL
            (`gs://bucket/folder`).
        variant: which of several weight files to read (`fp16`), for each component that has it, and the plain one for
            the others. None takes the plain one, else the one that is there.
        allow_pickle: whether a component without safetensors may be read of PyTorch's own files; see `torch_zip`.

    Raises:
        CheckpointError: nothing is there, it is not in the diffusers layout, or no component has the variant.
    """

    first: ClassVar[str] = "model_index.json"
    kind: ClassVar[str] = "a diffusers checkpoint folder"

    def __init__(
        self, source: str | os.PathLike[str], *, variant: str | None = None, allow_pickle: bool = False
    ) -> None:
        self.source, self.variant = os.fspath(source), variant
        self._endings = tuple(_STEMS) if allow_pickle else (".safetensors",)
        folder = os.path.expanduser(self.source)
        if "://" not in folder and not os.path.isdir(folder):
            folder = hub.folder(folder, self._wanted)
        self._fs, self._root = fsspec.core.url_to_fs(folder)
        if not is_file(self._fs, self._path(self.first)):
            raise CheckpointError(f"{self.source} holds no {self.first}; {self.kind} has one")
        self._check_variant()

    def _check_variant(self) -> None:
        """Raise CheckpointError where no component is of the variant that was asked for."""
        components = (self._weights(component, self._files, [self.variant]) for component in _WEIGHTS)
        if self.variant and not any(components):
            raise CheckpointError(f"{self.source} has no safetensors file of the variant {self.variant!r}")

    def _weights(
        self, component: str, paths: Collection[str], variants: Iterable[str | None] | None = None
    ) -> str | None:
        """The file of the first format and variant that holds a component, or the index that names its shards."""
        if variants is None:
            variants = _VARIANTS if self.variant is None else (self.variant, None)
        for ending, variant in itertools.product(self._endings, variants):
            dot = f".{variant}" if variant else ""
            for stem in _STEMS[ending]:
                indices = (f"{stem}{ending}.index{dot}.json", f"{stem}{dot}{ending}.index.json")
                for name in (f"{stem}{dot}{ending}", *indices):
                    if (path := posixpath.join(component, name)) in paths:
                        return path
        return None

    def _wanted(self, paths: list[str]) -> list[str]:
        """Which files of a repository on the hub to have."""
        texts = [path for path in paths if path.startswith(("scheduler/", "tokenizer")) and "/" in path]
        return ["model_index.json", *texts, *(path for name in _WEIGHTS for path in self._wanted_of(name, paths))]

    def _wanted_of(self, component: str, paths: list[str]) -> list[str]:
        """Which of them hold a component."""
        found = self._weights(component, paths)
        if found is None:
            return [posixpath.join(component, "config.json")]
        ending = next(ending for ending in self._endings if ending in found)
        whole = found.replace(f"{ending}.index", "").removesuffix(".json") + ending
        shards = [path for path in paths if _SHARD.search(path) and _SHARD.sub("", path) == whole]
        return [posixpath.join(component, "config.json"), found, *(shards if found.endswith(".json") else [])]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_files"}

    def _path(self, *names: str) -> str:
        return posixpath.join(self._root, *names)

    def _read(self, path: str) -> bytes:
        """A small file's content. Raises FileNotFoundError."""
        return self._fs.cat_file(self._path(path))

    @cached_property
    def _files(self) -> list[str]:
        """Every file below the root, as a relative path."""
        prefix = self._root.rstrip("/") + "/"
        return [path.removeprefix(prefix) for path in below(self._fs, self._root)]

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json: the pipeline's class and each component's library and class."""
        return self.json("model_index.json")

    def json(self, *names: str) -> dict[str, Any]:
        """A JSON file's object."""
        try:
            value = json.loads(self._read(posixpath.join(*names)))
        except FileNotFoundError:
            raise CheckpointError(f"{self.source} lacks {'/'.join(names)}") from None
        except (ValueError, RecursionError):
            raise CheckpointError(f"{'/'.join(names)} of {self.source} is not JSON") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{'/'.join(names)} of {self.source} is not a JSON object")
        return value

    def texts(self, folder: str) -> dict[str, str]:
        """The small text files of a folder (a tokenizer, a scheduler), by their path in the checkpoint."""
        paths = [path for path in self._files if posixpath.dirname(path) == folder and path.endswith(_TEXTS)]
        try:
            return {path: self._read(path).decode("utf-8") for path in paths}
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder} of {self.source} has a text file that is not UTF-8") from None

    @cached_property
    def name(self) -> str:
        """The last part of the source: what metadata calls the model."""
        name = posixpath.basename(self.source.rstrip("/"))
        return os.path.basename(os.path.abspath(self._root)) if name in (".", "..", "~") else name

    def fingerprint(self, components: Iterable[str]) -> str:
        """SHA-256 over the names and contents of every file that the components are read from."""
        digest = hashlib.sha256()
        for component in sorted(components):
            weights = self._weight_files(component) if self._weights(component, self._files) else []
            others = [file for file in self._files if posixpath.dirname(file) == component and file.endswith(_TEXTS)]
            for file in sorted({*weights, *others}):
                with self._fs.open(self._path(file), "rb") as stream:
                    content = hashlib.file_digest(stream, "sha256")  # pyright: ignore[reportArgumentType]
                digest.update(f"{file}\0{content.hexdigest()}\n".encode())
        return digest.hexdigest()

    def tensors(self, component: str) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor of a component with its key, one at a time, in the dtype of the file."""
        for file in self._weight_files(component):
            with self._fs.open(self._path(file), "rb", block_size=2**23) as stream:
                yield from read_tensors(stream, _read_header(stream, file))

    def entries(self, component: str) -> dict[str, Entry]:
        """Where each tensor of a component lies in its file, and its shape and dtype; reads headers only."""
        found: dict[str, Entry] = {}
        for file in self._weight_files(component):
            with self._fs.open(self._path(file), "rb") as stream:
                found |= _read_header(stream, file)
        return found

    def _weight_files(self, component: str) -> list[str]:
        """The files that hold a component: one, or the shards that its index names."""
        files, folder = set(self._files), posixpath.join(component, "")
        found = self._weights(component, files)
        if found is not None:
            return self._shards(component, found.removeprefix(folder), files) if found.endswith(".json") else [found]
        what = posixpath.join(self.source, component).rstrip("/")
        pickles = [file for file in files if file.startswith(folder) and file.endswith((".bin", ".ckpt", ".pt"))]
        if pickles:
            raise CheckpointError(
                f"{what} has its weights as a pickle ({min(pickles)}), a format that can carry code; with allow_pickle "
                f"({torch_zip.ALLOWED_BY}) {' and '.join(stem + '.bin' for stem in _STEMS['.bin'])} are read all the "
                "same, by a reader that runs none"
            )
        asked = f" of the variant {self.variant!r}, and no plain one" if self.variant else ""
        raise CheckpointError(f"{what} has no safetensors file{asked}")

    def _shards(self, component: str, index: str, files: set[str]) -> list[str]:
        weight_map = self.json(component, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{component}/{index} of {self.source} has no weight_map of files' names")
        shards = sorted({posixpath.join(component, shard) for shard in weight_map.values()})
        for shard in shards:
            if shard not in files:
                raise CheckpointError(f"{self.source} lacks {shard}, which {component}/{index} names")
        return shards


class Component(Checkpoint):
    """A network in a folder of its own (a ControlNet, a VAE): a checkpoint whose one component is `""`."""

    first = "config.json"
    kind = "a network's folder in the diffusers layout"

    def _check_variant(self) -> None:
        pass  # it is that of the checkpoint which the network goes with

    def _wanted(self, paths: list[str]) -> list[str]:
        return self._wanted_of("", paths)


@contextlib.contextmanager
def as_folder(texts: Mapping[str, str]) -> Iterator[Path]:
    """Text files, by their path in a checkpoint, as one folder on this machine, while the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        for path, text in texts.items():
            Path(folder, posixpath.basename(path)).write_text(text, encoding="utf-8")
        yield Path(folder)


def _read_header(stream: IO[bytes], file: str) -> dict[str, Entry]:
    """Where the tensors of a file lie, of whichever format its name says."""
    return torch_zip.read_header(stream, file) if file.endswith(".bin") else read_header(stream, file)


def _flat(module: nnx.Module) -> dict[str, tuple[tuple, nnx.Variable]]:
    """A module's parameters by checkpoint key, each with its path in the module."""
    return {_key(path): (path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def _key(path: tuple) -> str:
    *module, leaf = map(str, path)
    return ".".join([*module, "bias" if leaf == "bias" else "weight"])


def _to_flax(tensor: np.ndarray, leaf: str) -> np.ndarray:
    """A checkpoint's tensor as the leaf has it: kernels with their output axis last."""
    if leaf != "kernel":
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _to_torch(array: np.ndarray, leaf: str) -> np.ndarray:
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def fill(
    module: Module,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    what: str,
    place: Place = jax.device_put,
    edit: Edit = lambda key, tensor: tensor,
) -> Module:
    """Give a module that was built abstractly its parameters, in the dtype that it was built with.

    Args:
        module: built with `rngs=None`; it is changed and returned.
        tensors: key and array in the checkpoint's layout; used one at a time, so that one copy is held.
        what: what errors call the checkpoint.
        place: puts an array onto the devices.
        edit: changes tensors before they are put there.

    Raises:
        CheckpointError: keys that are missing or left over, or a tensor of another shape, each by name.
    """
    wanted = _flat(module)
    surplus, filled = [], {}
    for key, tensor in tensors:
        key = names.current(key, wanted)
        if key is None:
            continue
        if key not in wanted:
            surplus.append(key)
            continue
        path, leaf = wanted[key]
        array = _to_flax(edit(key, names.squeezed(tensor, leaf.ndim)), path[-1])
        if array.shape != leaf.shape:
            expected = list(shapes_of(module)[key])
            raise CheckpointError(
                f"{what}: {key} has shape {list(tensor.shape)}; the configuration makes it {expected}"
            )
        filled[path] = leaf.replace(place(np.ascontiguousarray(array, leaf.dtype)))
    missing = [key for key, (path, _) in wanted.items() if path not in filled]
    for keys, problem in ((missing, "lacks"), (surplus, "has keys that the configuration does not:")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{what} {problem} {', '.join(keys[:3])}{more}")
    nnx.update(module, nnx.from_flat_state(filled))
    return module


def shapes_of(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's parameters as the checkpoint has them, whether it was filled or not."""
    return {
        key: _to_torch(np.broadcast_to(np.int8(0), leaf.shape), path[-1]).shape
        for key, (path, leaf) in _flat(module).items()
    }


def tensors_of(module: nnx.Module, dtype: Any = None) -> dict[str, np.ndarray]:
    """A module's parameters as the checkpoint has them, cast to `dtype` where one is given."""
    return {
        key: np.ascontiguousarray(_to_torch(np.asarray(leaf[...]), path[-1]), dtype)
        for key, (path, leaf) in _flat(module).items()
    }


def write(
    folder: Path,
    *,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, np.ndarray]],
    texts: Mapping[str, str],
) -> None:
    """Write a checkpoint in the diffusers layout.

    Args:
        folder: a local folder, which is made.
        index: model_index.json.
        configs: each component's config.json by its folder.
        weights: each network's tensors by its folder.
        texts: other files (tokenizer, scheduler) by their path in the folder.
    """
    files = {"model_index.json": json.dumps(index, indent=2, sort_keys=True) + "\n", **texts}
    files |= {
        f"{name}/config.json": json.dumps(config, indent=2, sort_keys=True) + "\n" for name, config in configs.items()
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, tensors in weights.items():
        write_weights(folder, name, tensors)


def write_weights(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a network's tensors into its folder of a checkpoint, which is there."""
    stem = _STEMS[".safetensors"][name.startswith("text_encoder")]
    write_tensors(folder / name / f"{stem}.safetensors", tensors)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of one that does not exist yet once the context ends well.

    Raises:
        FileExistsError: `folder` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

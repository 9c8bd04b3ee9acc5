"""Checkpoints, ControlNets and VAEs in one file, as they were first published and as most fine-tunes are passed on."""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import fsspec
import numpy as np

from sdjax.config import ConfigError
from sdjax.files import is_file
from sdjax.weights import families, hub, ldm, torch_zip
from sdjax.weights.checkpoint import Checkpoint, Component
from sdjax.weights.safetensors import CheckpointError, Entry, read_header_and_metadata, read_tensors

SUFFIXES = (".safetensors", *torch_zip.SUFFIXES)
CLIP = "openai/clip-vit-large-patch14"
_VOCABULARY = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"  # both of them in one, as transformers writes since version 5
# Training leftovers inside a component: a loss's network, an average, CLIP's other half.
_LEFTOVER = re.compile(r"(^|\.)(loss|model_ema|visual|vision_model|visual_projection)\.|(^|\.)(logit_scale|attn_mask)$")


def is_single_file(source: str | os.PathLike[str]) -> bool:
    """Whether a source's name is that of a file rather than of a folder."""
    return hub.path_of(os.fspath(source)).endswith(SUFFIXES)


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    variant: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """The checkpoint at a source: a `SingleFile` where the name ends like one, else a folder.

    Args:
        source, variant, allow_pickle: see `Checkpoint`.
        tokenizer, prediction_type: see `SingleFile`; a folder says itself what they are.
    """
    if is_single_file(source):
        return SingleFile(source, tokenizer=tokenizer, prediction_type=prediction_type, allow_pickle=allow_pickle)
    for name, value in (("tokenizer", tokenizer), ("prediction_type", prediction_type)):
        if value is not None:
            raise CheckpointError(f"{name} is for single files; {source} is a folder, which says it itself")
    return Checkpoint(source, variant=variant, allow_pickle=allow_pickle)


def open_controlnet(source: str | os.PathLike[str], *, variant: str | None, allow_pickle: bool) -> Checkpoint:
    """The ControlNet at a source, whose one component is `""`; see `open_checkpoint`."""
    if is_single_file(source):
        return ControlNetFile(source, allow_pickle=allow_pickle)
    return Component(source, variant=variant, allow_pickle=allow_pickle)


def open_vae(
    source: str | os.PathLike[str], own: Mapping[str, Any], *, variant: str | None, allow_pickle: bool
) -> Checkpoint:
    """The VAE at a source, whose one component is `""`; see `VAEFile` and `open_checkpoint`."""
    if is_single_file(source):
        return VAEFile(source, own, allow_pickle=allow_pickle)
    return Component(source, variant=variant, allow_pickle=allow_pickle)


class _File(Checkpoint):
    """A file of tensors, seen as the folder in the diffusers layout that it would be.

    Args:
        source: a path, an fsspec URL, or a file's address on huggingface.co, which goes through the hub's cache.
        allow_pickle: whether one of PyTorch's own may be read; see `torch_zip`.

    Raises:
        CheckpointError: the file cannot be read, or is nothing that is recognised.
    """

    def __init__(self, source: str | os.PathLike[str], *, allow_pickle: bool = False) -> None:
        self.source, self.variant = os.fspath(source), None
        self._fs, self._root = fsspec.core.url_to_fs(hub.file(self.source))
        if not is_file(self._fs, self._root):
            raise CheckpointError(f"{self.source} is no file")
        with self._fs.open(self._root, "rb") as stream:
            metadata: Mapping[str, str] = {}
            if not hub.path_of(self._root).endswith(torch_zip.SUFFIXES):
                self._entries, metadata = read_header_and_metadata(stream, self.source)
            elif allow_pickle:
                self._entries = torch_zip.read_header(stream, self.source)
            else:
                raise CheckpointError(
                    f"{self.source} is a pickle, a format that can carry code; with allow_pickle "
                    f"({torch_zip.ALLOWED_BY}) it is read all the same, by a reader that runs none"
                )
        try:
            shapes = {key: entry.shape for key, entry in self._entries.items()}
            self._layout = self._recognise(shapes, metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{self.source} {error}") from None
        except ConfigError as error:
            raise CheckpointError(f"{self.source} has shapes that cannot be run: {error}") from None
        except (IndexError, ValueError):
            raise CheckpointError(f"{self.source} has a tensor of more or fewer axes than such networks have") from None

    def _recognise(self, shapes: families.Shapes, metadata: Mapping[str, str]) -> families.Layout:
        """What it is. Raises CheckpointError."""
        raise NotImplementedError

    @cached_property
    def name(self) -> str:
        return posixpath.basename(hub.path_of(self._root)).rpartition(".")[0]

    @cached_property
    def _files(self) -> list[str]:
        return sorted(self._layout.files)

    def _read(self, path: str) -> bytes:
        if path not in self._layout.files:
            raise FileNotFoundError(path)
        return json.dumps(self._layout.files[path]).encode()

    def fingerprint(self, components: Iterable[str]) -> str:
        """SHA-256 over the file and over what was added to it."""
        digest = hashlib.sha256()
        with self._fs.open(self._root, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())  # pyright: ignore[reportArgumentType]
        for path in self._files:
            digest.update(f"{path}\0{hashlib.sha256(self._read(path)).hexdigest()}\n".encode())
        return digest.hexdigest()

    def entries(self, component: str) -> dict[str, Entry]:
        part = self._layout.parts.get(component)
        if part is None:
            raise CheckpointError(f"{self.source} has no {component}")
        found = {k.removeprefix(part.prefix): e for k, e in self._entries.items() if k.startswith(part.prefix)}
        return {key: entry for key, entry in found.items() if key not in part.unused and not _LEFTOVER.search(key)}

    def tensors(self, component: str) -> Iterator[tuple[str, np.ndarray]]:
        table = self._layout.parts[component].table
        with self._fs.open(self._root, "rb", block_size=2**23) as stream:
            tensors = read_tensors(stream, self.entries(component))
            yield from tensors if table is None else ldm.translated(tensors, table)


class SingleFile(_File):
    """A file in the original layout of latent diffusion.

    Training leftovers (an average's copy of the weights, optimizers, schedules) are passed over.

    Args:
        source, allow_pickle: see `_File`.
        tokenizer: a folder, hub id or URL with CLIP's vocab.json and merges.txt, which such a file does not hold; by
            default they are taken from openai/clip-vit-large-patch14 on the hub.
        prediction_type: `epsilon` or `v_prediction`; asked for only where neither the file nor its family says it.

    Raises:
        CheckpointError: the file cannot be read, or is no Stable Diffusion.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self._tokenizer = CLIP if tokenizer is None else os.path.expanduser(os.fspath(tokenizer))
        self._prediction_type = prediction_type
        super().__init__(source, allow_pickle=allow_pickle)

    def _recognise(self, shapes: families.Shapes, metadata: Mapping[str, str]) -> families.Layout:
        return families.recognise(shapes, metadata, self._prediction_type)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_vocabulary"}

    @cached_property
    def _files(self) -> list[str]:
        names = (*_VOCABULARY, "tokenizer_config.json")
        folders = [encoder.replace("text_encoder", "tokenizer") for encoder in self._layout.encoders]
        tokenizers = [f"{folder}/{name}" for folder in folders for name in names]
        return sorted([*self._layout.files, *tokenizers])

    def _read(self, path: str) -> bytes:
        folder, _, name = path.rpartition("/")
        if path in self._layout.files or path not in self._files:
            return super()._read(path)
        if name in _VOCABULARY:
            return self._vocabulary[name]
        encoder = folder.replace("tokenizer", "text_encoder")
        # OpenCLIP pads with the token whose id is 0, CLIP with the one that ends a text.
        special = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
        special["pad"] = "!" if self._layout.encoders[encoder].open_clip else special["eos"]
        length = self._layout.files[f"{encoder}/config.json"]["max_position_embeddings"]
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
        return json.dumps(config | {f"{kind}_token": token for kind, token in special.items()}).encode()

    @cached_property
    def _vocabulary(self) -> dict[str, bytes]:
        """vocab.json and merges.txt of CLIP's byte-pair encoding."""
        what = f"{self.source} holds no tokenizer; give tokenizer, a folder with CLIP's vocab.json and merges.txt"
        folder, names = self._tokenizer, (*_VOCABULARY, _WHOLE)
        try:
            if "://" not in folder and not os.path.isdir(folder):
                folder = hub.folder(folder, lambda paths: [path for path in paths if path.endswith(names)])
        except CheckpointError as error:
            raise CheckpointError(f"{what} ({error})") from None
        fs, root = fsspec.core.url_to_fs(folder)
        for place in (root, posixpath.join(root, "tokenizer")):
            paths = {name: posixpath.join(place, name) for name in names}
            if all(fs.isfile(paths[name]) for name in _VOCABULARY):
                return {name: fs.cat_file(paths[name]) for name in _VOCABULARY}
            if fs.isfile(paths[_WHOLE]):
                return _split_tokenizer(fs.cat_file(paths[_WHOLE]), paths[_WHOLE])
        raise CheckpointError(f"{what} ({folder} has none)")


class ControlNetFile(_File):
    """A ControlNet's file, in the original layout or in that of diffusers."""

    def _recognise(self, shapes: families.Shapes, metadata: Mapping[str, str]) -> families.Layout:
        return families.recognise_controlnet(shapes, self.name)


class VAEFile(_File):
    """A VAE's file in the original layout, or a checkpoint's of which no more is used.

    Args:
        source, allow_pickle: see `_File`.
        own: config.json of the VAE whose place it is to take, which says how the latents are scaled.
    """

    def __init__(self, source: str | os.PathLike[str], own: Mapping[str, Any], *, allow_pickle: bool = False) -> None:
        self._own = own
        super().__init__(source, allow_pickle=allow_pickle)

    def _recognise(self, shapes: families.Shapes, metadata: Mapping[str, str]) -> families.Layout:
        return families.recognise_vae(shapes, self._own)


def _split_tokenizer(data: bytes, path: str) -> dict[str, bytes]:
    """The vocabulary and the merges inside a tokenizer.json, as the two files that they were."""
    try:
        model = json.loads(data)["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} has no byte-pair encoding") from None

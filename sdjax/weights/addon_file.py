"""Small files that change a checkpoint (LoRAs, textual inversions), wherever they lie."""

import hashlib
import os
import posixpath
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import fsspec
import numpy as np

from sdjax.weights import hub, torch_zip
from sdjax.weights.safetensors import CheckpointError, read_header_and_metadata, read_tensors


class AddonFile:
    """A file of tensors, of which only the header is read until they are asked for.

    Args:
        source: a path, fsspec URL or address on huggingface.co of a file; or a folder or hub id that holds it.
        names: what the file may be called in a folder, in the order in which they are looked for; else a folder's only
            safetensors file is taken.
        allow_pickle: whether PyTorch's own files may be read; see `torch_zip`.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str], names: Sequence[str], *, allow_pickle: bool = False) -> None:
        self.source = os.fspath(source)
        place = hub.file(self.source)
        suffixes = (".safetensors", ".bin", *torch_zip.SUFFIXES)
        if "://" not in place and not os.path.exists(place) and not place.endswith(suffixes):
            place = hub.folder(place, ["*.safetensors", "*.json"])
        self._fs, root = fsspec.core.url_to_fs(place)
        self._path = self._inside(root, names) if self._fs.isdir(root) else root
        if not self._fs.isfile(self._path):
            raise CheckpointError(f"{self.source} is no file")
        with self._fs.open(self._path, "rb") as stream:
            if self._path.endswith(".safetensors"):
                self.entries, self.metadata = read_header_and_metadata(stream, self.source)
            elif allow_pickle:
                self.entries, self.metadata = torch_zip.read_header(stream, self.source), {}
            else:
                raise CheckpointError(f"{self.source} is no safetensors file; a pickle is read with allow_pickle only")

    def _inside(self, folder: str, names: Sequence[str]) -> str:
        paths = [posixpath.join(folder, name) for name in names]
        there = [path for path in paths if self._fs.isfile(path)]
        there = there or [path for path in self._fs.ls(folder, detail=False) if path.endswith(".safetensors")]
        if len(there) == 1 or (there and there[0] in paths):
            return there[0]
        raise CheckpointError(f"{self.source} has {len(there)} safetensors files; name one, or {' or '.join(names)}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "digest"}

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return posixpath.basename(self._path).rpartition(".")[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, in hex."""
        with self._fs.open(self._path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]

    def beside(self, name: str) -> bytes | None:
        """The content of another file of the same folder, or None where there is none."""
        path = posixpath.join(posixpath.dirname(self._path), name)
        return self._fs.cat_file(path) if self._fs.isfile(path) else None

    def tensors(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Some of the tensors, in the dtype of the file."""
        with self._fs.open(self._path, "rb") as stream:
            return dict(read_tensors(stream, {key: self.entries[key] for key in keys}))

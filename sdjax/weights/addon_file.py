"""Small files that change a checkpoint (LoRAs, textual inversions), wherever they lie."""

import hashlib
import os
import posixpath
from collections.abc import Iterable, Sequence

import fsspec
import numpy as np

from sdjax.files import is_file
from sdjax.weights import hub, torch_zip
from sdjax.weights.safetensors import CheckpointError, read_header_and_metadata, read_tensors

_WITH_ALLOW_PICKLE = f"a pickle is read with allow_pickle only ({torch_zip.ALLOWED_BY})"
SETTINGS = "adapter_config.json"  # of a LoRA; PEFT lays it beside the file


class AddonFile:
    """A file of tensors, of which only the header is read until they are asked for.

    Args:
        source: a path, fsspec URL or address on huggingface.co of a file; or a folder or hub id that holds it.
        names: what the file may be called in a folder, in the order in which they are looked for; else a folder's only
            safetensors file is taken.
        allow_pickle: whether PyTorch's own files may be read; see `torch_zip`. In a folder they are called as `names`,
            but end in `.bin`.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
    """

    def __init__(self, source: str | os.PathLike[str], names: Sequence[str], *, allow_pickle: bool = False) -> None:
        self.source, self._read_beside = os.fspath(source), b""

        def chosen(paths: Iterable[str]) -> str:
            return _chosen(self.source, paths, names, allow_pickle)

        place = os.path.expanduser(hub.file(self.source))
        if (
            "://" not in place
            and not os.path.exists(place)
            and not place.endswith((".safetensors", *torch_zip.SUFFIXES))
        ):
            place = hub.folder(place, lambda paths: [chosen(paths), *(path for path in paths if path == SETTINGS)])
        self._fs, self._path = fsspec.core.url_to_fs(place)
        if self._fs.isdir(self._path):
            paths = map(posixpath.basename, self._fs.ls(self._path, detail=False))
            self._path = posixpath.join(self._path, chosen(paths))
        if not is_file(self._fs, self._path):
            raise CheckpointError(f"{self.source} is no file")
        with self._fs.open(self._path, "rb") as stream:
            if hub.path_of(self._path).endswith(".safetensors"):
                self.entries, self.metadata = read_header_and_metadata(stream, self.source)
            elif allow_pickle:
                self.entries, self.metadata = torch_zip.read_header(stream, self.source), {}
            else:
                raise CheckpointError(f"{self.source} is no safetensors file; {_WITH_ALLOW_PICKLE}")

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return posixpath.basename(hub.path_of(self._path)).rpartition(".")[0]

    def hashed(self) -> str:
        """SHA-256 of the file's bytes as they are now, and of what was read beside it, in hex."""
        with self._fs.open(self._path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")  # pyright: ignore[reportArgumentType]
        digest.update(self._read_beside)
        return digest.hexdigest()

    def beside(self, name: str) -> bytes | None:
        """The content of another file of the same folder, or None where there is none."""
        path = posixpath.join(posixpath.dirname(hub.path_of(self._path)), name)
        found = self._fs.cat_file(path) if self._fs.isfile(path) else None
        self._read_beside += found or b""
        return found

    def tensors(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Some of the tensors, in the dtype of the file."""
        with self._fs.open(self._path, "rb") as stream:
            return dict(read_tensors(stream, {key: self.entries[key] for key in keys}))


def _chosen(source: str, paths: Iterable[str], names: Sequence[str], allow_pickle: bool) -> str:
    """Which of a folder's files it is. Raises CheckpointError."""
    there = {path for path in paths if "/" not in path}
    pickles = [name for name in (f"{posixpath.splitext(name)[0]}.bin" for name in names) if name in there]
    named = [name for name in names if name in there]
    others = [path for path in there if path.endswith(".safetensors")]
    if named or len(others) == 1:
        return (named or others)[0]
    if pickles and not others:
        if allow_pickle:
            return pickles[0]
        raise CheckpointError(f"{source} has no safetensors file but {pickles[0]}; {_WITH_ALLOW_PICKLE}")
    raise CheckpointError(f"{source} has {len(others)} safetensors files; name one, or {' or '.join(names)}")

"""Captioned images as others store them: WebDataset tars, folders, and Parquet files that hold the images' bytes.

What generate_images wrote into files is found by its manifests.

A set is cut into pieces that workers read alone: a tar, a row group, some files of a folder. Reading a piece checks
each image and remembers where it lies, so that only places and captions travel; `load` goes back for the bytes.
"""

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import fsspec
from PIL import Image

from pipelines import image_samples, layout, sources
from pipelines.image_samples import Sample
from pipelines.records import MAX_RECORD, RowError
from pipelines.sources import Place, Source, SourceError
from pipelines.storage import parallel_map
from sdjax import inputs
from sdjax.files import below
from sdjax.retrying import retry
from sdjax.training.samples import CAPTIONS, IMAGES, DataError, is_hidden
from sdjax.values import RequestError, is_web, one_line

READERS = 16  # images that are fetched or decoded at once
FOLDER_FILES = 4096  # of a folder in a piece
_METADATA = "metadata.jsonl"
_TAR_ROW = 2**17  # bytes of a tar's sample, for an estimate of their number

T = TypeVar("T")


class Piece(NamedTuple):
    """A part of a set; the first of its rows is numbered `first_row`.

    Of a tar or a manifest all of it; of a Parquet file the row group `start`; of a folder the files called `names`; of
    a metadata.jsonl, which names a folder's files, its bytes `start` to `stop`.
    """

    file: str
    start: int = 0
    stop: int = 0
    first_row: int = 1
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A captioned picture by where it lies.

    Args:
        file: the tar, the Parquet file, or the picture's own.
        start, stop: its bytes in a tar; its row group and its row there in a Parquet file.
        part: equal for pictures that one piece holds: read together, they are read from end to end.
        key: the sample's name.
        sha256: of the picture's bytes, in hex.
    """

    file: str
    start: int
    stop: int
    part: str
    key: str
    caption: str
    sha256: str

    def decode(self, data: bytes) -> Image.Image:
        """The picture in its bytes, RGB and upright. Raises RequestError where they cannot be read or are others."""
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise RequestError(f"image {self.key} of {self.file} has changed since the job was planned")
        return inputs.decode(data, f"image {self.key} of {self.file}")


Found = tuple[Picture, dict[str, Any]]
"""A picture and what else its sample says."""


def find(patterns: list[str]) -> list[str]:
    """The tars, Parquet files, metadata.jsonl and folders that paths, globs and fsspec URLs name, in order.

    Raises:
        SourceError: nothing matches, or a match holds no captioned image.
    """
    found: dict[str, None] = {}
    for path in (path for pattern in patterns for path in sources.expand(pattern)):
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isdir(root):
            found |= dict.fromkeys(_in_folder(path))
        elif not fs.exists(root):
            raise SourceError(f"{path}: no such file or folder")
        elif not path.endswith((".tar", ".parquet", _METADATA)):
            raise SourceError(f"{path}: no image set; allowed are folders, .tar and .parquet")
        else:
            found[path] = None
    for _ in parallel_map(_check, found, READERS):
        pass
    return list(found)


def _in_folder(url: str) -> list[str]:
    """What a folder holds: captioned images, tars or Parquet files, the first kind that is there."""
    names = _names(url)
    if _METADATA in names:
        return [posixpath.join(url, _METADATA)]
    images = [name for name in names if name.lower().endswith(IMAGES)]
    texts = {name for name in names if name.endswith(".txt")}
    if any(posixpath.splitext(name)[0] + ".txt" in texts for name in images):
        return [url]
    # Where generate_images wrote, what has no manifest is no data.
    manifests = [name for name in names if name.startswith("manifest/") and name.endswith(".parquet")]
    units = set(map(layout.unit_of, manifests))
    tars = [name for name in names if name.endswith(".tar") and (not units or layout.unit_of(name) in units)]
    if manifests and any(map(layout.is_ours, images)):
        in_tars = set(map(layout.unit_of, tars))
        chosen = tars + [name for name in manifests if layout.unit_of(name) not in in_tars]
        return [posixpath.join(url, name) for name in chosen]
    if images:
        raise SourceError(f"{url}: its images have no captions; give {_METADATA}, or .txt files beside them")
    chosen = tars or [name for name in names if name.endswith(".parquet") and not units]
    if not chosen:
        raise SourceError(f"{url}: it holds no image ({', '.join(IMAGES)}), no .tar and no .parquet")
    return [posixpath.join(url, name) for name in chosen]


def _is_manifest(path: str) -> bool:
    """Whether generate_images or this job names its manifests so."""
    return layout.is_ours(posixpath.join(*path.split("/")[-2:])) and path.endswith(".parquet")


def _names(folder: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(folder)
    names = (path[len(root.rstrip("/")) + 1 :] for path in retry(lambda: below(fs, root)))
    return [name for name in names if not is_hidden(name)]


def _check(file: str) -> None:
    if is_web(file) and file.endswith((".tar", ".parquet")) and not sources.is_given_in_parts(file):
        raise SourceError(f"{file}: its web server gives no parts of files, in which it is read; copy it from there")
    if file.endswith(".parquet"):
        _check_columns(file)


def _check_columns(file: str) -> None:
    try:
        names = image_samples.columns(file)
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: {one_line(error)}") from None
    if _is_manifest(file):
        if "file" not in names:
            raise SourceError(f"{file}: it is no manifest of images")
    elif "image" not in names or not names.intersection(CAPTIONS):
        raise SourceError(f"{file}: it needs a column image and one of {', '.join(CAPTIONS)}")


def folder_of(path: str) -> str:
    """The folder that a metadata.jsonl speaks of; any other set as it is."""
    return posixpath.dirname(path) or "." if path.endswith(_METADATA) else path


def count(path: str) -> int:
    """About how many pictures a set holds, from its footer, its size or its names."""
    if path.endswith(".tar"):
        fs, root = fsspec.core.url_to_fs(path)
        return int(fs.size(root)) // _TAR_ROW + 1
    if path.endswith((".parquet", _METADATA)):
        return sources.count(Source(path))
    return len(_names(path))


def cut(path: str) -> Iterator[Piece]:
    """The set in pieces."""
    if path.endswith(".tar") or _is_manifest(path):
        yield Piece(path)
    elif path.endswith(".parquet"):
        first = 1
        for group, rows in enumerate(image_samples.row_groups(path)):
            if rows:
                yield Piece(path, group, group + 1, first)
            first += rows
    elif path.endswith(_METADATA):
        yield from (Piece(path, *piece[1:]) for piece in sources.cut(Source(path), FOLDER_FILES))
    else:
        images = [name for name in _names(path) if name.lower().endswith(IMAGES)]
        for first in range(0, len(images), FOLDER_FILES):
            yield Piece(path, first_row=first + 1, names=tuple(images[first : first + FOLDER_FILES]))


def read(piece: Piece) -> Iterator[tuple[Place, Found | RowError]]:
    """The piece's pictures in order, each with its place; one that cannot be used is its error."""
    part = f"{piece.file} {piece.first_row}"
    for row, found in enumerate(parallel_map(partial(_checked, part), _samples(piece), READERS), piece.first_row):
        yield Place(piece.file, row), found


def _samples(piece: Piece) -> image_samples.Samples:
    if piece.names:
        return image_samples.of_folder(piece.file, piece.names)
    if piece.file.endswith(".tar"):
        return image_samples.of_tar(piece.file)
    if _is_manifest(piece.file):
        return image_samples.of_manifest(piece.file)
    if piece.file.endswith(".parquet"):
        return image_samples.of_parquet(piece.file, piece.start, piece.first_row)
    return image_samples.of_metadata(sources.Piece(Source(piece.file), *piece[1:4]))


def _checked(part: str, sample: Callable[[], Sample]) -> Found | RowError:
    try:
        file, start, stop, key, data, caption, extras = sample()
        key.encode()
        if not data or not isinstance(data, bytes):
            raise RowError(f"sample {key} holds no image's bytes ({', '.join(IMAGES)})")
        if not isinstance(caption, str):
            raise RowError(f"sample {key} has no caption; {', '.join(CAPTIONS)} may hold one")
        if len(caption) > MAX_RECORD:
            raise RowError(f"sample {key} has a caption of {len(caption):,} characters")
        picture = Picture(file, start, stop, part, key, caption.strip(), hashlib.sha256(data).hexdigest())
        picture.decode(data)
        return picture, extras
    except RowError as error:
        return error
    except (DataError, RequestError) as error:
        return RowError(str(error))
    except UnicodeEncodeError:
        return RowError("a file's name that is not valid UTF-8")


def load(pictures: Iterable[Picture], use: Callable[[Picture, bytes], T]) -> Iterator[T]:
    """What `use` makes of each picture and its bytes, in order, some of them at a time.

    Raises:
        RequestError: a picture is gone, or whatever `use` raises.
    """

    def calls() -> Iterator[Callable[[], T]]:
        for _, group in groupby(pictures, key=lambda picture: picture.part):
            together = list(group)
            if together[0].file.endswith(".parquet"):
                yield from (partial(use, picture, data) for picture, data in _from_row_group(together))
            else:
                yield from (partial(_fetched, use, picture) for picture in together)

    yield from parallel_map(lambda call: call(), calls(), READERS)


def _from_row_group(pictures: list[Picture]) -> Iterator[tuple[Picture, bytes]]:
    """The pictures, in order, with their bytes."""
    wanted = {picture.stop: picture for picture in pictures}
    for number, data in enumerate(image_samples.images_of_group(pictures[0].file, pictures[0].start)):
        if number in wanted:
            yield wanted.pop(number), data
            if not wanted:
                return
    raise RequestError(f"{pictures[0].file} has changed since the job was planned")


def _fetched(use: Callable[[Picture, bytes], T], picture: Picture) -> T:
    fs, path = fsspec.core.url_to_fs(picture.file)
    start, stop = (picture.start, picture.stop) if picture.stop else (0, None)
    try:
        data = retry(lambda: bytes(fs.cat_file(path, start, stop)))  # type: ignore[arg-type]
    except FileNotFoundError:
        raise RequestError(f"image {picture.key} of {picture.file} is gone since the job was planned") from None
    return use(picture, data)

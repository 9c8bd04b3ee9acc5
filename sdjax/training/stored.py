"""Training examples as files: folders and WebDataset tars, on any fsspec filesystem."""

import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from glob import has_magic
from typing import Any, NamedTuple

import fsspec
import numpy as np
from jaxtyping import UInt8

from sdjax.files import below
from sdjax.training.buckets import Buckets
from sdjax.training.framing import Frame, decode, sides
from sdjax.training.samples import (
    CAPTIONS,
    CONDITIONING,
    IMAGES,
    DataError,
    is_hidden,
    json_object,
    members,
    sample_key,
    split_caption,
    text_of,
)

_VERSIONS = ("etag", "ETag", "md5Hash", "mtime", "last_modified", "LastModified", "created")  # of fsspec's filesystems
_HEADER = 2**16  # bytes of an image in which its header mostly lies
# What JSON that is no row raises where it is read as one.
_UNREADABLE = (ValueError, KeyError, StopIteration, TypeError, AttributeError, RecursionError)


class Stored(ABC):
    """Examples whose pictures lie in files, and are read when they are asked for."""

    _examples: list[Any]
    _size: int
    buckets: Buckets | None = None  # which else pictures are cut to

    @abstractmethod
    def _content(self, place: Any, most: int | None = None) -> bytes:
        """What lies at one of an example's places, or its first `most` bytes."""

    @abstractmethod
    def _called(self, place: Any) -> str:
        """What errors call a picture."""

    def __len__(self) -> int:
        return len(self._examples)

    def sides(self, index: int) -> tuple[int, int]:
        """An image's height and width before it is cut."""
        place = self._examples[index].image
        for most in (_HEADER, None):
            if (found := sides(self._content(place, most))) is not None:
                return found
        _, frame = self._decoded(index, place)  # which says what it is not
        return frame.height, frame.width

    def framed(self, index: int) -> tuple[UInt8[np.ndarray, "height width 3"], Frame]:
        return self._decoded(index, self._examples[index].image)

    def image(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        return self.framed(index)[0]

    def conditioning(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        place = self._examples[index].conditioning
        assert place is not None  # looked for when it was opened
        return self._decoded(index, place)[0]

    def _decoded(self, index: int, place: Any) -> tuple[UInt8[np.ndarray, "height width 3"], Frame]:
        shape = (self._size, self._size) if self.buckets is None else self.buckets.shape(index)
        return decode(self._content(place), shape, self._called(place))


class _File(NamedTuple):
    """An image's path, its caption unless it lies beside it, and the path of what it is made from."""

    image: str
    caption: str | None = None
    conditioning: str | None = None


class Folder(Stored):
    """Images below a folder or fsspec URL, captioned by metadata.jsonl (`file_name`, `text`) or by .txt files.

    captions, conditioned: whether each image must have a caption, or a picture that it is made from (metadata.jsonl's
        `conditioning_image_file_name`), which are looked for before any is read.
    caption: of images that have none.
    """

    def __init__(
        self, url: str, size: int, *, captions: bool = False, conditioned: bool = False, caption: str | None = None
    ) -> None:
        self._fs, root = fsspec.core.url_to_fs(url)
        self._size, self._url, self._root = size, url, root
        table, there = posixpath.join(root, "metadata.jsonl"), below(self._fs, root)
        if self._fs.isfile(table):
            default = caption if captions else caption or ""  # which is then not asked for
            rows = _rows(self._fs.cat_file(table), f"{url}/metadata.jsonl", root, conditioned, default)
            self._examples = list(rows)
            needed = [path for file in self._examples for path in (file.image, file.conditioning) if path is not None]
        else:
            paths = [path for path in there if path.lower().endswith(IMAGES)]
            paths = [path for path in paths if not is_hidden(posixpath.relpath(path, root))]
            self._examples = [_File(path, None if _beside(path) in there else caption) for path in paths]
            needed = [_beside(file.image) for file in self._examples if file.caption is None] if captions else []
        if not self._examples:
            raise DataError(f"{url} holds no image ({', '.join(IMAGES)})")
        if conditioned and self._examples[0].conditioning is None:
            raise DataError(f"{url} needs a metadata.jsonl that says each image's {CONDITIONING[0]}_file_name")
        for path in needed:  # metadata.jsonl may lead out of the folder
            if posixpath.normpath(path) not in there and not self._fs.exists(path):
                raise self._missing(path)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        path, caption, _ = self._examples[index]
        return text_of(self._content(_beside(path)), _beside(path)).strip() if caption is None else caption

    def files(self) -> Iterator[tuple[Any, ...]]:
        """Each file's name, caption if metadata.jsonl has it, and its size and when it was last written."""
        there = below(self._fs, self._root)
        for path, caption, conditioning in self._examples:
            beside = _beside(path) if caption is None else conditioning
            for name in (path,) if beside is None else (path, beside):
                entry = there.get(posixpath.normpath(name), {})
                yield posixpath.relpath(name, self._root), caption, (entry.get("size"), _written(entry))

    def _content(self, place: str, most: int | None = None) -> bytes:
        try:
            return self._fs.cat_file(place, end=most)
        except FileNotFoundError:
            raise self._missing(place) from None

    def _called(self, place: str) -> str:
        return place

    def _missing(self, path: str) -> DataError:
        return DataError(f"{path} is not there; {self._url} needs it as an image or a caption")


class _Span(NamedTuple):
    """The bytes of one file inside a tar, and what it is called there."""

    shard: str
    name: str
    start: int
    stop: int


class _Example(NamedTuple):
    image: _Span
    caption: _Span | None
    conditioning: _Span | None


class Shards(Stored):
    """WebDataset tars at a path or fsspec URL (`*`, `?`, `[]`): `key.png` (any of IMAGES) beside `key.txt` or `.json`.

    The tars are walked once, header by header, and examples are then read by their place in the tar.

    captions, conditioned: whether each image must have a caption beside it, or a picture that it is made from,
        `key.conditioning_image.png`.
    caption: of images that have none.
    """

    def __init__(
        self, pattern: str, size: int, *, captions: bool = False, conditioned: bool = False, caption: str | None = None
    ) -> None:
        self._fs, path = fsspec.core.url_to_fs(pattern)
        self._size, self._conditioned, self._caption = size, conditioned, caption
        self._captions = captions and caption is None
        shards = sorted(str(shard) for shard in self._fs.glob(path)) if has_magic(path) else [path]
        self._examples = [example for shard in shards for example in self._index(shard)]
        if not self._examples:
            raise DataError(f"{pattern} holds no image ({', '.join(IMAGES)})")

    def _index(self, shard: str) -> Iterator[_Example]:
        found: dict[str, dict[str, _Span]] = {}
        try:
            with self._fs.open(shard, "rb") as stream:
                for name, start, size in members(stream, shard):
                    key, extension = sample_key(name)
                    found.setdefault(key, {})[extension] = _Span(shard, name, start, start + size)
        except FileNotFoundError:
            raise DataError(f"{shard} is not there") from None
        beside = [f".{name}{extension}" for name in CONDITIONING for extension in IMAGES]
        for key, parts in found.items():
            image, caption, conditioning = (
                next((parts[name] for name in names if name in parts), None)
                for names in (IMAGES, (".txt", ".json"), beside)
            )
            if image is None:
                continue
            if self._captions and caption is None:
                raise _no_caption(shard, key)
            if self._conditioned and conditioning is None:
                raise DataError(f"{shard} has no {key}{beside[0]}, the picture that {key}'s image is made from")
            yield _Example(image, caption, conditioning if self._conditioned else None)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        image, span, _ = self._examples[index]
        if span is None:
            if self._caption is None:
                raise _no_caption(image.shard, sample_key(image.name)[0])
            return self._caption
        what = f"{span.name} of {span.shard}"
        text = text_of(self._content(span), what)
        if sample_key(span.name)[1] == ".txt":
            return text.strip()
        try:
            return _said(text, self._caption)[0]
        except DataError as error:
            raise DataError(f"{what}: {error}") from None
        except _UNREADABLE:
            raise DataError(f"{what} needs one of {', '.join(CAPTIONS)}, as a string") from None

    def files(self) -> Iterator[tuple[Any, ...]]:
        """Each example's tar and name there, and its place, the tar's size, and when it was last written."""
        shards = dict.fromkeys(example.image.shard for example in self._examples)
        infos = {shard: self._fs.info(shard) for shard in shards}
        for example in self._examples:
            info = infos[example.image.shard]
            places = [place for span in example if span is not None for place in (span.start, span.stop)]
            key = sample_key(example.image.name)[0]
            yield posixpath.basename(example.image.shard), key, (*places, info.get("size"), _written(info))

    def _content(self, place: _Span, most: int | None = None) -> bytes:
        stop = place.stop if most is None else min(place.stop, place.start + most)
        return self._fs.cat_file(place.shard, place.start, stop)

    def _called(self, place: _Span) -> str:
        return f"the image at byte {place.start} of {place.shard}"


def _beside(path: str) -> str:
    """An image's file of its caption."""
    return posixpath.splitext(path)[0] + ".txt"


def _no_caption(shard: str, key: str) -> DataError:
    return DataError(f"{shard} has no {key}.txt, the caption of {key}'s image")


def _said(text: str, default: str | None) -> tuple[str, dict[str, Any]]:
    """The caption in a JSON object, and its other values. Raises DataError, or any of _UNREADABLE."""
    own, others = split_caption(json.loads(text, object_pairs_hook=json_object))
    caption: Any = default if own is None else own
    caption.encode()  # half of a surrogate pair is no text
    return caption.strip(), others


def _written(entry: dict[str, Any]) -> str | None:
    """What a filesystem says of a file that changes whenever it is written."""
    return next((str(entry[key]) for key in _VERSIONS if entry.get(key)), None)


def _rows(content: bytes, what: str, root: str, conditioned: bool, default: str | None) -> Iterator[_File]:
    columns = [f"{name}_file_name" for name in CONDITIONING]
    for number, line in enumerate(content.split(b"\n"), 1):
        text = text_of(line, f"{what} line {number}")
        if not text.strip():
            continue
        try:
            caption, others = _said(text, default)
            names = [others["file_name"]]
            if conditioned:
                names += [next(others[name] for name in columns if name in others)]
            "".join(names).encode()
        except DataError as error:
            raise DataError(f"{what} line {number}: {error}") from None
        except _UNREADABLE:
            needed = f"file_name, {columns[0]}" if conditioned else "file_name"
            wanted = f"{needed} and one of {', '.join(CAPTIONS)}"
            raise DataError(f"{what} line {number} needs {wanted}, as strings") from None
        path, *conditioning = (posixpath.join(root, name) for name in names)
        yield _File(path, caption, *conditioning)

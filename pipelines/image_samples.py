"""Samples of captioned image sets as they are stored, before anybody has looked at the image.

Each function yields calls rather than samples, so that a sample that cannot be read is an error of its own, and so that
files are fetched side by side.
"""

import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow.parquet as pq

from pipelines import sources, tables
from pipelines.records import RowError
from pipelines.sinks import facts
from pipelines.storage import Store
from sdjax import inputs
from sdjax.retrying import is_transient, retry
from sdjax.training.samples import (
    IMAGES,
    DataError,
    Member,
    json_object,
    members,
    sample_key,
    split_caption,
    text_of,
)
from sdjax.values import one_line

_BLOCK = 2**23  # bytes that a file is read by
_ROWS = 16  # of a Parquet file that are held at once


class Sample(NamedTuple):
    """An image and what its set says of it: whatever is there.

    file, start, stop: where the image lies; see `image_sets.Picture`.
    data: the image's bytes.
    extras: the sample's other columns.
    """

    file: str
    start: int
    stop: int
    key: str
    data: Any
    caption: Any
    extras: dict[str, Any]


Samples = Iterator[Callable[[], Sample]]
"""Each call may raise RowError or DataError, or UnicodeEncodeError over a name."""


def of_folder(folder: str, names: Iterable[str]) -> Samples:
    """Files of a folder, with captions in .txt files beside them."""
    return (partial(_captioned_file, folder, name) for name in names)


def _captioned_file(folder: str, name: str) -> Sample:
    file = _below(folder, name)
    caption = text_of(_whole_file(posixpath.splitext(file)[0] + ".txt"), f"the caption of {name}")
    return Sample(file, 0, 0, name, _whole_file(file), caption, {})


def of_metadata(piece: sources.Piece) -> Samples:
    """Files of a folder that lines of its metadata.jsonl name (`file_name`) and caption."""
    root = posixpath.dirname(piece.source.file)
    return (partial(_listed_file, root, row) for _, row in sources.read(piece))


def _listed_file(root: str, row: dict[str, Any] | RowError) -> Sample:
    if isinstance(row, RowError):
        raise row
    caption, extras = split_caption(row)
    name = extras.pop("file_name", None)
    file = _below(root, name)
    return Sample(file, 0, 0, name, _whole_file(file), caption, extras)


def _below(folder: str, name: Any) -> str:
    """The path of a folder's file, whose name may be anything."""
    outside = ("://", "::", "\0")  # "::" would make a chain of file systems of the path
    if not isinstance(name, str) or name.startswith("/") or ".." in name.split("/") or any(x in name for x in outside):
        raise RowError(f"file_name={name!r:.200} is no file below {folder}")
    name.encode()  # UnicodeEncodeError, before a file system has another error for it
    return posixpath.join(folder, name)


def of_manifest(file: str) -> Samples:
    """Images in files of their own that generate_images committed by this manifest, with their prompts as captions."""
    manifests, name = posixpath.split(file)
    folder = posixpath.dirname(manifests) or "."
    for row in Store(folder).read_table(f"manifest/{name}").to_pylist():
        yield partial(_committed_file, folder, row)


def _committed_file(folder: str, row: dict[str, Any]) -> Sample:
    if row["shard"] is not None:
        raise RowError(f"{row['file']} lies in {row['shard']}; give that")
    caption, extras = split_caption(facts(row))
    file = _below(folder, row["file"])
    return Sample(file, 0, 0, row["id"], _whole_file(file), caption, extras)


def of_tar(file: str) -> Samples:
    """A WebDataset's samples: neighbours with one name up to its first dot. Read once, from end to end."""
    with open_file(file) as stream:
        try:
            for key, parts in groupby(members(stream, file), key=lambda member: sample_key(member.name)[0]):
                yield partial(_of_members, file, key, *_contents(stream, parts))
        except DataError as error:  # a sample whose caption is lost may seem to have another, in its .json
            yield partial(_raise, RowError(f"{error}; the sample there and all after it are not read"))


def _contents(
    stream: IO[bytes], parts: Iterable[Member]
) -> tuple[tuple[int, bytes] | None, dict[str, bytes] | RowError]:
    """Where a sample's image begins and its bytes, and all that is read of it by extension."""
    image, contents = None, {}
    for member in parts:
        extension = sample_key(member.name)[1]
        if extension not in (*IMAGES, ".txt", ".json"):
            continue
        if member.size > inputs.MAX_BYTES:
            return None, RowError(f"{member.name} is larger than {inputs.MAX_BYTES >> 20} MiB, which is the most")
        stream.seek(member.start)
        contents[extension] = stream.read(member.size)
        if extension in IMAGES and image is None:
            image = member.start, contents[extension]
    return image, contents


def _of_members(file: str, key: str, image: tuple[int, bytes] | None, contents: dict[str, bytes] | RowError) -> Sample:
    if isinstance(contents, RowError):
        raise contents
    facts: Any = {}
    if ".json" in contents:
        text = text_of(contents[".json"], f"{key}.json")
        try:
            facts = json.loads(text, object_pairs_hook=json_object)
        except DataError as error:
            raise RowError(f"{key}.json: {error}") from None
        except (ValueError, RecursionError):
            raise RowError(f"{key}.json is not JSON") from None
        if not isinstance(facts, dict):
            raise RowError(f"{key}.json is not a JSON object")
    caption, extras = split_caption(facts)
    if ".txt" in contents:
        caption = text_of(contents[".txt"], f"{key}.txt")
    start, data = image or (0, b"")
    return Sample(file, start, start + len(data), key, data, caption, extras)


def of_parquet(file: str, group: int, first_row: int) -> Samples:
    """A row group whose column `image` holds image files' bytes, or the {bytes, path} of the datasets library."""
    for number, row in enumerate(_rows(file, group)):
        if isinstance(row, RowError):
            yield partial(_raise, row)
            continue
        caption, extras = split_caption({name: value for name, value in row.items() if not _is_image(name)})
        key = f"row {first_row + number}"
        yield partial(Sample, file, group, number, key, _image(row), caption, extras)


def images_of_group(file: str, group: int) -> Iterator[Any]:
    """The images of a row group's rows; None of a row that cannot be read."""
    return (None if isinstance(row, RowError) else _image(row) for row in _rows(file, group, only_images=True))


def columns(file: str) -> set[str]:
    """The columns of a Parquet file, in lower case."""
    with open_file(file) as stream:
        return {name.lower() for name in pq.ParquetFile(stream).schema_arrow.names}


def row_groups(file: str) -> list[int]:
    """How many rows each row group of a Parquet file holds."""
    with open_file(file) as stream:
        metadata = pq.ParquetFile(stream).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _rows(file: str, group: int, *, only_images: bool = False) -> Iterator[dict[str, Any] | RowError]:
    with open_file(file) as stream:
        parquet = tables.open_parquet(stream)
        names = [name for name in parquet.schema_arrow.names if _is_image(name) or not only_images]
        for batch in parquet.iter_batches(_ROWS, [group], names, use_threads=False):
            yield from tables.rows(batch)


def _is_image(column: str) -> bool:
    return column.lower() == "image"


def _image(row: dict[str, Any]) -> Any:
    value = next(value for name, value in row.items() if _is_image(name))
    return value.get("bytes") if isinstance(value, dict) else value


def open_file(file: str) -> IO[bytes]:
    """A file to be read in large blocks."""
    return retry(lambda: io.BufferedReader(fsspec.open(file, "rb", block_size=_BLOCK).open()))  # pyright: ignore


def _whole_file(file: str) -> bytes:
    try:
        data = inputs.read(file)  # a data set's own store is worth more patience than a row's host
    except Exception as error:  # each of fsspec's file systems has errors of its own
        if is_transient(error):
            raise
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise RowError(f"{file} is not there") from None
        if isinstance(error, IsADirectoryError):
            raise RowError(f"{file} is a folder") from None
        raise RowError(f"{file:.200} cannot be read: {one_line(error)}") from None
    if len(data) > inputs.MAX_BYTES:
        raise RowError(f"{file} is larger than {inputs.MAX_BYTES >> 20} MiB, which is the most")
    return data


def _raise(error: RowError) -> Sample:
    raise error

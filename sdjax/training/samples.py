"""How captioned images are stored: what training and `pipelines.encode_latents` both read of tars and metadata."""

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from sdjax.retrying import is_of_a_network

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTIONS = ("text", "caption", "prompt")  # the columns that are taken as a caption, the first that is there
CONDITIONING = ("conditioning_image", "control_image", "input_image")  # what an image is made from, likewise


class DataError(ValueError):
    """A data set that cannot be used; the message is one line naming the file."""


class Member(NamedTuple):
    """A file inside a tar: its bytes are the `size` from `start`."""

    name: str
    start: int
    size: int


def members(stream: IO[bytes], file: str) -> Iterator[Member]:
    """The files of a tar in order, header by header; without hidden ones, and sparse ones, whose bytes lie otherwise.

    Raises:
        DataError: it is no tar, damaged or cut short; `file` is how errors call it.
    """
    fault = f"{file} is not a tar file"
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            fault = f"{file} is damaged or cut short"
            for member in tar:
                plain = member.isreg() and not member.issparse()
                # A header may say any size; a negative one would lead back to what was read already, for ever.
                if not 0 <= (member.size if plain else 0) <= tar.offset - member.offset_data or tar.offset > end:
                    raise tarfile.ReadError
                if plain and not is_hidden(member.name):
                    yield Member(member.name, member.offset_data, member.size)
            stream.seek(tar.offset)  # tarfile takes any damaged header but the first for the end, which is two of zeros
            if stream.read(2 * tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError
    except Exception as error:  # tarfile raises all sorts over what headers may say
        if isinstance(error, OSError) or is_of_a_network(error):
            raise
        raise DataError(fault) from None


def is_hidden(name: str) -> bool:
    """Whether a file of a data set, or a folder that it lies in there, is one that systems leave and do not show."""
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in name.split("/"))


def sample_key(name: str) -> tuple[str, str]:
    """A tar member's sample and its extension, as WebDataset splits them: at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, dot + extension.lower()


def split_caption(row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A row's caption, from the first column that may hold one, and the other columns."""
    names = {name.strip().lower(): name for name in reversed(row)}
    column = next((names[name] for name in CAPTIONS if name in names), None)
    return None if column is None else row[column], {name: value for name, value in row.items() if name != column}


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as `json.loads` finds it. Raises DataError: of two values under one name it would lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DataError("two keys of an object have the same name")
    return found


def text_of(data: bytes, what: str) -> str:
    """A small file's text, without a byte order mark. Raises DataError; `what` is how errors call it."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{what} is not valid UTF-8") from None

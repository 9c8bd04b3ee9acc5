"""Files that are there whole or not at all, folders that one process holds, and where and what they are."""

import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.retrying import is_absent
from sdjax.values import one_line


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process or the machine stops."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # hosts that share a disk share process ids
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(folder: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Keeps a folder, which is made, from others that would hold it, until the context or the process ends.

    Raises:
        BlockingIOError: another process holds it; `busy` says so.
    """
    os.makedirs(folder, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise BlockingIOError(busy) from None
    except OSError:
        pass  # some disks of networks have no locks
    try:
        yield
    finally:
        os.close(opened)


def user_cache(name: str) -> Path:
    """The folder `name` among the user's caches, which may not be there yet."""
    # Of a user without a home it is one that cannot be made, which Path.home would raise for.
    home = Path("/", os.path.expanduser("~"))
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "sdjax" / name


def folder_here(path: str | os.PathLike[str]) -> Path:
    """A folder on this machine, `~` its user's. Raises ValueError for a URL, of which `Path` makes one named `gs:`."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is a URL; give a folder on this machine")
    return Path(os.path.expanduser(path))


def check_file(option: str, path: Path) -> None:
    """Raise ValueError, naming the option, where no file can be written."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give a file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{option}: {path} may not be written to")


def is_file(fs: Any, path: str) -> bool:
    """Whether a file of an fsspec filesystem is there. OSError where that cannot be told: `isfile` says no."""
    try:
        return fs.info(path)["type"] == "file"
    except Exception as error:
        if is_absent(error) or isinstance(error, (NotADirectoryError, ValueError)):  # ValueError of a NUL
            return False
        raise OSError(f"{path} cannot be read: {one_line(error.__cause__ or error)}") from None


def below(fs: Any, root: str, within: Sequence[Path] = ()) -> dict[str, dict[str, Any]]:
    """Every file below a folder of an fsspec filesystem, and what that says of it, in the order of their paths.

    On a disk a link is what it names, which fsspec's `find` takes for a file also where that is a folder.

    within: the folders of the links that led here, to which no further one leads back.
    """
    found = fs.find(root, detail=True)
    for path in [path for path, entry in found.items() if entry.get("islink")]:
        del found[path]
        folders, target = (*within, Path(path).parent.resolve()), Path(path).resolve()
        if target.is_file():
            found[path] = fs.info(path)
        elif target.is_dir() and not any(folder.is_relative_to(target) for folder in folders):
            found |= below(fs, path, folders)
    return dict(sorted(found.items()))

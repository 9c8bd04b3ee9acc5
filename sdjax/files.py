"""Files that are there whole or not at all, and where those go that are kept from run to run."""

import os
import uuid
from pathlib import Path


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


def user_cache(name: str) -> Path:
    """The folder `name` among the user's caches, which may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdjax" / name

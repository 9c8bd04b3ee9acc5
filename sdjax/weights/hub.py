"""Folders and files of the Hugging Face hub, through huggingface_hub's cache."""

import re
from collections.abc import Callable, Iterable

from sdjax.weights.safetensors import CheckpointError

_ADDRESS = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)")


def folder(repo_id: str, wanted: Iterable[str], *, without: Iterable[str] = ()) -> str:
    """The local folder of a repository (`org/name`): from the cache where it is there, else downloaded.

    Args:
        wanted, without: patterns of the files to have and not to have.

    Raises:
        CheckpointError: the id is none, or the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise CheckpointError(f"{repo_id} is neither a folder, nor a hub id (org/name), nor an fsspec URL")
    patterns = {"allow_patterns": list(wanted), "ignore_patterns": list(without) or None}
    return _had(f"{repo_id} is no folder here, and the hub", lambda: snapshot_download(repo_id, **patterns))


def file(source: str) -> str:
    """The local path of a file whose address on huggingface.co is given; any other source as it is.

    Raises:
        CheckpointError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    match = _ADDRESS.fullmatch(source)
    if match is None:
        return source
    return _had(f"{source}: the hub", lambda: hf_hub_download(match[1], match[3], revision=match[2]))


def _had(start: str, get: Callable[[], str]) -> str:
    """What `get` gets; `start` begins the error if it gets nothing."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return get()
    except HFValidationError:
        raise CheckpointError(f"{start} knows no such names; an id is org/name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{start} did not give it ({type(error).__name__}); check the name and the network"
        ) from None

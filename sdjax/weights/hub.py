"""Folders and files of the Hugging Face hub, through huggingface_hub's cache."""

import glob
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar
from urllib.parse import unquote

from sdjax.weights.safetensors import CheckpointError

Got = TypeVar("Got")

_ADDRESS = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/?#]+)/([^?#]+)(?:[?#].*)?"
)


def folder(repo_id: str, choose: Callable[[list[str]], Iterable[str]]) -> str:
    """The local folder of a repository, with the files that are chosen of those that it has.

    Where the hub cannot be asked, the folder is as the cache has it.

    Args:
        repo_id: `org/name`, or `org/name@revision`: a branch, a tag or a commit.
        choose: is given the paths of all files, and returns those to have; what it raises is passed on.

    Raises:
        CheckpointError: the id is none, or the hub does not give it.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, _, revision = repo_id.partition("@")  # of which a branch's name may hold more slashes
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{repo_id} is neither a folder, nor a hub id (org/name), nor an fsspec URL")
    start = f"{repo_id} is no folder here, and the hub"
    get = partial(snapshot_download, name, revision=revision or None)
    try:
        about = _had(start, lambda: HfApi().model_info(name, revision=revision or None))
    except CheckpointError as error:
        try:
            # Without patterns, a folder that was fetched in part would be refused.
            return _had(start, lambda: get(allow_patterns=[], local_files_only=True))
        except CheckpointError:
            raise error from None
    paths = choose([file.rfilename for file in about.siblings or []])
    patterns = [glob.escape(path) for path in paths]
    return _had(start, lambda: get(allow_patterns=patterns))


def file(source: str) -> str:
    """The local path of a file whose address on huggingface.co is given; any other source as it is.

    Raises:
        CheckpointError: the hub does not give it.
    """
    match = _ADDRESS.fullmatch(source)
    if match is None:
        return source
    from huggingface_hub import hf_hub_download

    repo_id, revision, path = map(unquote, match.groups())
    return _had(f"{source}: the hub", lambda: hf_hub_download(repo_id, path, revision=revision))


def path_of(source: str) -> str:
    """A URL without its query, of which the last part is a name; any other source as it is."""
    return source.partition("?")[0] if "://" in source else source


def _had(start: str, get: Callable[[], Got]) -> Got:
    """What `get` gets; `start` begins the error if it gets nothing."""
    from huggingface_hub.errors import HFValidationError

    try:
        return get()
    except HFValidationError:
        raise CheckpointError(f"{start} knows no such names; an id is org/name") from None
    # Besides its own errors and OSError, those of the HTTP library that its version uses.
    except Exception as error:
        raise CheckpointError(
            f"{start} did not give it ({type(error).__name__}); check the name and the network"
        ) from None

"""How jobs name what they write. Whatever else lies in the folders of an output is somebody's own."""

import re

from pipelines.progress import FOLDER
from pipelines.storage import Store
from sdjax.images import FORMATS

_ID = "[0-9a-f]{32}"
_NAMES = {
    "manifest": rf"{_ID}\.parquet",
    "shards": rf"{_ID}\.(tar|safetensors)",
    "images": rf"(?P<start>[0-9a-f]{{2}})/(?P=start)[0-9a-f]{{30}}\.({'|'.join(FORMATS)})",
    "rejected": rf"{_ID}\.jsonl",
}
RESULTS = tuple(_NAMES)
FOLDERS = (*RESULTS, FOLDER)
_OURS = {folder: re.compile(f"{folder}/{name}") for folder, name in _NAMES.items()}
_TEMPORARY = re.compile(r"(?P<folder>(.*/)?)\.(?P<name>[^/]+)\.[0-9a-f]+")  # as sdjax.files.write_whole names them


def manifest_name(unit: str) -> str:
    return f"manifest/{unit}.parquet"


def shard_name(unit: str, suffix: str = "tar") -> str:
    return f"shards/{unit}.{suffix}"


def image_name(id: str, image_format: str) -> str:
    return f"images/{id[:2]}/{id}.{image_format}"


def rejects_name(digest: str) -> str:
    return f"rejected/{digest}.jsonl"


def unit_of(name: str) -> str:
    """The unit of a manifest or a shard, or the id of an image."""
    return name.rpartition("/")[2].partition(".")[0]


def is_ours(name: str) -> bool:
    """Whether jobs name their manifests, shards, images or rejects so."""
    pattern = _OURS.get(name.partition("/")[0])
    return bool(pattern and pattern.fullmatch(name))


def whole_of(name: str) -> str | None:
    """The file that a write would have made of this temporary one, had it not been killed; None for other files."""
    match = _TEMPORARY.fullmatch(name)
    return match and match["folder"] + match["name"]


def find(store: Store, folder: str) -> list[str]:
    """What jobs have written whole into one of the folders of RESULTS, sorted."""
    return [name for name in store.find(folder) if is_ours(name)]

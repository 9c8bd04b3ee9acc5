"""What a run is made from: what tells its checkpoints and its latents from another's."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sdjax.files import write_whole
from sdjax.training.config import Data, Train, TrainConfigError, flat
from sdjax.training.data import Source
from sdjax.training.encoded import EncodedSet

# What a run may change as it goes on. Where its data and its start lie is not what they are.
_FREE = {"output", "steps", "log_every", "checkpoint_every", "keep_checkpoints"}
_FREE |= {"sheet_every", "sheet_prompts", "sheet_images"}
_FREE |= {"init", "tokenizer", "allow_ckpt", "lora.init", "controlnet.init"}
_FREE |= {"data.folder", "data.shards", "data.latents", "data.workers"}
_MEMORY = {"remat", "optimizer.accumulate"}  # which a step takes; they change its rounding alone
_FILE = "run.json"


def of_source(source: Source | EncodedSet, *, times: bool) -> str:
    """A digest of which examples a source has; with `times`, also of each file's size and when it was last written.

    A copied data set has other times and is the same; so is one with a picture that was mended.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    rows = getattr(source, "files", tuple)()  # of a source that has none, the configuration says what it is
    for *name, written in rows:
        digest.update(json.dumps([*name, written] if times else name).encode() + b"\n")
    return digest.hexdigest()


def of_run(config: Train, source: Source | EncodedSet, init: str | None) -> dict[str, Any]:
    """What a run's numbers follow from, by name; `init` is the fingerprint of what was read to start from."""
    return _settled(config) | {"data": of_source(source, times=False), "init": init}


def _settled(config: Train) -> dict[str, Any]:
    """What of a configuration stays as it is while a run goes on, as JSON gives it back."""
    made = {key: value for key, value in flat(config).items() if key not in _FREE}
    return json.loads(json.dumps(made, default=str))


def check(folder: Path, made: dict[str, Any]) -> None:
    """Raise TrainConfigError where the run in `folder` was begun from something else."""
    if not (folder / _FILE).exists():  # begun by an earlier version
        return
    # What an earlier version did not know was as it is by default.
    begun = _settled(Train(task=made["task"], output="", steps=1, batch_size=1, data=Data()))
    begun |= json.loads((folder / _FILE).read_text(encoding="utf-8"))
    for key, before in begun.items():
        now = made.get(key)
        if before == now or key in _MEMORY:
            continue
        told = key in ("data", "init") or isinstance(before, (dict, list)) or isinstance(now, (dict, list))
        what = f"another {key}" if told else f"{key} {json.dumps(before)}, not {json.dumps(now)}"
        raise TrainConfigError(f"{folder} holds the checkpoints of a run with {what}; name another --output")


def write(folder: Path, made: dict[str, Any]) -> None:
    """Say in `folder` what its run is made from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _FILE, (json.dumps(made, indent=1) + "\n").encode())

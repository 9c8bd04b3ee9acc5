"""Rows that cannot be used: each a line of rejected/*.jsonl, with its place and the reason."""

import hashlib
import json
import math
from typing import Any

from pipelines.layout import rejects_name
from pipelines.records import RowError
from pipelines.sources import Place
from pipelines.storage import Store
from sdjax.values import RequestError

UNUSABLE = (RowError, RequestError, UnicodeEncodeError, RecursionError)
"""What planning may raise for a row, which is then rejected alone; the last two of what no file can hold."""
_REASONS = {UnicodeEncodeError: "half of a surrogate pair, which is no text", RecursionError: "nested too deeply"}
_SHOWN = 1_000  # characters of a cell that a rejected row's record keeps


def rejection(place: Place, values: Any, error: Exception) -> dict[str, Any]:
    """A line of rejected/*.jsonl."""
    shown = {_shown(k): _shown(v) for k, v in values.items()} if isinstance(values, dict) else None
    reason = _REASONS.get(type(error)) or " ".join(_shown(str(error)).split())
    return {"file": place.file, "row": place.row, "reason": reason, "values": shown}


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__}, {_REASONS[RecursionError]}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def write_rejected(store: Store, name: str, lines: list[dict[str, Any]]) -> None:
    """Keep which rows of `name`, a piece or a unit, were rejected; what an earlier attempt at it rejected goes."""
    file = _rejects_of(name)
    if lines:
        store.write(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    else:
        store.delete([file])


def read_rejected(store: Store, name: str) -> list[dict[str, Any]]:
    """What an earlier attempt at `name` rejected; what an earlier job did was deleted when this one began."""
    try:
        return list(map(json.loads, store.read(_rejects_of(name)).splitlines()))
    except FileNotFoundError:
        return []


def _rejects_of(name: str) -> str:
    return rejects_name(hashlib.sha256(name.encode()).hexdigest()[:32])

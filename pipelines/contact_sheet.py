"""index.html: a page of thumbnails with their prompts, self-contained, searchable, and drawn as it is scrolled."""

import base64
import html
import io
import json
import re
from functools import partial
from importlib.resources import files
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines import layout
from pipelines.storage import Store, parallel_map

NAME = "index.html"
SIDE = 160  # pixels of a thumbnail's longer side
_CARD = ("id", "prompt", "facts", "file", "thumb")
_COLUMNS = ["id", "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "width"]
_COLUMNS += ["height", "flags", "file", "shard", "offset", "bytes"]


def write(store: Store, limit: int) -> None:
    """Write the page over up to `limit` images of the output; thumbnails in the page that it replaces are kept.

    An image that is gone or damaged, or whose manifest's rows are, is left out: finding it is for `pipelines.verify`.
    """
    old = _cards_of(store)
    rows: list[dict[str, Any]] = []
    total = 0
    for manifest in parallel_map(partial(_manifest, store), layout.find(store, "manifest")):
        if not set(_COLUMNS) <= set(manifest.schema_arrow.names):  # of latents, say
            continue
        total += manifest.metadata.num_rows
        if len(rows) < limit:
            rows += _rows(manifest, limit - len(rows))
    cards = [card for card in parallel_map(partial(_card, store, old), rows) if card]
    page = files("pipelines").joinpath("index.html").read_text(encoding="utf-8")
    # No "<" at all: what may end or open a script element is more than "</script>".
    data = json.dumps(cards, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    shown = f"{len(cards):,} of {total:,} images" if len(cards) < total else f"{total:,} images"
    store.write(NAME, page.replace("__SHOWN__", html.escape(shown)).replace("__CARDS__", data).encode())


def _manifest(store: Store, name: str) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(store.read(name)))


def _rows(manifest: pq.ParquetFile, limit: int) -> list[dict[str, Any]]:
    try:
        return manifest.read(columns=_COLUMNS, use_threads=False).slice(0, limit).to_pylist()
    except Exception:  # damage makes pyarrow raise all sorts
        return []


def _card(store: Store, old: dict[str, dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    place = row["file"] if row["shard"] is None else f"{row['shard']}: {row['file']}"
    kept = old.get(row["id"])
    if kept and kept["file"] == place:  # made again, an image may lie elsewhere
        return kept
    path = row["shard"] or row["file"]
    try:
        if not layout.is_ours(path):  # nor does a damaged manifest lead out of the output
            return None
        thumb = thumbnail(store.read(path, row["offset"], row["offset"] + row["bytes"]))
        facts = f"seed {row['seed']}, {row['sampler']}, {row['num_inference_steps']} steps, "
        facts += f"guidance {row['guidance_scale']:g}, {row['width']}x{row['height']}"
    except Exception:  # decoders raise all sorts over broken files, and so do nulls; the images are made
        return None
    if row["negative_prompt"]:
        facts += f", not: {row['negative_prompt']}"
    if row["flags"]:
        facts += f" [{', '.join(row['flags'])}]"
    return {"id": row["id"], "prompt": row["prompt"], "facts": facts, "file": place, "thumb": thumb}


def thumbnail(data: bytes) -> str:
    """An image file's bytes as a small JPEG in base64."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75, subsampling=0)  # colour at full size: flat shapes would bleed
    return base64.b64encode(buffer.getvalue()).decode()


def _cards_of(store: Store) -> dict[str, dict[str, Any]]:
    """The page's cards by id; none where there is no page, or one of somebody else's."""
    try:
        page = store.read(NAME).decode()
        found = re.search(r'<script type="application/json" id="cards">(.*?)</script>', page, re.DOTALL)
        cards = json.loads(found[1]) if found else []
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return {card["id"]: card for card in cards if _is_card(card)} if isinstance(cards, list) else {}


def _is_card(card: Any) -> bool:
    return isinstance(card, dict) and all(isinstance(card.get(name), str) for name in _CARD)

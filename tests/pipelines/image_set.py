"""A few captioned pictures, as others store them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

DRAW = np.random.default_rng(0)
PICTURES = {f"{i:03d}": DRAW.integers(0, 256, (20, 24 + i, 3), np.uint8) for i in range(10)}
CAPTIONS = {key: f"a cat number {key}" for key in PICTURES}


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_set(folder, kind: str) -> str:
    """The pictures as others store them; returns what --images takes."""
    folder.mkdir(exist_ok=True)
    if kind == "tar":
        for shard, keys in enumerate((list(PICTURES)[:6], list(PICTURES)[6:])):
            with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
                for key in keys:
                    facts = {"label": int(key), "prompt": "not this one"}
                    writer.write(
                        {"__key__": f"v1.0/{key}", "png": png(PICTURES[key]), "txt": CAPTIONS[key], "json": facts}
                    )
        return str(folder / "*.tar")
    if kind in ("bytes", "struct"):
        images = [png(pixels) for pixels in PICTURES.values()]
        column = images if kind == "bytes" else [{"bytes": image, "path": None} for image in images]
        rows = pa.table({"Image": column, "text": list(CAPTIONS.values()), "label": list(range(10))})
        pq.write_table(rows, folder / "set.parquet", row_group_size=4)
        return str(folder / "set.parquet")
    for key, pixels in PICTURES.items():
        (folder / f"{key}.png").write_bytes(png(pixels))
        if kind == "folder":
            (folder / f"{key}.txt").write_text(CAPTIONS[key] + "\n")
    if kind == "metadata":
        rows = [{"file_name": f"{key}.png", "text": CAPTIONS[key], "label": int(key)} for key in PICTURES]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)

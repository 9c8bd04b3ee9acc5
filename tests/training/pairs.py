"""Pictures beside those that they are made from, and a run on them."""

import json

import numpy as np
from PIL import Image

from sdjax.training import config

SIDE, COUNT = 32, 4


def write(folder):
    """Four images, each with a caption and the picture that it is made from."""
    rng, rows = np.random.default_rng(0), []
    for i in range(COUNT):
        names = {"file_name": f"{i}.png", "conditioning_image_file_name": f"from/{i}.png"}
        rows.append(json.dumps({**names, "text": ["a red circle", "", "cat cat", "a star"][i]}))
        for name in names.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def settings(folder, model, pictures, **changes):
    """A run of two steps on all of them."""
    shared = {"output": str(folder / "run"), "init": str(model), "steps": 2, "batch_size": COUNT}
    data = config.Data(folder=str(pictures), size=SIDE)
    return config.Train(**{**shared, "data": data, "diffusion": config.Diffusion(caption_dropout=0.0), **changes})

"""Checkpoint keys of other times and makers as the keys that the modules here have, which are the classic ones."""

import re
from collections.abc import Container

import numpy as np

# Of a whole CLIP, beside the text encoder that is wanted of it.
_OTHER_HALF = re.compile(r"vision_model\..*|(?:text|visual)_projection\.weight|logit_scale")
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current(key: str, wanted: Container[str]) -> str | None:
    """The module's key for a checkpoint's `key`, or None for a buffer or another network's, which no module wants.

    VAEs from before diffusers 0.18 name their attention otherwise; transformers 5 leaves `text_model.` out.
    """
    if key.endswith(".position_ids") or (key not in wanted and _OTHER_HALF.fullmatch(key)):
        return None
    key = _OLD_ATTENTION.sub(lambda match: f"{match[1]}.{_NEW_ATTENTION[match[2]]}.", key)
    prefixed = f"text_model.{key}"
    return prefixed if key not in wanted and prefixed in wanted else key


def squeezed(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """A 1x1 convolution's weight as the matrix that it is, where the module has a matrix."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1) else tensor

"""Textual inversions (https://arxiv.org/abs/2208.01618): tokens of learned embeddings, added to a text encoder."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdjax.weights.addon_file import AddonFile
from sdjax.weights.checkpoint import Edit
from sdjax.weights.safetensors import CheckpointError

NAMES = ("learned_embeds.safetensors",)
TABLE = "text_model.embeddings.token_embedding.weight"
# Keys that name an encoder, and those that stand for the file's only embedding and leave the token to the file's name.
_ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
_NAMELESS = ("emb_params", "string_to_param.*")


class TextualInversion:
    """One token's embeddings, of one vector or several, for one text encoder or two.

    The formats are those of A1111 (`emb_params`, `string_to_param`), of diffusers (the token is the key) and of SDXL's
    trainers (`clip_l`, `clip_g`). A token of several vectors stands in a prompt for all of them.

    Args:
        source: see `AddonFile`.
        token: by which prompts use it; default the file's own, which is its name where it holds none.
        configs: the checkpoint's, by component.
        what: what errors call the checkpoint.
        allow_pickle: see `AddonFile`.

    Raises:
        CheckpointError: it cannot be read, or has vectors of a width that no text encoder takes.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        token: str | None,
        configs: Mapping[str, Any],
        *,
        what: str,
        allow_pickle: bool = False,
    ) -> None:
        self.file = AddonFile(source, NAMES, allow_pickle=allow_pickle)
        entries = self.file.entries
        self._keys = {encoder: key for key, encoder in _ENCODERS.items() if key in entries}
        named = self.file.stem
        widths = {name: config.hidden_size for name, config in configs.items() if name.startswith("text_encoder")}
        if not self._keys:
            key = next((key for key in _NAMELESS if key in entries), None)
            if key is None and len(entries) == 1:
                key = named = next(iter(entries))
            if key is None:
                raise CheckpointError(
                    f"{source} holds no textual inversion, but keys such as {', '.join([*entries][:3])}"
                )
            width = entries[key].shape[-1] if entries[key].shape else 0
            self._keys = {next((name for name, size in widths.items() if size == width), "text_encoder"): key}
        self.token = token or named
        if not self.token or any(character.isspace() for character in self.token):
            raise CheckpointError(f"{source}: {self.token!r} cannot be a token; give one without spaces")
        for encoder, key in self._keys.items():
            shape = entries[key].shape
            if len(shape) not in (1, 2) or 0 in shape or shape[-1] != widths.get(encoder):
                takes = " and ".join(f"{name} takes {size}" for name, size in widths.items())
                raise CheckpointError(f"{source} has vectors {key} of shape {list(shape)}; of {what}, {takes} numbers")

    def count(self, encoder: str) -> int:
        """How many vectors an encoder gets."""
        if encoder not in self._keys:
            return 0
        shape = self.file.entries[self._keys[encoder]].shape
        return 1 if len(shape) == 1 else shape[0]

    def vectors(self, encoder: str) -> np.ndarray:
        """An encoder's vectors, [count, width]."""
        key = self._keys[encoder]
        return np.atleast_2d(self.file.tensors([key])[key]).astype(np.float32)


def extended(inversions: Sequence[TextualInversion], encoder: str, first: int) -> Edit:
    """What puts the vectors of an encoder into its table of embeddings, from the id `first` on."""
    vectors = np.concatenate([inversion.vectors(encoder) for inversion in inversions if inversion.count(encoder)])

    def edit(key: str, tensor: np.ndarray) -> np.ndarray:
        if key != TABLE:
            return tensor
        end = first + len(vectors)
        table = np.zeros((max(len(tensor), end), tensor.shape[1]), np.float32)
        table[: len(tensor)], table[first:end] = tensor, vectors
        return table

    return edit

"""config.json of the text encoders."""

import dataclasses
from typing import Any, ClassVar

from sdjax.config.base import MAX_COUNT, MAX_LAYERS, Config, is_count

TEXT_ACTIVATIONS = ("quick_gelu", "gelu")
_MAX_POSITIONS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """config.json of transformers' CLIPTextModel and CLIPTextModelWithProjection.

    `eos_token_id=2` is what transformers wrote before 4.31 for every model, whatever its tokenizer: it means that the
    pooled token is the one with the highest id.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    inert: ClassVar[dict[str, Any]] = {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "model_type": "clip_text_model",
        "use_attention_mask": False,
    }
    # Bookkeeping that changes no output.
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("architectures", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")
        + (
            "gradient_checkpointing",
            "initializer_factor",
            "initializer_range",
            "return_dict",
            "output_hidden_states",
            "output_attentions",
        )
    )

    def __post_init__(self) -> None:
        self._counts("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_attention_heads")
        self._counts("num_hidden_layers", most=MAX_LAYERS)
        positions = self.max_position_embeddings
        # A text has a start and an end token.
        self._require(
            is_count(positions, _MAX_POSITIONS) and positions > 2,
            "max_position_embeddings",
            f"an integer from 3 to {_MAX_POSITIONS:,}",
        )
        self._positive("layer_norm_eps")
        self._one_of("hidden_act", TEXT_ACTIVATIONS)
        is_id = self.eos_token_id == 0 or is_count(self.eos_token_id)
        self._require(is_id, "eos_token_id", f"a token id up to {MAX_COUNT:,}")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            f"a divisor of hidden_size={self.hidden_size}",
        )

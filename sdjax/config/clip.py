"""config.json of the text encoders."""

import dataclasses
from typing import Any, ClassVar

from sdjax.config.base import Config

TEXT_ACTIVATIONS = ("quick_gelu", "gelu")


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
        self._counts("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers")
        self._counts("num_attention_heads", "max_position_embeddings")
        self._positive("layer_norm_eps")
        self._one_of("hidden_act", TEXT_ACTIVATIONS)
        self._require(isinstance(self.eos_token_id, int) and self.eos_token_id >= 0, "eos_token_id", "a token id")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "num_attention_heads",
            f"a divisor of hidden_size={self.hidden_size}",
        )

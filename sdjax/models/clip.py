"""CLIP's text encoder (https://arxiv.org/abs/2103.00020), with the state-dict keys of transformers before version 5.

transformers 5 saves CLIPTextModel without the `text_model.` prefix and CLIPTextModelWithProjection with it; loaders
settle that.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sdjax.config import CLIPTextConfig
from sdjax.models.attention import attention
from sdjax.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear


class TextOutput(NamedTuple):
    """What a prompt becomes.

    `hidden_states` are the embeddings and then each layer's output, none of them normalised:
    `text_model.final_layer_norm` of the last one is `last_hidden_state`. `pooled` is the end-of-text token's vector
    of it, projected by CLIPTextModelWithProjection.
    """

    last_hidden_state: Float[Array, "batch tokens hidden"]
    hidden_states: tuple[Float[Array, "batch tokens hidden"], ...]
    pooled: Float[Array, "batch pooled"]


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.heads = config.num_attention_heads
        self.k_proj = Linear(config.hidden_size, config.hidden_size, **kw)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, **kw)
        self.q_proj = Linear(config.hidden_size, config.hidden_size, **kw)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, **kw)

    def __call__(
        self, x: Float[Array, "batch tokens hidden"], keep: Bool[Array, "batch tokens"] | None
    ) -> Float[Array, "batch tokens hidden"]:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=True, keep=keep).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Two linear layers."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.act_fn = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kw)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kw)

    def __call__(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        return self.fc2(ACTIVATIONS[self.act_fn](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.self_attn = CLIPAttention(config, **kw)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, **kw)
        self.mlp = CLIPMLP(config, **kw)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, **kw)

    def __call__(
        self, x: Float[Array, "batch tokens hidden"], keep: Bool[Array, "batch tokens"] | None
    ) -> Float[Array, "batch tokens hidden"]:
        x = x + self.self_attn(self.layer_norm1(x), keep)
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nnx.Module):
    """Token plus position."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.token_embedding = Embed(config.vocab_size, config.hidden_size, **kw)
        self.position_embedding = Embed(config.max_position_embeddings, config.hidden_size, **kw)

    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens hidden"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPEncoder(nnx.Module):
    """The stack of layers; returns the input and every layer's output."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.layers = nnx.List([CLIPEncoderLayer(config, **kw) for _ in range(config.num_hidden_layers)])

    def __call__(
        self, x: Float[Array, "batch tokens hidden"], keep: Bool[Array, "batch tokens"] | None
    ) -> tuple[Float[Array, "batch tokens hidden"], ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], keep))
        return tuple(states)


class CLIPTextTransformer(nnx.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: CLIPTextConfig, **kw: Any):
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, **kw)
        self.encoder = CLIPEncoder(config, **kw)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, **kw)

    def __call__(self, ids: Int[Array, "batch tokens"], keep: Bool[Array, "batch tokens"] | None) -> TextOutput:
        hidden_states = self.encoder(self.embeddings(ids), keep)
        last = self.final_layer_norm(hidden_states[-1])
        # 2 is what configs before transformers 4.31 carry whatever the tokenizer; end-of-text is then the highest id.
        end = ids if self.eos_token_id == 2 else ids == self.eos_token_id
        return TextOutput(last, hidden_states, last[jnp.arange(len(ids)), jnp.argmax(end, axis=-1)])


class CLIPTextModel(nnx.Module):
    """CLIP's text encoder. `ids` are int [batch, tokens], tokens at most max_position_embeddings. Tokens whose
    `keep`, bool of the same shape, is false are hidden from all.

    A row without an end-of-text token pools its first token, as in transformers.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        self.config = config
        self.text_model = CLIPTextTransformer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "batch tokens"], keep: Bool[Array, "batch tokens"] | None = None) -> TextOutput:
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens; this text encoder takes at most {self.config.max_position_embeddings}"
            )
        return self.text_model(ids, keep)


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIPTextModel whose pooled vector is projected to `projection_dim`."""

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.text_projection = Linear(
            config.hidden_size, config.projection_dim, bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, ids: Int[Array, "batch tokens"], keep: Bool[Array, "batch tokens"] | None = None) -> TextOutput:
        output = super().__call__(ids, keep)
        return output._replace(pooled=self.text_projection(output.pooled))


def read(
    encoders: Sequence[Callable[[Array], TextOutput]], ids: Int[Array, "batch encoders *chunks length"], *, is_xl: bool
) -> tuple[Float[Array, "batch tokens hidden"], Float[Array, "batch pooled"]]:
    """What a UNet is told of plain texts: the encoders' last states side by side, and the last one's pooled vectors.

    Of texts in chunks the states follow each other, and the first chunk's vector counts. Stable Diffusion XL's are the
    states of the last layer but one, without the final norm.
    """
    batch, length = len(ids), ids.shape[-1]
    outputs = [encoder(ids[:, i].reshape(-1, length)) for i, encoder in enumerate(encoders)]
    states = [output.hidden_states[-2] if is_xl else output.last_hidden_state for output in outputs]
    context, pooled = jnp.concatenate(states, axis=-1), outputs[-1].pooled
    return context.reshape(batch, -1, context.shape[-1]), pooled.reshape(batch, -1, pooled.shape[-1])[:, 0]

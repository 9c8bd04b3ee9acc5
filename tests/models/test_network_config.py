"""The networks' configs: what published checkpoints carry is read, and what cannot be honoured is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.config import CLIPTextConfig, ConfigError, UNetConfig, VAEConfig
from tests.torch_models import CLIP, UNET, VAE, torch_clip, torch_unet, torch_vae

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"

SDXL = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": [PLAIN, CROSS, CROSS],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [UP_CROSS, UP_CROSS, UP_PLAIN],
    "upcast_attention": None,
    "use_linear_projection": True,
}


def test_the_stages_of_sdxl():
    config = UNetConfig.from_dict(SDXL)
    down, middle, up = config.down_stages, config.mid_stage, config.up_stages
    assert [stage.depths for stage in down] == [(), (2, 2), (10, 10)]
    assert middle is not None
    assert (middle.channels, middle.depths, middle.heads) == (1280, (10,), 20)
    assert [stage.depths for stage in up] == [(10,) * 3, (2,) * 3, ()]
    assert [stage.channels for stage in up] == [1280, 640, 320]
    assert {stage.context_dim for stage in (*down, *up)} == {2048}


def test_up_depths_of_a_distilled_sdxl_are_given_in_the_order_they_run():
    nested = {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    }
    config = UNetConfig.from_dict(SDXL | nested)
    assert [stage.depths for stage in config.down_stages] == [(), (2, 2), (4, 4)]
    assert [stage.depths for stage in config.up_stages] == [(4, 4, 10), (2, 1, 1), ()]


@pytest.mark.parametrize(
    ("config", "network", "kind"),
    [(UNET, torch_unet, UNetConfig), (VAE, torch_vae, VAEConfig), (CLIP, torch_clip, CLIPTextConfig)],
)
def test_whatever_the_libraries_write_is_read(config, network, kind):
    written = json.loads(
        network(config).config.to_json_string() if kind is CLIPTextConfig else network(config).to_json_string()
    )
    assert kind.from_dict(written) == kind.from_dict(config)


def test_old_text_encoder_configs_are_read():
    old = {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    }
    assert CLIPTextConfig.from_dict(old).eos_token_id == 2


def test_ema_settings_in_a_network_config_are_ignored():
    assert UNetConfig.from_dict(UNET | {"decay": 0.9999, "use_ema_warmup": True}) == UNetConfig.from_dict(UNET)


UNSUPPORTED = [
    (UNetConfig, "in_channels", 0),
    (UNetConfig, "out_channels", 4.5),
    (UNetConfig, "sample_size", [64, 64, 3]),
    (UNetConfig, "center_input_sample", "yes"),
    (UNetConfig, "freq_shift", 99),
    (UNetConfig, "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    (UNetConfig, "down_block_types", ["DownBlock2D"]),
    (UNetConfig, "up_block_types", ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]),
    (UNetConfig, "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    (UNetConfig, "only_cross_attention", [True]),
    (UNetConfig, "block_out_channels", []),
    (UNetConfig, "block_out_channels", [32, 60]),
    (UNetConfig, "layers_per_block", [1, 2, 3]),
    (UNetConfig, "layers_per_block", True),
    (UNetConfig, "mid_block_scale_factor", 0),
    (UNetConfig, "act_fn", "softplus"),
    (UNetConfig, "norm_num_groups", None),
    (UNetConfig, "norm_eps", -1),
    (UNetConfig, "cross_attention_dim", None),
    (UNetConfig, "transformer_layers_per_block", [[1], 1]),
    (UNetConfig, "transformer_layers_per_block", [1, 1, 1]),
    (UNetConfig, "reverse_transformer_layers_per_block", [1, [1]]),
    (UNetConfig, "attention_head_dim", 5),
    (UNetConfig, "attention_head_dim", None),
    (UNetConfig, "use_linear_projection", 1),
    (UNetConfig, "addition_embed_type", "image"),
    (UNetConfig, "upcast_attention", "fp32"),
    (UNetConfig, "resnet_time_scale_shift", "ada_group"),
    (UNetConfig, "time_cond_proj_dim", 0),
    (UNetConfig, "conv_in_kernel", 4),
    (UNetConfig, "class_embed_type", "timestep"),
    (UNetConfig, "num_class_embeds", 1000),
    (UNetConfig, "dual_cross_attention", True),
    (UNetConfig, "downsample_padding", 0),
    (UNetConfig, "encoder_hid_dim", 1024),
    (UNetConfig, "attention_type", "gated"),
    (UNetConfig, "time_embedding_type", "fourier"),
    (UNetConfig, "dropout", 0.1),
    (UNetConfig, "norm_eps", 10**400),
    (UNetConfig, "sample_size", 10**8),
    (UNetConfig, "cross_attention_dim", 10**8),
    (UNetConfig, "layers_per_block", 101),
    (UNetConfig, "layers_per_block", [1, 10**8]),
    (UNetConfig, "transformer_layers_per_block", 101),
    (UNetConfig, "block_out_channels", [32] * 101),
    (VAEConfig, "down_block_types", ["AttnDownEncoderBlock2D"] * 2),
    (VAEConfig, "up_block_types", ["UpDecoderBlock2D"]),
    (VAEConfig, "layers_per_block", [1, 1]),
    (VAEConfig, "layers_per_block", 101),
    (VAEConfig, "act_fn", "tanh"),
    (VAEConfig, "norm_num_groups", 7),
    (VAEConfig, "latent_channels", None),
    (VAEConfig, "scaling_factor", "0.18"),
    (VAEConfig, "shift_factor", 0.1159),
    (VAEConfig, "latents_mean", [0.0, 0.0, 0.0, 0.0]),
    (VAEConfig, "use_quant_conv", None),
    (CLIPTextConfig, "hidden_act", "relu"),
    (CLIPTextConfig, "num_attention_heads", 5),
    (CLIPTextConfig, "eos_token_id", [1, 2]),
    (CLIPTextConfig, "eos_token_id", 10**400),
    (CLIPTextConfig, "num_hidden_layers", 101),
    (CLIPTextConfig, "vocab_size", 10**8),
    (CLIPTextConfig, "max_position_embeddings", 2),
    (CLIPTextConfig, "max_position_embeddings", 10**5),
    (CLIPTextConfig, "model_type", "t5"),
    (CLIPTextConfig, "use_attention_mask", True),
    (CLIPTextConfig, "layer_norm_eps", None),
]


@pytest.mark.parametrize(("kind", "key", "value"), UNSUPPORTED)
def test_an_unsupported_value_is_named(kind, key, value):
    base = {UNetConfig: UNET, VAEConfig: VAE, CLIPTextConfig: CLIP}[kind]
    with pytest.raises(ConfigError) as error:
        kind.from_dict(base | {key: value})
    message = str(error.value)
    blamed = "block_out_channels" if (kind, key) == (VAEConfig, "norm_num_groups") else key
    assert message.startswith(f"{kind.__name__}: {blamed}=")
    assert "must be" in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [UNetConfig, VAEConfig, CLIPTextConfig])
def test_an_unknown_key_is_named(kind):
    with pytest.raises(ConfigError, match="unknown key shiny=3"):
        kind.from_dict({"shiny": 3})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from([(UNetConfig, UNET), (VAEConfig, VAE), (CLIPTextConfig, CLIP)]), st.data())
def test_any_json_is_read_or_refused(pair, data):
    kind, base = pair
    key = data.draw(st.sampled_from([*kind.__dataclass_fields__, *kind.inert]))
    try:
        config = kind.from_dict(base | {key: data.draw(JUNK)})
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert hash(config) == hash(config)
        if kind is UNetConfig:
            assert len(config.down_stages) == len(config.up_stages)

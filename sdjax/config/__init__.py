"""The networks' config.json files as strict dataclasses.

Field names and defaults are those of diffusers (UNet2DConditionModel, ControlNetModel, AutoencoderKL,
AutoencoderTiny) and transformers (CLIPTextConfig), because a config file may leave out any field. A value that the
networks here cannot honour raises ConfigError; so does a key nobody knows. Keys that those libraries write but that
select features this package does not have are accepted at the value that switches them off.
"""

from sdjax.config.base import ACTIVATIONS, ConfigError
from sdjax.config.clip import TEXT_ACTIVATIONS, CLIPTextConfig
from sdjax.config.unet import ControlNetConfig, DownConfig, Stage, UNetConfig
from sdjax.config.vae import AutoencoderTinyConfig, VAEConfig

__all__ = [
    "ACTIVATIONS",
    "TEXT_ACTIVATIONS",
    "AutoencoderTinyConfig",
    "CLIPTextConfig",
    "ConfigError",
    "ControlNetConfig",
    "DownConfig",
    "Stage",
    "UNetConfig",
    "VAEConfig",
]

"""Tiny networks to train: their configuration, a run of them that has begun, and the weights that one leaves."""

import csv

import jax
import numpy as np
from safetensors.numpy import load_file

from sdjax.parallel import Devices
from sdjax.training import config
from sdjax.training.loop import Run

ONE = Devices(jax.devices()[:1])
SHARED = """
output = "{output}"
steps = 8
batch_size = 4
log_every = 1
checkpoint_every = 3
sheet_every = 8
[data]
generator = "sdjax.training.data:Scenes"
options = {{ count = 11 }}
size = 16
cache_latents = {cache}
[model.vae]
block_out_channels = [4, 8]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
norm_num_groups = 2
mid_block_add_attention = false
[optimizer]
learning_rate = 1e-3
ema_decay = 0.9
"""
UNET = """
[model.unet]
sample_size = 8
block_out_channels = [8]
down_block_types = ["CrossAttnDownBlock2D"]
up_block_types = ["CrossAttnUpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
cross_attention_dim = 8
attention_head_dim = 2
[model.text_encoder]
hidden_size = 8
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 2
[model.tokenizer]
merges = 100
max_length = 20
[model.scheduler]
_class_name = "DDIMScheduler"
beta_schedule = "scaled_linear"
prediction_type = "v_prediction"
[diffusion]
train_text_encoder = true
min_snr_gamma = 5.0
offset_noise = 0.1
"""


def write(folder, task="unet", cache="true", prompts=()):
    path = folder / f"{task}.toml"
    cache = cache if task == "unet" else "false"
    text = f'task = "{task}"\nsheet_prompts = {list(prompts)}\n{SHARED}'.format(output=folder / "run", cache=cache)
    path.write_text(text + (UNET if task == "unet" else ""))
    return path


def weights(folder):
    return {path.parent.name: load_file(path) for path in sorted(folder.glob("*/*.safetensors"))}


def losses(folder):
    """A run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def begin(folder):
    """A run of the VAE alone whose state is that of its first step, with an average that is not the parameters."""
    run = Run(config.load(write(folder, "vae", cache="false")), ONE)
    average = {"vae": {name: leaf + 1 for name, leaf in run.state.params["vae"].items()}}
    run.state = run.state._replace(step=np.int32(1), ema=average)
    return run

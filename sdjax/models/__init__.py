"""CLIP text encoder, UNet, ControlNet and autoencoders in Flax NNX. They know nothing of samplers, files or devices."""

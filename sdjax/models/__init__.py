"""CLIP text encoder, UNet and KL autoencoder in Flax NNX. They know nothing of samplers, files or devices."""

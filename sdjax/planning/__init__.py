"""What a program would cost on a TPU that is not here, by the TPU compiler's own account."""

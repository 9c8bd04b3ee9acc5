"""What programs would take on a TPU or GPU that is not here, by its compiler's own account."""

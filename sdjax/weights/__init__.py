"""Checkpoint files to parameters and back. Knows no devices and no requests."""

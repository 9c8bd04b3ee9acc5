"""What commands print for others to read. Knows no JAX."""

import os
import sys


def show(text: str) -> None:
    """Print to stdout; where whoever read it has gone, as `head` does, this and all that follows is dropped unsaid."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer Python writes once more as it ends, and says so if it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

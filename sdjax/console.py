"""What commands print for others to read, and what they end with a line for. Knows no JAX."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence

from sdjax.retrying import is_of_a_network


def says_why(error: Exception) -> bool:
    """Whether a command ends with the one line of this error: what was asked for or the world is at fault, not we."""
    return isinstance(error, (ValueError, OSError, ImportError)) or is_of_a_network(error)  # an import for a protocol


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had too little; by the error's name, because not all who ask import JAX."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def say(command: str, what: object) -> None:
    """Print one line for whoever started a command; of an error without words, what it is."""
    print(f"{command}: {' '.join(str(what).split()) or type(what).__name__}", file=sys.stderr)


def interrupted(command: str) -> int:
    """The exit status of a command that Ctrl-C ended, as shells have it."""
    say(command, "interrupted")
    return 130


def ended(command: str, run: Callable[[], int]) -> int:
    """The exit status of a command: what it returns, or 130 after Ctrl-C, or 2 after an error that is its one line."""
    try:
        return run()
    except KeyboardInterrupt:
        return interrupted(command)
    except Exception as error:
        if not says_why(error):
            raise
        say(command, error)
        return 2


def show(text: str) -> None:
    """Print to stdout; where whoever read it has gone, as `head` does, this and all that follows is dropped unsaid.

    Where it cannot be written for another reason, that is said: what the command did is done all the same.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"what was to be printed is lost: {error}", file=sys.stderr)
        # What is left in the buffer Python writes once more as it ends, and says so if it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))

"""The options with which commands take a Request's fields, and a check of their others. Knows no JAX."""

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from sdjax.request import Request, field_types


def add_request_options(
    to: argparse.ArgumentParser, about: str | None = None, *, leave_out: Sequence[str] = ("prompt",)
) -> None:
    """One option for each field of Request but those left out; values stay text, which Request reads and checks.

    about: what the help says of them all.
    """
    group, meanings = to.add_argument_group("request", about), _meanings()
    for field in fields(Request):
        if field.name not in leave_out:
            shown = "" if field.default in (None, MISSING) else f" (default: {field.default})"
            option = f"--{field.name.replace('_', '-')}"
            group.add_argument(option, default=argparse.SUPPRESS, help=f"{meanings.get(field.name, '')}{shown}")


def request_fields(options: object) -> dict[str, Any]:
    """The fields of a Request that were given, as text."""
    return {name: value for name, value in vars(options).items() if name in field_types()}


def refuse_empty(options: argparse.Namespace, *, leave_out: Sequence[str] = ()) -> None:
    """Raise ValueError where an option holds no text: a shell's variable that is not set would be taken for a default.

    A request's fields, some of which may be empty, are left to Request.
    """
    for name, value in vars(options).items():
        if name in field_types() or name in leave_out:
            continue
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ValueError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")


def _meanings() -> dict[str, str]:
    """What each field of Request means, from its docstring, as argparse wants it; python -OO leaves none."""
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", inspect.getdoc(Request) or "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for names, text in entries for name in names.split(", ")}

"""Prompt templates: a TOML file that stands for the product of its lists, any row of it made on demand.

    images_per_prompt = 4                     # seeds 0, 1, 2, 3 (counted from `seed`); 1 where left out
    prompts = ["a photo of a {animal} in {place}", "a drawing of a {animal}"]

    [lists]
    animal = ["cat", "dog"]
    place = ["Paris", "the snow"]             # one named as a Request field goes through its values for every prompt

    [request]                                 # any other Request field, for every row
    num_inference_steps = 20

This one expands to (2 x 2 + 2) x 4 rows. The values taken from the lists travel with the row as extra columns.
"""

import bisect
import itertools
import math
import string
import tomllib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from sdjax.request import field_types
from sdjax.values import RequestError, coerce

MAX_ROWS = 10**9

_FIELDS = frozenset(field_types())
_SWEPT = _FIELDS - {"prompt"}


class TemplateError(ValueError):
    """A template file that says something it cannot mean; one line."""


@dataclass(frozen=True)
class Template:
    """The rows a template file stands for: `len(template)` of them, `template[i]` made when asked for."""

    prompts: tuple[str, ...]
    lists: dict[str, tuple[Any, ...]]
    request: dict[str, Any]
    images_per_prompt: int

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "Template":
        """Read the TOML text.

        seed: where one that names none begins to count.

        Raises:
            TemplateError: not TOML, an unknown key, no prompts, a list that is empty, missing or of no use, a value of
                another type, a field that is given twice, a prompt that formats a list's value, or more than MAX_ROWS
                rows.
        """
        try:
            spec = tomllib.loads(text)
        except RecursionError:
            raise TemplateError("nested too deeply") from None
        except ValueError as error:  # also of a number of too many digits
            raise TemplateError(f"not TOML: {error}") from None
        _check_numbers(spec)
        unknown = set(spec) - {"prompts", "lists", "request", "images_per_prompt"}
        if unknown:
            raise TemplateError(
                f"unknown key {min(unknown)!r}; allowed are prompts, lists, request and images_per_prompt"
            )
        prompts, lists, request = spec.get("prompts", []), spec.get("lists", {}), spec.get("request", {})
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise TemplateError("prompts must be a list of one or more texts")
        for name, table in (("lists", lists), ("request", request)):
            if not isinstance(table, dict):
                raise TemplateError(f"{name} must be a table, [{name}]")
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise TemplateError(f"lists.{name} must be a list of one or more values")
        unknown = set(request) - _SWEPT
        if unknown:
            raise TemplateError(f"request.{min(unknown)} is not a Request field")
        swept = [name.lower() for name in lists if name.lower() in _SWEPT]
        if twice := [name for name in swept if name in request or swept.count(name) > 1]:
            raise TemplateError(f"{min(twice)} is given twice; give a field one list, or one value in [request]")
        images = spec.get("images_per_prompt", 1)
        if not isinstance(images, int) or isinstance(images, bool) or images < 1:
            raise TemplateError(f"images_per_prompt={images!r} must be a whole number of 1 or more")
        request["seed"] = _seed(request.get("seed", seed))
        lists = {k: tuple(map(_seed, v) if k.lower() == "seed" else v) for k, v in lists.items()}
        template = cls(tuple(prompts), lists, request, images)
        for prompt in prompts:
            for name in _names(prompt):
                if name not in lists:
                    raise TemplateError(f"the prompt {prompt!r} uses {{{name}}}, and there is no list of that name")
        idle = lists.keys() - {name for turning in template._turning.values() for name in turning}
        if idle:
            raise TemplateError(f"lists.{min(idle)} is in no prompt, and no Request field")
        if template._ends[-1] > MAX_ROWS:
            raise TemplateError(f"more than {MAX_ROWS:,} rows; shorten its lists, or lower images_per_prompt")
        return template

    @cached_property
    def _turning(self) -> dict[str, tuple[str, ...]]:
        """The lists whose product a prompt is made with, by prompt: those that it names, and those of fields."""
        fields = [name for name in self.lists if name.lower() in _SWEPT]
        return {prompt: tuple(dict.fromkeys((*_names(prompt), *fields))) for prompt in self.prompts}

    @cached_property
    def _ends(self) -> list[int]:
        """Where each prompt's rows end."""
        products = (math.prod(len(self.lists[name]) for name in self._turning[prompt]) for prompt in self.prompts)
        return list(itertools.accumulate(self.images_per_prompt * product for product in products))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: the prompt, its seed, the request's fields and the lists' values. The last list turns fastest
        but for the seed."""
        if not 0 <= index < self._ends[-1]:
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        prompt = self.prompts[which]
        index -= self._ends[which - 1] if which else 0
        index, image = divmod(index, self.images_per_prompt)
        values: dict[str, Any] = {}
        for name in reversed(self._turning[prompt]):
            index, place = divmod(index, len(self.lists[name]))
            values[name] = self.lists[name][place]
        columns = {name: value for name, value in reversed(values.items()) if name.lower() not in _FIELDS}
        fields = {"seed": 0, **self.request}
        fields |= {name.lower(): value for name, value in values.items() if name.lower() in _FIELDS}
        fields["seed"] += image
        texts = [text + ("" if name is None else str(values[name])) for text, name in _parts(prompt)]
        return {**columns, **fields, "prompt": "".join(texts)}


def _check_numbers(spec: Any) -> None:
    """Raise TemplateError where a whole number is beyond TOML's 64 bits; no file may be able to hold it."""
    left = [spec]
    while left:
        value = left.pop()
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise TemplateError("a whole number of more than 64 bits")


def _seed(value: Any) -> int:
    """A seed that can be counted from."""
    try:
        return coerce("seed", value, (int, False))
    except RequestError as error:
        raise TemplateError(str(error)) from None


def _names(prompt: str) -> tuple[str, ...]:
    """The lists a prompt uses, in the order of their first use."""
    return tuple(dict.fromkeys(name for _, name in _parts(prompt) if name is not None))


@cache
def _parts(prompt: str) -> tuple[tuple[str, str | None], ...]:
    """A prompt as texts, each with the list whose value follows it."""
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise TemplateError(f"the prompt {prompt!r}: {error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in parts:
        if spec or conversion:
            raise TemplateError(f"the prompt {prompt!r} formats {{{name}}}; a list's value goes in as it is")
    return tuple((text, name) for text, name, _, _ in parts)

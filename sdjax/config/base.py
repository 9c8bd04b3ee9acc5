"""What the configs share: reading a JSON object strictly, and checks whose errors name their key."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

# Far beyond what is of use; shapes take time to build and lists of layers much more.
MAX_COUNT = 1_000_000
MAX_LAYERS = 100
_MAX_NUMBER = 1e30

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


class ConfigError(ValueError):
    """A config.json value that is not supported; the message names the key, the value and what is allowed."""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def is_count(value: Any, most: int = MAX_COUNT) -> bool:
    """Whether a JSON value is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def is_layers(value: Any) -> bool:
    """Whether it is a number of layers."""
    return is_count(value, MAX_LAYERS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


class Config:
    """A frozen dataclass of a config.json's keys; `inert` keys are accepted at one value, `ignored` ones at any."""

    inert: ClassVar[dict[str, Any]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    block_out_channels: tuple[int, ...]
    norm_num_groups: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """The config that the JSON object `config` describes. Raises ConfigError."""
        names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        for key, value in config.items():
            if key in names or key in cls.ignored or key.startswith("_"):
                continue
            if key not in cls.inert:
                raise ConfigError(f"{cls.__name__}: unknown key {key}={value!r}")
            if _tuples(value) != cls.inert[key]:
                raise ConfigError(f"{cls.__name__}: {key}={value!r} is not supported; it must be {cls.inert[key]!r}")
        return cls(**{key: _tuples(value) for key, value in config.items() if key in names})

    def _as_float(self, *keys: str) -> None:
        """Store numbers as floats: JSON writes 1 for 1.0."""
        for key in keys:
            value = getattr(self, key)
            self._require(_is_number(value), key, "a number")
            object.__setattr__(self, key, float(value))

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(
                f"{type(self).__name__}: {key}={getattr(self, key)!r} is not supported; it must be {allowed}"
            )

    def _counts(self, *keys: str, most: int = MAX_COUNT) -> None:
        for key in keys:
            self._require(is_count(getattr(self, key), most), key, f"a positive integer up to {most:,}")

    def _positive(self, *keys: str) -> None:
        self._as_float(*keys)
        for key in keys:
            self._require(getattr(self, key) > 0, key, "a positive number")

    def _flags(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "true or false")

    def _one_of(self, key: str, allowed: Iterable[Any]) -> None:
        allowed = tuple(allowed)
        self._require(getattr(self, key) in allowed, key, f"one of {', '.join(map(str, allowed))}")

    def _size(self, key: str) -> None:
        size = getattr(self, key)
        pair = isinstance(size, tuple) and len(size) == 2 and all(map(is_count, size))
        allowed = f"a positive integer up to {MAX_COUNT:,}, a pair of them, or null"
        self._require(size is None or is_count(size) or pair, key, allowed)

    def _channels(self) -> int:
        """Check block_out_channels; returns the number of blocks."""
        channels, groups = self.block_out_channels, self.norm_num_groups
        self._counts_list("block_out_channels")
        self._require(
            all(c % groups == 0 for c in channels), "block_out_channels", f"multiples of norm_num_groups={groups}"
        )
        return len(channels)

    def _counts_list(self, *keys: str, most: int = MAX_COUNT) -> None:
        for key in keys:
            value = getattr(self, key)
            listed = isinstance(value, tuple) and is_layers(len(value)) and all(is_count(each, most) for each in value)
            self._require(listed, key, f"a list of positive integers up to {most:,}, at most {MAX_LAYERS} of them")

    def _kinds(self, key: str, *allowed: str) -> None:
        """Check a list of block types, one for each of block_out_channels."""
        kinds, blocks = getattr(self, key), len(self.block_out_channels)
        listed = isinstance(kinds, tuple) and all(kind in allowed for kind in kinds)
        self._require(listed, key, f"a list of {', '.join(allowed)}")
        self._require(len(kinds) == blocks, key, f"as long as block_out_channels ({blocks})")

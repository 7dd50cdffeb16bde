"""Checks of configuration values: config.json may hold anything, and errors name the field."""

from __future__ import annotations

import dataclasses
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run as written; the message names the field and what to do."""


# Largest accepted sizes, several times those of any published model, so that a damaged or hostile config.json is
# refused before anything of its size is allocated.
LIMITS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 27,
    "image_size": 1 << 14,
    "patch_size": 1 << 12,
    "num_channels": 1 << 8,
}
_LARGEST = 1e300

# Annotation -> its name in error messages.
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "tuple[int, ...]": "integers",
    "None": "null",
}


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_kinds(config: Any) -> None:
    """Raise ConfigError unless every plain field of a dataclass has the type of its annotation."""
    for field in dataclasses.fields(config):
        kinds = [kind for kind in str(field.type).split(" | ") if kind in _KINDS]
        value = getattr(config, field.name)
        if kinds[:1] not in ([], ["None"]) and not any(_is_kind(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ConfigError(f"{type(config).__name__}.{field.name} must be {expected}, not {value!r}")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "tuple[int, ...]":
        return isinstance(value, tuple) and all(_is_kind(item, "int") for item in value)
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    if isinstance(value, bool) or not isinstance(value, (int,) if kind == "int" else (int, float)):
        return False
    return abs(value) <= _LARGEST  # excludes NaN, Inf and integers beyond float64


def require_size(name: str, value: Any, where: str) -> None:
    """Raise ConfigError unless `value` is an integer from 1 to LIMITS[name]. where: how the message begins."""
    if not (_is_kind(value, "int") and 1 <= value <= LIMITS[name]):
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
        raise ConfigError(f"{where} {shown}: expected an integer from 1 to {LIMITS[name]}")


def require_sizes(config: Any) -> None:
    """Raise ConfigError unless every size of a dataclass is within LIMITS; None is accepted."""
    for name in LIMITS:
        if getattr(config, name, None) is not None:
            require_size(name, getattr(config, name), f"{type(config).__name__}.{name} is")


def require_positive(config: Any, names: str) -> None:
    """Raise ConfigError unless the fields `names`, separated by spaces, are positive."""
    for name in names.split():
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be positive, not {value!r}")


def unshuffle_factor(downsample_ratio: Any) -> int:
    """Return the integer 1 / downsample_ratio. Raises ConfigError where it is not an integer."""
    valid = _is_kind(downsample_ratio, "float") and 0 < downsample_ratio <= 1
    ratio = round(1 / downsample_ratio) if valid else 0
    require(
        abs(ratio * downsample_ratio - 1) < 1e-6 if valid else False,
        f"downsample_ratio {downsample_ratio!r} is not 1/n for an integer n",
    )
    return ratio

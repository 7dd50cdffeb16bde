"""Declares parameters, each with a logical name per array axis, where its module makes it.

`params` and checkpoints hold plain arrays. The names are recorded only inside `recording_axes`, as
`internvl_jax.models.axes` does to read them; everything that depends on what an axis means (sharding,
padding, quantization, adapters, chunks on disk) is derived from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any

import flax.linen as nn
import flax.struct
from flax.core.meta import AxisMetadata

# While axes are recorded: counts the parameters, so that their order of declaration is known.
_recording: ContextVar[Iterator[int] | None] = ContextVar("recording_axes", default=None)


@dataclass(frozen=True)
class ParamAxes:
    """What a parameter's axes mean.

    Attributes:
        names: the logical name of each axis, a key of `partitioning.AXIS_RULES`.
        inputs: of a kernel, how many axes a product with it sums: the first ones, after "layers". 0 for others.
        order: the place of the declaration among all of the model.
    """

    names: tuple[str, ...]
    inputs: int = 0
    order: int = 0


class Declared(flax.struct.PyTreeNode, AxisMetadata[Any]):
    """A parameter and its axes; exists only while axes are recorded."""

    value: Any
    axes: ParamAxes = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        return self


def declared(value: Any, axes: tuple[str, ...], inputs: int = 0) -> Any:
    """Return a new parameter's value, with its axes while these are recorded. Arguments as `declare`."""
    order = _recording.get()
    return value if order is None else Declared(value, ParamAxes(axes, inputs, next(order)))


@contextmanager
def recording_axes() -> Iterator[None]:
    """Have `declare` wrap new parameters in `Declared`, so that a tree of them shows the axes."""
    token = _recording.set(count())
    try:
        yield
    finally:
        _recording.reset(token)


def declare(
    module: nn.Module,
    name: str,
    init: Callable[..., Any],
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    inputs: int = 0,
) -> Any:
    """Return a module's parameter: the stored one, or a new one where there is none yet.

    A stored parameter may be padded for a mesh or quantized, which Flax's own check of shapes would reject.

    Args:
        module: the module that owns the parameter.
        name: its name.
        init: a Flax initializer, called with a key and `shape`.
        shape: the shape of a new parameter.
        axes: the logical name of each axis, a key of `partitioning.AXIS_RULES`.
        inputs: of a kernel, how many of its first axes a product sums.

    Raises:
        ValueError: there is not one name per axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"the parameter {name} {list(shape)} is declared with {len(axes)} logical axes: {axes}")
    if module.has_variable("params", name):
        return nn.meta.unbox(module.get_variable("params", name))
    return module.param(name, lambda key: declared(init(key, shape), axes, inputs))

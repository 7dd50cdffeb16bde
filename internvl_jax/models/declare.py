"""Parameters are declared here: each with a logical axis name per array axis, at the place where its module makes it.

`params` and checkpoints hold plain arrays. The names are recorded only inside `recording_axes`, as
`internvl_jax.models.placement.logical_axes` does to read them; everything that depends on what an axis means (sharding,
padding, quantization, adapters, chunks on disk) is derived from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import flax.struct
from flax.core.meta import AxisMetadata

_recording: ContextVar[bool] = ContextVar("recording_axes", default=False)


class Declared(flax.struct.PyTreeNode, AxisMetadata[Any]):
    """A parameter and the logical names of its axes; exists only while axes are recorded."""

    value: Any
    axes: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        return self


def declared(value: Any, *axes: str) -> Any:
    """A new parameter's value, with its axes while these are recorded."""
    return Declared(value, axes) if _recording.get() else value


@contextmanager
def recording_axes() -> Iterator[None]:
    """Have `declare` wrap new parameters in `Declared`, so that a tree of them shows the axes."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)


def declare(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...], axes: tuple[str, ...]
) -> Any:
    """Return a module's parameter: the stored one, or a new one where there is none yet.

    A stored parameter may be padded for a mesh or quantized, which Flax's own check of shapes would reject.

    Args:
        module: the module that owns the parameter.
        name: its name.
        init: a Flax initializer, called with a key and `shape`.
        shape: the shape of a new parameter.
        axes: the logical name of each axis, a key of `partitioning.AXIS_RULES`.

    Raises:
        ValueError: there is not one name per axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"the parameter {name} {list(shape)} is declared with {len(axes)} logical axes: {axes}")
    if module.has_variable("params", name):
        return nn.meta.unbox(module.get_variable("params", name))
    return module.param(name, lambda key: declared(init(key, shape), *axes))

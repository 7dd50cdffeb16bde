"""What a training step changes: parameters, optimizer state and randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from internvl_jax.models.layers import Array, Params

ADAPTERS = "adapters"  # the key of the adapters' tree, beside the trained parts of the model


class State(flax.struct.PyTreeNode):
    """Everything that a step changes and that resuming needs, except for the position in the data.

    Attributes:
        step: [] int32, number of finished steps.
        trained: Trained parts of the model by name, and the adapters under ADAPTERS.
        optimizer: optax's state for `trained`.
        key: [2] uint32, key data of all randomness; each step folds its number in.
    """

    step: Array
    trained: Params
    optimizer: Any
    key: Array


def split_adapters(params: Params) -> tuple[Params, Params | None]:
    """Return the parts of the model, and the tree of adapters if there is one."""
    return {name: part for name, part in params.items() if name != ADAPTERS}, params.get(ADAPTERS)


def map_param_trees(function: Callable[[Any], Any], tree: Any, others: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """Apply `function` to the trees of parameters in an optimizer state, and `others` to all other leaves.

    The trees of parameters are the only dictionaries in optax's state.
    """
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, dict) else others(node),
        tree,
        is_leaf=lambda node: isinstance(node, dict),
    )


def checksum(leaf: Array) -> Array:
    """Return a checksum of an array. It is the same on every mesh, and differs if one bit does.

    The checksum is the sum of a hash of every element's bits and index, so it is exact in any order of summation.

    Args:
        leaf: Any shape, of 8, 16 or 32 bits per element.

    Returns:
        [] uint32.
    """
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

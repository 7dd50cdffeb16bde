"""A stack of equal layers, and how it runs: a scan over stacked parameters, or a loop over one tree per layer.

"Layers" of parameters, adapters or a KV cache are one tree stacked on axis 0, or a tuple with one tree per
layer. Only this file asks which; others use its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from qwix import QArray

from internvl_jax.models.layers import Array, Params, Variables, split_groups

# Rematerialization of a layer in the backward pass: none, all of it, or what a policy of jax.checkpoint_policies does
# not save.
Remat = bool | Callable[..., Any]

LAYERS = "layers"  # the name of the stack's parameters in its parent


class LayerStack(nn.Module):
    """Equal layers that run one after the other, and the parameters "layers" of the module that it shares a scope with.

    Where the collection "lora" has "layers" too, in the same layout, they are the layers' adapters. An rng "dropout"
    gives every layer one of its own, which depends on the layer's number alone.

    Stacked layers run as a lax.scan: the compile time does not grow with depth, and on TPU nothing is copied. A tuple
    runs as a Python loop, because on CPU a scan copies every layer's weights.

    Attributes:
        make_block: makes one unbound layer.
        num_layers: layers that `init` makes.
        remat: what the backward pass recomputes.
    """

    make_block: Callable[[], nn.Module]
    num_layers: int
    remat: Remat = False

    @nn.compact
    def __call__(
        self,
        step: Callable[..., tuple[Any, Any]],
        carry: Any,
        *,
        num_layers: int | None = None,
        per_layer: Any = None,
    ) -> tuple[Any, Any]:
        """Run the layers.

        Args:
            step: called as step(block, carry, index, extra) -> (carry, y), where block(...) applies the layer, index is
                its number (traced in a scan) and extra its slice of `per_layer`.
            carry: what goes into the first layer.
            num_layers: how many layers run; None for all.
            per_layer: a tree with a leading layer axis, or None.

        Returns:
            The last carry, and the ys stacked on axis 0 (None where y is None).

        Raises:
            ValueError: there are fewer layers than `num_layers`.
        """
        block = self.make_block()
        if not self.has_variable("params", LAYERS):
            self._init(block, step, carry, per_layer)
        layers = self._layers("params")
        stored = depth(layers)
        count = stored if num_layers is None else num_layers
        if count > stored:
            raise ValueError(f"{count} layers are asked for, but the parameters hold {stored}")
        layers, keys = _split_groups(layers), None
        if self.has_variable("lora", LAYERS):
            layers = _join(params=layers, lora=self._layers("lora"))
            if self.has_rng("dropout"):
                keys = jax.random.split(self.make_rng("dropout"), stored)
        else:
            layers = _join(params=layers)

        def apply(carry: Any, layer: Variables, index: Any, extra: Any) -> tuple[Any, Any]:
            extra, key = extra
            rngs = {} if key is None else {"dropout": key}
            return step(lambda *args: block.apply(layer, *args, rngs=rngs), carry, index, extra)

        if self.remat:
            apply = jax.checkpoint(apply, policy=None if self.remat is True else self.remat)
        return _run(apply, layers, carry, count, (per_layer, keys))

    def _layers(self, collection: str) -> Any:
        layers = self.get_variable(collection, LAYERS)
        return flax.core.unfreeze(layers) if isinstance(layers, flax.core.FrozenDict) else layers

    def _init(self, block: nn.Module, step: Callable[..., Any], carry: Any, per_layer: Any) -> None:
        """Make the stacked parameters, each layer from a key of its own."""

        def make(*args: Any) -> Any:
            def init(key: jax.Array) -> Params:
                keys = jax.random.split(key, self.num_layers)
                return jax.vmap(lambda key: block.init(key, *args)["params"])(keys)

            layers = self.param(LAYERS, init)
            return block.apply({"params": jax.tree.map(lambda leaf: leaf[0], layers)}, *args)

        step(make, carry, 0, jax.tree.map(lambda leaf: leaf[0], per_layer))


def is_stacked(layers: Params | tuple[Params, ...]) -> bool:
    """Whether a stack's parameters are one tree with a leading layer axis, rather than a tuple of trees."""
    return not isinstance(layers, tuple)


def unstack(layers: Params) -> tuple[Params, ...]:
    """Stacked layers as a tuple of trees.

    Arrays are sliced on the host, where it is free; by jax, every leaf would be copied by a program that is compiled
    first. Under jit and jax.eval_shape, jax slices.
    """

    def layer_of(leaf: Any, index: int) -> Any:
        return leaf[index] if isinstance(leaf, jax.core.Tracer) else jax.device_put(np.asarray(leaf)[index])

    return tuple(
        jax.tree.map(lambda leaf, index=index: layer_of(leaf, index), layers) for index in range(depth(layers))
    )


def zero_layers(count: int, shape: tuple[int, ...], dtype: Any, *, like: Any) -> Any:
    """Zeros of `shape` for every layer: one array [count, *shape] or a tuple, as the layers `like` are laid out."""
    if is_stacked(like):
        return jnp.zeros((count, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(count))


def depth(layers: Params | tuple[Params, ...]) -> int:
    """The number of layers in a stack's parameters."""
    return jax.tree.leaves(layers)[0].shape[0] if is_stacked(layers) else len(layers)


def _join(**collections: Any) -> Any:
    """Layers of several collections as layers of variables, in the layout that they have."""
    if all(map(is_stacked, collections.values())):
        return collections
    return tuple(dict(zip(collections, layer)) for layer in zip(*collections.values(), strict=True))


def _split_groups(layers: Any) -> Any:
    quantized = lambda leaf: isinstance(leaf, QArray)  # noqa: E731
    return jax.tree.map(lambda leaf: split_groups(leaf) if quantized(leaf) else leaf, layers, is_leaf=quantized)


def _run(apply: Callable[..., tuple[Any, Any]], layers: Any, carry: Any, count: int, per_layer: Any) -> tuple[Any, Any]:
    if not is_stacked(layers):
        ys = []
        for index, layer in enumerate(layers[:count]):
            carry, y = apply(carry, layer, index, jax.tree.map(lambda leaf, i=index: leaf[i], per_layer))
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys) if ys else None
    if count == 0:
        return carry, None
    if count < depth(layers):
        layers = jax.tree.map(lambda leaf: leaf[:count], layers)
    per_layer = jax.tree.map(lambda leaf: leaf[:count], per_layer)

    def body(state: tuple[Any, Array], xs: tuple[Any, Any]) -> tuple[tuple[Any, Array], Any]:
        (carry, index), (layer, extra) = state, xs
        carry, y = apply(carry, layer, index, extra)
        return (carry, index + 1), y

    # The index is carried: as a scanned input it would be sliced out of an array for every layer.
    (carry, _), ys = jax.lax.scan(body, (carry, jnp.int32(0)), (layers, per_layer))
    return carry, ys

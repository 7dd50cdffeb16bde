"""Quantized weights: int8 or int4 integers, and their scales.

A quantized kernel is a qwix.QArray in place of the array: `qvalue` in the kernel's shape and `scale` with the same
axes; qvalue * scale approximates the kernel. Both schemes are symmetric: a scale is set by the largest magnitude that
shares it (Jacob et al., 2018).

    "int8"     every matrix product except the patch embedding: one scale per output channel, multiplied after the
               product, so that weights are read from memory as 8 bits and never dequantized there.
    "int4"     the language model's layers: one scale per output channel and group of 64 or 128 inputs (per head in
               o_proj), because one scale for 5,120 inputs is too coarse for 15 levels (Frantar et al., 2023). The
               vision tower, the projector and the head are int8.

Embeddings (patches, positions, tokens), norms, biases and layer scales are not quantized: they are small or looked up.
The authors of InternViT-6B warn that it does not work in 4 bits; Scheme's `int4_vision` uses them nevertheless.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from qwix import QArray

from internvl_jax.models.axes import LAYERS, axes_of, find_axes
from internvl_jax.models.layers import Array, Params
from internvl_jax.parallel.partitioning import path_of

SCHEMES = ("int8", "int4")
GROUPS = (128, 64)  # sizes of int4 groups; the first one is used that leaves whole groups on each of 8 devices
SMALLEST_GROUP = 8  # the scales of smaller groups take more memory than they save


class QuantizeError(ValueError):
    """Parameters that cannot or should not be quantized as asked. The message says what is possible."""


@dataclass(frozen=True)
class Scheme:
    """How parameters are quantized.

    Attributes:
        name: "int8" or "int4", as described above.
        int4_vision: with "int4", use 4 bits for the vision tower and the projector too.
    """

    name: str
    int4_vision: bool = False

    def __post_init__(self):
        if self.name not in SCHEMES:
            raise QuantizeError(f"quantization {self.name!r} is not known: use {' or '.join(map(repr, SCHEMES))}")

    def qtype(self, path: str) -> Any:
        """The integer type of the parameter at "a/b/c"; None if it is not quantized."""
        axes = find_axes(path)
        if axes is None or not axes.inputs or "patch" in axes.names:
            return None
        part = path.partition("/")[0]
        four_bits = self.int4_vision if part != "language_model" else LAYERS in axes.names
        return jnp.dtype(jnp.int4 if self.name == "int4" and four_bits else jnp.int8)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a quantized kernel. As `is_leaf` of jax.tree functions, it keeps such a kernel whole."""
    return isinstance(leaf, QArray)


def quantize_params(params: Params, scheme: Scheme | str) -> Params:
    """Quantize the kernels of a tree of parameters. Works on arrays, under jit and under jax.eval_shape.

    Args:
        params: parameters with layers stacked or as tuples of per-layer trees.
        scheme: "int8", "int4" or a Scheme.

    Returns:
        The same tree with a QArray in place of each kernel.

    Raises:
        QuantizeError: the scheme is unknown, "int4" is asked for a vision tower alone, or a size has no groups.
    """
    scheme = Scheme(scheme) if isinstance(scheme, str) else scheme
    if scheme.name == "int4" and "language_model" not in params and not scheme.int4_vision:
        raise QuantizeError(
            "int4 is for language models: 4 bits ruin a vision tower like InternViT-6B, and this model is nothing "
            "else. Use 'int8' (or force it: Scheme('int4', int4_vision=True), --force-int4-vision)"
        )

    def quantize(keys: Any, leaf: Any) -> Any:
        path = path_of(keys)
        qtype = scheme.qtype(path)
        if qtype is None:
            return leaf
        per_layer = any(isinstance(key, jax.tree_util.SequenceKey) for key in keys)
        stacked = LAYERS in axes_of(path).names and not per_layer
        return quantize_kernel(leaf, inputs=axes_of(path).inputs, qtype=qtype, stacked=stacked, name=path)

    return jax.tree_util.tree_map_with_path(quantize, params)


def quantize_kernel(
    kernel: Array, *, inputs: int, qtype: Any, stacked: bool = False, name: str = "the kernel"
) -> QArray:
    """Quantize one kernel.

    Args:
        kernel: float array, whose first axes are summed in a product.
        inputs: how many axes that is (ParamAxes.inputs): 1, or 2 for heads and head dim.
        qtype: int8 or int4.
        stacked: the first axis is that of layers, which share no scales.
        name: for the error message.

    Returns:
        Integers and scales: int8 with one float32 scale per output channel, int4 with one bfloat16 scale per output
        channel and group of inputs.

    Raises:
        QuantizeError: int4 cannot divide the inputs into groups.
    """
    first = 1 if stacked else 0
    summed = range(first, first + inputs)
    channels = [axis for axis in range(len(kernel.shape)) if axis not in summed]
    tiles = {}
    if qtype == jnp.int4:
        if inputs == 2:
            channels.append(first)  # a group is what a head sums
        else:
            tiles = {first: group_size(kernel.shape[first], name)}
    # Groups have many scales. bfloat16 rounds them by 0.2%, far less than rounding to 15 levels does.
    return qwix.quantize(
        kernel.astype(jnp.float32),
        qtype,
        channelwise_axes=channels,
        tiled_axes=tiles,
        scale_dtype=jnp.bfloat16 if qtype == jnp.int4 else jnp.float32,
    )


def group_size(size: int, name: str) -> int:
    """The number of inputs that share a scale in int4.

    Args:
        size: all inputs.
        name: the kernel's name, for the message.

    Raises:
        QuantizeError: groups would be too small.
    """
    group = next((group for group in GROUPS if size % (8 * group) == 0), math.gcd(size, GROUPS[0]))
    if group < SMALLEST_GROUP:
        raise QuantizeError(
            f"{name} sums over {size} numbers, which int4 cannot divide into groups of {SMALLEST_GROUP} or more: "
            "use 'int8'"
        )
    return group


def scheme_of(params: Params) -> Scheme | None:
    """The scheme by which a tree is quantized; None if it is not."""
    types = {
        part: {leaf.qvalue.dtype for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)}
        for part, tree in params.items()
    }
    if not any(types.values()):
        return None
    four_bits = {part for part, found in types.items() if jnp.dtype(jnp.int4) in found}
    return Scheme("int4" if four_bits else "int8", int4_vision=not four_bits <= {"language_model"})


def quantize_while_reading(name: str, wanted: QArray, read: Callable[[int | None, Any], Array]) -> QArray:
    """Read a kernel and quantize it layer by layer, so that at most one layer is in memory unquantized.

    Args:
        name: the kernel's path, "a/b/kernel".
        wanted: its shapes as jax.ShapeDtypeStruct, with shardings or without.
        read: called as read(layer, sharding); returns one layer of the kernel in its stored dtype with that sharding
            (None: on the default device), or the whole kernel for layer None.
    """
    shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), wanted)
    options = {} if shardings.qvalue is None else {"out_shardings": shardings}
    axes = axes_of(name)
    quantize = partial(quantize_kernel, inputs=axes.inputs, qtype=wanted.qvalue.dtype, name=name)
    if LAYERS not in axes.names:
        return jax.jit(quantize, **options)(read(None, shardings.qvalue))

    def put(stack: QArray, kernel: Array, layer: Array) -> QArray:
        return jax.tree.map(partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0), stack, quantize(kernel))

    of_layer = shardings.qvalue and NamedSharding(shardings.qvalue.mesh, P(*shardings.qvalue.spec[1:]))
    stack = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted), **options)()
    put = jax.jit(put, donate_argnums=0, **options)
    for layer in range(wanted.shape[0]):
        stack = put(stack, read(layer, of_layer), layer)
    return stack

"""Weights in 8 or 4 bits and what is kept of them: integers, and scales that turn them back into numbers.

A quantized kernel is a qwix.QArray in the place of the array: `qvalue` in the kernel's shape, `scale` with the same
axes, where qvalue * scale is the kernel again. Both schemes are symmetric: the largest magnitude that shares a scale
sets it (Jacob et al., 2018).

    "int8"     every product of both towers, projector and head: one scale per output channel. Multiplying by it can
               wait until after the product, so that the weights cross the memory as 8 bits and nothing else is kept.
    "int4"     the language model's layers: one scale per output channel and group of 64 or 128 numbers that are summed
               (per head in o_proj), as with 15 levels one scale for 5,120 numbers is too coarse (Frantar et al., 2023).
               Vision tower, projector and head are int8.

Embeddings (patches, positions, tokens), norms, biases and layer scales stay as they are: they are small or looked up.
InternViT-6B in 4 bits answers nonsense, its authors warn; Scheme's `int4_vision` does it all the same.
"""

from __future__ import annotations

import math
import re
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

from internvl_jax.models.layers import Array, Params
from internvl_jax.parallel.partitioning import path_of

SCHEMES = ("int8", "int4")
GROUPS = (128, 64)  # numbers that share a scale in int4; the first that leaves whole groups on each of 8 devices
SMALLEST_GROUP = 8  # below, the scales take more room than they save

_KERNELS = re.compile(
    r"(vision_model|language_model)/layers/.*/kernel|mlp1/fc[12]/kernel|language_model/lm_head/kernel"
)
_OVER_HEADS = ("attn/proj/kernel", "self_attn/o_proj/kernel")  # sum over two axes, heads and head dim


class QuantizeError(ValueError):
    """Parameters that cannot, or should not, be quantized as asked; the message says what can."""


@dataclass(frozen=True)
class Scheme:
    """What is quantized how: "int8" or "int4" as above. int4_vision: 4 bits for vision tower and projector too."""

    name: str
    int4_vision: bool = False

    def __post_init__(self):
        if self.name not in SCHEMES:
            raise QuantizeError(f"quantization {self.name!r} is not known: use {' or '.join(map(repr, SCHEMES))}")

    def qtype(self, path: str) -> Any:
        """The integer type of the parameter at "a/b/c"; None for what is not quantized."""
        if not _KERNELS.fullmatch(path):
            return None
        part = path.partition("/")[0]
        four_bits = self.int4_vision if part != "language_model" else "/layers/" in path
        return jnp.dtype(jnp.int4 if self.name == "int4" and four_bits else jnp.int8)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a quantized kernel. With it as `is_leaf`, jax.tree takes one as a whole."""
    return isinstance(leaf, QArray)


def quantize_params(params: Params, scheme: Scheme | str) -> Params:
    """The same tree with its kernels quantized. Works on arrays, under jit and under jax.eval_shape.

    params: chat_model's tree, layers stacked or as tuples of per-layer trees. scheme: "int8", "int4" or a Scheme.
    Raises QuantizeError for a scheme that is none, for "int4" where there is a vision tower only, and for sizes that
    have no groups.
    """
    scheme = Scheme(scheme) if isinstance(scheme, str) else scheme
    if scheme.name == "int4" and "language_model" not in params and not scheme.int4_vision:
        raise QuantizeError(
            "int4 is for language models: 4 bits ruin a vision tower like InternViT-6B, and this model is nothing "
            "else. Use 'int8' (or force it: Scheme('int4', int4_vision=True), --force-int4-vision)"
        )

    def quantize(keys: Any, leaf: Any) -> Any:
        name = path_of(keys)
        qtype = scheme.qtype(name)
        if qtype is None:
            return leaf
        stacked = "/layers/" in name and not any(isinstance(key, jax.tree_util.SequenceKey) for key in keys)
        return quantize_kernel(leaf, name=name, qtype=qtype, stacked=stacked)

    return jax.tree_util.tree_map_with_path(quantize, params)


def quantize_kernel(kernel: Array, *, name: str, qtype: Any, stacked: bool = False) -> QArray:
    """Quantize the kernel called `name`. stacked: its first axis is that of layers, which share nothing."""
    first = 1 if stacked else 0
    summed = (first, first + 1) if name.endswith(_OVER_HEADS) else (first,)
    own = [axis for axis in range(len(kernel.shape)) if axis not in summed]
    tiles = {}
    if qtype == jnp.int4:
        if len(summed) == 2:
            own.append(first)  # a group is what a head sums
        else:
            tiles = {first: group_size(kernel.shape[first], name)}
    # Scales of groups are many: in bfloat16, whose rounding (0.2%) is nothing beside that to 15 levels.
    return qwix.quantize(
        kernel.astype(jnp.float32),
        qtype,
        channelwise_axes=own,
        tiled_axes=tiles,
        scale_dtype=jnp.bfloat16 if qtype == jnp.int4 else jnp.float32,
    )


def group_size(size: int, name: str) -> int:
    """How many of `size` numbers that are summed share a scale in int4."""
    group = next((group for group in GROUPS if size % (8 * group) == 0), math.gcd(size, GROUPS[0]))
    if group < SMALLEST_GROUP:
        raise QuantizeError(
            f"{name} sums over {size} numbers, which int4 cannot divide into groups of {SMALLEST_GROUP} or more: "
            "use 'int8'"
        )
    return group


def scheme_of(params: Params) -> Scheme | None:
    """How a tree is quantized; None: not at all."""
    types = {
        part: {leaf.qvalue.dtype for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)}
        for part, tree in params.items()
    }
    if not any(types.values()):
        return None
    four_bits = {part for part, found in types.items() if jnp.dtype(jnp.int4) in found}
    return Scheme("int4" if four_bits else "int8", int4_vision=not four_bits <= {"language_model"})


def quantize_while_reading(name: str, wanted: QArray, read: Callable[[int | None, Any], Array]) -> QArray:
    """Read a kernel and quantize it layer by layer: no more than one layer is ever there unquantized.

    wanted: shapes, and shardings where it shall have one. read(layer, sharding): one layer of the kernel in its stored
    dtype, laid out by `sharding` (None: on the default device); layer None: the whole leaf.
    """
    places = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), wanted)
    options = {} if places.qvalue is None else {"out_shardings": places}
    quantize = partial(quantize_kernel, name=name, qtype=wanted.qvalue.dtype)
    if "/layers/" not in name:
        return jax.jit(quantize, **options)(read(None, places.qvalue))

    def put(stack: QArray, kernel: Array, layer: Array) -> QArray:
        return jax.tree.map(partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0), stack, quantize(kernel))

    place = places.qvalue and NamedSharding(places.qvalue.mesh, P(*places.qvalue.spec[1:]))
    stack = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted), **options)()
    put = jax.jit(put, donate_argnums=0, **options)
    for layer in range(wanted.shape[0]):
        stack = put(stack, read(layer, place), layer)
    return stack

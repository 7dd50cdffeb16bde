"""Building blocks of both towers. Nothing here knows a model.

Axis letters, here and in every einsum string and shape comment of the project:
    B batch          T query tokens    S cache slots (keys)   D width           F mlp hidden
    N heads          K kv heads        G heads per kv head    H head dim        V vocabulary
    L layers         M images          P patches              C 3 (q, k, v)
    R rank of an adapter
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P
from qwix import QArray

from internvl_jax.models import cpu
from internvl_jax.models.declare import declare
from internvl_jax.parallel.partitioning import AXIS_RULES, BATCH, TENSOR, constrain, fit_spec, is_sharded, logical_spec

Array = jax.Array
Params = dict[str, Any]
Variables = dict[str, Params]  # by collection: "params", and "lora" where there are adapters

# Finite, so that a row that attends to nothing (padding) does not become NaN; the value is gemma's and big_vision's.
MASK_VALUE = -2.3819763e38

LANES = 128  # a TPU stores the innermost axis of an array in multiples of this
SUBLANES = 8  # and the second innermost in multiples of this

EMBED = ("embed", "vision_embed")  # the logical axes that are a residual stream's width
ADAPTER = "adapter"  # the name of a linear layer's Adapter in the collection "lora"


def part_variables(variables: Variables, part: str) -> Variables:
    """The variables of one part of a model, "language_model", in every collection that has some."""
    return {collection: tree[part] for collection, tree in variables.items() if part in tree}


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Precision of products in `dtype`: HIGHEST for float32, which a TPU would otherwise multiply as bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def on_tpu() -> bool:
    """Whether the program that is being traced is for a TPU: the mesh's devices, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def pin_layout(x: Array, spec: P, order: tuple[int, ...]) -> Array:
    """Fix the memory layout of an array.

    Inside a loop XLA chooses layouts that suit the loop's body, and copies every input that has another one. A layout
    constraint alone would make the partitioner gather x, hence the shard_map.

    Args:
        x: the array.
        spec: its sharding over the mesh.
        order: its axes from the outermost to the innermost.
    """

    def pin(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=order))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return pin(x)
    spec = fit_spec(spec, x.shape, mesh.shape)
    return jax.shard_map(pin, in_specs=spec, out_specs=spec)(x)


def pin_matrix(kernel: Array | QArray, spec: P) -> Array | QArray:
    """Fix the layout of one layer's kernel [D,F] or [D,N,H] to that in which the TPU stores the stack.

    [D,F] is stored with F innermost, unless a device's part of F would be padded to whole tiles and D would not. By
    itself XLA prefers F innermost inside the loop over layers and copies the stack: two thirds of LLaMA-13B's weights
    for tensor=8. Of int8 [D,N,H] it prefers N outermost, which is how it is stored where a device's heads do not fill
    tiles (5, 10 or 20); where they do (40), it copies q, k and v, 2.9 GiB on one chip.

    Args:
        kernel: the kernel, which may be quantized.
        spec: its sharding over the mesh.
    """
    if isinstance(kernel, QArray):
        return kernel if kernel.ndim > len(spec) else kernel.replace(qvalue=pin_matrix(kernel.qvalue, spec))
    mesh = jax.sharding.get_abstract_mesh()
    shape = kernel.shape
    if not mesh.empty:
        shape = jax.sharding.NamedSharding(mesh, fit_spec(spec, shape, mesh.shape)).shard_shape(shape)
    if kernel.ndim == 3:
        in_tiles = kernel.dtype == jnp.int8 and shape[1] % SUBLANES == 0
        return pin_layout(kernel, spec, (0, 1, 2)) if in_tiles else kernel
    rows, columns = shape
    return pin_layout(kernel, spec, (1, 0)) if not mesh.empty and columns % LANES and not rows % LANES else kernel


def product(eqn: str, x: Array, kernel: Array | QArray, dtype: Any, **options: Any) -> Array:
    """jnp.einsum(eqn, x, kernel) with a kernel that may be quantized.

    Scales of output channels are multiplied after the product, in float32; sums over devices are in `dtype`. Scales of
    groups are multiplied with the integers before it.

    Args:
        eqn: the equation in capitals; the kernel's output axes come last in the result.
        x: the left operand.
        kernel: the right operand; with groups, as stored or from `split_groups`.
        dtype: dtype in which both are multiplied.
        options: those of jnp.einsum.
    """
    options = {"precision": precision_of(dtype), **options}
    x = x.astype(dtype)
    einsum = cpu.einsum if cpu.on_cpu() else jnp.einsum
    if not isinstance(kernel, QArray):
        return einsum(eqn, x, kernel.astype(dtype), **options)
    kernel = split_groups(kernel)
    left, right, out = eqn.replace("->", ",").split(",")
    summed = [axis for axis in right if axis not in out]
    if kernel.ndim > len(right):  # the first axis that is summed, in groups
        groups, size = kernel.shape[right.index(summed[0]) :][:2]
        place = left.replace("...", "").index(summed[0]) - len(left.replace("...", ""))
        x = x.reshape(*x.shape[:place], groups, size, *x.shape[place:][1:])
        eqn = eqn.replace(summed[0], f"{summed[0]}g")
        right, summed = right.replace(summed[0], f"{summed[0]}g"), [*summed, "g"]
    scale = kernel.scale
    if any(size > 1 for axis, size in zip(right, scale.shape) if axis in summed):
        return einsum(eqn, x, kernel.qvalue.astype(dtype) * scale.astype(dtype), **options)
    y = einsum(eqn, x, kernel.qvalue.astype(dtype), **options)
    return (y * scale.reshape([size for axis, size in zip(right, scale.shape) if axis not in summed])).astype(y.dtype)


def split_groups(kernel: QArray) -> QArray:
    """Give the groups that share a scale an axis of their own: [...,G*g,...] becomes [...,G,g,...].

    On a stack of layers this is free. On one layer, inside the loop, the TPU compiler would write all of its scales or
    integers out as bfloat16, 4 times the memory traffic of the integers.
    """
    pairs = zip(kernel.shape, kernel.scale.shape)
    axis = next((axis for axis, (size, groups) in enumerate(pairs) if 1 < groups < size), None)
    if axis is None:
        return kernel
    before, groups, after = kernel.shape[:axis], kernel.scale.shape[axis], kernel.shape[axis + 1 :]
    return kernel.replace(
        qvalue=kernel.qvalue.reshape(*before, groups, -1, *after), scale=jnp.expand_dims(kernel.scale, axis + 1)
    )


class Adapter(flax.struct.PyTreeNode):
    """A low-rank adapter of a linear layer (Hu et al., "LoRA", 2021), in the collection "lora".

    Attributes:
        lora_a: [inputs..., R].
        lora_b: [R, outputs...], already multiplied by alpha / rank.
        dropout: the rate at which inputs are dropped where there is an rng "dropout".
    """

    lora_a: Array
    lora_b: Array
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)


class Linear(nn.Module):
    """A linear layer as an einsum over named axes.

    Parameters may have any dtype, or be quantized; they are cast to `dtype` where they are used. If the collection
    "lora" has an `Adapter` for the layer, its output is added.

    Attributes:
        eqn: the equation in capitals, for example "BTD,DNH->BTNH". The kernel has the axes of the second operand, the
            bias those of them that are in the output.
        shape: the kernel's shape.
        axes: the kernel's logical axes.
        dtype: compute dtype.
        use_bias: whether there is a bias.
        image_axes: mesh axes over which the vision tower's images are sharded.
    """

    eqn: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: Any
    use_bias: bool = False
    image_axes: tuple[str, ...] = BATCH

    def setup(self) -> None:
        kernel_axes, out_axes = self.eqn.split(",")[1].split("->")
        contracted = tuple(i for i, axis in enumerate(kernel_axes) if axis not in out_axes)
        kept = tuple(i for i, axis in enumerate(kernel_axes) if axis in out_axes)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=contracted, out_axis=kept)
        self.kernel = declare(self, "kernel", init, self.shape, self.axes, inputs=len(contracted))
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias_axes = tuple("embed_vector" if self.axes[i] in EMBED else self.axes[i] for i in kept)
            self.bias = declare(self, "bias", zeros, tuple(self.shape[i] for i in kept), bias_axes)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel
        if self.axes[0] in EMBED and AXIS_RULES[self.axes[1]] == TENSOR:  # [D,F] or [D,N,H]
            kernel = pin_matrix(kernel, logical_spec(*self.axes, image_axes=self.image_axes))
        return self.complete(product(self.eqn, x, kernel, self.dtype), x)

    def complete(self, y: Array, x: Array) -> Array:
        """Add what belongs to the layer besides its product `y` with the input `x`: adapter and bias."""
        if self.has_variable("lora", ADAPTER):
            y = y + self._lora_delta(x, self.get_variable("lora", ADAPTER))
        return y + self.bias.astype(self.dtype) if self.use_bias else y

    def _lora_delta(self, x: Array, adapter: Adapter) -> Array:
        """The adapter's output: dropout(x) @ lora_a @ lora_b."""
        left, right, out = self.eqn.replace("->", ",").split(",")
        summed = "".join(axis for axis in right if axis not in out)
        if adapter.dropout and self.has_rng("dropout"):
            keep, key = 1 - adapter.dropout, self.make_rng("dropout")
            # Without the barrier, XLA for TPU fuses the mask's random numbers into the product: minutes to compile.
            mask = jax.lax.optimization_barrier(dropout_mask(key, keep, x.shape, heads=len(summed) > 1))
            x = jnp.where(mask, x / keep, 0)
        outputs = "".join(axis for axis in right if axis in out)
        rows = "".join(axis for axis in left if axis not in summed)
        narrow = product(f"{left},{summed}R->{rows}R", x, adapter.lora_a, self.dtype)
        return product(f"{rows}R,R{outputs}->{out}", narrow, adapter.lora_b, self.dtype)


def project(x: Array, *layers: Linear) -> list[Array]:
    """Apply linear layers that share their input.

    Where the input's tokens are sharded over the tensor axis, the layers run as one product, with their kernels side by
    side: XLA gathers the tokens in steps that run beside the steps of a product, but not where several products need
    them. It copies the layer's kernels out of their stacks anyway then, so joining them adds little HBM traffic.

    Args:
        x: [B,T,D].
        layers: linear layers "BTD,D...->BT..." whose outputs have the same axes but for the size of the first.

    Returns:
        The output of each layer, [B,T,...].
    """
    kernels = [layer.kernel for layer in layers]
    sizes = [layer.shape[1] for layer in layers]
    size = math.gcd(*sizes)
    kinds = {(jax.tree.structure(kernel), *(leaf.dtype for leaf in jax.tree.leaves(kernel))) for kernel in kernels}
    if len(kinds) > 1 or not (is_sharded(x.shape[1], "tokens") and is_sharded(size, layers[0].axes[1])):
        return [layer(x) for layer in layers]
    left, right, out = layers[0].eqn.replace("->", ",").split(",")
    outputs = len(right) - 1

    def split(leaf: Array) -> Array:  # [D,N,...] -> [D,N/size,size,...]
        axis = leaf.ndim - outputs
        parts = leaf.reshape(*leaf.shape[:axis], size, -1, *leaf.shape[axis + 1 :])
        return jnp.swapaxes(parts, axis, axis + 1)

    def join(*leaves: Array) -> Array:
        return jnp.concatenate([split(leaf) for leaf in leaves], axis=leaves[0].ndim - outputs)

    eqn = f"{left},{right[0]}C{right[1:]}->{out[:2]}C{out[2:]}"
    y = product(eqn, x, jax.tree.map(join, *kernels), layers[0].dtype)
    y = constrain(y, "batch", None, None, *layers[0].axes[1:])
    ends = np.cumsum([count // size for count in sizes])
    parts = jnp.split(y, ends[:-1], axis=2)
    return [
        layer.complete(jnp.swapaxes(part, 2, 3).reshape(*x.shape[:2], *layer.shape[1:]), x)
        for layer, part in zip(layers, parts)
    ]


def dropout_mask(key: Array, keep: float, shape: tuple[int, ...], *, heads: bool) -> Array:
    """Draw a dropout mask that does not change for the other rows and heads when a mesh adds padding at the end.

    Args:
        key: a PRNG key.
        keep: the probability of True, which keeps an element.
        shape: [B,...], or [B,...,N,H] with `heads`.
        heads: whether the last two axes are heads and head dim.

    Returns:
        bool, of `shape`.
    """
    if not heads:
        return jax.random.bernoulli(key, keep, shape)
    *rows, count, width = shape
    return jax.vmap(lambda key: jax.random.bernoulli(key, keep, (*rows, width)), out_axes=-2)(
        jax.random.split(key, count)
    )


def _inverse_root(mean_square: Array, eps: float) -> Array:
    """1/sqrt, but NaN where the squares overflowed: rsqrt gives 0 there, which would turn such a row into zeros."""
    return jnp.where(jnp.isfinite(mean_square), jax.lax.rsqrt(mean_square + eps), jnp.nan)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019) as in LLaMA and InternViT.

    Statistics are float32, cast to the input's dtype, then scaled, in the reference's order.

    Attributes:
        shape: the trailing axes that are normalized.
        eps: added to the mean square.
        axes: their logical axes.
        divisor: the true number of elements, where `shape` includes zero padding; None for all.
    """

    shape: tuple[int, ...]
    eps: float
    axes: tuple[str, ...] = ("embed_vector",)
    divisor: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare(self, "scale", nn.initializers.ones_init(), self.shape, self.axes)

        def norm(x: Array, scale: Array) -> Array:
            x32 = x.astype(jnp.float32)
            axes = tuple(range(-len(self.shape), 0))
            mean_square = jnp.sum(x32 * x32, axis=axes, keepdims=True) / (self.divisor or math.prod(self.shape))
            return (x32 * _inverse_root(mean_square, self.eps)).astype(x.dtype) * scale.astype(x.dtype)

        return cpu.remat_cheap(norm)(x, scale)


class Embedding(nn.Module):
    """A table of token embeddings [V,D], which may also serve as the language model's head."""

    vocab_size: int
    width: int
    dtype: Any

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.embedding = declare(self, "embedding", init, (self.vocab_size, self.width), ("vocab", "embed"))

    def __call__(self, token_ids: Array) -> Array:
        """Look up token_ids [B,T] int32. Returns [B,T,D] in `dtype`."""
        return jnp.take(self.embedding, token_ids, axis=0).astype(self.dtype)

    def attend(self, hidden: Array) -> Array:
        """Logits [...,V] float32 of hidden states [...,D]."""
        return product("...D,VD->...V", hidden, self.embedding, hidden.dtype, preferred_element_type=jnp.float32)


class Head(nn.Module):
    """The language model's output projection. hidden [...,D] -> logits [...,V] float32."""

    width: int
    vocab_size: int

    @nn.compact
    def __call__(self, hidden: Array) -> Array:
        init = nn.initializers.normal(0.02)
        kernel = declare(self, "kernel", init, (self.width, self.vocab_size), ("embed", "vocab"), inputs=1)
        return product("...D,DV->...V", hidden, kernel, hidden.dtype, preferred_element_type=jnp.float32)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis: biased variance, computed in float32 and cast at the end."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = declare(self, "scale", nn.initializers.ones_init(), (self.width,), ("embed_vector",))
        bias = declare(self, "bias", nn.initializers.zeros_init(), (self.width,), ("embed_vector",))
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
        y = centered * _inverse_root(variance, self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Array) -> Array:
    """Exact GELU, with erf; the tanh approximation changes the golden model's logits by 5e-3."""
    if x.dtype == jnp.float32 and cpu.on_cpu():
        return cpu.gelu(x)
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def positions_from_valid(valid: Array) -> Array:
    """Positions of the valid tokens of each row, 0 on padding before them. valid [B,T] bool -> [B,T] int32."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


Rope = tuple[Array, Array]  # cosines and signed sines [B,T,1,H]


def rope_tables(positions: Array, frequencies: np.ndarray | Array, dtype: Any) -> Rope:
    """Compute the tables of the rotary embedding, which all layers share.

    Angles, cosines and sines are float32 (bfloat16 rounds position 257 to 256) and cast to `dtype`, as in the
    reference.

    Args:
        positions: [B,T] int32.
        frequencies: [H/2] float32, or [B,1,H/2] if rows have their own.
        dtype: of the queries and keys.
    """
    angles = (positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32))[:, :, None]
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: Array, rope: Rope) -> Array:
    """Rotary position embedding (Su et al., 2021) in Hugging Face's layout, which rotates halves.

    Args:
        x: [B,T,N,H].
        rope: from `rope_tables`, in x's dtype.

    Returns:
        [B,T,N,H].
    """
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([second, first], axis=-1) * sin

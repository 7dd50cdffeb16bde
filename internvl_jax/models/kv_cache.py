"""The KV cache of the language model, as a value."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import qwix
from jax.sharding import PartitionSpec as P

from internvl_jax.config import TextConfig
from internvl_jax.models import cpu
from internvl_jax.models.layers import Array, pin_layout
from internvl_jax.models.stack import is_stacked, zero_layers
from internvl_jax.parallel.mesh import kv_copies
from internvl_jax.parallel.partitioning import axis_devices, logical_spec

CACHE_AXES = ("layers", "batch", "kv_heads", None, None)  # [L,B,K,S,H]


class KeysValues(NamedTuple):
    """What attention reads: keys and values of one layer, or of all layers and that layer's index.

    Attributes:
        k, v: [B,K,S,H], or [L,B,K,S,H] with `layer`.
        scales: of int8 k and v, float32 [B,K,S] each, or [L,B,K,S].
        layer: index of the layer; None if k and v are one layer's.
    """

    k: Array
    v: Array
    scales: tuple[Array, Array] | None = None
    layer: int | Array | None = None


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens so far: a value that is passed in and returned, and that callers donate.

    Rows share slots: token i of a call goes to slot length + i of every row, whatever its position.
    """

    k: Any  # layers (stack.py): Array [L,B,K,S,H], or a tuple of L arrays [B,K,S,H]
    v: Any
    positions: Array  # [B,S] int32, the position of the token in each slot
    valid: Array  # [B,S] bool, False for padding and for slots not yet written
    length: Array  # [] int32, slots written
    # Of an int8 cache: k's and v's scales, one per token and head, float32 [L,B,K,S] each (or tuples of [B,K,S]).
    scales: Any = None

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.positions.shape[1]

    @property
    def stacked(self) -> bool:
        """Whether the layers' keys and values are one array."""
        return is_stacked(self.k)

    def append_positions(self, positions: Array, valid: Array) -> KVCache:
        """Record the positions and validity of T new tokens [B,T], before the layers append their k and v."""
        start = (0, self.length)
        return self.replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), start),
            valid=jax.lax.dynamic_update_slice(self.valid, valid, start),
        )

    def append(self, layer: int | Array, k: Array, v: Array) -> KVCache:
        """Write one layer's k and v [B,K,T,H] at the next slots."""
        if self.scales is None:
            return self.replace(k=self._write(self.k, layer, k), v=self._write(self.v, layer, v))
        quantized = [qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=(0, 1, 2)) for x in (k, v)]
        k, v = (self._write(stack, layer, x.qvalue) for stack, x in zip((self.k, self.v), quantized))
        scales = tuple(self._write(stack, layer, x.scale[..., 0]) for stack, x in zip(self.scales, quantized))
        return self.replace(k=k, v=v, scales=scales)

    def _write(self, stack: Any, layer: int | Array, new: Array) -> Any:
        """One layer's new [B,K,T,H] or [B,K,T] into a stack (or tuple) of them."""
        if not self.stacked:
            old = stack[layer]
            axis = old.ndim - new.ndim + 2  # of the slots: one less where rows and heads are folded
            new = new.reshape(*old.shape[:axis], *new.shape[2:]).astype(old.dtype)
            written = jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis)
            return (*stack[:layer], written, *stack[layer + 1 :])
        # The scan carries the whole stack and updates it in place: as a scanned input and output it would be held
        # twice. Without the pinned layout, the TPU compiler puts slots outermost for single tokens, and copies it.
        stack = pin_layout(stack, logical_spec(*CACHE_AXES[: stack.ndim]), tuple(range(stack.ndim)))
        slot = (0, 0, self.length, 0)[: new.ndim]
        new = new.astype(stack.dtype)[None]
        return jax.lax.dynamic_update_slice(stack, new, (layer, *slot), allow_negative_indices=False)

    def read(self, layer: int | Array) -> KeysValues:
        """The layer's view, for `attention`."""
        if not self.stacked:
            cache = cpu.unfold_cache(self)
            scales = cache.scales and tuple(stack[layer] for stack in cache.scales)
            return KeysValues(cache.k[layer], cache.v[layer], scales)
        return KeysValues(self.k, self.v, self.scales, layer)


def init_cache(config: TextConfig, batch: int, slots: int, dtype: Any, *, layers: Any) -> KVCache:
    """Make an empty cache, on a mesh with repeated kv heads where they are fewer than the tensor axis.

    Args:
        config: sizes of the language model.
        batch: rows, B.
        slots: tokens that a row has room for, S.
        dtype: of keys and values; int8 keeps a scale beside each token's k and v.
        layers: the layers' parameters, whose layout (stacked or not) the cache takes over.
    """
    kv_heads = config.num_key_value_heads * kv_copies(config.num_key_value_heads, axis_devices("kv_heads"))
    per_token = (batch, kv_heads, slots)
    zeros = partial(zero_layers, config.num_hidden_layers, like=layers)
    scaled = jnp.dtype(dtype) == jnp.int8
    return KVCache(
        k=zeros((*per_token, config.head_dim), dtype),
        v=zeros((*per_token, config.head_dim), dtype),
        scales=(zeros(per_token, jnp.float32), zeros(per_token, jnp.float32)) if scaled else None,
        positions=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )


def cache_specs(cache: KVCache) -> KVCache:
    """PartitionSpecs of a cache, as a KVCache: rows over BATCH, kv heads over TENSOR."""

    def heads(stack: Any, axes: tuple[str | None, ...]) -> Any:
        return logical_spec(*axes) if cache.stacked else tuple(logical_spec(*axes[1:]) for _ in stack)

    return KVCache(
        k=heads(cache.k, CACHE_AXES),
        v=heads(cache.v, CACHE_AXES),
        positions=logical_spec("batch", None),
        valid=logical_spec("batch", None),
        length=P(),
        scales=cache.scales and tuple(heads(stack, CACHE_AXES[:-1]) for stack in cache.scales),
    )

"""What XLA's CPU backend needs to be fast. Used if `on_cpu()`; GPUs and TPUs run the plain program.

Each function computes the same as the one that it replaces. Figures were measured on 2 cores of an AMD EPYC.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

BY_HEAD_FROM = 512 * 512  # scores per head from which attention runs one head at a time
QUERY_BLOCK = 256  # queries of a head whose scores are computed at once in causal attention


def on_cpu() -> bool:
    """Whether the program that is being traced is for a CPU: the mesh's devices, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def remat_cheap(function: Callable[..., Array]) -> Callable[..., Array]:
    """Rematerialize a cheap elementwise function in the backward pass on CPU; elsewhere, return it unchanged.

    Otherwise jax keeps every intermediate, six arrays [B,T,F] of LLaMA's MLP instead of three, and the scan over layers
    writes them out. On TPU whole layers are rematerialized instead.
    """
    return jax.checkpoint(function) if on_cpu() else function


def einsum(eqn: str, x: Array, kernel: Array, **options: Any) -> Array:
    """jnp.einsum as one product of two matrices, where the equation is one.

    einsum sums axes in the order of their letters, H before N, and the CPU backend then transposes x and the kernel
    [N,H,D] first; so it does for a kernel's gradient, which is summed over rows and tokens.
    """
    left, right, out = eqn.replace("->", ",").split(",")
    kept, summed = "".join(a for a in right if a in out), "".join(a for a in right if a not in out)
    rows = left.removesuffix(summed)
    if (left, out) != (rows + summed, rows + kept) or right not in (summed + kept, kept + summed):
        return jnp.einsum(eqn, x, kernel, **options)
    first = right == summed + kept
    before = x.shape[: x.ndim - len(summed)]
    after = kernel.shape[len(summed) :] if first else kernel.shape[: len(kept)]

    def multiply(x: Array, kernel: Array) -> Array:
        matrix = kernel.reshape(-1, math.prod(after)) if first else kernel.reshape(math.prod(after), -1)
        axes = (((1,), (0 if first else 1,)), ((), ()))
        return jax.lax.dot_general(x.reshape(math.prod(before), -1), matrix, axes, **options).reshape(*before, *after)

    return jax.checkpoint(multiply)(x, kernel)  # rematerializes the reshapes; the product itself is not needed again


def gelu(x: Array) -> Array:
    """Exact GELU of float32 with erf. jax uses erfc, which takes 2.6 times as long; erf is within 1e-7 of it."""
    return jax.checkpoint(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * np.float32(math.sqrt(0.5)))))(x)


def attention_by_head(
    attend: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    allowed: Array | None,
    scales: tuple[Array, Array] | None = None,
    *,
    causal: bool = False,
) -> Array:
    """Run `attend` (attention_xla, whose arguments follow) for one row and kv head at a time.

    One head's scores stay in the processor's cache; all heads' scores would be written to memory and read back by each
    step of the softmax. With 1025 tokens and 5 heads of 128 this is 2.3 times faster, 0.8 of the cores' peak.

    Args:
        attend: the attention of a few heads.
        q: [B,T,N,H]. k, v: [B,K,S,H]. allowed: [B,T,S] bool or None. scales: float32 [B,K,S] each, of int8 k and v.
        causal: queries and keys are the same tokens in order, so keys after a block of queries are skipped.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    block = QUERY_BLOCK if causal else length
    folded = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 1, 3, 4)
    per_head = jax.tree.map(lambda leaf: leaf.reshape(batch * kv_heads, *leaf.shape[2:]), (folded, k, v, scales))

    def head(one: tuple[Array, Any]) -> Array:
        index, leaves = one
        q, k, v, scales = jax.tree.map(lambda leaf: leaf[None], leaves)
        k, v, scales = jax.tree.map(lambda leaf: leaf[None], (k, v, scales))
        mask = None if allowed is None else allowed[index // kv_heads][None]
        parts = []
        for start in range(0, length, block):
            queries = slice(start, start + block)
            keys = slice(min(start + block, length)) if causal else slice(None)
            part_mask = None if mask is None else mask[:, queries, keys]
            part_scales = None if scales is None else (scales[0][..., keys], scales[1][..., keys])
            parts.append(attend(q[:, queries], k[:, :, keys], v[:, :, keys], part_mask, part_scales)[0])
        return jnp.concatenate(parts)

    y = jax.lax.map(jax.checkpoint(head), (jnp.arange(batch * kv_heads), per_head))
    y = y.reshape(batch, kv_heads, length, groups, head_dim).transpose(0, 2, 1, 3, 4)
    return y.reshape(batch, length, heads, head_dim)


def fold_cache(cache: Any) -> Any:
    """Join rows and heads of a per-layer KV cache to one axis, [B*K,S,H], for a loop to carry.

    The CPU backend batches products over that axis. A reshape between the loop's carry and the products would make it
    write both, and copy each layer's keys and values four times per token. A stacked cache is returned unchanged.
    """
    return _regroup_cache(cache, -1)


def unfold_cache(cache: Any) -> Any:
    """Undo `fold_cache`."""
    return _regroup_cache(cache, cache.positions.shape[0], -1)


def _regroup_cache(cache: Any, *axes: int) -> Any:
    if cache.stacked:
        return cache
    k, v = jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[-2:]), (cache.k, cache.v))
    scales = jax.tree.map(lambda leaf: leaf.reshape(*axes, leaf.shape[-1]), cache.scales)
    return cache.replace(k=k, v=v, scales=scales)

"""Pallas TPU kernels for attention: splash attention, which comes with jax, and one of our own for decoding.

Both run on one device's part; attention.py decides when they run and maps them over a mesh. On other platforms they
run in interpret mode, for tests.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from internvl_jax.models.layers import LANES, MASK_VALUE, Array, precision_of

SPLASH_BLOCK = 512  # queries and keys of a block
WIDE_BLOCK = 1152  # without a mask: the tokens of an image of 448 pixels, in whole tiles
DECODE_BLOCK_BYTES = 1 << 20  # of a block of keys in the decode kernel, which holds four blocks at once


# Whole sequences: splash attention.


def splash_attention(
    q: Array, k: Array, v: Array, segments: Array | None = None, *, causal: bool, interpret: bool = False
) -> Array:
    """Attention over whole sequences whose scores stay in VMEM; differentiable.

    Scores and softmax are float32. Unlike in attention_xla, q is scaled in its own dtype before the product with k, and
    the weights stay float32.

    Args:
        q: [B,T,N,H]; T may be any length and is padded to whole tiles.
        k, v: [B,K,T,H].
        segments: [B,T] int32, tokens attend within their own segment; None for no segments.
        causal: whether tokens attend only to themselves and earlier ones.
        interpret: run in interpret mode.

    Returns:
        [B,T,N,H] in q's dtype.
    """
    return _forward_only(q, k, v, jnp.ones(q.shape[:2], jnp.int32) if segments is None else segments, causal, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _forward_only(q: Array, k: Array, v: Array, segments: Array, causal: bool, interpret: bool) -> Array:
    """Without a gradient. The backward kernels need queries padded to 128, the forward one to 16: 1040 for 1025."""
    return _splash(q, k, v, segments, causal, interpret, backward=False)


def _with_backward(q: Array, k: Array, v: Array, segments: Array, causal: bool, interpret: bool) -> tuple[Array, Any]:
    run = partial(_splash, segments=segments, causal=causal, interpret=interpret, backward=True)
    return jax.vjp(run, q, k, v)


_forward_only.defvjp(_with_backward, lambda causal, interpret, vjp, cotangent: (*vjp(cotangent), None))


def _splash(q: Array, k: Array, v: Array, segments: Array, causal: bool, interpret: bool, *, backward: bool) -> Array:
    length, heads, head_dim = q.shape[1:]
    sizes, queries, keys = splash_sizes(length, causal=causal, backward=backward)
    mask = splash_mask.CausalMask((queries, keys)) if causal else splash_mask.FullMask((queries, keys))
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def pad(x: Array, size: int, axis: int) -> Array:
        return jnp.pad(x, [(0, size - length if i == axis else 0) for i in range(x.ndim)])

    q = pad((q * head_dim**-0.5).astype(q.dtype).transpose(0, 2, 1, 3), queries, 2)
    k, v = pad(k, keys, 2), pad(v, keys, 2)
    # Padding has segment 0, which no real token attends to; its own outputs are cut off.
    ids = splash.SegmentIds(pad(segments, queries, 1), pad(segments, keys, 1))
    return jax.vmap(kernel)(q, k, v, ids)[:, :, :length].transpose(0, 2, 1, 3)


def splash_sizes(length: int, *, causal: bool, backward: bool) -> tuple[splash.BlockSizes, int, int]:
    """Block sizes for sequences of `length`, and the lengths to which queries and keys are padded.

    Causal masks get blocks of up to 512 by 512, so that most masked blocks are skipped; otherwise blocks are large.
    """
    keys = -(-length // LANES) * LANES
    block = _largest_divisor(keys, SPLASH_BLOCK)
    if backward:
        return splash.BlockSizes(block, block, block, block, block, block, block, block), keys, keys
    if causal:
        return splash.BlockSizes(block, block, block), keys, keys
    parts = -(-length // WIDE_BLOCK)
    q_block = -(-length // (parts * 16)) * 16
    wide = _largest_divisor(keys, WIDE_BLOCK)
    return splash.BlockSizes(q_block, wide, _largest_divisor(wide, SPLASH_BLOCK)), parts * q_block, keys


def _largest_divisor(size: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides size."""
    return max(block for block in range(LANES, most + 1, LANES) if size % block == 0)


# Decoding: one query per row against the cache.


def decode_block(kv_heads: int, slots: int, head_dim: int, itemsize: int) -> int:
    """Slots of a block in the decode kernel: the most that fit; 0 if no multiple of LANES divides `slots`."""
    fitting = [
        size
        for size in range(LANES, slots + 1, LANES)
        if slots % size == 0 and (size == LANES or kv_heads * size * head_dim * itemsize <= DECODE_BLOCK_BYTES)
    ]
    return max(fitting, default=0)


def decode_attention(
    q: Array, k: Array, v: Array, layer: Array, allowed: Array, span: Array, *scales: Array, interpret: bool = False
) -> Array:
    """Attention of one query per row to one layer of the KV cache, of which only the slots in use are read.

    Numerics are those of attention_xla: scores and softmax are float32, with a running maximum and sum (Milakov and
    Gimelshein, 2018), weights are in q's dtype.

    Args:
        q: [B,N,H].
        k, v: [L,B,K,S,H].
        layer: [] int32.
        allowed: [B,1,S] int32, not 0 for slots that the query attends to.
        span: [B,2] int32, the first of them, and one past the last.
        scales: of int8 k and v, float32 [L,B,K,S] each.
        interpret: run in interpret mode.

    Returns:
        [B,N,H] in q's dtype.
    """
    batch, heads, head_dim = q.shape
    kv_heads, slots = k.shape[2:4]
    groups = heads // kv_heads
    size = decode_block(kv_heads, slots, head_dim, k.dtype.itemsize)

    def blocks(span: Any, row: Any) -> tuple[Any, Any]:
        return span[row, 0] // size, jnp.maximum(span[row, 1] - 1, 0) // size

    def block_of(row: Any, step: Any, layer: Any, span: Any) -> tuple[Any, ...]:
        # Before the first and after the last block of a row the same one stays: nothing is copied.
        return layer[0], row, 0, jnp.clip(step, *blocks(span, row)), 0

    def kernel(layer: Any, span: Any, q: Any, k: Any, v: Any, allowed: Any, *refs: Any) -> None:
        *scales, out, top, total, sums = refs
        row, step = pl.program_id(0), pl.program_id(1)
        first, last = blocks(span, row)
        dot = partial(jax.lax.dot_general, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)

        @pl.when(step == 0)
        def _() -> None:
            top[...] = jnp.full_like(top, MASK_VALUE)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when((first <= step) & (step <= last))
        def _() -> None:
            parts = [dot(q[head], k[head].astype(q.dtype), (((1,), (1,)), ((), ()))) for head in range(kv_heads)]
            if scales:
                parts = [part * scales[0][head : head + 1] for head, part in enumerate(parts)]
            scores = jnp.concatenate(parts) / math.sqrt(head_dim)
            scores = jnp.where(allowed[...] > 0, scores, MASK_VALUE)  # [N,slots of the block]
            old = top[:, :1]
            new = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
            weights = jnp.exp(scores - new)
            shrink = jnp.exp(old - new)
            top[...] = jnp.broadcast_to(new, top.shape)
            total[...] = total[...] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            parts = [weights[head * groups : (head + 1) * groups] for head in range(kv_heads)]
            if scales:
                parts = [part * scales[1][head : head + 1] for head, part in enumerate(parts)]
            parts = [
                dot(part.astype(q.dtype), v[head].astype(q.dtype), (((1,), (0,)), ((), ())))
                for head, part in enumerate(parts)
            ]
            sums[...] = sums[...] * shrink + jnp.concatenate(parts)

        @pl.when(step == pl.num_programs(1) - 1)
        def _() -> None:
            out[...] = (sums[...] / total[:, :1]).astype(out.dtype)

    queries = pl.BlockSpec((None, kv_heads, groups, head_dim), lambda row, *_: (row, 0, 0, 0))
    keys = pl.BlockSpec((None, None, kv_heads, size, head_dim), block_of)
    slots_used = pl.BlockSpec((None, 1, size), lambda *at: (at[0], 0, block_of(*at)[3]))
    per_token = pl.BlockSpec((None, None, kv_heads, size), lambda *at: block_of(*at)[:4])
    cells = batch * kv_heads * slots * head_dim
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, slots // size),
            in_specs=[queries, keys, keys, slots_used, *[per_token for _ in scales]],
            out_specs=pl.BlockSpec((None, heads, head_dim), lambda row, *_: (row, 0, 0)),
            scratch_shapes=[pltpu.VMEM((heads, LANES), jnp.float32)] * 2 + [pltpu.VMEM((heads, head_dim), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * groups * cells,
            transcendentals=batch * heads * slots,
            bytes_accessed=2 * cells * k.dtype.itemsize,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        jnp.reshape(layer, 1),
        span,
        q.reshape(batch, kv_heads, groups, head_dim),
        k,
        v,
        allowed,
        *scales,
    )

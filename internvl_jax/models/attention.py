"""Attention of both towers, for prefill, decoding and training, and its backend dispatch.

`attention_xla` runs anywhere, and the kernels (kernels.py) are tested against it. On a TPU, XLA writes the scores of
long sequences to memory and reads them twice, and multiplies single queries outside the matrix unit; there the kernels
are faster. Each device runs them on its own rows and heads.

With `implementation` "auto", kernels run on TPUs, in bfloat16, with a head dim in multiples of 128 and kv heads that
divide the mesh:

    decoding, one query per row      decode_attention, from 256 slots on (a multiple of 128)
    causal, no cache before it       splash attention, from 512 tokens on (any number; padded)
    no mask (the vision tower)       splash attention, from 1024 tokens on (any number; padded)

Everything else is XLA's; on CPUs without a mesh, where a head has 512 x 512 scores or more, one head at a time
(cpu.attention_by_head). One layer compiled for one v5e chip of tensor=8, in thousands of cycles (for XLA its own
estimate of the fusions; for a kernel its instructions times its steps or, if longer, the time of its reads):

                                     XLA    kernel + preparation of its input
    decode, 8 rows x 2048 slots      302    77, and less where fewer slots are in use
    prefill, 8 rows x 512            271    73 + 39
    vision tower, 8 images x 1025   1539    246 + 121; 8 MiB of temporaries instead of 145
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from internvl_jax.models import cpu
from internvl_jax.models.kernels import decode_attention, decode_block, splash_attention
from internvl_jax.models.kv_cache import KeysValues
from internvl_jax.models.layers import LANES, MASK_VALUE, Array, on_tpu, precision_of
from internvl_jax.parallel.partitioning import BATCH, TENSOR, fit_spec

# "auto" (as above), "xla", or "pallas": a kernel wherever one supports the shapes, interpreted without a TPU.
# `with implementation("xla"): ...`, or implementation.set_global("xla"); it is part of the key of compiled programs.
implementation = jax.make_user_context("auto")

DECODE_FROM = 256  # slots
CAUSAL_FROM = 512  # tokens
UNMASKED_FROM = 1024


class Mask(NamedTuple):
    """An attention mask in the forms that the programs need; forms that are not used are never computed.

    Attributes:
        allowed: [B,T,S] bool, True where a query attends to a key.
        segments: [B,T] int32, 0 for padding, if queries and keys are the same tokens: then slots are ordered by
            position, and a token attends to the earlier slots of its own segment.
        span: [B,2] int32 for T = 1: the first allowed slot, and one past the last.
        flags: [B,1,S] int32 for T = 1: `allowed` as the decode kernel takes it.
    """

    allowed: Array
    segments: Array | None = None
    span: Array | None = None
    flags: Array | None = None


def self_mask(positions: Array, valid: Array, segments: Array | None = None) -> Mask:
    """The causal mask of a sequence without a cache.

    Args:
        positions: [B,T] int32, not decreasing along a row, or along each of its segments.
        valid: [B,T] bool, False for padding, which may be anywhere. What padding attends to is undefined.
        segments: [B,T] int32, 0 for padding, if samples share rows: tokens attend within their own segment.
    """
    allowed = attention_mask(positions, positions, valid)
    if segments is None:
        return Mask(allowed, segments=valid.astype(jnp.int32))
    return Mask(allowed & (segments[:, :, None] == segments[:, None, :]), segments)


def cache_mask(q_positions: Array, kv_positions: Array, kv_valid: Array) -> Mask:
    """The mask of new tokens, at q_positions [B,T], over the slots of a KV cache [B,S]."""
    allowed = attention_mask(q_positions, kv_positions, kv_valid)
    if q_positions.shape[1] > 1:
        return Mask(allowed)
    slots = kv_positions.shape[1]
    first = jnp.argmax(allowed[:, 0], axis=1)
    last = slots - jnp.argmax(allowed[:, 0, ::-1], axis=1)
    return Mask(allowed, span=jnp.stack([first, last], axis=1).astype(jnp.int32), flags=allowed.astype(jnp.int32))


def attention_mask(q_positions: Array, kv_positions: Array, kv_valid: Array) -> Array:
    """The attention mask: valid keys (kv_valid [B,S]) at positions up to the query's. -> [B,T,S] bool.

    It serves prefill, decoding, padded batches and training: it compares positions, not slots, so padding may be
    anywhere.
    """
    return kv_valid[:, None, :] & (kv_positions[:, None, :] <= q_positions[:, :, None])


def attention(
    q: Array,
    keys: KeysValues,
    mask: Mask | None = None,
    *,
    axes: tuple[str, ...] = BATCH,
    split: str | None = TENSOR,
) -> Array:
    """Scaled dot-product attention, by the program that `choose` selects.

    Args:
        q: [B,T,N,H].
        keys: keys and values [B,K,S,H], or stacks [L,B,K,S,H] and an index, of which a kernel reads the layer without
            copying it.
        mask: None if every query attends to every key.
        axes: mesh axes of the rows.
        split: mesh axis of the heads.

    Returns:
        [B,T,N,H] in q's dtype.

    Raises:
        ValueError: `implementation` has an unknown value.
    """
    k, v, scales, layer = keys
    program = choose(q, k, mask, split)
    if program in ("xla", "by_head"):
        if layer is not None:
            k, v, scales = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(
                    stack, layer, 0, keepdims=False, allow_negative_indices=False
                ),
                (k, v, scales),
            )
        causal = mask is not None and mask.segments is not None
        run = partial(cpu.attention_by_head, attention_xla, causal=causal) if program == "by_head" else attention_xla
        return run(q, k.astype(q.dtype), v.astype(q.dtype), None if mask is None else mask.allowed, scales)

    interpret = not on_tpu()
    rows, queries, slots = P(axes, None), P(axes, None, split, None), P(axes, split, None, None)
    if program == "splash":
        kernel = partial(splash_attention, causal=mask is not None, interpret=interpret)
        if mask is None:
            return _on_devices(kernel, (q, k, v), (queries, slots, slots), queries)
        return _on_devices(kernel, (q, k, v, mask.segments), (queries, slots, slots, rows), queries)
    if mask is None or mask.span is None or mask.flags is None:
        raise ValueError("decoding needs the mask of a cache")
    stacks: tuple[Array, ...] = (k, v, *(scales or ()))
    if layer is None:
        stacks, layer = tuple(stack[None] for stack in stacks), 0
    k, v, *per_token = stacks
    query, stack, scale = P(axes, split, None), P(None, *slots), P(None, axes, split, None)
    y = _on_devices(
        partial(decode_attention, interpret=interpret),
        (q[:, 0], k, v, jnp.asarray(layer, jnp.int32), mask.flags, mask.span, *per_token),
        (query, stack, stack, P(), P(axes, None, None), rows, *[scale for _ in per_token]),
        query,
    )
    return y[:, None]


def choose(q: Array, k: Array, mask: Mask | None, split: str | None) -> str:
    """Choose the program, "xla", "by_head", "splash" or "decode", as the module describes. k [...,K,S,H]."""
    wish = implementation.value
    if wish not in ("auto", "xla", "pallas"):
        raise ValueError(f'the attention implementation is "auto", "xla" or "pallas", not {wish!r}')
    length, (kv_heads, slots, head_dim) = q.shape[1], k.shape[-3:]
    mesh = jax.sharding.get_abstract_mesh()
    if wish == "auto" and mesh.empty and cpu.on_cpu():
        return "by_head" if length > 1 and length * slots >= cpu.BY_HEAD_FROM else "xla"
    if wish == "xla" or (wish == "auto" and not (on_tpu() and q.dtype == jnp.bfloat16 and q.shape[-1] % LANES == 0)):
        return "xla"
    if split is not None and not mesh.empty and kv_heads % mesh.shape[split]:
        return "xla"
    always = wish == "pallas"
    if mask is None:
        return "splash" if always or length >= UNMASKED_FROM else "xla"
    if mask.segments is not None:
        return "splash" if always or length >= CAUSAL_FROM else "xla"
    if mask.span is not None and decode_block(kv_heads, slots, head_dim, k.dtype.itemsize):
        return "decode" if always or slots >= DECODE_FROM else "xla"
    return "xla"


def _on_devices(kernel: Callable[..., Array], args: tuple[Any, ...], specs: tuple[P, ...], out: P) -> Array:
    """Run a kernel on each device's part, since XLA cannot partition a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*args)
    fitted = tuple(fit_spec(spec, arg.shape, mesh.shape) for spec, arg in zip(specs, args))
    out = fit_spec(out, args[0].shape, mesh.shape)
    return jax.shard_map(kernel, in_specs=fitted, out_specs=out, check_vma=False)(*args)


def attention_xla(
    q: Array, k: Array, v: Array, allowed: Array | None, scales: tuple[Array, Array] | None = None
) -> Array:
    """Scaled dot-product attention in plain jax, with grouped queries where there are fewer kv heads than heads.

    Scores and softmax are float32. The weights are cast to q's dtype before the product with v, and divided by their
    sum after it, where there are fewer elements. Scales multiply scores and weights rather than k and v, which have H
    times as many elements.

    Keys have their heads before their slots, and the queries of a group are one matrix, so that both products are plain
    batched matrix products: measured on CPU, 7 times faster in decoding than with keys [B,S,K,H], 2 times in prefill.

    Args:
        q: [B,T,N,H].
        k: [B,K,S,H].
        v: [B,K,S,H].
        allowed: [B,T,S] bool; None for all.
        scales: of int8 k and v, float32 [B,K,S] each.

    Returns:
        [B,T,N,H] in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    groups = heads // kv_heads
    precision = precision_of(q.dtype)
    folded = q.reshape(batch, length, kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, kv_heads, groups * length, head_dim)
    scores = jnp.einsum("BKTH,BKSH->BKTS", folded, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, groups, length, slots) / math.sqrt(head_dim)
    if scales is not None:
        scores = scores * scales[0][:, :, None, None]
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, MASK_VALUE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if scales is not None:
        weights = weights * scales[1][:, :, None, None]
    weights = weights.astype(q.dtype).reshape(batch, kv_heads, groups * length, slots)
    y = jnp.einsum("BKTS,BKSH->BKTH", weights, v, precision=precision, preferred_element_type=jnp.float32)
    y = (y.reshape(batch, kv_heads, groups, length, head_dim) / total).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)

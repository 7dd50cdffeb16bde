"""The language model's head and the cross-entropy, chunk by chunk, without ever holding the logits of a whole batch.

V1-1's logits of 8 rows of 2048 tokens are 2 GiB in float32, and twice that with their gradient. The forward pass
computes the gradients of head and hidden states too, while a chunk's logits exist, so that logits are computed once.

On a mesh, every device has rows of its own. The head is gathered along fsdp once per step, not once per chunk, and its
gradient is added up on each device and summed over the devices at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from internvl_jax.config import TextConfig
from internvl_jax.models import llama, param_sharding
from internvl_jax.models.layers import Array, Params
from internvl_jax.parallel.partitioning import BATCH, constrain
from internvl_jax.quantize import is_quantized

Sums = tuple[Array, Array]  # loss and number of correct predictions


def head_loss(
    language: Params,
    config: TextConfig,
    hidden: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> Sums:
    """Compute the weighted loss of hidden states.

    Args:
        language: parameters of the language model, of which only the head is used. A quantized head has no gradient.
        config: its configuration.
        hidden: [B,T,D], after the final norm.
        targets: [B,T] int32, the token that each position predicts; any where the weight is 0.
        weights: [B,T] float32.
        chunk: tokens of each row whose logits exist at once.
        z_loss: weight of the squared log-normalizer of the softmax.

    Returns:
        The weighted sum of losses, and the number of tokens with a weight whose target has the largest logit; float32.
    """
    length = hidden.shape[1]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def split(x: Array) -> Array:  # [B,T,...] -> [count,B,chunk,...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    head = llama.head(language)
    quantized = any(map(is_quantized, jax.tree.leaves(head, is_leaf=is_quantized)))
    trained, frozen = ({}, head) if quantized else (head, {})
    # Whole rows: along tensor, each chunk would be on other devices.
    x = split(constrain(hidden, "batch", None, None))
    return _loss_of_chunks(partial(_chunk_loss, config, z_loss), trained, frozen, x, (split(targets), split(weights)))


def _chunk_loss(config: TextConfig, z_loss: float, head: Params, x: Array, targets: Array, weights: Array) -> Sums:
    logits = llama.Llama(config, x.dtype).apply({"params": head}, x, method="logits")
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # Not a gather: the vocabulary may be sharded, and each device has only its part of it.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    losses = log_normalizer - target_logits
    if z_loss:
        losses = losses + z_loss * log_normalizer**2
    correct = target_logits >= jnp.max(logits, axis=-1)
    return jnp.sum(losses * weights), jnp.sum(correct & (weights > 0), dtype=jnp.float32)


def _loss_of_chunks(chunk_loss: Callable[..., Sums], trained: Params, frozen: Params, x: Array, labels: Any) -> Sums:
    """Add up `chunk_loss` over the leading axis of x and labels; differentiable by `trained` and `x`."""
    specs = param_sharding.param_specs({"language_model": trained})["language_model"]

    def sums_of_rows(trained: Params, x: Array, frozen: Params, labels: Any) -> Sums:
        def step(sums: Sums, part: Any) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, sums, chunk_loss({**trained, **frozen}, *part)), None

        return _sum_over_devices(jax.lax.scan(step, _zero_sums(), (x, *labels))[0])

    def grads_of_rows(trained: Params, x: Array, frozen: Params, labels: Any) -> tuple[Sums, tuple[Params, Array]]:
        grad_fn = jax.value_and_grad(
            lambda trained, x, *labels: chunk_loss({**trained, **frozen}, x, *labels), argnums=(0, 1), has_aux=True
        )

        def step(carry: tuple[Sums, Params], part: Any) -> tuple[tuple[Sums, Params], Array]:
            sums, (head_grads, x_grad) = grad_fn(trained, *part)
            return jax.tree.map(jnp.add, carry, (sums, head_grads)), x_grad

        first = (_zero_sums(), jax.tree.map(jnp.zeros_like, trained))
        (sums, head_grads), x_grads = jax.lax.scan(step, first, (x, *labels))
        return _sum_over_devices(sums), (jax.tree.map(_scatter_gradient, head_grads, specs), x_grads)

    @jax.custom_vjp
    def total(trained: Params, x: Array) -> Sums:
        return _on_rows(sums_of_rows, P())(trained, x, frozen, labels)

    def forward(trained: Params, x: Array) -> tuple[Sums, tuple[Params, Array]]:
        return _on_rows(grads_of_rows, (P(), (jax.tree.map(_along_rows, specs), _rows())))(trained, x, frozen, labels)

    def backward(grads: tuple[Params, Array], cotangents: Sums) -> tuple[Params, Array]:
        return jax.tree.map(lambda leaf: leaf * cotangents[0].astype(leaf.dtype), grads)

    total.defvjp(forward, backward)
    return total(trained, x)


def _zero_sums() -> Sums:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


# Devices that have rows of their own, along BATCH. Along tensor, XLA partitions as elsewhere.


def _row_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH if not mesh.empty and mesh.shape[axis] > 1)


def _on_rows(function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Run a function of (trained, x, frozen, labels) on each device's rows, with the whole head."""
    axes = _row_axes()
    if not axes:
        return function
    rows = _rows()
    in_specs = (P(), rows, P(), rows)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)


def _rows() -> P:
    """The spec of chunks of rows, [count,B,...]."""
    return P(None, _row_axes())


def _along_rows(spec: P) -> P:
    """What a parameter's spec says of the axes that `_on_rows` maps over."""
    return P(*(axis if axis in _row_axes() else None for axis in spec))


def _sum_over_devices(sums: Sums) -> Sums:
    axes = _row_axes()
    return jax.lax.psum(sums, axes) if axes else sums


def _scatter_gradient(grad: Array, spec: P) -> Array:
    """Sum a gradient over the devices, and leave each its part of it."""
    axes = _row_axes()
    for dimension, axis in enumerate(spec):
        if axis in axes:
            grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dimension, tiled=True)
    rest = tuple(axis for axis in axes if axis not in spec)
    return jax.lax.psum(grad, rest) if rest else grad

"""What training minimizes: cross-entropy of the next token, without ever holding the logits of a whole batch.

V1-1's logits of 8 rows of 2048 tokens are 2 GB in float32, and twice that with their gradient. Here the head and the
loss run over slices of the sequence, and the backward pass makes each slice's logits again.

Every pair of neighbouring tokens has a weight, and the loss is the weighted sum. The weights are known before the model
runs, from labels and segments alone: so parts of a batch (devices, accumulated micro-batches) can simply be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import IGNORED, Batch
from internvl_jax.models import cpu, llama
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.layers import Array, Params, Variables, part_variables
from internvl_jax.models.stack import Remat
from internvl_jax.parallel.partitioning import BATCH

CHUNK = 256  # tokens of every row whose logits exist at once

Rngs = Mapping[str, Array]  # by name: "dropout", "drop_path"
NO_RNGS: Rngs = {}


class Sums(flax.struct.PyTreeNode):
    """What a batch, or a part of one, adds up to. All float32 scalars."""

    loss: Array  # weighted cross-entropy, plus the z-loss
    right: Array  # supervised tokens that are the likeliest
    tokens: Array  # supervised tokens
    read: Array  # real tokens


def supervised(labels: Any, segment_ids: Any) -> Any:
    """Which tokens predict a supervised one: [B,T] bool, True at t where t+1 has a label and the two are neighbours in
    one sample. labels, segment_ids [B,T] int32, numpy's or jax's; the last token of a row predicts nothing."""
    np_ = jnp if isinstance(labels, jax.Array) else np
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] > 0)
    return np_.pad((labels[:, 1:] != IGNORED) & same, ((0, 0), (0, 1)))


def loss_weights(labels: Any, segment_ids: Any, groups: int | None = None) -> Any:
    """The weight of every token's prediction in the loss. labels, segment_ids [...,B,T] -> [...,B,T] float32, sum 1.

    Leading axes are micro-batches of one optimizer step.
    groups None: all supervised tokens of the step weigh the same. A number: rows are dealt in order to that many equal
        groups per micro-batch; each group's tokens share its weight and groups weigh the same. That is the reference's
        loss, a mean per device and micro-batch and then a mean over them. A group without a supervised token weighs
        nothing and is not counted; torch's mean of nothing is NaN there.
    Raises ValueError where rows do not divide into groups.
    """
    np_ = jnp if isinstance(labels, jax.Array) else np
    rows, length = labels.shape[-2:]
    flat = supervised(labels.reshape(-1, length), segment_ids.reshape(-1, length)).astype(np_.float32)
    if groups is None:
        return (flat / np_.maximum(flat.sum(), 1)).reshape(labels.shape)
    if rows % groups:
        raise ValueError(f"{rows} rows do not divide into {groups} groups of the per-device mean")
    grouped = flat.reshape(-1, rows // groups, length)
    counts = grouped.sum(axis=(1, 2), keepdims=True)
    weights = grouped / np_.maximum(counts, 1)
    return (weights / np_.maximum((counts > 0).sum(), 1)).astype(np_.float32).reshape(labels.shape)


def loss(
    variables: Variables,
    config: ChatConfig,
    batch: Batch,
    weights: Array,
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    dtype: Any = jnp.float32,
    remat: Remat = False,
    rngs: Rngs = NO_RNGS,
    **vit: Any,
) -> Sums:
    """The weighted loss of a batch, or of a micro-batch of one.

    weights [B,T] float32 as `loss_weights` makes them.
    z_loss: adds this times the squared log of the softmax's normaliser (Chowdhery et al., "PaLM", 2022), which keeps
        logits from drifting; 0, the reference's, for none.
    chunk: tokens of each row whose logits exist at once. remat: what the backward pass recomputes of each layer.
    rngs: "dropout" of the adapters, "drop_path" of the vision tower's branches; what has no rng drops nothing.
    vit: to encode_images.
    """
    features = None
    if batch.pixel_values.shape[0]:
        features = encode_images(variables, config, batch.pixel_values, dtype=dtype, remat=remat, rngs=rngs, **vit)
    return language_loss(
        variables,
        config,
        batch,
        features,
        weights,
        z_loss=z_loss,
        chunk=chunk,
        dtype=dtype,
        remat=remat,
        rngs=rngs,
    )


def encode_images(
    variables: Variables,
    config: ChatConfig,
    pixel_values: Array,
    *,
    dtype: Any,
    remat: Remat,
    rngs: Rngs = NO_RNGS,
    image_axes: tuple[str, ...] = BATCH,
) -> Array:
    """Visual tokens [M,P,D] of images [M,3,h,w]. rngs: as `loss` takes them."""
    model = InternVLChat(config, dtype, remat=remat, image_axes=image_axes)
    return model.apply(variables, pixel_values, method="encode_images", rngs=dict(rngs))


def language_loss(
    variables: Variables,
    config: ChatConfig,
    batch: Batch,
    features: Array | None,
    weights: Array,
    *,
    z_loss: float = 0.0,
    chunk: int = CHUNK,
    dtype: Any = jnp.float32,
    remat: Remat = False,
    rngs: Rngs = NO_RNGS,
) -> Sums:
    """As `loss`, of images that are encoded already: features [M,P,D], or None."""
    model = InternVLChat(config, dtype)
    x = model.apply(variables, batch.input_ids, features, batch.image_index, method="embed_prompt")
    real = batch.segment_ids > 0
    language = part_variables(variables, "language_model")
    hidden, _ = llama.Llama(config.text, dtype, remat).apply(
        language, x, batch.positions, real, segments=batch.segment_ids, rngs=dict(rngs)
    )
    targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    total, right = _head_loss(language["params"], config, hidden, targets, weights, z_loss, chunk)
    counted = jnp.sum(weights > 0, dtype=jnp.float32)
    return Sums(total, right, counted, jnp.sum(real, dtype=jnp.float32))


def _head_loss(
    language: Params, config: ChatConfig, hidden: Array, targets: Array, weights: Array, z_loss: float, chunk: int
) -> tuple[Array, Array]:
    """Loss and right answers of hidden states [B,T,D], `chunk` tokens of every row at a time."""
    length = hidden.shape[1]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def split(x: Array) -> Array:  # [B,T,...] -> [count,B,chunk,...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    def one(head: Params, x: Array, wanted: Array, weight: Array) -> tuple[Array, Array]:
        logits = llama.Llama(config.text, x.dtype).apply({"params": head}, x, method="logits")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # Not a gather: the vocabulary may lie over several devices, and each has only its part of it.
        is_target = jnp.arange(logits.shape[-1]) == wanted[..., None]
        target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        losses = normaliser - target
        if z_loss:
            losses = losses + z_loss * normaliser**2
        best = target >= jnp.max(logits, axis=-1)
        return jnp.sum(losses * weight), jnp.sum(best & (weight > 0), dtype=jnp.float32)

    single_cpu = jax.sharding.get_abstract_mesh().empty and cpu.on_cpu()
    run = _summed_with_gradients(one) if single_cpu else _summed(jax.checkpoint(one))
    return run(llama.head(language), split(hidden), split(targets), split(weights))


Slices = Callable[[Params, Array, Array, Array], tuple[Array, Array]]


def _summed(one: Slices) -> Slices:
    """`one` of each slice, added up."""

    def run(head: Params, x: Array, wanted: Array, weight: Array) -> tuple[Array, Array]:
        zero = jnp.zeros((), jnp.float32)
        add = lambda sums, part: (jax.tree.map(jnp.add, sums, one(head, *part)), None)  # noqa: E731
        return jax.lax.scan(add, (zero, zero), (x, wanted, weight))[0]

    return run


def _summed_with_gradients(one: Slices) -> Slices:
    """The same, with gradients of head and x made while a slice's logits exist: those are computed once, not twice.

    A quantized head has none. Not on a mesh or a TPU, whose programs are measured as they are.
    """

    def run(head: Params, x: Array, wanted: Array, weight: Array) -> tuple[Array, Array]:
        leaves, tree = jax.tree.flatten(head)
        moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

        def whole(moving: list[Array]) -> Params:
            rest = iter(moving)
            return jax.tree.unflatten(tree, [next(rest) if moved else leaf for leaf, moved in zip(leaves, moves)])

        @jax.custom_vjp
        def summed(moving: list[Array], x: Array) -> tuple[Array, Array]:
            return _summed(one)(whole(moving), x, wanted, weight)

        def forward(moving: list[Array], x: Array) -> tuple[Any, Any]:
            slope = jax.value_and_grad(lambda head, x, *part: one(whole(head), x, *part), argnums=(0, 1), has_aux=True)

            def step(carry: Any, part: Any) -> tuple[Any, Array]:
                (loss, right), (of_head, of_x) = slope(moving, *part)
                return jax.tree.map(jnp.add, carry, (loss, right, of_head)), of_x

            zero = jnp.zeros((), jnp.float32)
            first = (zero, zero, jax.tree.map(jnp.zeros_like, moving))
            (loss, right, of_head), of_x = jax.lax.scan(step, first, (x, wanted, weight))
            return (loss, right), (of_head, of_x)

        def backward(made: Any, cotangents: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf * cotangents[0].astype(leaf.dtype), made)

        summed.defvjp(forward, backward)
        return summed([leaf for leaf, moved in zip(leaves, moves) if moved], x)

    return run

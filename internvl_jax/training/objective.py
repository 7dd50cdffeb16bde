"""The training loss: next-token cross-entropy.

The prediction of every token has a weight, and the loss is the weighted sum. The weights depend on labels and
segments alone and are known before the model runs, so losses of parts of a batch (devices, micro-batches) are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import IGNORED, Batch
from internvl_jax.models import llama
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.layers import Array, Variables, part_variables
from internvl_jax.models.stack import Remat
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.training.head_loss import head_loss

CHUNK = 256  # tokens of every row whose logits exist at once

Rngs = Mapping[str, Array]  # keys by name: "dropout" of adapters, "drop_path" of the vision tower
NO_RNGS: Rngs = {}


@dataclass(frozen=True)
class LossOptions:
    """How a loss is computed.

    Attributes:
        z_loss: Weight of the squared log-normalizer of the softmax (Chowdhery et al., "PaLM", 2022), which keeps logits
            from drifting. The reference has none.
        chunk: Tokens of each row whose logits exist at once.
        dtype: Computation dtype.
        remat: What the backward pass rematerializes of each layer.
        image_axes: Mesh axes that images are sharded over in the vision tower.
    """

    z_loss: float = 0.0
    chunk: int = CHUNK
    dtype: Any = jnp.float32
    remat: Remat = False
    image_axes: tuple[str, ...] = BATCH


class LossSums(flax.struct.PyTreeNode):
    """Sums over a batch or a micro-batch, all float32 scalars.

    Attributes:
        loss: Weighted cross-entropy plus z-loss.
        num_correct: Supervised tokens that have the largest logit.
        num_supervised: Supervised tokens.
        num_tokens: Tokens without padding.
    """

    loss: Array
    num_correct: Array
    num_supervised: Array
    num_tokens: Array


def supervised(labels: Any, segment_ids: Any) -> Any:
    """Return which tokens predict a supervised token of the same sample.

    Args:
        labels: [B,T] int32, numpy or jax, not shifted.
        segment_ids: [B,T] int32, 0 on padding.

    Returns:
        [B,T] bool, True at t if t+1 has a label and both are in one sample. The last token of a row predicts nothing.
    """
    np_ = jnp if isinstance(labels, jax.Array) else np
    same = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] > 0)
    return np_.pad((labels[:, 1:] != IGNORED) & same, ((0, 0), (0, 1)))


def loss_weights(labels: Any, segment_ids: Any, groups: int | None = None) -> Any:
    """Return the weight of every token's prediction in the loss.

    Args:
        labels: [...,B,T] int32; leading axes are the micro-batches of one optimizer step.
        segment_ids: [...,B,T] int32.
        groups: None for equal weights of all supervised tokens of the step. A number for the reference's loss, a mean
            per device and micro-batch and then over these: the rows of a micro-batch are divided in order into so many
            equal groups, which have equal weights. A group without a supervised token is not counted; torch's mean
            of nothing is NaN there.

    Returns:
        [...,B,T] float32 with sum 1.

    Raises:
        ValueError: The rows do not divide into groups.
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
    options: LossOptions = LossOptions(),
    *,
    rngs: Rngs = NO_RNGS,
) -> LossSums:
    """Return the weighted loss of a batch or a micro-batch.

    Args:
        variables: Parameters of the model, and its adapters.
        config: Its configuration.
        batch: Rows [B,T] with their images.
        weights: [B,T] float32, of `loss_weights`.
        options: How the loss is computed.
        rngs: Keys of "dropout" and "drop_path". Without a key, nothing is dropped.
    """
    features = None
    if batch.pixel_values.shape[0]:
        features = encode_images(variables, config, batch.pixel_values, options, rngs=rngs)
    return language_loss(variables, config, batch, features, weights, options, rngs=rngs)


def encode_images(
    variables: Variables,
    config: ChatConfig,
    pixel_values: Array,
    options: LossOptions = LossOptions(),
    *,
    rngs: Rngs = NO_RNGS,
) -> Array:
    """Return the visual tokens [M,P,D] of images [M,3,h,w] in training mode. Arguments are those of `loss`."""
    model = InternVLChat(config, options.dtype, remat=options.remat, image_axes=options.image_axes)
    return model.apply(variables, pixel_values, method="encode_images", rngs=dict(rngs))


def language_loss(
    variables: Variables,
    config: ChatConfig,
    batch: Batch,
    features: Array | None,
    weights: Array,
    options: LossOptions = LossOptions(),
    *,
    rngs: Rngs = NO_RNGS,
) -> LossSums:
    """Return the weighted loss for images that are encoded already.

    Args:
        variables: Parameters of the model, and its adapters.
        config: Its configuration.
        batch: Rows [B,T].
        features: Visual tokens [M,P,D] of the batch's images, or None.
        weights: [B,T] float32, of `loss_weights`.
        options: How the loss is computed.
        rngs: Keys, as in `loss`.
    """
    model = InternVLChat(config, options.dtype)
    x = model.apply(variables, batch.input_ids, features, batch.image_index, method="embed_prompt")
    valid = batch.segment_ids > 0
    language = part_variables(variables, "language_model")
    hidden, _ = llama.Llama(config.required_text, options.dtype, options.remat).apply(
        language, x, batch.positions, valid, segments=batch.segment_ids, rngs=dict(rngs)
    )
    targets = jnp.pad(batch.labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    total, num_correct = head_loss(
        language["params"],
        config.required_text,
        hidden,
        targets,
        weights,
        chunk=options.chunk,
        z_loss=options.z_loss,
    )
    num_supervised = jnp.sum(weights > 0, dtype=jnp.float32)
    return LossSums(total, num_correct, num_supervised, jnp.sum(valid, dtype=jnp.float32))

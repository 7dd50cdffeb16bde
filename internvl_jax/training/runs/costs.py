"""FLOPs of a training step, for MFU, and an estimate of its memory before anything is compiled.

The memory is estimated from sizes alone; `internvl-jax compile-report` compiles the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import lora
from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import flops
from internvl_jax.training.context import TrainContext
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.state import ADAPTERS

MOMENT_BYTES = 8  # optimizer state of a trained parameter
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class BatchShape:
    """The size of a micro-batch over all devices: rows, tokens per row, and image slots."""

    rows: int
    length: int
    images: int


def step_flops(config: ChatConfig, recipe: Recipe, shape: BatchShape) -> float:
    """Return the FLOPs of the matrix products of one micro-batch on all devices.

    Sizes are true ones, padding tokens count, and rematerialized computation does not. The forward pass counts once.
    The backward pass counts once more for the gradients of the inputs, if anything below them is trained, and once for
    those of the weights, if these are trained.
    """
    text_products = shape.rows * shape.length * (2 * flops.text_weights(config) + flops.head(config))
    text_attention = shape.rows * flops.causal_attention(config, shape.length)
    parts, adapted = recipe.train, recipe.lora
    below_projector = "vision_model" in parts or "vision_model" in adapted
    below_language = below_projector or "mlp1" in parts or "language_model" in parts or "language_model" in adapted
    text = text_products * (1 + below_language + ("language_model" in parts))
    text += text_attention * (1 + 2 * below_language)
    if not shape.images:  # the model may have no tower
        return text
    return text + shape.images * (
        flops.projector(config) * (1 + below_projector + ("mlp1" in parts))
        + flops.tower_products(config) * (1 + below_projector + ("vision_model" in parts))
        + flops.tower_attention(config) * (1 + 2 * below_projector)
    )


def batch_flops(config: ChatConfig, recipe: Recipe, batch: Batch, num_data_shards: int) -> float:
    """Return the FLOPs of a step over all micro-batches, from the stacked batch of one of the data shards."""
    count, rows, length = batch.labels.shape
    return count * num_data_shards * step_flops(config, recipe, BatchShape(rows, length, batch.pixel_values.shape[1]))


def count_parameters(config: ChatConfig, recipe: Recipe) -> tuple[int, int]:
    """Return the number of trained parameters, adapters included, and of frozen ones."""
    params = abstract_for_running(config, jnp.float32)
    adapters = jax.eval_shape(lambda p: lora.init_adapters(jax.random.key(0), p, recipe.lora), params)
    trained = {name: part for name, part in params.items() if name in recipe.train}
    frozen = {name: part for name, part in params.items() if name not in recipe.train}
    return _count(trained) + _count(adapters), _count(frozen)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def memory_per_device(context: TrainContext, shape: BatchShape, param_dtype: Any) -> tuple[int, int]:
    """Return the bytes of parameters, optimizer state and gradients, and an estimate of those of activations.

    Args:
        context: Context of the run.
        shape: Size of a micro-batch over all devices.
        param_dtype: Dtype of trained parameters.

    Returns:
        Both per device.
    """
    placement, recipe = context.placement, context.recipe
    params = jax.eval_shape(placement.pad, abstract_for_running(placement.config, jnp.float32))
    true = jax.eval_shape(placement.unpad, params)
    adapters = jax.eval_shape(
        lambda p: placement.pad({ADAPTERS: lora.init_adapters(jax.random.key(0), p, recipe.lora)}), true
    )
    trained = {name: part for name, part in params.items() if name in recipe.train}
    frozen = {name: part for name, part in params.items() if name not in recipe.train}
    float32 = jnp.dtype(jnp.float32).itemsize
    state = _count_per_device(trained, placement) * (jnp.dtype(param_dtype).itemsize + MOMENT_BYTES + GRADIENT_BYTES)
    state += _count_per_device(adapters, placement) * (float32 + MOMENT_BYTES + GRADIENT_BYTES)
    state += _count_per_device(frozen, placement) * context.dtype.itemsize
    return state, _activation_bytes(context, shape)


def _count_per_device(tree: Any, placement: MeshPlacement) -> int:
    if placement.mesh is None:
        return _count(tree)
    shapes = jax.tree.map(
        lambda leaf, sharding: sharding.shard_shape(leaf.shape), tree, placement.param_shardings(tree)
    )
    return sum(math.prod(shape) for shape in jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple)))


def _activation_bytes(context: TrainContext, shape: BatchShape) -> int:
    config, placement, remat = context.placement.config, context.placement, context.settings.remat
    text, vision = config.required_text, config.vision
    shards = placement.num_row_shards
    tensor = 1 if placement.mesh is None else placement.mesh.shape["tensor"]
    text_tokens = shape.rows * shape.length / shards
    has_vision_gradients = "vision_model" in context.recipe.train or "vision_model" in context.recipe.lora

    def layers(tokens: float, width: int, hidden: int, count: int, has_gradients: bool) -> float:
        per_layer = tokens * (6 * width + 3 * hidden) / tensor  # q, k, v, attention, mlp
        if not has_gradients:
            return 2 * per_layer
        if remat == "full":
            return count * tokens * width + 3 * per_layer
        return count * (2 * tokens * width + per_layer * (1 if remat == "dots" else 1.5))

    elements = layers(text_tokens, text.hidden_size, text.intermediate_size, text.num_hidden_layers, True)
    pixels = 0.0
    if vision is not None:
        image_size = config.required_image_size
        vision_tokens = shape.images * ((image_size // vision.patch_size) ** 2 + 1) / shards
        width, hidden = vision.hidden_size, vision.intermediate_size
        elements += layers(vision_tokens, width, hidden, config.num_vision_layers, has_vision_gradients)
        pixels = shape.images / shards * vision.num_channels * image_size**2 * 4
    chunk = min(context.settings.chunk, shape.length)
    logits = shape.rows / shards * chunk * text.vocab_size / tensor * 3 * 4
    return int(elements * context.dtype.itemsize + logits + pixels)

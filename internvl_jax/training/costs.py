"""What a training step costs: arithmetic, for MFU, and memory, before anything is compiled.

The memory is an estimate from sizes alone; `internvl-jax compile-report` compiles.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import lora
from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import flops
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.state import ADAPTERS, Place

MOMENTS = 8  # bytes of optimizer state for each trained parameter
GRADIENT = 4  # bytes


def step_flops(config: ChatConfig, recipe: Recipe, rows: int, length: int, images: int) -> float:
    """Matrix products of one step, of all devices: true sizes, padding included, what is made again not counted.

    Forward once; backward once more for the products' inputs, where anything below them is trained, and once for
    their weights where these are trained.
    """
    language = rows * length * (2 * flops.text_weights(config) + flops.head(config))
    attention = rows * flops.causal_attention(config, length)
    tower, mixing = images * flops.tower_products(config), images * flops.tower_attention(config)
    project = images * flops.projector(config)
    whole, adapted = recipe.train, recipe.lora
    below_projector = "vision_model" in whole or "vision_model" in adapted
    below_language = below_projector or "mlp1" in whole or "language_model" in whole or "language_model" in adapted
    return (
        language * (1 + below_language + ("language_model" in whole))
        + attention * (1 + 2 * below_language)
        + project * (1 + below_projector + ("mlp1" in whole))
        + tower * (1 + below_projector + ("vision_model" in whole))
        + mixing * (1 + 2 * below_projector)
    )


def batch_flops(config: ChatConfig, recipe: Recipe, batch: Batch, processes: int) -> float:
    """`step_flops` of one process's stacked batch, of as many processes."""
    count, rows, length = batch.labels.shape
    images = batch.pixel_values.shape[1]
    return count * processes * step_flops(config, recipe, rows, length, images)


def parameters(config: ChatConfig, recipe: Recipe) -> tuple[int, int]:
    """Parameters that are trained, adapters included, and those that stay as they are."""
    params = abstract_for_running(config, jnp.float32)
    adapters = jax.eval_shape(lambda p: lora.init_adapters(jax.random.key(0), p, recipe.lora), params)
    trained = {name: part for name, part in params.items() if name in recipe.train}
    frozen = {name: part for name, part in params.items() if name not in recipe.train}
    return _count(trained) + _count(adapters), _count(frozen)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def memory_per_device(
    recipe: Recipe,
    place: Place,
    *,
    rows: int,
    length: int,
    images: int,
    trained_dtype: Any,
    dtype: Any,
    remat: str,
    chunk: int,
) -> tuple[int, int]:
    """Bytes of parameters, optimizer and gradients, and about how many of activations, on each device.

    rows, images: of a micro-batch over all devices. dtype: of computation and of frozen parameters.
    """
    config = place.config
    params = jax.eval_shape(place.pad, abstract_for_running(config, jnp.float32))
    true = jax.eval_shape(place.unpad, params)
    adapters = jax.eval_shape(
        lambda p: place.pad({ADAPTERS: lora.init_adapters(jax.random.key(0), p, recipe.lora)}), true
    )
    own = {name: part for name, part in params.items() if name in recipe.train}
    frozen = {name: part for name, part in params.items() if name not in recipe.train}
    float32 = jnp.dtype(jnp.float32).itemsize
    state = _share(own, place) * (jnp.dtype(trained_dtype).itemsize + MOMENTS + GRADIENT)
    state += _share(adapters, place) * (float32 + MOMENTS + GRADIENT)
    state += _share(frozen, place) * jnp.dtype(dtype).itemsize
    return state, _activations(recipe, place, rows, length, images, jnp.dtype(dtype).itemsize, remat, chunk)


def _share(tree: Any, place: Place) -> int:
    """Elements of a tree on each device."""
    if place.mesh is None:
        return _count(tree)
    shapes = jax.tree.map(lambda leaf, where: where.shard_shape(leaf.shape), tree, place.specs(tree))
    return sum(math.prod(shape) for shape in jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple)))


def _activations(
    recipe: Recipe, place: Place, rows: int, length: int, images: int, itemsize: int, remat: str, chunk: int
) -> int:
    config, mesh = place.config, place.mesh
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    text, vision = config.text, config.vision
    tokens = rows * length / shards
    seen = images * ((config.image_size // vision.patch_size) ** 2 + 1) / shards
    learns = "vision_model" in recipe.train or "vision_model" in recipe.lora

    def stack(tokens: float, width: int, hidden: int, layers: int, kept: bool) -> float:
        inside = tokens * (6 * width + 3 * hidden) / tensor  # q, k, v, attention, mlp
        if not kept:
            return 2 * inside
        if remat == "full":
            return layers * tokens * width + 3 * inside
        return layers * (2 * tokens * width + inside * (1 if remat == "dots" else 1.5))

    elements = stack(tokens, text.hidden_size, text.intermediate_size, text.num_hidden_layers, True)
    elements += stack(seen, vision.hidden_size, vision.intermediate_size, config.num_vision_layers, learns)
    logits = rows / shards * min(chunk, length) * text.vocab_size / tensor * 3 * 4
    pixels = images / shards * vision.num_channels * config.image_size**2 * 4
    return int(elements * itemsize + logits + pixels)

"""FLOPs of the forward pass: matrix products of true sizes, 2 per multiply-add.

Products with weights are counted from the declared parameters, so that no shape is listed twice.
"""

from __future__ import annotations

import math
from functools import lru_cache

import jax

from internvl_jax.config import ChatConfig
from internvl_jax.models.axes import axes_of
from internvl_jax.models.chat_model import abstract_params
from internvl_jax.parallel.partitioning import path_of


@lru_cache(maxsize=256)
def kernel_elements(config: ChatConfig, part: str) -> int:
    """Elements of all kernels below a node of the parameter tree, such as "language_model/layers".

    A token costs 2 FLOPs per element.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    sizes = {path_of(keys): math.prod(leaf.shape) for keys, leaf in leaves}
    return sum(size for path, size in sizes.items() if path.startswith(f"{part}/") and axes_of(path).inputs)


def text_weights(config: ChatConfig) -> int:
    """Elements of the kernels of the language model's layers."""
    return kernel_elements(config, "language_model/layers")


def causal_attention(config: ChatConfig, length: int) -> int:
    """FLOPs of the language model's scores and weighted sums for one row, the causal half only."""
    text = config.required_text
    return 2 * length**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers


def head(config: ChatConfig) -> int:
    """FLOPs of one token's logits."""
    return 2 * config.required_text.hidden_size * config.required_text.vocab_size


def tower_products(config: ChatConfig) -> int:
    """FLOPs of one image's products with weights in the vision tower, in its patches and the layers that run."""
    patches = _num_patches(config)
    layer = kernel_elements(config, "vision_model/layers") // config.required_vision.num_hidden_layers
    layers = config.num_vision_layers * layer * (patches + 1)
    return 2 * (layers + patches * kernel_elements(config, "vision_model/embeddings"))


def tower_attention(config: ChatConfig) -> int:
    """FLOPs of one image's scores and weighted sums in the vision tower."""
    return config.num_vision_layers * 4 * (_num_patches(config) + 1) ** 2 * config.required_vision.hidden_size


def projector(config: ChatConfig) -> int:
    """FLOPs of one image in the projector."""
    return 2 * config.tokens_per_image * kernel_elements(config, "mlp1")


def _num_patches(config: ChatConfig) -> int:
    return (config.required_image_size // config.required_vision.patch_size) ** 2

"""FLOPs of the model's matrix products in a forward pass, 2 per multiply-add, in true sizes."""

from __future__ import annotations

from internvl_jax.config import ChatConfig


def text_weights(config: ChatConfig) -> int:
    """Number of weights in the kernels of the language model's layers."""
    text = config.required_text
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    return text.num_hidden_layers * text.hidden_size * (heads + 3 * text.intermediate_size)


def causal_attention(config: ChatConfig, length: int) -> int:
    """FLOPs of attention in the language model for one row of `length` tokens, without what the mask excludes."""
    text = config.required_text
    return 2 * length**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers


def head(config: ChatConfig) -> int:
    """FLOPs of the logits of one token."""
    return 2 * config.required_text.hidden_size * config.required_text.vocab_size


def tower_products(config: ChatConfig) -> int:
    """FLOPs of the products with weights in the vision tower for one image: patches, and the layers that run."""
    vision = config.required_vision
    width, patches = vision.hidden_size, (config.required_image_size // vision.patch_size) ** 2
    layer = 2 * (patches + 1) * (4 * width**2 + 2 * width * vision.intermediate_size)
    return config.num_vision_layers * layer + 2 * patches * vision.num_channels * vision.patch_size**2 * width


def tower_attention(config: ChatConfig) -> int:
    """FLOPs of attention in the vision tower for one image."""
    vision = config.required_vision
    tokens = (config.required_image_size // vision.patch_size) ** 2 + 1
    return config.num_vision_layers * 4 * tokens**2 * vision.hidden_size


def projector(config: ChatConfig) -> int:
    """FLOPs of the projector for one image."""
    sizes = config.required_projector
    return 2 * config.tokens_per_image * (sizes.in_features + sizes.out_features) * sizes.out_features

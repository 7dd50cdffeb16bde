"""Matrix products of the model's parts in floating point operations, 2 per multiply-add: true sizes, forward."""

from __future__ import annotations

from internvl_jax.config import ChatConfig


def text_weights(config: ChatConfig) -> int:
    """Elements of the matrices of the language model's layers."""
    text = config.text
    heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
    return text.num_hidden_layers * text.hidden_size * (heads + 3 * text.intermediate_size)


def causal_attention(config: ChatConfig, length: int) -> int:
    """Scores and weighted sums of one row of the language model, the half below the diagonal."""
    text = config.text
    return 2 * length**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers


def head(config: ChatConfig) -> int:
    """Logits of one token."""
    return 2 * config.text.hidden_size * config.text.vocab_size


def tower_products(config: ChatConfig) -> int:
    """Products with weights of one image in the tower, the layers that run and the patches."""
    vision = config.vision
    width, patches = vision.hidden_size, (config.image_size // vision.patch_size) ** 2
    layer = 2 * (patches + 1) * (4 * width**2 + 2 * width * vision.intermediate_size)
    return config.num_vision_layers * layer + 2 * patches * vision.num_channels * vision.patch_size**2 * width


def tower_attention(config: ChatConfig) -> int:
    """Scores and weighted sums of one image in the tower."""
    vision = config.vision
    tokens = (config.image_size // vision.patch_size) ** 2 + 1
    return config.num_vision_layers * 4 * tokens**2 * vision.hidden_size


def projector(config: ChatConfig) -> int:
    """One image in the projector."""
    sizes = config.projector
    return 2 * config.tokens_per_image * (sizes.in_features + sizes.out_features) * sizes.out_features

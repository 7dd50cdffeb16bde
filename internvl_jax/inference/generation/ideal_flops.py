"""Least FLOPs of each inference program: matrix products of true sizes, summed over all devices."""

from __future__ import annotations

from internvl_jax.config import ChatConfig
from internvl_jax.models import flops

# Parts of the parameter tree that each program reads.
PARTS = {
    "encode": ("vision_model", "mlp1"),
    "prefill": ("language_model",),
    "decode": ("language_model",),
}


def encode(config: ChatConfig, images: int) -> int:
    """Vision tower and projector for `images` images."""
    return images * (flops.tower_products(config) + flops.tower_attention(config) + flops.projector(config))


def prefill(config: ChatConfig, rows: int, prompt: int) -> int:
    """Layers, the causal half of attention, and logits of the last position, for `rows` prompts of `prompt` tokens."""
    layers = 2 * prompt * flops.text_weights(config) + flops.causal_attention(config, prompt)
    return rows * (layers + flops.head(config))


def decode(config: ChatConfig, rows: int, slots: int) -> int:
    """One token per row: layers, attention over `slots` slots of the KV cache, and logits."""
    text = config.required_text
    attention = 4 * slots * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return rows * (2 * flops.text_weights(config) + attention + flops.head(config))

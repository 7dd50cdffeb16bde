"""Adapters of the tiny model, and transformers' Llama that peft adapts."""

import jax
from support.golden import random_tree, spread

from internvl_jax import lora
from internvl_jax.lora import Lora

# peft's configuration of plain LoRA.
PLAIN_LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "down_proj"]}

BOTH = {"language_model": Lora(4, dropout=0.0), "vision_model": Lora(2, alpha=3, dropout=0.0)}


def adapters_of(params, settings=BOTH, size=0.3):
    """Adapters all of whose numbers matter: lora_b begins at zero."""
    fresh = jax.eval_shape(lambda p: lora.init_adapters(jax.random.key(0), p, settings), params)
    return jax.tree.map(lambda x: size * x, random_tree(fresh, 3))


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=91, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return spread(transformers.LlamaForCausalLM(config), 0)

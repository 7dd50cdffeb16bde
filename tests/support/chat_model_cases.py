"""Prompts with images, the configuration of a small InternVL in transformers' layout, and the compiled model."""

import jax
import numpy as np
from support import modules
from support.config_cases import INTERNVL

VISION = INTERNVL["vision_config"]
TEXT = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
IMAGE = 7


def rows_with_images(counts, per_image, seed=0, vocabulary=67):
    """Left-padded prompts with the given numbers of images at random places: ids and mask."""
    rng = np.random.default_rng(seed)
    rows = []
    for count in counts:
        row = rng.integers(8, vocabulary, rng.integers(3, 6)).tolist()
        for _ in range(count):
            row += [IMAGE] * per_image + rng.integers(8, vocabulary, rng.integers(1, 4)).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    return ids, np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def on_host(function, **options):
    """Compiled once per configuration, options and shapes; the result as numpy arrays."""
    compiled = jax.jit(function, static_argnames=("config", "dtype", "collect"), **options)
    return lambda *args, **options: jax.device_get(compiled(*args, **options))


forward, encode, tower = map(on_host, (modules.forward, modules.encode_images, modules.run_tower))

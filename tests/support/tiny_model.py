"""A tiny chat model, its random parameters and training batches."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from support.golden import random_tree

from internvl_jax.config import PRESETS
from internvl_jax.data.batch import Batch
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import objective
from internvl_jax.training.objective import LossOptions

IMAGE = 3


def tiny(**text):
    """Small enough to compile fast, large enough that a chunk is not the whole."""
    config = PRESETS["nano"]()
    vision = dataclasses.replace(config.vision, num_hidden_layers=2)
    text = {"num_hidden_layers": 2, "vocab_size": 61, **text}
    return dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, **text))


def random_params(config, seed=0):
    return jax.tree.map(lambda leaf: leaf * 0.3, random_tree(abstract_for_running(config, jnp.float32), seed))


def rows_of(config, lengths, total, *, seed=0, images=1):
    """Samples of the given lengths, one after the other in one row of `total` tokens; each begins with its images."""
    rng = np.random.default_rng(seed)
    ids, labels, segments, positions = (np.full(total, value, np.int32) for value in (0, -100, 0, 0))
    start = 0
    for number, length in enumerate(lengths, 1):
        here = slice(start, start + length)
        ids[here] = rng.integers(4, config.text.vocab_size, length)
        ids[start + 1 : start + 1 + images * config.tokens_per_image] = IMAGE
        learned = start + 1 + images * config.tokens_per_image + 2
        labels[learned : start + length] = ids[learned : start + length]
        labels[start] = ids[start]  # a label on a sample's first token is predicted by nothing
        segments[here], positions[here] = number, np.arange(length)
        start += length
    return ids, labels, segments, positions


def batch_of(config, rows, total, images=1):
    parts = [
        np.stack(part)
        for part in zip(*(rows_of(config, r, total, seed=i, images=images) for i, r in enumerate(rows)), strict=True)
    ]
    count = max(1, images * sum(map(len, rows)))
    size = config.image_size
    pixels = np.random.default_rng(5).standard_normal((count, 3, size, size)).astype(np.float32)
    return Batch(*parts, image_token_index(parts[0] == IMAGE), pixels)


def evaluate(params, config, batch, weights=None, **options):
    return evaluate_variables({"params": params}, config, batch, weights, **options)


def evaluate_variables(variables, config, batch, weights=None, *, rngs=objective.NO_RNGS, **options):
    weights = objective.loss_weights(batch.labels, batch.segment_ids) if weights is None else weights
    return jax.device_get(_loss(variables, batch, weights, rngs, config=config, options=LossOptions(**options)))


@partial(jax.jit, static_argnames=("config", "options"))
def _loss(variables, batch, weights, rngs, *, config, options):
    return objective.loss(variables, config, batch, weights, options, rngs=rngs)

"""Quantized parameters and logits of the tiny models."""

from functools import partial

import jax
import numpy as np
from support import modules
from support.mesh_cases import IMAGE
from support.paths import DATA

from internvl_jax.quantize import (
    quantize_params,
)

V1_1 = DATA / "internvl_chat_v1_1" / "checkpoint"


# Compiled as a whole: one operation at a time is a program each.
quantized = jax.jit(quantize_params, static_argnames="scheme")


def run(params, config, batch):
    ids, pixels, valid = batch
    return np.asarray(jax.jit(partial(logits_of, config=config))(params, ids, pixels, valid))[valid]


def logits_of(params, ids, pixels, valid, *, config):
    return modules.forward(params, config, ids, pixels, valid, image_token_id=IMAGE)[0]

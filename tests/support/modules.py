"""The model's modules as functions of parameters, as tests call and jit them. Each returns its result and `out`."""

import jax.numpy as jnp

from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.models.llama import Llama
from internvl_jax.models.projector import Projector


def with_out(result, collect):
    return result if collect else (result, {})


def forward(
    params, config, input_ids, pixel_values=None, valid=None, *,
    image_token_id=None, dtype=jnp.float32, collect=False, remat=False,
):  # fmt: skip
    model = InternVLChat(config, dtype, image_token_id, remat)
    return with_out(model.apply({"params": params}, input_ids, pixel_values, valid, collect=collect), collect)


def encode_images(params, config, pixel_values, *, dtype=jnp.float32, collect=False):
    result = InternVLChat(config, dtype).apply(
        {"params": params}, pixel_values, method="encode_images", collect=collect
    )
    return with_out(result, collect)


def run_tower(
    params, config, pixel_values, *, num_layers=None, dtype=jnp.float32, collect=False, remat=False, drop_path_key=None
):
    rngs = {} if drop_path_key is None else {"drop_path": drop_path_key}
    tower = InternViT(config, dtype, remat)
    return with_out(
        tower.apply({"params": params}, pixel_values, num_layers=num_layers, collect=collect, rngs=rngs), collect
    )


def init_tower(key, config):
    pixels = jnp.zeros((1, config.num_channels, config.image_size, config.image_size))
    return InternViT(config).init(key, pixels)["params"]


def project(params, config, x, dtype=jnp.float32):
    return Projector(config, dtype).apply({"params": params}, x)


def init_projector(key, config):
    return Projector(config).init(key, jnp.zeros((1, 1, config.in_features)))["params"]


def embed(params, token_ids, dtype=jnp.float32):
    return jnp.take(params["embed_tokens"]["embedding"], token_ids, axis=0).astype(dtype)


def run_llama(params, config, x, positions, valid, cache=None, *, dtype=jnp.float32, collect=False, **options):
    """Returns (hidden, cache, out)."""
    result = Llama(config, dtype).apply({"params": params}, x, positions, valid, cache, collect=collect, **options)
    return result if collect else (*result, {})


def logits(params, config, hidden):
    return Llama(config, hidden.dtype).apply({"params": params}, hidden, method="logits")


def init_llama(key, config):
    def everything(llama, token_ids):
        x = llama.embed(token_ids)
        hidden, _ = llama(x, jnp.zeros(token_ids.shape, jnp.int32), jnp.ones(token_ids.shape, bool))
        return llama.logits(hidden)

    return Llama(config).init(key, jnp.zeros((1, 2), jnp.int32), method=everything)["params"]

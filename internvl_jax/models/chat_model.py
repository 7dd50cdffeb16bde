"""The chat model: images and tokens in, logits out, as pure functions on one tree of parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.models import intern_vit, llama, projector
from internvl_jax.models.layers import Array, Params, Remat, positions_from_valid


def init_params(key: Array, config: ChatConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the parts that the config has, layers stacked on axis 0."""
    k_vision, k_projector, k_text = jax.random.split(key, 3)
    params = {}
    if config.vision is not None:
        params["vision_model"] = intern_vit.init_params(k_vision, config.vision)
    if config.projector is not None:
        params["mlp1"] = projector.init_params(k_projector, config.projector)
    if config.text is not None:
        params["language_model"] = llama.init_params(k_text, config.text)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: ChatConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes of `init_params` as a tree of jax.ShapeDtypeStruct; computes nothing, needs no device."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config, dtype))


def count_params(tree: Any) -> int:
    """Number of parameters in a tree of arrays or of ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def encode_images(
    params: Params,
    config: ChatConfig,
    pixel_values: Array,
    *,
    dtype: Any = jnp.float32,
    collect: bool = False,
    **vit: Any,
) -> tuple[Array, dict[str, Array]]:
    """Images to visual tokens in the language model's width.

    pixel_values [M,3,h,w] float, normalised; `vit` goes to intern_vit.forward (remat, drop_path_key, image_axes).
    Returns [M,P,D] with P = (h/patch/ratio) * (w/patch/ratio), and `out`: with collect "hidden_states", "selected"
    (patch features [M,patches,D]), "unshuffled" [M,P,E] and "projected" [M,P,D].
    """
    x, out = intern_vit.forward(
        params["vision_model"],
        config.vision,
        pixel_values,
        num_layers=config.num_vision_layers,
        dtype=dtype,
        collect=collect,
        **vit,
    )
    selected = x[:, 1:]
    images, _, width = selected.shape
    rows, columns = (side // config.vision.patch_size for side in pixel_values.shape[2:])
    folded = projector.pixel_unshuffle(
        selected.reshape(images, rows, columns, width), config.unshuffle, config.ps_version
    )
    folded = folded.reshape(images, -1, folded.shape[-1])
    projected = projector.forward(params["mlp1"], config.projector, folded, dtype=dtype)
    if collect:
        out = {**out, "selected": selected, "unshuffled": folded, "projected": projected}
    return projected, out


def merge_images(embeddings: Array, is_image: Array, features: Array, owners: tuple[int, ...] = (0,)) -> Array:
    """Put visual tokens where the prompt has image tokens, in prompt order over the rows of each owner.

    embeddings [B,T,D], is_image [B,T] bool, features [M,P,D] -> [B,T,D]. A gather: no scatter, no dynamic shape. The
    host must have checked that there are M*P image tokens : no count can be checked under jit.
    owners: rows and images are that many equal parts, and the parts with one number are one owner's. Its images, in
        order over its parts, are those of its rows, in theirs; an image need not lie in the part of its row.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    size = flat.shape[0] // len(owners)
    index = jnp.cumsum(is_image.reshape(len(owners), -1).astype(jnp.int32), axis=1) - 1
    if len(owners) == 1:
        index = jnp.clip(index, 0, size - 1)
    else:
        numbers = np.asarray(owners)
        parts = np.stack([np.flatnonzero(numbers == owner) for owner in owners]).astype(np.int32)  # of a part's owner
        earlier = np.tril(numbers[:, None] == numbers, -1).astype(np.int32)
        index = index + (earlier @ (index[:, -1] + 1))[:, None]  # among all of the owner's
        index = jnp.clip(index, 0, parts.shape[1] * size - 1)
        index = jnp.take_along_axis(jnp.asarray(parts), index // size, axis=1) * size + index % size
    return jnp.where(is_image[..., None], flat[index.reshape(is_image.shape)], embeddings)


def embed_prompt(
    params: Params,
    input_ids: Array,
    image_features: Array | None,
    image_token_id: int | Array,
    *,
    dtype: Any,
    owners: tuple[int, ...] = (0,),
) -> Array:
    """Embeddings of a prompt with its images merged in. input_ids [B,T], image_features [M,P,D] or None -> [B,T,D].

    owners: of equal parts of the rows and of the images, as merge_images takes them.
    """
    embeddings = llama.embed(params["language_model"], input_ids, dtype)
    if image_features is None:
        return embeddings
    return merge_images(embeddings, input_ids == image_token_id, image_features, owners)


def forward(
    params: Params,
    config: ChatConfig,
    input_ids: Array,
    pixel_values: Array | None = None,
    valid: Array | None = None,
    *,
    image_token_id: int | Array = -1,
    dtype: Any = jnp.float32,
    collect: bool = False,
    remat: Remat = False,
) -> tuple[Array, dict[str, Any]]:
    """Logits at every position of whole sequences (training, scoring, parity).

    input_ids [B,T] int32; pixel_values [M,3,h,w] in prompt order over the batch, or None; valid [B,T] bool, all True
    by default (padding may stand on either side).
    Returns logits [B,T,V] float32 and `out`: with collect, "vision" and "language" hold each part's own.
    """
    valid = jnp.ones(input_ids.shape, bool) if valid is None else valid
    features = None
    vision_out: dict[str, Array] = {}
    if pixel_values is not None:
        features, vision_out = encode_images(params, config, pixel_values, dtype=dtype, collect=collect, remat=remat)
    x = embed_prompt(params, input_ids, features, image_token_id, dtype=dtype)
    positions = positions_from_valid(valid)
    language = params["language_model"]
    hidden, _, language_out = llama.forward(
        language, config.text, x, positions, valid, dtype=dtype, collect=collect, remat=remat
    )
    out = {"vision": vision_out, "language": language_out} if collect else {}
    return llama.logits(language, config.text, hidden), out

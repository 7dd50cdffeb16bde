"""The chat model as a Flax module: images and tokens in, logits out."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from internvl_jax.config import ChatConfig
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.models.layers import Array, Params, positions_from_valid
from internvl_jax.models.llama import Llama
from internvl_jax.models.projector import Projector, pixel_unshuffle
from internvl_jax.models.stack import Remat
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.conversation import image_token_index


class InternVLChat(nn.Module):
    """Vision tower, pixel unshuffle, projector and language model; a config may lack parts.

        model = InternVLChat(config, image_token_id=image_token_id)
        params = model.init(jax.random.key(0), input_ids, pixel_values)["params"]
        logits = model.apply({"params": params}, input_ids, pixel_values)

    Attributes:
        config: the model's parts and their sizes.
        dtype: of computation; parameters are cast where they are used.
        image_token_id: the id that stands for a visual token in `input_ids`; needed where images are given.
        remat: what the backward pass recomputes of each layer.
        image_axes: mesh axes over which the vision tower's images are sharded.
    """

    config: ChatConfig
    dtype: Any = jnp.float32
    image_token_id: int | None = None
    remat: Remat = False
    image_axes: tuple[str, ...] = BATCH

    def setup(self) -> None:
        cfg = self.config
        if cfg.vision is not None:
            self.vision_model = InternViT(cfg.vision, self.dtype, self.remat, self.image_axes)
        if cfg.projector is not None:
            self.mlp1 = Projector(cfg.projector, self.dtype)
        if cfg.text is not None:
            self.language_model = Llama(cfg.text, self.dtype, self.remat)

    def __call__(
        self,
        input_ids: Array,
        pixel_values: Array | None = None,
        valid: Array | None = None,
        *,
        collect: bool = False,
    ) -> Any:
        """Compute logits at every position of whole sequences.

        Args:
            input_ids: [B,T] int32, with image tokens in place.
            pixel_values: normalized images [M,3,h,w] in prompt order over the batch, or None.
            valid: [B,T] bool, False for padding, on either side; None for no padding.
            collect: also return `out`.

        Returns:
            Logits [B,T,V] float32; with `collect` also a dict with "vision" and "language", each part's own.

        Raises:
            ValueError: there are images, but the module has no `image_token_id`.
        """
        valid = jnp.ones(input_ids.shape, bool) if valid is None else valid
        features, image_index, vision_out = None, None, {}
        if pixel_values is not None:
            if self.image_token_id is None and not self.is_initializing():
                raise ValueError("pixel_values are given, but InternVLChat(..., image_token_id=...) is not set")
            features = self.encode_images(pixel_values, collect=collect)
            features, vision_out = features if collect else (features, {})
            image_token = -1 if self.image_token_id is None else self.image_token_id  # None: in `init`
            image_index = image_token_index(valid & (input_ids == image_token))
        x = self.embed_prompt(input_ids, features, image_index)
        positions = positions_from_valid(valid)
        if not collect:
            hidden, _ = self.language_model(x, positions, valid)
            return self.language_model.logits(hidden)
        hidden, _, language_out = self.language_model(x, positions, valid, collect=True)
        return self.language_model.logits(hidden), {"vision": vision_out, "language": language_out}

    def encode_images(self, pixel_values: Array, *, collect: bool = False) -> Any:
        """Turn images into visual tokens of the language model's width.

        An rng "drop_path" drops branches of the tower (InternViT).

        Args:
            pixel_values: normalized images [M,3,h,w].
            collect: also return `out`.

        Returns:
            Visual tokens [M,P,D] with P = (h/patch/ratio) * (w/patch/ratio); with `collect` also a dict with
            "hidden_states", "selected" (patch features [M,patches,D]), "unshuffled" [M,P,E] and "projected" [M,P,D].
        """
        cfg = self.config
        x = self.vision_model(pixel_values, num_layers=cfg.num_vision_layers, collect=collect)
        x, out = x if collect else (x, {})
        selected = x[:, 1:]
        images, _, width = selected.shape
        rows, columns = (side // cfg.required_vision.patch_size for side in pixel_values.shape[2:])
        folded = pixel_unshuffle(selected.reshape(images, rows, columns, width), cfg.unshuffle, cfg.ps_version)
        folded = folded.reshape(images, -1, folded.shape[-1])
        projected = self.mlp1(folded)
        if not collect:
            return projected
        return projected, {**out, "selected": selected, "unshuffled": folded, "projected": projected}

    def embed_prompt(self, input_ids: Array, features: Array | None, image_index: Array | None) -> Array:
        """Embed prompts, with visual tokens in place of their image tokens.

        Args:
            input_ids: [B,T] int32.
            features: visual tokens [M,P,D], or None without images.
            image_index: [B,T] int32, as `merge_images` takes it; unused without images.

        Returns:
            Embeddings [B,T,D].

        Raises:
            ValueError: there are visual tokens, but no index.
        """
        embeddings = self.language_model.embed(input_ids)
        if features is None:
            return embeddings
        if image_index is None:
            raise ValueError("visual tokens are given without an image_index")
        return merge_images(embeddings, features, image_index)


def init_params(key: Array, config: ChatConfig, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the parts that the config has, layers stacked on axis 0, in `dtype`."""
    pixels = None if config.vision is None else jnp.zeros((1, config.vision.num_channels, *[config.image_size] * 2))
    if config.text is None and config.projector is None:
        params = {"vision_model": InternViT(config.vision).init(key, pixels)["params"]}
    elif config.text is None:
        params = InternVLChat(config).init(key, pixels, method="encode_images")["params"]
    else:
        params = InternVLChat(config).init(key, jnp.zeros((1, 2), jnp.int32), pixels)["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract_params(config: ChatConfig, dtype: Any = jnp.float32) -> Params:
    """Shapes and dtypes of `init_params` as a tree of jax.ShapeDtypeStruct; computes nothing, needs no device."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), _traced_shapes(config))


@functools.lru_cache(maxsize=64)
def _traced_shapes(config: ChatConfig) -> Params:
    """Float32 parameters as ShapeDtypeStructs. Tracing takes tenths of a second, and loading asks several times."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), config))


def count_params(tree: Any) -> int:
    """Number of parameters in a tree of arrays or of ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def merge_images(embeddings: Array, features: Array, image_index: Array) -> Array:
    """Put visual tokens in the place of image tokens.

    A gather: no scatter, no dynamic shape. The host makes the index and checks the number of image tokens; under jit
    neither can be checked.

    Args:
        embeddings: [B,T,D], of the prompts.
        features: visual tokens [M,P,D].
        image_index: [B,T] int32: for an image token its row in `features` as [M*P,D], -1 for any other token
            (`processing.conversation.image_token_index`).

    Returns:
        [B,T,D] in the dtype of `embeddings`.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(embeddings.dtype)
    return jnp.where(image_index[..., None] >= 0, flat[jnp.maximum(image_index, 0)], embeddings)

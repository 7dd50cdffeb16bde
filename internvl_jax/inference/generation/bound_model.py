"""A model bound to its parameters, and a batch of prompts: what every jitted inference step takes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp

from internvl_jax.config import ChatConfig
from internvl_jax.models.layers import Array, Params, Variables
from internvl_jax.parallel.partitioning import BATCH


class BoundModel(flax.struct.PyTreeNode):
    """A model with its parameters. The fields that are not arrays select the compiled program.

    Attributes:
        params: parameter tree of `chat_model`, layers stacked or as tuples of per-layer trees.
        config: configuration of the model.
        dtype: compute dtype.
        cache_dtype: dtype of the KV cache: int8 or a floating-point type.
        image_axes: mesh axes over which the vision tower's images are split (`partitioning.IMAGE_AXES`).
        adapters: the collection "lora", as `lora.attach` makes it, its layers laid out as those of `params`; None
            without adapters.
    """

    params: Params
    config: ChatConfig = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    cache_dtype: Any = flax.struct.field(pytree_node=False)
    image_axes: tuple[str, ...] = flax.struct.field(pytree_node=False, default=BATCH)
    adapters: Params | None = None

    @property
    def variables(self) -> Variables:
        """What the model's modules are applied to, by collection."""
        return {"params": self.params, "lora": self.adapters or {}}


def bind_model(
    config: ChatConfig,
    params: Params,
    *,
    dtype: Any,
    cache_dtype: Any = None,
    image_axes: tuple[str, ...] = BATCH,
    adapters: Params | None = None,
) -> BoundModel:
    """Bind a model to its parameters. Arguments as the fields of BoundModel; cache_dtype None: `dtype`."""
    dtype = jnp.dtype(dtype)
    cache_dtype = dtype if cache_dtype is None else jnp.dtype(cache_dtype)
    return BoundModel(
        params=params,
        config=config,
        dtype=dtype,
        cache_dtype=cache_dtype,
        image_axes=image_axes,
        adapters=adapters,
    )


class PromptBatch(flax.struct.PyTreeNode):
    """Prompts of one batch. Decoding needs left padding: then the last column has every row's last token.

    Attributes:
        input_ids: [B,T] int32.
        valid: [B,T] bool, False on padding. Rows that only fill up the mesh have no valid token.
        features: [M,P,D] image features in prompt order over the batch, possibly followed by padding; None without
            images.
        image_index: [B,T] int32, the row of each image token in `features` as [M*P,D], -1 for any other token; None
            without images.
    """

    input_ids: Array
    valid: Array
    features: Array | None = None
    image_index: Array | None = None

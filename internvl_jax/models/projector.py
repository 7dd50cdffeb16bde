"""From patch features to visual tokens: pixel unshuffle and the MLP projector."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from internvl_jax.config import ProjectorConfig
from internvl_jax.models.layers import Array, LayerNorm, Linear, gelu


def pixel_unshuffle(x: Array, ratio: int, version: str) -> Array:
    """Fold squares of ratio x ratio patches into channels: [M,h,w,D] -> [M,h/ratio,w/ratio,D*ratio*ratio].

    The reference code calls this pixel_shuffle. Its first release ("v1") left the two spatial axes of the result
    swapped, [M,w/ratio,h/ratio,...]; "v2" swaps them back. Both run on any checkpoint, but only one is right for it.

    Args:
        x: patch features [M,h,w,D].
        ratio: side of the squares, in patches.
        version: "v1" or "v2".

    Raises:
        ValueError: the grid is not a multiple of `ratio`.
    """
    images, height, width, features = x.shape
    if height % ratio or width % ratio:
        raise ValueError(f"a grid of {height} x {width} patches cannot be folded by {ratio}")
    x = x.reshape(images, height, width // ratio, features * ratio)
    x = x.transpose(0, 2, 1, 3).reshape(images, width // ratio, height // ratio, features * ratio * ratio)
    return x if version == "v1" else x.transpose(0, 2, 1, 3)


class Projector(nn.Module):
    """LayerNorm -> Linear -> exact GELU -> Linear (mlp1); LLaVA's has no norm. x [M,P,E] -> [M,P,D]."""

    config: ProjectorConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        x = x.astype(self.dtype)
        if cfg.layer_norm:
            x = LayerNorm(cfg.in_features, cfg.layer_norm_eps, name="norm")(x)
        shape = (cfg.in_features, cfg.out_features)
        x = gelu(Linear("MPE,ED->MPD", shape, ("features", "projector_mlp"), self.dtype, True, name="fc1")(x))
        square = (cfg.out_features, cfg.out_features)
        return Linear("MPD,DE->MPE", square, ("projector_mlp", "embed"), self.dtype, True, name="fc2")(x)

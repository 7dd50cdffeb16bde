"""The vision tower as a Flax module.

InternViT (Chen et al., "InternVL: Scaling up Vision Foundation Models", 2023), and CLIP's ViT (Radford et al., 2021) by
other settings of VisionConfig.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import VisionConfig
from internvl_jax.models.attention import attention
from internvl_jax.models.declare import declare
from internvl_jax.models.kv_cache import KeysValues
from internvl_jax.models.layers import (
    Array,
    LayerNorm,
    Linear,
    RMSNorm,
    gelu,
    quick_gelu,
)
from internvl_jax.models.stack import LayerStack, Remat
from internvl_jax.parallel.partitioning import BATCH, constrain, logical_spec

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
LAYER_SCALE_INIT = 0.1  # initializer_factor of the reference code


class Embeddings(nn.Module):
    """Patch and class embeddings with positions, normalized in CLIP. pixel_values [M,3,h,w] -> [M,1+P,D].

    Pixels beyond the last whole patch are ignored, as torch's strided convolution ignores them.
    """

    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array:
        cfg = self.config
        size = cfg.patch_size
        images, channels, height, width = pixel_values.shape
        rows, columns = height // size, width // size
        pixels = pixel_values[:, :, : rows * size, : columns * size].reshape(
            images, channels, rows, size, columns, size
        )
        patches = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(images, rows * columns, channels * size * size)
        features = (channels * size * size, cfg.hidden_size)
        patch_axes = ("patch", "embed_vector")
        x = Linear("MPE,ED->MPD", features, patch_axes, self.dtype, cfg.patch_bias, name="patch_embedding")(patches)

        normal = nn.initializers.normal(0.02)
        class_embedding = declare(self, "class_embedding", normal, (cfg.hidden_size,), ("embed_vector",))
        table_shape = (1 + cfg.grid**2, cfg.hidden_size)
        table = declare(self, "position_embedding", normal, table_shape, ("position", "embed_vector"))
        table = resize_positions(table, cfg.grid, rows, columns).astype(self.dtype)
        first = jnp.broadcast_to(class_embedding.astype(self.dtype), (images, 1, cfg.hidden_size))
        x = jnp.concatenate([first, x], axis=1) + table
        return LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, name="pre_layrnorm")(x) if cfg.embedding_norm else x


class Attention(nn.Module):
    """Full self-attention, in InternViT with q/k RMSNorm over all heads together. x [M,T,D] -> [M,T,D].

    Parameters may have more heads than the config: zero padding for a mesh. The norm still divides by the true width.

    Attributes:
        config: sizes and variants of the tower.
        dtype: of computation.
        axes: mesh axes over which images are sharded.
    """

    config: VisionConfig
    dtype: Any
    axes: tuple[str, ...] = BATCH

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        shape = (cfg.num_attention_heads, cfg.head_dim)
        head_axes = ("vision_heads", "head_dim")
        qkv_axes = ("vision_embed", "qkv", *head_axes)
        qkv = Linear("BTD,DCNH->BTCNH", (cfg.hidden_size, 3, *shape), qkv_axes, self.dtype, cfg.qkv_bias, name="qkv")(x)
        qkv = constrain(qkv, "images", None, None, *head_axes, image_axes=self.axes)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if cfg.qk_normalization:
            q = RMSNorm(shape, cfg.qk_norm_eps, head_axes, cfg.hidden_size, name="q_norm")(q)
            k = RMSNorm(shape, cfg.qk_norm_eps, head_axes, cfg.hidden_size, name="k_norm")(k)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        split = logical_spec("vision_heads", image_axes=self.axes)[0]
        y = attention(q, KeysValues(k, v), axes=self.axes, split=split)
        proj_axes = (*head_axes, "vision_embed")
        y = Linear("BTNH,NHD->BTD", (*shape, cfg.hidden_size), proj_axes, self.dtype, use_bias=True, name="proj")(y)
        return constrain(y, "residual_images", None, None, image_axes=self.axes)


class Mlp(nn.Module):
    """Linear -> GELU (CLIP: quick GELU) -> Linear. x [M,T,D] -> [M,T,D]."""

    config: VisionConfig
    dtype: Any
    axes: tuple[str, ...] = BATCH

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, hidden = self.config.hidden_size, self.config.intermediate_size
        axes = ("vision_embed", "vision_mlp")
        x = Linear("BTD,DF->BTF", (width, hidden), axes, self.dtype, True, self.axes, name="fc1")(x)
        x = constrain(x, "images", None, "vision_mlp", image_axes=self.axes)
        x = ACTIVATIONS[self.config.hidden_act](x)
        x = Linear("BTF,FD->BTD", (hidden, width), axes[::-1], self.dtype, True, self.axes, name="fc2")(x)
        return constrain(x, "residual_images", None, None, image_axes=self.axes)


class Block(nn.Module):
    """One layer: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)), or both unscaled. x [M,T,D] -> [M,T,D].

    keep [2,M] scales the two branches of each image (stochastic depth); None for no drop path.
    """

    config: VisionConfig
    dtype: Any
    axes: tuple[str, ...] = BATCH

    @nn.compact
    def __call__(self, x: Array, keep: Array | None = None) -> Array:
        cfg = self.config

        def norm(name: str) -> nn.Module:
            if cfg.norm_type == "rms_norm":
                return RMSNorm((cfg.hidden_size,), cfg.layer_norm_eps, name=name)
            return LayerNorm(cfg.hidden_size, cfg.layer_norm_eps, name=name)

        def add(x: Array, branch: Array, scale_name: str, index: int) -> Array:
            if cfg.layer_scale:
                init = nn.initializers.constant(LAYER_SCALE_INIT)
                scale = declare(self, scale_name, init, (cfg.hidden_size,), ("embed_vector",))
                branch = branch * scale.astype(self.dtype)
            if keep is not None:
                branch = branch * keep[index][:, None, None].astype(self.dtype)
            return x + branch

        x = add(x, Attention(cfg, self.dtype, self.axes, name="attn")(norm("norm1")(x)), "ls1", 0)
        return add(x, Mlp(cfg, self.dtype, self.axes, name="mlp")(norm("norm2")(x)), "ls2", 1)


class InternViT(nn.Module):
    """The vision tower. There is no final norm.

    Attributes:
        config: sizes and variants of the tower.
        dtype: of computation; parameters are cast where they are used.
        remat: what the backward pass recomputes of each layer.
        image_axes: mesh axes over which images are sharded. Unless "tensor" is one of them, it shards heads and mlp.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: Remat = False
    image_axes: tuple[str, ...] = BATCH

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config, self.dtype)
        make_block = partial(Block, self.config, self.dtype, self.image_axes)
        self.stack = LayerStack(make_block, self.config.num_hidden_layers, self.remat)
        nn.share_scope(self, self.stack)

    def __call__(self, pixel_values: Array, *, num_layers: int | None = None, collect: bool = False) -> Any:
        """Run the first `num_layers` layers, all by default.

        With an rng "drop_path" (training), each branch of each image is dropped at a rate that grows linearly with
        depth up to config.drop_path_rate.

        Args:
            pixel_values: normalized images [M,3,h,w] of at least one patch; positions are resized bicubically.
            num_layers: the number of layers that run.
            collect: also return `out`.

        Returns:
            Hidden states [M,1+P,D] in `dtype`, whose row 0 is the class token (the published pooled output); with
            `collect` also a dict with "hidden_states" [1+layers,M,1+P,D], where index 0 is the embeddings.

        Raises:
            ValueError: the parameters hold fewer layers.
        """
        axes = self.image_axes
        pixel_values = constrain(pixel_values.astype(self.dtype), "images", None, None, None, image_axes=axes)
        x = constrain(self.embeddings(pixel_values), "residual_images", None, None, image_axes=axes)
        keep = None
        if self.has_rng("drop_path"):
            keep = _drop_path_scales(self.make_rng("drop_path"), self.config, x.shape[0])

        def step(block: Callable[..., Array], x: Array, _: Any, keep: Array | None) -> tuple[Array, Array | None]:
            y = block(x, keep)
            return y, y if collect else None

        last, states = self.stack(step, x, num_layers=num_layers, per_layer=keep)
        if not collect:
            return last
        return last, {"hidden_states": x[None] if states is None else jnp.concatenate([x[None], states])}


def _drop_path_scales(key: Array, config: VisionConfig, images: int) -> Array:
    """Stochastic depth (Huang et al., 2016): 0 or 1/keep per layer, branch and image. -> [L,2,M]."""
    keep = 1.0 - jnp.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)[:, None, None]
    # Images are the leading axis, so that padding images at the end do not change the draws of the others.
    drawn = jax.random.uniform(key, (images, config.num_hidden_layers, 2)).transpose(1, 2, 0) < keep
    return drawn / keep


def resize_positions(table: Array, grid: int, rows: int, columns: int) -> Array:
    """Resize the position embeddings of patches to another grid, in float32.

    torch's bicubic (a = -0.75, half-pixel centers, clamped borders, no antialiasing), which the reference code runs on
    every call; at the native grid it is the identity. Training at another resolution resizes a tower with it once.

    Args:
        table: [1+grid*grid, D], with the class token's row, which stays.
        grid: patches per side of the table.
        rows: rows of the new grid.
        columns: columns of the new grid.

    Returns:
        [1+rows*columns, D].
    """
    if (rows, columns) == (grid, grid):
        return table
    patches = table[1:].astype(jnp.float32).reshape(grid, grid, -1)
    down, across = jnp.asarray(bicubic_matrix(grid, rows)), jnp.asarray(bicubic_matrix(grid, columns))
    resized = jnp.einsum("YI,XJ,IJD->YXD", down, across, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:1].astype(jnp.float32), resized.reshape(rows * columns, -1)])


@lru_cache(maxsize=64)
def bicubic_matrix(source: int, target: int) -> np.ndarray:
    """The [target, source] float32 matrix of torch's bicubic resampling (align_corners False, no antialiasing)."""
    a = -0.75
    matrix = np.zeros((target, source))
    for row in range(target):
        center = (row + 0.5) * source / target - 0.5
        first = math.floor(center) - 1
        for tap in range(first, first + 4):
            distance = abs(center - tap)
            if distance <= 1:
                weight = ((a + 2) * distance - (a + 3)) * distance**2 + 1
            else:
                weight = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix.astype(np.float32)

"""The vision tower as pure functions on parameters: InternViT (Chen et al., "InternVL: Scaling up Vision Foundation
Models", 2023), and CLIP's ViT (Radford et al., 2021), which is the same with other switches of VisionConfig."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import VisionConfig
from internvl_jax.models.attention import attention
from internvl_jax.models.declare import declare
from internvl_jax.models.layers import (
    Array,
    LayerNorm,
    Linear,
    Params,
    Remat,
    RMSNorm,
    gelu,
    init_stack,
    quick_gelu,
    run_layers,
)
from internvl_jax.parallel.partitioning import BATCH, constrain, logical_spec

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
LAYER_SCALE_INIT = 0.1  # the reference's initializer_factor


class Embeddings(nn.Module):
    """Patches and class token with their positions, normed if the config says so. pixel_values [M,3,h,w] -> [M,1+P,D].

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
    """Full self-attention, InternViT's with q/k RMSNorm over all heads together. x [M,T,D] -> [M,T,D].

    `heads` may exceed the config's by zero padding (sharding); the norm's divisor stays the true width.
    `axes` are the mesh axes along which the images lie.
    """

    config: VisionConfig
    heads: int
    dtype: Any
    axes: tuple[str, ...] = BATCH

    @nn.compact
    def __call__(self, x: Array) -> Array:
        cfg = self.config
        shape = (self.heads, cfg.head_dim)
        head_axes = ("vision_heads", "head_dim")
        qkv_axes = ("embed", "qkv", *head_axes)
        qkv = Linear("BTD,DCNH->BTCNH", (cfg.hidden_size, 3, *shape), qkv_axes, self.dtype, cfg.qkv_bias, name="qkv")(x)
        qkv = constrain(qkv, "images", None, None, *head_axes, image_axes=self.axes)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if cfg.qk_normalization:
            q = RMSNorm(shape, cfg.qk_norm_eps, head_axes, cfg.hidden_size, name="q_norm")(q)
            k = RMSNorm(shape, cfg.qk_norm_eps, head_axes, cfg.hidden_size, name="k_norm")(k)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        split = logical_spec("vision_heads", image_axes=self.axes)[0]
        y = attention(q, k, v, axes=self.axes, split=split)
        proj_axes = (*head_axes, "embed")
        y = Linear("BTNH,NHD->BTD", (*shape, cfg.hidden_size), proj_axes, self.dtype, use_bias=True, name="proj")(y)
        return constrain(y, "images", None, None, image_axes=self.axes)


class Mlp(nn.Module):
    """Linear -> GELU -> Linear. x [M,T,D] -> [M,T,D]."""

    config: VisionConfig
    dtype: Any
    axes: tuple[str, ...] = BATCH

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, hidden = self.config.hidden_size, self.config.intermediate_size
        x = Linear("BTD,DF->BTF", (width, hidden), ("embed", "vision_mlp"), self.dtype, True, self.axes, name="fc1")(x)
        x = constrain(x, "images", None, "vision_mlp", image_axes=self.axes)
        x = ACTIVATIONS[self.config.hidden_act](x)
        x = Linear("BTF,FD->BTD", (hidden, width), ("vision_mlp", "embed"), self.dtype, True, self.axes, name="fc2")(x)
        return constrain(x, "images", None, None, image_axes=self.axes)


class Block(nn.Module):
    """One layer: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)), or both unscaled. x [M,T,D] -> [M,T,D].

    keep [2,M] scales the two branches of each image (stochastic depth); None leaves them whole.
    """

    config: VisionConfig
    heads: int
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

        x = add(x, Attention(cfg, self.heads, self.dtype, self.axes, name="attn")(norm("norm1")(x)), "ls1", 0)
        return add(x, Mlp(cfg, self.dtype, self.axes, name="mlp")(norm("norm2")(x)), "ls2", 1)


def init_params(key: Array, config: VisionConfig) -> Params:
    """Random float32 parameters, layers stacked."""
    k_embeddings, k_layers = jax.random.split(key)
    pixels = jnp.zeros((1, config.num_channels, config.image_size, config.image_size))
    tokens = jnp.zeros((1, 2, config.hidden_size))
    block = Block(config, config.num_attention_heads, jnp.float32)
    return {
        "embeddings": Embeddings(config, jnp.float32).init(k_embeddings, pixels)["params"],
        "layers": init_stack(block, k_layers, config.num_hidden_layers, tokens),
    }


def forward(
    params: Params,
    config: VisionConfig,
    pixel_values: Array,
    *,
    num_layers: int | None = None,
    dtype: Any = jnp.float32,
    collect: bool = False,
    remat: Remat = False,
    drop_path_key: Array | None = None,
    image_axes: tuple[str, ...] = BATCH,
) -> tuple[Array, dict[str, Array]]:
    """Run the tower: the hidden state after `num_layers` layers (all by default). There is no final norm.

    pixel_values [M,3,h,w] float, normalised; any size of at least one patch (positions are resized bicubically).
    drop_path_key: training only; drops branches at config.drop_path_rate, linearly growing with depth.
    image_axes: mesh axes along which the images lie; without TENSOR among them, that axis splits heads and mlp.
    Returns x [M,1+P,D] in `dtype` (row 0 is the class token, the published pooled output) and `out`: with collect,
    "hidden_states" [1+layers,M,1+P,D], index 0 the embedding output.
    """
    layers = params["layers"]
    pixel_values = constrain(pixel_values.astype(dtype), "images", None, None, None, image_axes=image_axes)
    x = Embeddings(config, dtype).apply({"params": params["embeddings"]}, pixel_values)
    x = constrain(x, "images", None, None, image_axes=image_axes)
    stored = len(layers) if isinstance(layers, tuple) else layers["norm1"]["scale"].shape[0]
    num_layers = stored if num_layers is None else num_layers
    if num_layers > stored:
        raise ValueError(f"{num_layers} vision layers are asked for, the parameters hold {stored}")
    heads = (layers[0] if isinstance(layers, tuple) else layers)["attn"]["qkv"]["kernel"].shape[-2]
    block = Block(config, heads, dtype, image_axes)
    keep = None if drop_path_key is None else _drop_path_scales(drop_path_key, config, x.shape[0])

    def apply(x: Array, layer: Params, extra: tuple[Any, Array | None]) -> tuple[Array, Array | None]:
        y = block.apply({"params": layer}, x, extra[1])
        return y, y if collect else None

    last, states = run_layers(apply, layers, x, num_layers=num_layers, per_layer=keep, remat=remat)
    if not collect:
        return last, {}
    return last, {"hidden_states": x[None] if states is None else jnp.concatenate([x[None], states])}


def _drop_path_scales(key: Array, config: VisionConfig, images: int) -> Array:
    """Stochastic depth (Huang et al., 2016): 0 or 1/keep per layer, branch and image. -> [L,2,M]."""
    keep = 1.0 - jnp.linspace(0.0, config.drop_path_rate, config.num_hidden_layers)[:, None, None]
    # Images foremost: slots added at the end change nothing of what the others draw.
    drawn = jax.random.uniform(key, (images, config.num_hidden_layers, 2)).transpose(1, 2, 0) < keep
    return drawn / keep


def resize_positions(table: Array, grid: int, rows: int, columns: int) -> Array:
    """Resize the patch positions of a table to another grid, in float32; the class row stays.

    table [1+grid*grid, D] -> [1+rows*columns, D]. torch's bicubic (a = -0.75, half-pixel centres, clamped borders, no
    antialiasing), which the reference runs on every call; at the native grid it is the identity. Also how a tower is
    resized for good, from 224 to 448 pixels say.
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
        centre = (row + 0.5) * source / target - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            distance = abs(centre - tap)
            if distance <= 1:
                weight = ((a + 2) * distance - (a + 3)) * distance**2 + 1
            else:
                weight = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
            matrix[row, min(max(tap, 0), source - 1)] += weight
    return matrix.astype(np.float32)

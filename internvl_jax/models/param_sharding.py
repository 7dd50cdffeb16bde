"""Parameters on a mesh: PartitionSpecs and zero padding, derived from the logical axes that the modules declare.

Some true sizes divide no mesh: InternViT-6B's 25 heads, a vocabulary of any number. They are padded with zeros when
parameters are placed on a mesh (`pad_params`) and cropped when they leave it (`unpad_params`); a checkpoint never holds
padding. Zero heads are exact: their q, k and v are zero, their output meets zero rows of `proj`, and the q/k norm
divides by the true width. Their gradient is exactly zero too, so training leaves them zero.

kv heads fewer than the tensor axis (Qwen2.5-7B has 4, most others 8) are stored as they are, on every device, and each
device's part of keys, values and KV cache is the one head that its query heads read: the model repeats keys and values
after their projection. So a cache is not held several times, kernels run on each device's heads, and a gradient is the
sum over a head's copies by itself. The query heads of a kv head are padded to a multiple of its copies: 28 heads with 4
kv heads become 32 on 8 devices, 8 for each kv head, of which each device has 4. (Dropout on the input of an adapter of
o_proj then draws other masks than on a mesh without such padding.)

A quantized kernel (quantize.py) is two leaves under the kernel's name. Its scales are sharded as its integers, except
along axes that share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.config import ChatConfig
from internvl_jax.models.axes import LAYERS, axes_of
from internvl_jax.parallel.mesh import IMAGE_AXES, TENSOR, padded_heads
from internvl_jax.parallel.partitioning import GATHERED_AXES, axis_size, fit_spec, logical_spec, path_of

VOCABULARY_TILE = 128  # each device's part of the vocabulary is a multiple of this: whole tiles of a TPU's matrix unit


# Specs.


def param_specs(abstract: Any, *, vision: str = "tensor") -> Any:
    """The PartitionSpec of every parameter, and of every matrix of adapters, by its logical axes.

    Args:
        abstract: parameters or adapters, as anything that has shapes. Layers are stacked or a tuple of trees.
        vision: the vision mode, a key of IMAGE_AXES.

    Raises:
        ValueError: a parameter is not declared, or the vision mode is unknown.
    """
    if vision not in IMAGE_AXES:
        raise ValueError(f"vision mode {vision!r} is not one of {', '.join(IMAGE_AXES)}")

    def spec_of(keys: Sequence[Any], leaf: Any) -> P:
        names = _axis_names(keys, leaf)
        spec = logical_spec(*names, image_axes=IMAGE_AXES[vision])
        if vision == "gather":
            spec = P(*(("fsdp", TENSOR) if name in GATHERED_AXES else axes for name, axes in zip(names, spec)))
        return P(*(None if _is_scale(keys) and size == 1 else axes for axes, size in zip(spec, leaf.shape)))

    return jax.tree_util.tree_map_with_path(spec_of, abstract)


def param_shardings(abstract: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """A NamedSharding for every parameter of a tree whose shapes divide the mesh (see `pad_params`).

    Groups that share a scale and kv heads may be fewer than the devices along an axis: each device keeps all of them.
    So it does with a width of the tower that vision mode "gather" cannot split evenly.

    Raises:
        ValueError: a parameter is not declared, or its shape does not divide.
    """

    def shard(keys: Sequence[Any], leaf: Any, spec: P) -> NamedSharding:
        names = _axis_names(keys, leaf)
        gathered = vision == "gather" and not set(GATHERED_AXES).isdisjoint(names)
        if _is_scale(keys) or "kv_heads" in names or gathered:
            spec = fit_spec(spec, leaf.shape, mesh.shape)
        if not _divides(leaf.shape, spec, mesh):
            raise ValueError(f"{path_of(keys)} {list(leaf.shape)} does not divide as {spec} over {dict(mesh.shape)}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard, abstract, param_specs(abstract, vision=vision))


def storage_shardings(abstract: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """As `param_shardings`, for true shapes: where they do not divide, tensor moves to an axis that does.

    For reading and writing checkpoints, which hold no padding: each device still holds its share only.
    """

    def shard(leaf: Any, spec: P) -> NamedSharding:
        if _divides(leaf.shape, spec, mesh):
            return NamedSharding(mesh, spec)
        rest = [None if axis == TENSOR else axis for axis in spec]
        for index in range(len(leaf.shape)):
            axes = (TENSOR,) if rest[index] is None else (rest[index], TENSOR)
            moved = P(*rest[:index], axes, *rest[index + 1 :])
            # Not along the layers: the padding that follows would move whole layers between devices.
            if (index > 0 or len(leaf.shape) == 2) and _divides(leaf.shape, moved, mesh):
                return NamedSharding(mesh, moved)
        return NamedSharding(mesh, fit_spec(P(*rest), leaf.shape, mesh.shape))

    return jax.tree.map(shard, abstract, param_specs(abstract, vision=vision))


def adapter_shardings(adapters: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """A NamedSharding for every matrix of adapters (lora.py); an axis that does not divide is not sharded."""
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh.shape)),
        adapters,
        param_specs(adapters, vision=vision),
    )


def _axis_names(keys: Sequence[Any], leaf: Any) -> tuple[str, ...]:
    """The logical axes of a leaf; in a tuple of layers it has no layer axis."""
    names = axes_of(path_of(keys)).names
    per_layer = any(isinstance(key, jax.tree_util.SequenceKey) for key in keys)
    names = names[1:] if per_layer and names[0] == LAYERS else names
    if len(names) != len(leaf.shape):
        raise ValueError(f"{path_of(keys)} {list(leaf.shape)} does not have the axes {', '.join(names)}")
    return names


def _is_scale(keys: Sequence[Any]) -> bool:
    """Whether a path leads to the scales of a quantized kernel."""
    return keys[-1] == jax.tree_util.GetAttrKey("scale")


def _divides(shape: Sequence[int], spec: P, mesh: Mesh) -> bool:
    return all(size % axis_size(axis, mesh.shape) == 0 for size, axis in zip(shape, spec))


# Padding.


def resize_axes(params: Any, sizes: Mapping[str, int], *, blocks: Mapping[str, int] | None = None) -> Any:
    """Zero-pad or crop parameters, quantized ones and adapters too, along logical axes.

    Works on arrays, under jit and under jax.eval_shape.

    Args:
        params: parameters or adapters.
        sizes: the new size of each logical axis that changes.
        blocks: the number of equal blocks of an axis, each of which is padded or cropped at its end; 1 for others.
    """

    def fit(keys: Sequence[Any], leaf: Any) -> Any:
        for axis, name in enumerate(_axis_names(keys, leaf)):
            size = sizes.get(name, leaf.shape[axis])
            if leaf.shape[axis] != size and not (_is_scale(keys) and leaf.shape[axis] == 1):
                leaf = _resize(leaf, axis, size, (blocks or {}).get(name, 1))
        return leaf

    return jax.tree_util.tree_map_with_path(fit, params)


def _resize(leaf: Any, axis: int, size: int, blocks: int) -> Any:
    shape = leaf.shape
    if blocks > 1:
        leaf = leaf.reshape(*shape[:axis], blocks, -1, *shape[axis + 1 :])
        return _resize(leaf, axis + 1, size // blocks, 1).reshape(*shape[:axis], size, *shape[axis + 1 :])
    if shape[axis] > size:
        return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
    width = [(0, 0)] * leaf.ndim
    width[axis] = (0, size - shape[axis])
    return jnp.pad(leaf, width)


def pad_params(params: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Pad true shapes to shapes that divide the mesh: both towers' heads and the vocabulary.

    The model masks the logits of padded rows. Works on arrays, under jit and under jax.eval_shape.
    """
    tensor = mesh.shape[TENSOR]
    sizes = {}
    if config.vision is not None and vision == "tensor":
        sizes["vision_heads"] = -(-config.vision.num_attention_heads // tensor) * tensor
    if config.text is not None and tensor > 1:
        tile = tensor * VOCABULARY_TILE
        sizes["vocab"] = -(-config.text.vocab_size // tile) * tile
        sizes["heads"] = padded_heads(config.text, tensor)
    return resize_axes(params, sizes, blocks=_blocks(config))


def unpad_params(params: Any, config: ChatConfig) -> Any:
    """Crop shapes that divide a mesh to true shapes, for export."""
    sizes = {}
    if config.vision is not None:
        sizes["vision_heads"] = config.vision.num_attention_heads
    if config.text is not None:
        sizes["vocab"] = config.text.vocab_size
        sizes["heads"] = config.text.num_attention_heads
    return resize_axes(params, sizes, blocks=_blocks(config))


def _blocks(config: ChatConfig) -> dict[str, int]:
    return {} if config.text is None else {"heads": config.text.num_key_value_heads}


# Placement.


def place_params(params: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Pad parameters of true shapes, on any devices, and shard them over the mesh. The input arrays may be donated."""
    padded = jax.eval_shape(lambda tree: pad_params(tree, config, mesh, vision=vision), params)
    shardings = param_shardings(padded, mesh, vision=vision)
    params = jax.device_put(params, storage_shardings(params, mesh, vision=vision))
    leaves, structure = jax.tree.flatten(params)
    # Arrays that are padded cannot be donated; jax would warn about them, and warnings cannot be muted for one thread.
    stays = [
        leaf.shape == made.shape and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, made, sharding in zip(leaves, jax.tree.leaves(padded), jax.tree.leaves(shardings))
    ]

    def pad(kept: list[Any], growing: list[Any]) -> Any:
        either = iter(kept), iter(growing)
        tree = jax.tree.unflatten(structure, [next(either[0] if same else either[1]) for same in stays])
        return pad_params(tree, config, mesh, vision=vision)

    kept = [leaf for leaf, same in zip(leaves, stays) if same]
    growing = [leaf for leaf, same in zip(leaves, stays) if not same]
    return jax.jit(pad, out_shardings=shardings, donate_argnums=0)(kept, growing)


def place_adapters(adapters: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Pad adapters of true shapes and shard them over the mesh, beside the parameters of `place_params`."""

    def pad(tree: Any) -> Any:
        return pad_params(tree, config, mesh, vision=vision)

    shardings = adapter_shardings(jax.eval_shape(pad, adapters), mesh, vision=vision)
    return jax.jit(pad, out_shardings=shardings)(adapters)

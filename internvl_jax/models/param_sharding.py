"""Parameters on a mesh: PartitionSpecs and zero padding, derived from the logical axes that the modules declare.

Some true sizes divide no mesh: InternViT-6B's 25 heads, a vocabulary of any number. They are padded with zeros when
parameters are placed on a mesh (`pad_params`) and cropped when they leave it (`unpad_params`); a checkpoint never holds
padding. Zero heads are exact: their q, k and v are zero, their output meets zero rows of `proj`, and the q/k norm
divides by the true width. Their gradient is exactly zero too, so training leaves them zero.

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
from internvl_jax.parallel.mesh import IMAGE_AXES, TENSOR
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


def resize_axes(params: Any, sizes: Mapping[str, int]) -> Any:
    """Zero-pad or crop parameters, quantized ones and adapters too, along logical axes.

    Works on arrays, under jit and under jax.eval_shape.

    Args:
        params: parameters or adapters.
        sizes: the new size of each logical axis that changes.
    """

    def fit(keys: Sequence[Any], leaf: Any) -> Any:
        for axis, name in enumerate(_axis_names(keys, leaf)):
            size = sizes.get(name, leaf.shape[axis])
            if leaf.shape[axis] == size or (_is_scale(keys) and leaf.shape[axis] == 1):
                continue
            if leaf.shape[axis] > size:
                leaf = jax.lax.slice_in_dim(leaf, 0, size, axis=axis)
            else:
                width = [(0, 0)] * leaf.ndim
                width[axis] = (0, size - leaf.shape[axis])
                leaf = jnp.pad(leaf, width)
        return leaf

    return jax.tree_util.tree_map_with_path(fit, params)


def pad_params(params: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Pad true shapes to shapes that divide the mesh: the vision tower's heads and the vocabulary.

    The model masks the logits of padded rows. Works on arrays, under jit and under jax.eval_shape.
    """
    tensor = mesh.shape[TENSOR]
    sizes = {}
    if config.vision is not None and vision == "tensor":
        sizes["vision_heads"] = -(-config.vision.num_attention_heads // tensor) * tensor
    if config.text is not None and tensor > 1:
        tile = tensor * VOCABULARY_TILE
        sizes["vocab"] = -(-config.text.vocab_size // tile) * tile
    return resize_axes(params, sizes)


def unpad_params(params: Any, config: ChatConfig) -> Any:
    """Crop shapes that divide a mesh to true shapes, for export."""
    sizes = {}
    if config.vision is not None:
        sizes["vision_heads"] = config.vision.num_attention_heads
    if config.text is not None:
        sizes["vocab"] = config.text.vocab_size
    return resize_axes(params, sizes)


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

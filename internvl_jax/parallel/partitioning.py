"""Logical axes to mesh axes: one table, from which every PartitionSpec follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from internvl_jax.parallel.mesh import BATCH, TENSOR

# The mesh axes that each logical axis of a parameter or an activation is sharded over.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "images": BATCH,
    "tokens": TENSOR,  # of the residual stream, between the layers' parallel parts (Korthikanti et al., 2022)
    "layers": None,
    "embed": "fsdp",
    "embed_vector": None,  # the width of norms, biases, layer scales and small tables: replicated
    "vision_embed": "fsdp",
    "features": "fsdp",  # the input of the projector
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "vision_heads": TENSOR,
    "vision_mlp": TENSOR,
    "projector_mlp": TENSOR,
    "qkv": None,
    "patch": None,  # the pixels of a patch
    "position": None,
    "rank": None,  # of an adapter
}
VISION_AXES = ("vision_heads", "vision_mlp", "projector_mlp")  # sharded in vision mode "tensor" only
GATHERED_AXES = ("vision_embed", "features")  # in vision mode "gather" sharded over the tensor axis too, at rest


def logical_spec(*axes: str | None, image_axes: tuple[str, ...] = BATCH) -> P:
    """The PartitionSpec of an array whose axes have these logical names; None for an axis that is not sharded.

    "residual_images" is the images of the residual stream between the tower's parallel parts, as "tokens" is of the
    language model: over `image_axes` and the tensor axis, whole images on each device.

    Args:
        axes: keys of AXIS_RULES, "residual_images", or None.
        image_axes: the mesh axes over which images are sharded, a value of IMAGE_AXES.

    Raises:
        ValueError: there is no rule for an axis.
    """
    residual_axes = image_axes if TENSOR in image_axes else (*image_axes, TENSOR)
    rules = {**AXIS_RULES, "images": image_axes, "residual_images": residual_axes}
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no sharding rule for the logical axis {', '.join(unknown)}: add one to AXIS_RULES")
    if TENSOR in image_axes:
        rules |= dict.fromkeys(VISION_AXES)
    return P(*(None if axis is None else rules[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None, image_axes: tuple[str, ...] = BATCH) -> jax.Array:
    """Constrain an activation's sharding by the logical names of its axes.

    Mesh axes that do not divide it are left out. Without a mesh (jax.set_mesh), x is returned unchanged.

    Args:
        x: the activation.
        axes: as for `logical_spec`.
        image_axes: as for `logical_spec`.

    Returns:
        x with the constraint.
    """
    return constrain_to(x, logical_spec(*axes, image_axes=image_axes))


def constrain_to(x: jax.Array, spec: P) -> jax.Array:
    """Constrain an activation's sharding by a PartitionSpec.

    Mesh axes that do not divide it are left out, and inside jax.shard_map those that it maps over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = P(*(_without(axes, mesh.manual_axes) for axes in spec))
    return jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh.shape))


def _without(axes: str | tuple[str, ...] | None, removed: Sequence[str]) -> tuple[str, ...] | None:
    rest = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in removed)
    return rest or None


def axis_devices(axis: str) -> int:
    """The number of devices of the mesh in use that an axis of this logical name is sharded over; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else axis_size(AXIS_RULES[axis], mesh.shape)


def is_sharded(size: int, axis: str) -> bool:
    """Whether `constrain` shards an axis of this logical name and size over the mesh in use."""
    devices = axis_devices(axis)
    return devices > 1 and size % devices == 0


def fit_spec(spec: P, shape: tuple[int, ...], sizes: Any) -> P:
    """Leave out of a PartitionSpec the mesh axes that do not divide `shape`. sizes: devices per mesh axis.

    Of several mesh axes of one dimension, the first ones stay.
    """

    def fit(axes: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        while axes and size % axis_size(axes, sizes):
            axes = axes[:-1] if isinstance(axes, tuple) else None
        return axes or None

    return P(*(fit(axes, size) for size, axes in zip(shape, spec)))


def axis_size(axes: str | tuple[str, ...] | None, sizes: Any) -> int:
    """The number of devices along one entry of a PartitionSpec. sizes: devices per mesh axis."""
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def path_of(keys: Sequence[Any]) -> str:
    """The path of a parameter: names joined by "/", without the index of a layer in a tuple of layers.

    The integers and scales of a quantized kernel both have the path of the kernel.
    """
    names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(map(str, names))

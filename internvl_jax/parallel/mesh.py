"""Device meshes: the sizes that a model allows, and which process loads which rows of a batch.

A mesh always has three axes, so that every sharding rule applies to every mesh:
    data      rows of the batch; parameters are replicated
    fsdp      rows of the batch, and one axis of every large parameter, which is gathered where it is used
    tensor    heads, mlp hidden and vocabulary, and between them the tokens (or whole images) of the residual stream
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from internvl_jax.config import ChatConfig, TextConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes over which the rows of a batch are sharded
TENSOR = "tensor"

# The mesh axes over which each vision mode shards images. "tensor" splits the vision tower's heads and mlp over the
# tensor axis, as in the language model. In "data" and "gather" every device encodes images of its own; with "gather" it
# stores a share of the tower, which is gathered layer by layer (along fsdp, "data" does that too).
IMAGE_AXES = {"tensor": BATCH, "data": AXES, "gather": AXES}


class MeshError(ValueError):
    """The model, the batch or the devices do not fit the mesh; the message lists the legal choices."""


def parse_mesh(spec: str | Mapping[str, int]) -> dict[str, int]:
    """Parse mesh sizes.

    Args:
        spec: "data=2,tensor=8" or a mapping. Axes that are not named have size 1; one may be -1, for all other devices.

    Returns:
        The sizes of all three axes.

    Raises:
        MeshError: the text cannot be parsed, or an axis is unknown or has an illegal size.
    """
    if isinstance(spec, str):
        pairs = [part.split("=") for part in spec.replace(" ", "").split(",") if part]
        if not all(len(pair) == 2 and re.fullmatch(r"-?\d+", pair[1]) for pair in pairs):
            raise MeshError(f'mesh {spec!r} is not understood: write for example "data=2,tensor=8"')
        sizes = {name: int(size) for name, size in pairs}
        if len(sizes) < len(pairs):
            raise MeshError(f"mesh {spec!r} names an axis twice")
    else:
        sizes = dict(spec)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise MeshError(f"mesh {spec!r} has the axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh {spec!r}: sizes are positive, and one of them may be -1 for the remaining devices")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(
    spec: str | Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    config: ChatConfig | None = None,
) -> Mesh:
    """Create a mesh over the first devices that `spec` needs.

    Args:
        spec: sizes, as `parse_mesh` takes them. None: the largest tensor axis that the config (if given) and the number
            of devices allow; other devices go to data.
        devices: the devices; None: all.
        config: the model that will run on it.

    Returns:
        The mesh, with axes "data", "fsdp" and "tensor".

    Raises:
        MeshError: there are too few devices, or the config's sizes do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    if spec is None:
        tensor = max(legal_tensor_sizes(config, len(devices))) if config else len(devices)
        sizes = parse_mesh({"data": len(devices) // tensor, "tensor": tensor})
    else:
        sizes = parse_mesh(spec)
    if -1 in sizes.values():
        others = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: len(devices) // others if size == -1 else size for axis, size in sizes.items()}
    needed = math.prod(sizes.values())
    if not 1 <= needed <= len(devices):
        tensors = legal_tensor_sizes(config, len(devices)) if config else _divisors(len(devices))
        raise MeshError(
            f"the mesh {_named(sizes)} needs {needed or 'more'} devices, there are {len(devices)}: data * fsdp * "
            f"tensor must be at most {len(devices)}; legal tensor sizes are {_listed(tensors)}"
        )
    if config is not None:
        _check_sizes(config, sizes)
    types = (AxisType.Auto,) * len(AXES)
    ring = ring_order([getattr(device, "coords", ()) for device in devices[:needed]])
    if ring is not None and needed in sizes.values():
        return Mesh(np.array(devices)[ring].reshape(tuple(sizes.values())), AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=devices[:needed])
    except NotImplementedError:  # an axis is not a product of torus axes, which jax splits on v5e only
        split = create_device_mesh(tuple(sizes.values()), devices[:needed], allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)
    except AssertionError:  # jax needs a contiguous block of a TPU slice
        raise MeshError(
            f"the mesh {_named(sizes)} takes {needed} of the slice's {len(devices)} devices, and the first {needed} "
            f"form no block: use all {len(devices)}, or fewer that do (the powers of 2)"
        ) from None


def ring_order(coords: Sequence[Sequence[int]]) -> list[int] | None:
    """Order the chips of a rectangle so that each is a neighbor of the next, and the last of the first.

    An axis over all of them then needs one hop from each device to the next, which collectives that XLA runs in steps
    beside matrix products count on. jax's own order of 8 chips of v5e and v6e takes two hops in three places.

    Args:
        coords: the coordinates (x, y, z) of each chip.

    Returns:
        Indices into `coords`; None where the chips are no rectangle in the plane with a side of even length, or some
        are listed twice (two devices on one chip).
    """
    index = {tuple(place[:2]): number for number, place in enumerate(coords) if len(place) == 3 and place[2] == 0}
    columns, rows = (1 + max((place[axis] for place in index), default=0) for axis in (0, 1))
    if len(index) != len(coords) or columns * rows != len(coords) or min(columns, rows) < 2 or columns * rows % 2:
        return None
    flip = columns % 2 == 1  # up and down an even number of columns, the path ends beside the first row, its way back
    across, along = (rows, columns) if flip else (columns, rows)
    path = [(a, b) for a in range(across) for b in (range(1, along) if a % 2 == 0 else range(along - 1, 0, -1))]
    path = [(0, 0), *path, *((a, 0) for a in range(across - 1, 0, -1))]
    return [index[(b, a) if flip else (a, b)] for a, b in path]


def validate_mesh(config: ChatConfig, mesh: Mesh, batch: int | None = None) -> None:
    """Check, before anything is read or compiled, that a model and a batch divide over a mesh.

    Args:
        config: the model.
        mesh: the mesh.
        batch: the number of rows of a batch; None: not checked.

    Raises:
        MeshError: they do not; the message lists the legal choices.
    """
    if tuple(mesh.axis_names) != AXES:
        raise MeshError(f"the mesh has the axes {tuple(mesh.axis_names)}, not {AXES}: make it with make_mesh")
    _check_sizes(config, mesh.shape)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if batch is not None and batch % (data * fsdp):
        raise MeshError(
            f"a batch of {batch} rows does not divide over data={data} x fsdp={fsdp}: use a multiple of {data * fsdp} "
            f"rows, or data * fsdp one of {_listed(_divisors(batch))}"
        )


def _check_sizes(config: ChatConfig, mesh: Mapping[str, int]) -> None:
    devices = math.prod(mesh.values())
    for axis, sizes_of in (("tensor", _tensor_sizes), ("fsdp", _fsdp_sizes)):
        wrong = [f"{what} ({number})" for what, number in sizes_of(config).items() if number % mesh[axis]]
        if axis == "tensor" and config.text is not None and not heads_fit(config.text, mesh[axis]):
            wrong.insert(0, f"the language model's heads ({_heads(config.text)})")
        if wrong:
            legal = _legal_sizes(config, axis, devices)
            raise MeshError(
                f"{axis}={mesh[axis]} does not divide {', '.join(wrong)}; legal sizes of {axis} on {devices} devices "
                f"are {_listed(legal)}; other devices can go to the other axes"
            )


def _named(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def data_shards(mesh: Mesh) -> tuple[tuple[int, ...], dict[int, int]]:
    """Assign the rows of a batch to the processes that load them.

    The rows are split into equal parts over data and fsdp, in order. A shard is the parts of one process, or of several
    processes along tensor, which load the same rows. The parts of a shard need not be contiguous, because a mesh
    follows the TPU's interconnect, not its hosts.

    Returns:
        The shard of every part, and the shard of every process.

    Raises:
        MeshError: processes share some parts but not all, or hold different numbers of them.
    """
    held: dict[int, list[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for process in {device.process_index for device in devices}:
            held.setdefault(process, []).append(part)
    shards = sorted({tuple(parts) for parts in held.values()})
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if len({len(parts) for parts in shards}) > 1 or sum(map(len, shards)) != count:
        raise MeshError(
            f"the mesh {dict(mesh.shape)} shares out {count} parts of a batch to {len(held)} processes unevenly: "
            f"{'; '.join(f'process {process} has {parts}' for process, parts in sorted(held.items())[:8])}. Along data "
            "and fsdp each process needs parts of its own, as many as the others, or the same as others on tensor"
        )
    shard_of = {part: number for number, parts in enumerate(shards) for part in parts}
    return tuple(shard_of[part] for part in range(count)), {
        process: shard_of[parts[0]] for process, parts in held.items()
    }


def default_vision_mode(mesh: Mesh, images: int = 1) -> str:
    """The vision mode that is fastest for calls with `images` images, of those that need no room for the whole tower.

    "data" if the tensor axis has size 1. Else "gather" from two images per device on, whose computation hides the
    gathering of the weights; below, "tensor", which shares out single images too. (docs/tpu.md has the times.)
    """
    if mesh.shape[TENSOR] == 1:
        return "data"
    return "gather" if images >= 2 * mesh.size else "tensor"


def legal_tensor_sizes(config: ChatConfig, devices: int) -> list[int]:
    """The sizes of the tensor axis that divide both the model and the number of devices, ascending."""
    return [size for size in _legal_sizes(config, TENSOR, devices) if devices % size == 0]


def kv_copies(kv_heads: int, devices: int) -> int:
    """How often kv heads are repeated on a tensor axis, so that each device has whole ones; 1 where they divide."""
    return devices // kv_heads if devices % kv_heads == 0 else 1


def padded_heads(text: TextConfig, devices: int) -> int:
    """The number of query heads on a tensor axis: each kv head's group is padded to share it out among its copies."""
    kv_heads, copies = text.num_key_value_heads, kv_copies(text.num_key_value_heads, devices)
    return kv_heads * copies * -(-text.num_attention_heads // (kv_heads * copies))


def heads_fit(text: TextConfig, devices: int) -> bool:
    """Whether a tensor axis can share out the heads, with fewer zero heads than true ones."""
    heads = padded_heads(text, devices)
    return heads % devices == 0 and heads < 2 * text.num_attention_heads


def _heads(text: TextConfig) -> str:
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    return str(heads) if heads == kv_heads else f"{heads} with {kv_heads} kv heads"


def _legal_sizes(config: ChatConfig, axis: str, devices: int) -> list[int]:
    """The sizes of an axis, up to `devices`, that the model allows."""
    sizes = _tensor_sizes(config) if axis == TENSOR else _fsdp_sizes(config)
    legal = _divisors(math.gcd(*sizes.values())) if sizes else list(range(1, devices + 1))
    fits = config.text is None or axis != TENSOR
    return [n for n in legal if n <= devices and (fits or heads_fit(config.required_text, n))]


def _tensor_sizes(config: ChatConfig) -> dict[str, int]:
    """Sizes that the tensor axis must divide, besides heads (`heads_fit`). Vision heads and vocabulary are padded."""
    sizes = {}
    if config.vision is not None:
        sizes["the vision tower's intermediate_size"] = config.vision.intermediate_size
    if config.text is not None:
        sizes["the language model's intermediate_size"] = config.text.intermediate_size
    if config.projector is not None:
        sizes["the projector's width"] = config.projector.out_features
    return sizes


def _fsdp_sizes(config: ChatConfig) -> dict[str, int]:
    sizes = {}
    if config.vision is not None:
        sizes["the vision tower's hidden_size"] = config.vision.hidden_size
    if config.text is not None:
        sizes["the language model's hidden_size"] = config.text.hidden_size
    return sizes


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

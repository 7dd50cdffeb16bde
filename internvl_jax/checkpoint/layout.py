"""Which arrays a checkpoint consists of: names, shapes, chunk shapes, and the metadata by which Orbax reads them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from qwix import QArray

from internvl_jax.checkpoint.chunks import CheckpointError, check_path, inspect_array
from internvl_jax.models.axes import LAYERS, find_axes
from internvl_jax.parallel.partitioning import logical_spec
from internvl_jax.utils import files

Progress = Callable[[int, int, str], None]  # called as progress(done, total, what)

PARAMS = "params"
QVALUE = "qvalue"  # the integers of a quantized kernel; its scales are the leaf "scale" beside them

# The most chunks along an axis that a mesh axis splits: 8 is the largest tensor axis that V1-1 can use. Beyond 4
# devices along fsdp some bytes are read more than once; V1-1 has 15,000 files as it is.
PARTS = {"tensor": 8, "fsdp": 4}
SMALLEST_PART = 1 << 20  # bytes; smaller chunks cost more than they save, and a small model would be a thousand files


def is_converted(directory: str | Path) -> bool:
    """Whether `directory` holds parameters in this project's format."""
    return (Path(directory) / PARAMS / "_METADATA").is_file()


def is_stack(name: str) -> bool:
    """Whether the leaf called `name` has a leading axis of layers."""
    return f"/{LAYERS}/" in name


def array_directory(name: str) -> str:
    """The directory of a leaf's array inside PARAMS."""
    return name.replace("/", ".")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """Iterate over the leaves of a parameter tree with their names, "a/b/c", in jax's order.

    A quantized kernel is two leaves, "a/kernel/qvalue" and "a/kernel/scale", unless `is_leaf` keeps it whole.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def stored_leaves(directory: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """List a checkpoint's leaves, and check the size of every file.

    Args:
        directory: the checkpoint.

    Returns:
        Shape and dtype of each leaf, by name.

    Raises:
        CheckpointError: there are no parameters, or files are damaged, truncated or missing.
    """
    params = directory / PARAMS
    check_path(params)
    path = params / "_METADATA"
    try:
        keys = files.read_json(path)["tree_metadata"].values()
        names = ["/".join(part["key"] for part in entry["key_metadata"]) for entry in keys]
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} has no {PARAMS}/ written by this project: convert a checkpoint") from None
    except (files.TextError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); convert the checkpoint again") from None
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    problems: list[str] = []
    for name in names:
        shape, dtype, wrong = inspect_array(params / array_directory(name))
        problems += wrong
        found[name] = (shape, dtype)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{params} is damaged or incomplete; convert or download it again:\n  " + "\n  ".join(problems[:10]) + more
        )
    return found


def stored_tree(directory: str | Path) -> Any:
    """Read the shapes and dtypes of a checkpoint's parameters.

    Args:
        directory: the checkpoint.

    Returns:
        A tree of jax.ShapeDtypeStruct, with a QArray for each quantized kernel.

    Raises:
        CheckpointError: there are no parameters, or they are damaged.
    """
    return nest_leaves(stored_leaves(Path(directory)))


def nest_leaves(leaves: Mapping[str, tuple[tuple[int, ...], Any]]) -> Any:
    """Build the tree of jax.ShapeDtypeStruct that has these leaves (shape and dtype by name)."""
    tree: dict[str, Any] = {}
    for name, (shape, dtype) in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, dtype)

    def quantized(node: Any) -> bool:
        return isinstance(node, dict) and QVALUE in node

    return jax.tree.map(lambda node: QArray(**node) if quantized(node) else node, tree, is_leaf=quantized)


def check_shapes(directory: Path, wanted: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint has the leaves that are wanted. Fewer vision layers may be wanted than are stored.

    Args:
        directory: the checkpoint, for the message.
        wanted: anything with a shape, by name.
        stored: shapes by name.

    Raises:
        CheckpointError: lists all leaves that are missing or have another shape.
    """
    problems = [f"missing: {name} {list(leaf.shape)}" for name, leaf in wanted.items() if name not in stored]
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name].shape
        fewer = name.startswith("vision_model/layers/") and have[1:] == want[1:] and want[0] <= have[0]
        if have != want and not fewer:
            problems.append(f"misshapen: {name} is {list(have)}, config.json asks for {list(want)}")
    if problems:
        raise CheckpointError(
            f"{directory}: parameters and config.json do not belong together:\n  " + "\n  ".join(sorted(problems))
        )


def chunk_shape(name: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a leaf's chunks: one layer of a stack, in equal parts along the axes that a mesh splits.

    Args:
        name: the leaf's name, "a/b/c".
        shape: its shape.
        itemsize: bytes of an element.
    """
    chunk = list(shape)
    if is_stack(name):
        chunk[0] = 1
    for mesh_axis, limit in PARTS.items():
        axis = _split_axis(name, shape, mesh_axis)
        if axis is not None:
            most = min(limit, math.prod(chunk) * itemsize // SMALLEST_PART)
            chunk[axis] //= max((parts for parts in range(2, most + 1) if chunk[axis] % parts == 0), default=1)
    return tuple(chunk)


def _split_axis(name: str, shape: tuple[int, ...], mesh_axis: str) -> int | None:
    """The axis along which a mesh splits a leaf, as param_sharding.storage_shardings chooses it."""
    axes = find_axes(re.sub(rf"/kernel/({QVALUE}|scale)$", "/kernel", name))
    spec = () if axes is None else tuple(logical_spec(*axes.names))
    if axes is None or mesh_axis not in spec:
        return None
    axis = spec.index(mesh_axis)
    others = range(1 if LAYERS in axes.names else 0, len(shape))
    return next((other for other in (axis, *others) if shape[other] % PARTS[mesh_axis] == 0), axis)


def orbax_metadata(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The two JSON files by which Orbax recognizes a tree of arrays in this form, by file name."""
    tree = {}
    for name, leaf in leaves.items():
        keys = name.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dictionary's key
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(leaf.shape)},
        }
    now = time.time_ns()
    return {
        "_METADATA": {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        },
        "_CHECKPOINT_METADATA": {
            "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        },
    }

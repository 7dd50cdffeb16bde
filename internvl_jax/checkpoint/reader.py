"""Reading parameters: onto any devices, each process only what its devices hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from qwix import QArray

from internvl_jax.checkpoint.chunks import Bounds, CheckpointError, LeafFile, bounds_of, read_checksums
from internvl_jax.checkpoint.layout import (
    PARAMS,
    QVALUE,
    Progress,
    array_directory,
    check_shapes,
    named_leaves,
    stored_leaves,
)
from internvl_jax.parallel import distributed
from internvl_jax.quantize import is_quantized, quantize_while_reading


class Reader:
    """Reads parameters piece by piece.

    Attributes:
        leaves: shape and dtype of each leaf, by name.
    """

    def __init__(self, directory: str | Path):
        """Open a checkpoint. Raises CheckpointError as `load` does."""
        self.leaves = stored_leaves(Path(directory))
        self._files = _open_leaves(Path(directory), self.leaves)

    def read(self, name: str, index: Any = ()) -> np.ndarray:
        """Read a part of a leaf.

        Args:
            name: the leaf's name, "a/b/c".
            index: numpy's basic indexing.

        Raises:
            CheckpointError: a chunk is damaged or holds NaN or Inf.
        """
        file, parts = self._files[name], index if isinstance(index, tuple) else (index,)
        if parts and isinstance(parts[0], int):  # a layer of a stack is one chunk, or several
            layer = file.read(((parts[0], parts[0] + 1), *((0, size) for size in file.shape[1:])))[0]
            return np.ascontiguousarray(layer[parts[1:]])
        return np.ascontiguousarray(file.read(tuple((0, size) for size in file.shape))[parts])


def load(directory: str | Path, abstract: Any, *, progress: Progress | None = None) -> Any:
    """Load parameters, in any dtypes and onto any devices.

    Only what is needed is read. Leaves that `abstract` lacks are skipped. Where it has fewer vision layers
    (`select_layer`), the first ones are read. With shardings, each process reads what its own devices hold, once.
    Kernels that are quantized in `abstract` but not on disk are quantized here, one layer at a time. Where there are
    several processes, all of them call this.

    Args:
        directory: the checkpoint.
        abstract: a tree of jax.ShapeDtypeStruct: the shapes and dtypes that are wanted, and shardings or none.
        progress: called as progress(done_bytes, total_bytes, what), both of this process (see `bytes_read`).

    Returns:
        The tree of arrays.

    Raises:
        CheckpointError: files are missing or truncated; leaves are missing or have other shapes (all are listed); a
            chunk does not match its checksum, where it has one, or holds NaN or Inf.
    """
    directory = Path(directory)
    done, leaves = 0, []
    with distributed.barrier():
        stored = stored_leaves(directory)
        whole = None if any(name.endswith(f"/{QVALUE}") for name in stored) else is_quantized
        wanted = dict(named_leaves(abstract, is_leaf=whole))
        check_shapes(directory, wanted, {name: shape for name, (shape, _) in stored.items()})
        opened = _open_leaves(directory, wanted)
        sizes = {name: _bytes_to_read(opened[name], leaf) for name, leaf in wanted.items()}
        for name, leaf in wanted.items():
            leaves.append((_quantize_leaf if is_quantized(leaf) else _load_leaf)(opened[name], leaf))
            done += sizes[name]
            if progress is not None:
                progress(done, sum(sizes.values()), "loading")
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=whole), leaves)


def verify(directory: str | Path, *, progress: Progress | None = None) -> tuple[int, bool]:
    """Read a whole checkpoint and check it, as `load` checks what it reads. Memory is bounded by one chunk.

    Args:
        directory: the checkpoint.
        progress: called as progress(done_bytes, total_bytes, what).

    Returns:
        Bytes of the parameters, and whether they have checksums (those written by earlier versions have none).

    Raises:
        CheckpointError: lists the files that are missing, truncated or damaged, and the leaves that hold NaN or Inf.
    """
    directory = Path(directory)
    stored = stored_leaves(directory)
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())
    done, problems = 0, []
    for file in _open_leaves(directory, stored).values():
        for number in np.ndindex(*(-(-size // chunk) for size, chunk in zip(file.shape, file.chunk))):
            bounds = tuple((n * c, min(size, (n + 1) * c)) for n, c, size in zip(number, file.chunk, file.shape))
            try:
                done += file.read(bounds).nbytes
            except CheckpointError as error:
                problems.append(str(error))
            if progress is not None:
                progress(done, total, "verifying")
    if problems:
        raise CheckpointError(f"{directory} is damaged:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return total, read_checksums(directory / PARAMS) is not None


def bytes_read() -> int:
    """Bytes that this process has read from checkpoint files since it started, as TensorStore counts them."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def _open_leaves(directory: Path, names: Iterable[str]) -> dict[str, LeafFile]:
    """Open leaves for reading, with the checksums of their chunks where there are any."""
    checksums = read_checksums(directory / PARAMS)
    leaves = {}
    for name in names:
        known = None if checksums is None else checksums.get(array_directory(name))
        leaf = LeafFile(directory / PARAMS / array_directory(name), name, known)
        if checksums is not None:
            leaf.check_metadata()
        leaves[name] = leaf
    return leaves


def _load_leaf(file: LeafFile, leaf: Any, layer: int | None = None) -> jax.Array:
    """Read a leaf, or one layer of a stack, in the dtype and with the sharding of `leaf`."""
    values: dict[Bounds, np.ndarray] = {}  # devices that hold the same part share one read

    def read(index: tuple[slice, ...] | None = None) -> np.ndarray:
        bounds = bounds_of(index or (), leaf.shape)
        if bounds not in values:
            if layer is None:
                values[bounds] = file.read(bounds, leaf.dtype)
            else:
                values[bounds] = file.read(((layer, layer + 1), *bounds), leaf.dtype)[0]
        return values[bounds]

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(read())  # jnp.asarray would compile a program for every shape
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _quantize_leaf(file: LeafFile, leaf: QArray) -> QArray:
    def read(layer: int | None, sharding: Any) -> jax.Array:
        shape = file.shape if layer is None else file.shape[1:]
        return _load_leaf(file, jax.ShapeDtypeStruct(shape, file.dtype, sharding=sharding), layer)

    return quantize_while_reading(file.name, leaf, read)


def _bytes_to_read(file: LeafFile, leaf: Any) -> int:
    """Bytes of the chunks that hold this process's parts of a leaf. Chunks are always read whole."""
    sharding = getattr(leaf.qvalue if is_quantized(leaf) else leaf, "sharding", None)
    parts = [()] if sharding is None else sharding.addressable_devices_indices_map(leaf.shape).values()
    chunks = sum(
        math.prod(-(-stop // size) - start // size for (start, stop), size in zip(bounds, file.chunk))
        for bounds in {bounds_of(part, leaf.shape) for part in parts}
    )
    return chunks * math.prod(file.chunk) * file.dtype.itemsize

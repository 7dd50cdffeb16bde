"""Parameters on disk: one layout, written in chunks, that Orbax can restore on its own.

`DIRECTORY/params/` is an Orbax checkpoint of the parameter tree in its true shapes: a zarr array per leaf, beside
config.json and the tokenizer files. Orbax's own checkpointer holds a whole leaf several times while it saves (14 GB for
V1-1's largest stack of 5.7 GB, measured); here a leaf is written chunk by chunk through TensorStore, on which Orbax
stands, so that memory is bounded by one chunk. A chunk is one layer, split along the axes that a mesh splits,
and is not compressed: a device reads little more than its own part, and a truncated file shows by its size. Chunks have
checksums (leaf_files.py), which Orbax passes over.

Several processes read and write one directory together, on a file system that all of them see: each reads what its
devices hold and writes what no other process writes; process 0 makes the directory and gives it its name at the end.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from qwix import QArray

from internvl_jax.chunk_store import (
    Bounds,
    CheckpointError,
    LeafFile,
    array_metadata,
    bounds_of,
    check_place,
    not_finite,
    read_checksums,
    stored_array,
    write_checksums,
)
from internvl_jax.models.axes import LAYERS, find_axes
from internvl_jax.parallel import distributed
from internvl_jax.parallel.partitioning import logical_spec
from internvl_jax.quantize import is_quantized, quantize_while_reading
from internvl_jax.utils import files

Progress = Callable[[int, int, str], None]

PARAMS = "params"
QVALUE = "qvalue"  # the integers of a quantized kernel; their scales lie beside them
# Chunks along the axes that a mesh splits, at most: 8 is the largest tensor axis that V1-1 can use. Beyond 4 devices
# along fsdp some bytes are read more than once; V1-1 is 15,000 files as it is.
PARTS = {"tensor": 8, "fsdp": 4}
SMALLEST_PART = 1 << 20  # bytes; below, a read costs more than it saves, and a small model would be a thousand files


def is_converted(directory: str | Path) -> bool:
    """Whether `directory` holds parameters in this project's format."""
    return (Path(directory) / PARAMS / "_METADATA").is_file()


class Writer:
    """Write parameters piece by piece: `write` any part of any leaf, then `commit`.

    Nothing stands at `directory`/params before commit; used as a context manager, leaving without it removes the rest.
    Where there are several processes, all of them make a Writer and commit it, and each writes its own parts.
    """

    def __init__(self, directory: Path, abstract: Any):
        leaves = dict(named_leaves(abstract))
        self._pending: ts.WriteFutures | None = None
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(new_directory(directory / PARAMS))
        try:
            with distributed.process_0_first() as first:
                if first:
                    self._stores = {name: self._create(name, leaf) for name, leaf in leaves.items()}
                    for name, value in _orbax_metadata(leaves).items():
                        (self._temporary / name).write_text(json.dumps(value))
            with distributed.barrier():
                if not first:
                    self._stores = {name: LeafFile(self._temporary / _directory(name), name) for name in leaves}
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _create(self, name: str, leaf: Any) -> LeafFile:
        dtype = jnp.dtype(leaf.dtype)
        metadata = array_metadata(leaf.shape, chunk_shape(name, leaf.shape, dtype.itemsize), dtype)
        return LeafFile(self._temporary / _directory(name), name, create=True, metadata=metadata)

    def write(self, name: str, index: Any, values: np.ndarray) -> None:
        """Write `values` at `index` (numpy's basic indexing) of the leaf called `name`, "a/b/c"."""
        self._pending = self._stores[name].write(index, values)
        self._pending.result()

    def commit(self) -> None:
        """Everything is written: sum what is not summed yet and give the directory its name."""
        known = {_directory(name): leaf.checksums for name, leaf in self._stores.items()}
        everyones = [json.loads(message) for message in distributed.all_gather(json.dumps(known).encode())]
        with distributed.process_0_first() as first:
            if first:
                for name, leaf in self._stores.items():
                    for other in everyones:
                        leaf.checksums |= other[_directory(name)]
                write_checksums(self._temporary, {_directory(n): leaf.complete() for n, leaf in self._stores.items()})
        self._stack.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any = None, error: BaseException | None = None, trace: Any = None) -> None:
        if self._pending is not None:  # after an interrupt it would go on writing into what is removed here
            self._pending.exception()
        error = error or CheckpointError(f"{self._temporary} was left without commit")
        self._stack.__exit__(type(error), error, trace)


class Reader:
    """Read parameters piece by piece. Raises CheckpointError as `load` does."""

    def __init__(self, directory: str | Path):
        self.leaves = _stored(Path(directory))  # name -> (shape, dtype)
        self._stores = _open_leaves(Path(directory), self.leaves)

    def read(self, name: str, index: Any = ()) -> np.ndarray:
        """The part at `index` (numpy's basic indexing) of the leaf called `name`, "a/b/c"."""
        store, parts = self._stores[name], index if isinstance(index, tuple) else (index,)
        if parts and isinstance(parts[0], int):  # a layer of a stack is a chunk, or several
            layer = store.read(((parts[0], parts[0] + 1), *((0, size) for size in store.shape[1:])))[0]
            return np.ascontiguousarray(layer[parts[1:]])
        return np.ascontiguousarray(store.read(tuple((0, size) for size in store.shape))[parts])


def save(directory: str | Path, params: Any) -> None:
    """Write a tree of arrays to `directory`/params, in its own dtypes, whole or not at all.

    Arrays may lie over the devices of several processes, which then all call this.
    """
    with Writer(Path(directory), params) as writer:
        with distributed.barrier():
            for name, leaf in named_leaves(params):
                for index, values in _own_pieces(name, leaf):
                    writer.write(name, index, np.asarray(values))
        writer.commit()


def write_changed(
    directory: str | Path,
    base: str | Path,
    changed: Any,
    *,
    reshaped: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Write `base`, a converted checkpoint, to `directory` with the leaves of `changed` in the place of its own.

    Names, shapes, dtypes and the files beside the parameters stay base's, except for leaves named in `reshaped`, which
    may have another shape, and for `files`, texts by name. `changed` may hold fewer vision layers: the others are
    copied. Arrays may lie over the devices of several processes, which then all call this.
    Raises CheckpointError where `directory` exists, and for leaves that base does not have.
    """
    directory, base = Path(directory), Path(base)
    source = Reader(base)
    new = dict(named_leaves(changed))
    shapes = {name: new[name].shape if name in reshaped else shape for name, (shape, _) in source.leaves.items()}
    check_shapes(base, new, shapes)
    with _copied(directory, base, shapes, files or {}) as writer:
        with distributed.barrier():
            for name, leaf in new.items():
                dtype = source.leaves[name][1]
                for index, values in _own_pieces(name, leaf):
                    writer.write(name, index, np.asarray(values).astype(dtype))
            if distributed.is_process_0():
                for name, (shape, _) in source.leaves.items():
                    for layer in (
                        range(new[name].shape[0] if name in new else 0, shape[0]) if "/layers/" in name else ()
                    ):
                        writer.write(name, (layer,), source.read(name, (layer,)))
                    if "/layers/" not in name and name not in new:
                        writer.write(name, ..., source.read(name))


def write_mapped(
    directory: str | Path,
    base: str | Path,
    change: Callable[[str, int | None, np.ndarray], np.ndarray],
    *,
    progress: Progress | None = None,
) -> None:
    """Write `base`, a converted checkpoint, to `directory` with every piece passed through change(name, layer, values).

    A piece is one layer of a stack, or a whole leaf (layer None): memory is bounded by the largest. Shapes, dtypes and
    the files beside the parameters stay. For one process. Raises CheckpointError where `directory` exists.
    """
    directory, base = Path(directory), Path(base)
    source = Reader(base)
    pieces = [
        (name, layer)
        for name, (shape, _) in source.leaves.items()
        for layer in (range(shape[0]) if "/layers/" in name else (None,))
    ]
    with _copied(directory, base, {name: shape for name, (shape, _) in source.leaves.items()}, {}) as writer:
        for number, (name, layer) in enumerate(pieces, 1):
            index: Any = ... if layer is None else (layer,)
            values = source.read(name, index)
            changed = np.asarray(change(name, layer, values)).astype(values.dtype)
            if (found := not_finite(changed)) is not None:
                raise CheckpointError(f"{name} of {base} would become {found}: nothing is written")
            writer.write(name, index, changed)
            if progress is not None:
                progress(number, len(pieces), "writing")


@contextmanager
def _copied(
    directory: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, str]
) -> Iterator[Writer]:
    """The Writer of a directory that is to be as `base`, files beside the parameters included; whole at the end."""
    abstract = _nested({name: (shapes[name], dtype) for name, (_, dtype) in _stored(base).items()})
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    with new_directory(directory, needed) as temporary:
        with distributed.process_0_first() as first:
            if first:
                for path in base.iterdir():
                    if path.is_file() and path.name not in files:
                        shutil.copy(path, temporary)
                    elif (path / "config.json").is_file():  # LLaVA's vision tower: its small files
                        shutil.copytree(path, temporary / path.name)
                for name, text in files.items():
                    (temporary / name).write_text(text, encoding="utf-8")
        with Writer(temporary, abstract) as writer:
            yield writer
            writer.commit()


@contextmanager
def new_directory(destination: str | Path, needed: int | None = None) -> Iterator[Path]:
    """`files.new_directory` for all processes together: process 0 makes it, and gives it its name when all are done.

    Raises CheckpointError, on all processes, where destination exists or has too little room, and on those that do not
    see what process 0 made.
    """
    check_place(destination)
    with ExitStack() as stack:
        made = b""
        with distributed.process_0_first() as first:
            if first:
                context = files.new_directory(destination, needed, error=CheckpointError)
                made = os.fsencode(stack.enter_context(context))
        temporary = Path(os.fsdecode(distributed.broadcast_from_process_0(made)))
        with distributed.barrier():
            if not temporary.is_dir():
                raise CheckpointError(
                    f"{temporary} is on process 0 but not here: several processes write to a directory that all of "
                    "them see (a mounted bucket, NFS)"
                )
        yield temporary
        with distributed.process_0_first() as first:
            if first:
                stack.close()


def stored_tree(directory: str | Path) -> Any:
    """What `directory`/params holds, as a tree of jax.ShapeDtypeStruct, quantized kernels as such.

    Raises CheckpointError where it is damaged.
    """
    return _nested(_stored(Path(directory)))


def _nested(leaves: Mapping[str, tuple[tuple[int, ...], Any]]) -> Any:
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


def load(directory: str | Path, abstract: Any, *, progress: Progress | None = None) -> Any:
    """Read the leaves of `abstract`, a tree of jax.ShapeDtypeStruct, in its dtypes and onto its shardings.

    Only what is needed is read: leaves that `abstract` lacks are skipped, of the vision layers the first ones are read
    where it has fewer (select_layer), and with shardings each process reads what its own devices hold, once. Kernels
    that are quantized in `abstract` but not on disk are quantized here, a layer at a time.
    progress: called as progress(done_bytes, total_bytes, what), both of this process (see `bytes_read`).
    Raises CheckpointError for files that are missing or truncated, and for leaves of other names or shapes, all listed;
    and for a chunk that is not what was written (where it has a checksum) or holds numbers that are not finite.
    """
    directory = Path(directory)
    done, leaves = 0, []
    with distributed.barrier():
        stored = _stored(directory)
        whole = None if any(name.endswith(f"/{QVALUE}") for name in stored) else is_quantized
        wanted = dict(named_leaves(abstract, is_leaf=whole))
        check_shapes(directory, wanted, {name: shape for name, (shape, _) in stored.items()})
        stores = _open_leaves(directory, wanted)
        sizes = {name: _bytes_to_read(stores[name], leaf) for name, leaf in wanted.items()}
        for name, leaf in wanted.items():
            leaves.append((_quantize_leaf if is_quantized(leaf) else _load_leaf)(stores[name], leaf))
            done += sizes[name]
            if progress is not None:
                progress(done, sum(sizes.values()), "loading")
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=whole), leaves)


def verify(directory: str | Path, *, progress: Progress | None = None) -> tuple[int, bool]:
    """Read all of a converted checkpoint and check it, as `load` does what it reads. Memory is bounded by one chunk.

    Returns: bytes of the parameters, and whether they have checksums (those written by earlier versions have none).

    Raises:
        CheckpointError: lists the files that are missing, truncated or not what was written, and the leaves that hold
            numbers that are not finite.
    """
    directory = Path(directory)
    stored = _stored(directory)
    leaves = _open_leaves(directory, stored)
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())
    done, problems = 0, []
    for leaf in leaves.values():
        for number in np.ndindex(*(-(-size // chunk) for size, chunk in zip(leaf.shape, leaf.chunk))):
            bounds = tuple((n * c, min(size, (n + 1) * c)) for n, c, size in zip(number, leaf.chunk, leaf.shape))
            try:
                done += leaf.read(bounds).nbytes
            except CheckpointError as error:
                problems.append(str(error))
            if progress is not None:
                progress(done, total, "verifying")
    if problems:
        raise CheckpointError(f"{directory} is damaged:\n  " + "\n  ".join(dict.fromkeys(problems)))
    return total, read_checksums(directory / PARAMS) is not None


def bytes_read() -> int:
    """Bytes that this process has read from checkpoint files since it started, by TensorStore's own count."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def chunk_shape(name: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a leaf's chunks: one layer of a stack, in equal parts along the axes that a mesh splits."""
    chunk = list(shape)
    if "/layers/" in name:
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
    if mesh_axis not in spec:
        return None
    axis = spec.index(mesh_axis)
    others = range(1 if LAYERS in axes.names else 0, len(shape))
    return next((other for other in (axis, *others) if shape[other] % PARTS[mesh_axis] == 0), axis)


def _quantize_leaf(store: LeafFile, leaf: QArray) -> QArray:
    def read(layer: int | None, sharding: Any) -> jax.Array:
        shape = store.shape if layer is None else store.shape[1:]
        return _load_leaf(store, jax.ShapeDtypeStruct(shape, store.dtype, sharding=sharding), layer)

    return quantize_while_reading(store.name, leaf, read)


def _load_leaf(store: LeafFile, leaf: Any, layer: int | None = None) -> jax.Array:
    """A leaf, or one layer of a stack."""
    values: dict[Bounds, np.ndarray] = {}  # devices that hold the same part share one read

    def read(index: tuple[slice, ...] = ()) -> np.ndarray:
        bounds = bounds_of(index, leaf.shape)
        if bounds not in values:
            if layer is None:
                values[bounds] = store.read(bounds, leaf.dtype)
            else:
                values[bounds] = store.read(((layer, layer + 1), *bounds), leaf.dtype)[0]
        return values[bounds]

    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(read())  # jnp.asarray would compile a program for every shape
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _bytes_to_read(store: LeafFile, leaf: Any) -> int:
    """Bytes of the chunks that hold this process's parts of a leaf. A chunk is read as a whole."""
    sharding = getattr(leaf.qvalue if is_quantized(leaf) else leaf, "sharding", None)
    parts = [()] if sharding is None else sharding.addressable_devices_indices_map(leaf.shape).values()
    chunks = sum(
        math.prod(-(-stop // size) - start // size for (start, stop), size in zip(bounds, store.chunk))
        for bounds in {bounds_of(part, leaf.shape) for part in parts}
    )
    return chunks * math.prod(store.chunk) * store.dtype.itemsize


def check_shapes(directory: Path, wanted: dict[str, Any], stored: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where stored leaves are missing or misshapen; fewer vision layers may be wanted."""
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


def _stored(directory: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes by leaf, after a look at every file's size."""
    params = directory / PARAMS
    check_place(params)
    path = params / "_METADATA"
    try:
        keys = files.read_json(path)["tree_metadata"].values()
        names = ["/".join(part["key"] for part in entry["key_metadata"]) for entry in keys]
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} has no {PARAMS}/ written by this project: convert a checkpoint") from None
    except (files.TextError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); convert the checkpoint again") from None
    found, problems = {}, []
    for name in names:
        shape, dtype, wrong = stored_array(_leaf_path(directory, name))
        problems += wrong
        found[name] = (shape, dtype)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{params} is damaged or incomplete; convert or download it again:\n  " + "\n  ".join(problems[:10]) + more
        )
    return found


def _directory(name: str) -> str:
    return name.replace("/", ".")


def _leaf_path(directory: Path, name: str) -> Path:
    return directory / PARAMS / _directory(name)


def _open_leaves(directory: Path, names: Iterable[str]) -> dict[str, LeafFile]:
    """The leaves called `names`, to read, with the checksums of their chunks where they were written with them."""
    checksums = read_checksums(directory / PARAMS)
    leaves = {}
    for name in names:
        known = None if checksums is None else checksums.get(_directory(name))
        leaf = LeafFile(_leaf_path(directory, name), name, known)
        if checksums is not None:
            leaf.check_metadata()
        leaves[name] = leaf
    return leaves


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """The leaves of a parameter tree by their whole name, "a/b/c", in jax's order.

    A quantized kernel is two, "a/kernel/qvalue" and "a/kernel/scale", unless is_leaf takes it whole.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _own_pieces(name: str, leaf: Any) -> Iterator[tuple[Any, Any]]:
    """Indices and values that this process writes of a leaf: each once, a layer at a time where it is a stack."""
    parts: list[tuple[tuple[slice, ...], Any]] = [((), leaf)]
    if isinstance(leaf, jax.Array):
        parts = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    for index, values in parts:
        if "/layers/" in name:
            (first, last), *_ = bounds_of(index, leaf.shape)
            yield from (((layer, *index[1:]), values[layer - first]) for layer in range(first, last))
        else:
            yield (*index, ...), values


def _orbax_metadata(leaves: dict[str, Any]) -> dict[str, Any]:
    """The two files by which Orbax recognises a tree of arrays in the form that we write."""
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

"""Writing parameters: whole or not at all, by one process or by several together."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from internvl_jax.checkpoint.chunks import (
    CheckpointError,
    LeafFile,
    array_metadata,
    bounds_of,
    check_path,
    first_non_finite,
    write_checksums,
)
from internvl_jax.checkpoint.layout import (
    PARAMS,
    Progress,
    array_directory,
    check_shapes,
    chunk_shape,
    is_stack,
    named_leaves,
    nest_leaves,
    orbax_metadata,
    stored_leaves,
)
from internvl_jax.checkpoint.reader import Reader
from internvl_jax.parallel import distributed
from internvl_jax.utils import files


class Writer:
    """Writes parameters piece by piece: `write` any part of any leaf, then `commit`.

    `directory`/params appears when it is committed. As a context manager, a Writer that is left without `commit`
    removes what it wrote. Where there are several processes, all of them make a Writer and commit it, and each writes
    its own parts.
    """

    def __init__(self, directory: Path, abstract: Any):
        """Begin to write.

        Args:
            directory: the new checkpoint; it may exist, its PARAMS may not.
            abstract: the parameters, as anything with shapes and dtypes.

        Raises:
            CheckpointError: the parameters exist already.
        """
        leaves = dict(named_leaves(abstract))
        self._pending: ts.WriteFutures | None = None
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(new_directory(directory / PARAMS))
        try:
            with distributed.process_0_first() as first:
                if first:
                    self._files = {name: self._create(name, leaf) for name, leaf in leaves.items()}
                    for name, value in orbax_metadata(leaves).items():
                        (self._temporary / name).write_text(json.dumps(value))
            with distributed.barrier():
                if not first:
                    self._files = {name: LeafFile(self._temporary / array_directory(name), name) for name in leaves}
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _create(self, name: str, leaf: Any) -> LeafFile:
        dtype = jnp.dtype(leaf.dtype)
        metadata = array_metadata(leaf.shape, chunk_shape(name, leaf.shape, dtype.itemsize), dtype)
        return LeafFile(self._temporary / array_directory(name), name, create=True, metadata=metadata)

    def write(self, name: str, index: Any, values: np.ndarray) -> None:
        """Write a part of a leaf.

        Args:
            name: the leaf's name, "a/b/c".
            index: where `values` go, numpy's basic indexing.
            values: the part, of any shape with as many elements.
        """
        self._pending = self._files[name].write(index, values)
        self._pending.result()

    def commit(self) -> None:
        """Finish: compute the checksums that are still missing, and give the directory its name."""
        known = {array_directory(name): leaf.checksums for name, leaf in self._files.items()}
        everyones = [json.loads(message) for message in distributed.all_gather(json.dumps(known).encode())]
        with distributed.process_0_first() as first:
            if first:
                for name, leaf in self._files.items():
                    for other in everyones:
                        leaf.checksums |= other[array_directory(name)]
                sums = {array_directory(name): leaf.all_checksums() for name, leaf in self._files.items()}
                write_checksums(self._temporary, sums)
        self._stack.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any = None, error: BaseException | None = None, trace: Any = None) -> None:
        if self._pending is not None:  # after an interrupt it would still write into what is removed here
            self._pending.exception()
        error = error or CheckpointError(f"{self._temporary} was left without commit")
        self._stack.__exit__(type(error), error, trace)


def save(directory: str | Path, params: Any) -> None:
    """Write a tree of arrays to `directory`/params in its own dtypes, whole or not at all.

    Where arrays are sharded over the devices of several processes, all of them call this.

    Args:
        directory: the new checkpoint; it may exist, its PARAMS may not.
        params: a tree of arrays, in true shapes.

    Raises:
        CheckpointError: the parameters exist already, or the disk is full.
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
    """Copy a checkpoint with some of its leaves replaced. Where there are several processes, all of them call this.

    Names, shapes, dtypes and the files beside the parameters stay the same, except as `reshaped` and `files` say.

    Args:
        directory: the new checkpoint.
        base: the checkpoint that is copied.
        changed: the new leaves, a tree of arrays, which may be sharded. It may have fewer vision layers: the others
            are copied.
        reshaped: names of leaves that may have another shape than in `base`.
        files: texts of files beside the parameters that replace those of `base`, by name.

    Raises:
        CheckpointError: `directory` exists, or `base` does not have a leaf of `changed`.
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
                    if is_stack(name):
                        for layer in range(new[name].shape[0] if name in new else 0, shape[0]):
                            writer.write(name, (layer,), source.read(name, (layer,)))
                    elif name not in new:
                        writer.write(name, ..., source.read(name))


def write_mapped(
    directory: str | Path,
    base: str | Path,
    change: Callable[[str, int | None, np.ndarray], np.ndarray],
    *,
    progress: Progress | None = None,
) -> None:
    """Copy a checkpoint with a function applied to every piece: one layer of a stack, or a whole leaf.

    Memory is bounded by the largest piece. Shapes, dtypes and the files beside the parameters stay the same. For one
    process.

    Args:
        directory: the new checkpoint.
        base: the checkpoint that is copied.
        change: called as change(name, layer, values), with layer None for a whole leaf; returns the new values.
        progress: called as progress(done_pieces, total_pieces, what).

    Raises:
        CheckpointError: `directory` exists, `base` is damaged, or new values are NaN or Inf.
    """
    directory, base = Path(directory), Path(base)
    source = Reader(base)
    pieces: list[tuple[str, int | None]] = []
    for name, (shape, _) in source.leaves.items():
        pieces += [(name, layer) for layer in (range(shape[0]) if is_stack(name) else (None,))]
    with _copied(directory, base, {name: shape for name, (shape, _) in source.leaves.items()}, {}) as writer:
        for number, (name, layer) in enumerate(pieces, 1):
            index: Any = ... if layer is None else (layer,)
            values = source.read(name, index)
            changed = np.asarray(change(name, layer, values)).astype(values.dtype)
            if (found := first_non_finite(changed)) is not None:
                raise CheckpointError(f"{name} of {base} would become {found}: nothing is written")
            writer.write(name, index, changed)
            if progress is not None:
                progress(number, len(pieces), "writing")


@contextmanager
def _copied(
    directory: Path, base: Path, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, str]
) -> Iterator[Writer]:
    """A Writer for a copy of `base`; copies the files beside the parameters, and commits at the end."""
    abstract = nest_leaves({name: (shapes[name], dtype) for name, (_, dtype) in stored_leaves(base).items()})
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
    """`files.new_directory` for all processes together: process 0 creates it, and renames it when all are done.

    Args:
        destination: the final path.
        needed: bytes that will be written, to check that the disk has room.

    Yields:
        The temporary path to write to.

    Raises:
        CheckpointError: on all processes, where `destination` exists or has too little room; on those that do not see
            what process 0 created.
    """
    check_path(destination)
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


def _own_pieces(name: str, leaf: Any) -> Iterator[tuple[Any, Any]]:
    """Indices and values that this process writes of a leaf: each part once, one layer at a time of a stack."""
    parts: list[tuple[tuple[slice, ...], Any]] = [((), leaf)]
    if isinstance(leaf, jax.Array):
        parts = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    for index, values in parts:
        if is_stack(name):
            (first, last), *_ = bounds_of(index, leaf.shape)
            yield from (((layer, *index[1:]), values[layer - first]) for layer in range(first, last))
        else:
            yield (*index, ...), values

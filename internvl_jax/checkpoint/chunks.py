"""One leaf of a parameter tree on disk: a zarr array of uncompressed chunks, with a CRC-32 of each beside the arrays.

What is read is checked: chunks against their checksums (checkpoints of earlier versions have none and can be read), and
floats for NaN and Inf. zlib's CRC-32 releases the GIL, so several checksums are computed at once.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from internvl_jax.utils import files

Bounds = tuple[tuple[int, int], ...]  # (start, stop) along every axis

CHECKSUMS = "checksums.json"  # beside the arrays; Orbax ignores it
METADATA = ".zarray"
READS = 16  # concurrent reads of chunks
_OWN_TYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "int4"))  # zarr has no codes for them
_CONTEXT = ts.Context(
    {"file_io_concurrency": {"limit": READS}, "file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}}
)
# The exponent's bits of each dtype, which are all set in NaN and Inf.
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_BLOCK = 1 << 18  # elements; a block stays in the processor's cache


class CheckpointError(ValueError):
    """Parameters that are missing, damaged or of another model. The message says which, and what to do."""


def check_path(directory: str | Path) -> None:
    """Check that TensorStore can open a path.

    Raises:
        CheckpointError: TensorStore would take the path for another one.
    """
    path = str(files.resolve(directory))
    if "\\" in path:
        problem = "has a backslash in it, which TensorStore takes for a slash"
    elif any(part.endswith(".__lock") for part in Path(path).parts):
        problem = 'has a name that ends in ".__lock", which TensorStore keeps for itself'
    elif any("\ud800" <= letter <= "\udfff" for letter in path):
        problem = "has a name that is not UTF-8, which TensorStore cannot open"
    else:
        return
    raise CheckpointError(f"{path} {problem}: rename the directory")


def first_non_finite(values: np.ndarray) -> str | None:
    """The first value that is not finite, as "inf", "-inf" or "nan"; None if all are finite.

    About 4 GB/s on one core. numpy's isfinite takes ten times as long for bfloat16.
    """
    exponent = _EXPONENTS.get(values.dtype.name)
    if exponent is None:
        return None
    flat = values.reshape(-1)
    bits, mask = flat.view(f"u{flat.itemsize}"), np.dtype(f"u{flat.itemsize}").type(exponent)
    masked = np.empty(min(_BLOCK, bits.size), bits.dtype)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        found = np.bitwise_and(block, mask, out=masked[: block.size])
        if found.max() == mask:
            return str(float(flat[start + int(np.argmax(found == mask))]))
    return None


class LeafFile:
    """The array of one leaf on disk.

    Attributes:
        path: its directory.
        name: the leaf's name, "a/b/c", for messages.
        checksums: CRC-32 by file name, of chunks that were read from disk or written whole here.
        shape, dtype, chunk: shape and dtype of the array, and the shape of its chunks.
    """

    def __init__(self, path: Path, name: str, checksums: Mapping[str, int] | None = None, **options: Any):
        """Open an array.

        Args:
            path: its directory.
            name: the leaf's name.
            checksums: known checksums of its files.
            options: TensorStore's, to create a new array.
        """
        self.path, self.name = files.resolve(path), name
        self.checksums: dict[str, int] = dict(checksums or {})
        self.store = open_array(self.path, **options)
        self.shape, self.dtype = tuple(self.store.shape), self.store.dtype.numpy_dtype
        chunk: Any = self.store.chunk_layout.read_chunk.shape or ()
        self.chunk: tuple[int, ...] = tuple(chunk)

    def write(self, index: Any, values: np.ndarray) -> ts.WriteFutures:
        """Begin to write values, and meanwhile compute the checksums of the chunks that they fill.

        Args:
            index: where they go, numpy's basic indexing.
            values: of any shape with as many elements.

        Returns:
            A future, done when the values are on disk.
        """
        values = np.asarray(values)
        bounds = _basic_bounds(index, self.shape)
        future = self.store[_slices(bounds)].write(shaped := values.reshape([stop - start for start, stop in bounds]))
        if values.dtype == self.dtype and values.dtype.name != "int4":
            for number, where in self._chunks(bounds):
                self.checksums[number] = _checksum(shaped[where])
        return future

    def read(self, bounds: Bounds, dtype: Any = None) -> np.ndarray:
        """Read a part of the array. Chunks are always read whole, so that their checksums can be checked.

        Args:
            bounds: the part.
            dtype: dtype of the result; None for that on disk.

        Raises:
            CheckpointError: a chunk does not match its checksum, or the part holds NaN or Inf.
        """
        whole = tuple(
            (start - start % chunk, min(size, -(-stop // chunk) * chunk))
            for (start, stop), chunk, size in zip(bounds, self.chunk, self.shape)
        )
        values = self.store[_slices(whole)].read().result()
        if self.checksums:
            self._verify(values, whole)
        if whole != bounds:
            offsets = [start for start, _ in whole]
            part = tuple(slice(start - at, stop - at) for (start, stop), at in zip(bounds, offsets))
            values = np.ascontiguousarray(values[part])
        values = values if dtype is None else values.astype(dtype, copy=False)
        if (found := first_non_finite(values)) is not None:
            raise CheckpointError(
                f"{self.path}: {self.name} holds numbers that are not finite ({found}), so the model cannot "
                "answer. Its training diverged, or its conversion overflowed; take another copy or an earlier step"
            )
        return values

    def _verify(self, values: np.ndarray, bounds: Bounds) -> None:
        chunks = list(self._chunks(bounds))

        def check(chunk: tuple[str, tuple[slice, ...]]) -> str | None:
            number, where = chunk
            return None if self._chunk_checksum(number, values[where]) == self.checksums.get(number) else number

        if len(chunks) == 1:
            wrong = [check(chunks[0])]
        else:
            with ThreadPoolExecutor(min(READS, os.cpu_count() or 1)) as pool:
                wrong = list(pool.map(check, chunks))
        damaged = [str(self.path / number) for number in wrong if number is not None]
        if damaged:
            raise CheckpointError(
                f"{', '.join(damaged[:3])} {'is' if len(damaged) == 1 else 'are'} damaged: the checksum does not "
                "match; convert or download the checkpoint again"
            )

    def _chunk_checksum(self, number: str, values: np.ndarray) -> int:
        # int4 has another form in memory than in the file.
        return _checksum(values) if self.dtype.name != "int4" else zlib.crc32((self.path / number).read_bytes())

    def _chunks(self, bounds: Bounds) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """The chunks that are wholly inside `bounds`: the name of each one's file, and its slices within them."""
        ranges = [
            range(-(-start // chunk), stop // chunk if stop < size else -(-stop // chunk))
            for (start, stop), chunk, size in zip(bounds, self.chunk, self.shape)
        ]
        starts = [start for start, _ in bounds]
        for number in np.ndindex(*(max(0, len(found)) for found in ranges)):
            at = [found[position] for found, position in zip(ranges, number)]
            where = tuple(
                slice(a * chunk - start, (a + 1) * chunk - start) for a, chunk, start in zip(at, self.chunk, starts)
            )
            yield chunk_name(at), where

    def check_metadata(self) -> None:
        """Check that all checksums are known, and that the array's metadata match theirs.

        Raises:
            CheckpointError: they do not.
        """
        absent = [number for number in (METADATA, *self.chunk_names()) if number not in self.checksums]
        if absent:
            raise CheckpointError(
                f"{self.path.parent / CHECKSUMS} is damaged: it lacks {self.path.name}/{absent[0]}; convert or "
                "download the checkpoint again, or remove that file alone to read the parameters unchecked"
            )
        if zlib.crc32((self.path / METADATA).read_bytes()) != self.checksums[METADATA]:
            raise CheckpointError(f"{self.path / METADATA} is damaged; convert or download the checkpoint again")

    def chunk_names(self) -> list[str]:
        """The names of all chunks' files."""
        return [name for name, _ in self._chunks(tuple((0, size) for size in self.shape))]

    def all_checksums(self) -> dict[str, int]:
        """Return the checksums of all files, computing those that are not known yet. Call it after the last write."""
        for number in (METADATA, *self.chunk_names()):
            if number not in self.checksums:
                self.checksums[number] = zlib.crc32((self.path / number).read_bytes())
        return self.checksums


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def chunk_name(number: Any) -> str:
    """The file name of the chunk at an index into the grid of chunks."""
    return ".".join(map(str, number)) or "0"


def read_checksums(params: Path) -> dict[str, dict[str, int]] | None:
    """Read the checksums of a checkpoint's parameters.

    Args:
        params: the directory of the arrays.

    Returns:
        CRC-32 by leaf's directory and file name; None if the checkpoint has no checksums.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = params / CHECKSUMS
    try:
        found = files.read_json(path)["crc32"]
        if not all(isinstance(crc, int) for leaf in found.values() for crc in leaf.values()):
            raise TypeError("a checksum is not a number")
    except FileNotFoundError:
        return None
    except (files.TextError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); convert or download the checkpoint again, or remove that file alone to read "
            "the parameters unchecked"
        ) from None
    return found


def write_checksums(params: Path, checksums: Mapping[str, Mapping[str, int]]) -> None:
    """Write the file that `read_checksums` reads."""
    (params / CHECKSUMS).write_text(json.dumps({"crc32": checksums}), encoding="utf-8")


def array_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """zarr's metadata of a new array with chunks of shape `chunk`."""
    dtype = jnp.dtype(dtype)
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk),
        "dtype": dtype.name if dtype in _OWN_TYPES else dtype.str,
        "compressor": None,
        "dimension_separator": ".",
        "fill_value": None,
        "filters": None,
        "order": "C",
    }


def inspect_array(path: Path) -> tuple[tuple[int, ...], np.dtype, list[str]]:
    """Read an array's metadata, and check the size of every chunk's file.

    Args:
        path: the array's directory.

    Returns:
        Its shape, its dtype, and a list of problems.

    Raises:
        OSError: a file cannot be read. This is no sign of damage, unlike a file that is missing.
    """
    try:
        array = files.read_json(path / METADATA)
        shape, chunks, dtype = tuple(array["shape"]), array["chunks"], jnp.dtype(array["dtype"])
        if min((*shape, *chunks), default=1) < 1:
            raise ValueError(f"shape {shape}, chunks {chunks}")
        grid = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
        expected = math.prod(chunks) * dtype.itemsize
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(path)}
    except (FileNotFoundError, NotADirectoryError) as error:
        return (), np.dtype(float), [f"{path / METADATA}: {error.strerror}"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        return (), np.dtype(float), [f"{path / METADATA}: {error}"]
    if math.prod(grid) > len(sizes):  # at least one is missing; a damaged shape must not make this run forever
        missing = next(name for number in np.ndindex(*grid) if (name := chunk_name(number)) not in sizes)
        return shape, dtype, [f"{path / missing}: no bytes, expected {expected}"]
    problems = [
        f"{path / name}: {sizes.get(name, 'no')} bytes, expected {expected}"
        for name in map(chunk_name, np.ndindex(*grid))
        if sizes.get(name) != expected
    ]
    return shape, dtype, problems


def open_array(path: Path, **options: Any) -> ts.TensorStore:
    """Open TensorStore's array at an absolute path, for reading and writing."""
    check_path(path)
    spec: dict[str, Any] = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=_CONTEXT, open=True, **options).result()


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Turn slices without steps into bounds along every axis of `shape`."""
    given = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    return given + tuple((0, size) for size in shape[len(given) :])


def _basic_bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    """Turn numpy's basic indexing without steps into bounds."""
    parts = index if isinstance(index, tuple) else (index,)
    at = next((number for number, part in enumerate(parts) if part is ...), len(parts))
    before, after = parts[:at], parts[at + 1 :]
    every = (*before, *[slice(None)] * (len(shape) - len(before) - len(after)), *after)
    return tuple(
        part.indices(size)[:2] if isinstance(part, slice) else (int(part), int(part) + 1)
        for part, size in zip(every, shape, strict=True)
    )


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in bounds)

"""One leaf of a parameter tree on disk: a zarr array of uncompressed chunks, each with a CRC-32 beside the arrays.

What is read is checked: a chunk against its checksum, where there is one (checkpoints written before there were any are
read as they are), and floats for being finite. zlib's CRC-32 lets other threads run: several chunks are summed at once.
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

CHECKSUMS = "checksums.json"  # beside the arrays; Orbax passes it over
METADATA = ".zarray"
READS = 16  # chunk reads under way at once
_OWN_TYPES = tuple(jnp.dtype(name) for name in ("bfloat16", "int4"))  # which zarr has no codes for
_CONTEXT = ts.Context(
    {"file_io_concurrency": {"limit": READS}, "file_io_sync": False, "cache_pool": {"total_bytes_limit": 0}}
)
# The exponent's bits, all of which are set in an infinity and in what is no number; and the integers to look at them.
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_BLOCK = 1 << 18  # numbers: a block stays in the processor's cache


class CheckpointError(ValueError):
    """A parameter directory that is missing, damaged or of another model; the message says which and what to do."""


def check_place(directory: str | Path) -> None:
    """Raise CheckpointError where TensorStore would take the path of a directory for another one."""
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


def not_finite(values: np.ndarray) -> str | None:
    """What stands in the first number that is infinite or none, "inf", "-inf" or "nan"; None where all are finite.

    About 4 GB/s on one core: numpy's isfinite takes ten times as long for bfloat16.
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
    """An open array. `checksums` has those of the chunks that were written whole here, or that were read from disk."""

    def __init__(self, path: Path, name: str, checksums: Mapping[str, int] | None = None, **options: Any):
        """Open the array at `path`, a leaf called `name`; options: TensorStore's, to make a new one."""
        self.path, self.name = files.resolve(path), name
        self.checksums: dict[str, int] = dict(checksums or {})
        self.store = open_array(self.path, **options)
        self.shape, self.dtype = tuple(self.store.shape), self.store.dtype.numpy_dtype
        self.chunk = tuple(self.store.chunk_layout.read_chunk.shape or ())

    def write(self, index: Any, values: np.ndarray) -> ts.WriteFutures:
        """Write `values` at `index` (numpy's basic indexing), and sum the chunks that this fills meanwhile."""
        values = np.asarray(values)
        bounds = _bounds_of(index, self.shape)
        future = self.store[_slices(bounds)].write(shaped := values.reshape([stop - start for start, stop in bounds]))
        if values.dtype == self.dtype and values.dtype.name != "int4":
            for number, where in self._chunks(bounds):
                self.checksums[number] = _checksum(shaped[where])
        return future

    def read(self, bounds: Bounds, dtype: Any = None) -> np.ndarray:
        """A part of the array, cast to `dtype`. Whole chunks are read, as the file system would anyway, and checked.

        Raises CheckpointError naming the chunk that is not what was written, or the leaf that holds inf or nan.
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
        if (found := not_finite(values)) is not None:
            raise CheckpointError(
                f"{self.path}: {self.name} holds numbers that are not finite ({found}): no answer comes of it. Its "
                "training diverged, or the conversion that made it overflowed; take another copy or an earlier step"
            )
        return values

    def _verify(self, values: np.ndarray, bounds: Bounds) -> None:
        chunks = list(self._chunks(bounds))

        def check(chunk: tuple[str, tuple[slice, ...]]) -> str | None:
            number, where = chunk
            return None if self._sum(number, values[where]) == self.checksums.get(number) else number

        if len(chunks) == 1:
            wrong = [check(chunks[0])]
        else:
            with ThreadPoolExecutor(min(READS, os.cpu_count() or 1)) as pool:
                wrong = list(pool.map(check, chunks))
        damaged = [str(self.path / number) for number in wrong if number is not None]
        if damaged:
            raise CheckpointError(
                f"{', '.join(damaged[:3])} {'is' if len(damaged) == 1 else 'are'} damaged: the checksum is not that of "
                "what was written; convert or download the checkpoint again"
            )

    def _sum(self, number: str, values: np.ndarray) -> int:
        # How an int4 lies in memory is not how it lies in the file.
        return _checksum(values) if self.dtype.name != "int4" else zlib.crc32((self.path / number).read_bytes())

    def _chunks(self, bounds: Bounds) -> Iterator[tuple[str, tuple[slice, ...]]]:
        """The chunks that lie wholly in `bounds`: the name of each one's file, and its place in them."""
        ranges = [
            range(-(-start // chunk), stop // chunk if stop < size else -(-stop // chunk))
            for (start, stop), chunk, size in zip(bounds, self.chunk, self.shape)
        ]
        starts = [start for start, _ in bounds]
        for number in np.ndindex(*(max(0, len(found)) for found in ranges)):
            at = [found[position] for found, position in zip(ranges, number)]
            place = tuple(
                slice(a * chunk - start, (a + 1) * chunk - start) for a, chunk, start in zip(at, self.chunk, starts)
            )
            yield chunk_name(at), place

    def check_metadata(self) -> None:
        """Raise CheckpointError where the metadata are not those that were written, or a checksum is missing."""
        absent = [number for number in (METADATA, *self.numbers()) if number not in self.checksums]
        if absent:
            raise CheckpointError(
                f"{self.path.parent / CHECKSUMS} is damaged: it lacks {self.path.name}/{absent[0]}; convert or "
                "download the checkpoint again, or remove that file alone to read the parameters unchecked"
            )
        if zlib.crc32((self.path / METADATA).read_bytes()) != self.checksums[METADATA]:
            raise CheckpointError(f"{self.path / METADATA} is damaged; convert or download the checkpoint again")

    def numbers(self) -> list[str]:
        """The names of all chunks' files."""
        return [name for name, _ in self._chunks(tuple((0, size) for size in self.shape))]

    def complete(self) -> dict[str, int]:
        """The checksums of all files: those that are not known yet are read. After the last write."""
        for number in (METADATA, *self.numbers()):
            if number not in self.checksums:
                self.checksums[number] = zlib.crc32((self.path / number).read_bytes())
        return self.checksums


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def chunk_name(number: Any) -> str:
    """The file of the chunk at a place in the grid of chunks."""
    return ".".join(map(str, number)) or "0"


def read_checksums(params: Path) -> dict[str, dict[str, int]] | None:
    """CRC-32 by directory of a leaf and name of a file; None where the parameters were written without."""
    path = params / CHECKSUMS
    try:
        found = files.read_json(path)["crc32"]
        if not all(isinstance(crc, int) for leaf in found.values() for crc in leaf.values()):
            raise TypeError("a checksum is no number")
    except FileNotFoundError:
        return None
    except (files.TextError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); convert or download the checkpoint again, or remove that file alone to read "
            "the parameters unchecked"
        ) from None
    return found


def write_checksums(params: Path, checksums: Mapping[str, Mapping[str, int]]) -> None:
    """Write what `read_checksums` reads."""
    (params / CHECKSUMS).write_text(json.dumps({"crc32": checksums}), encoding="utf-8")


def array_metadata(shape: tuple[int, ...], chunk: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """zarr's metadata of a new array."""
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


def stored_array(path: Path) -> tuple[tuple[int, ...], np.dtype, list[str]]:
    """Shape, dtype and problems of the array at `path`, after a look at the size of every chunk's file.

    An error of the system other than a file's absence is raised as it is: it says nothing about the files.
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
    if math.prod(grid) > len(sizes):  # at least one is missing; a damaged shape must not make this run for ever
        missing = next(name for number in np.ndindex(*grid) if (name := chunk_name(number)) not in sizes)
        return shape, dtype, [f"{path / missing}: no bytes, expected {expected}"]
    problems = [
        f"{path / name}: {sizes.get(name, 'no')} bytes, expected {expected}"
        for name in map(chunk_name, np.ndindex(*grid))
        if sizes.get(name) != expected
    ]
    return shape, dtype, problems


def open_array(path: Path, **options: Any) -> ts.TensorStore:
    """TensorStore's array at an absolute path, for reading and writing."""
    check_place(path)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=_CONTEXT, open=True, **options).result()


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """(start, stop) along every axis. The leaf may have fewer layers than the file: its own shape decides."""
    given = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
    return given + tuple((0, size) for size in shape[len(given) :])


def _bounds_of(index: Any, shape: tuple[int, ...]) -> Bounds:
    """The bounds of numpy's basic indexing without steps."""
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

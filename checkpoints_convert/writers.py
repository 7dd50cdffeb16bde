"""Shard files of the published forms: the layout is written first, then the tensors, one at a time.

torch.save and safetensors need a whole shard in memory, 10 GB in the published layout; writing at offsets does not. A
tensor that is never written reads as zeros and takes no disk space where the file system has sparse files.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoints_convert.readers import PICKLES, SAFETENSORS

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # key -> shape and dtype

_SAFETENSORS_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_SAFETENSORS_DTYPES |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)} | {"uint8": "U8"}


@dataclass(frozen=True)
class TensorOffset:
    """Where in a shard a tensor is.

    Attributes:
        offset: of its first byte.
        checksums: offsets of the CRC-32 of its bytes, which a zip has twice and safetensors has not.
    """

    offset: int
    checksums: tuple[int, ...] = ()


def lay_out(path: Path, tensors: Specs) -> dict[str, TensorOffset]:
    """Create the shard `path`, in the form that its suffix names, and return the offset of each tensor."""
    return (_lay_out_safetensors if path.suffix == ".safetensors" else _lay_out_pickle)(path, tensors)


def write_at(path: Path, place: TensorOffset, values: np.ndarray) -> None:
    """Write an array's bytes in C order, and their checksum."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    checksum = struct.pack("<I", zlib.crc32(data)) if place.checksums else b""
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(data)
        for offset in place.checksums:
            file.seek(offset)
            file.write(checksum)


def assign_files(sizes: Mapping[str, int], limit: int, single: str) -> dict[str, str]:
    """Distribute tensors over files, which are filled in order and named as transformers does.

    Args:
        sizes: the bytes of each tensor.
        limit: the most bytes of a file.
        single: the name if one file is enough, "model.safetensors" or "pytorch_model.bin".

    Returns:
        The file of each tensor.
    """
    shards: list[list[str]] = []
    filled = limit + 1
    for key, size in sizes.items():
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(shards[0], single)
    stem, suffix = single.split(".")
    return {
        key: f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        for number, keys in enumerate(shards, 1)
        for key in keys
    }


def is_safe(weight_map: Mapping[str, str]) -> bool:
    """Whether the files are safetensors rather than pickles."""
    return next(iter(weight_map.values())).endswith(".safetensors")


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a sharded checkpoint; none if all tensors are in one file with the usual name."""
    index, single = SAFETENSORS if is_safe(weight_map) else PICKLES
    if set(weight_map.values()) == {single}:
        return
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / index).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _lay_out_pickle(path: Path, tensors: Specs) -> dict[str, TensorOffset]:
    with FakeTensorMode():
        fake = {key: torch.empty(shape, dtype=getattr(torch, dtype.name)) for key, (shape, dtype) in tensors.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fake, path)
    # skip_data leaves out the contents of the records data/0, data/1, ..., one per tensor, and their checksums, which
    # are behind the contents and in the directory at the end of the zip (PKWARE's APPNOTE.TXT, 4.3).
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        places, entry = {}, archive.start_dir
        for record in archive.infolist():
            file.seek(record.header_offset)
            header = file.read(30)
            start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            places[record.filename.partition("/")[2]] = TensorOffset(start, (start + record.file_size + 4, entry + 16))
            file.seek(entry)
            entry += 46 + sum(struct.unpack("<HHH", file.read(34)[28:]))
    return {key: places[f"data/{number}"] for number, key in enumerate(tensors)}


def _lay_out_safetensors(path: Path, tensors: Specs) -> dict[str, TensorOffset]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    # Wide dtypes first, so that each tensor is aligned; then by name, as the library does.
    for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        starts[key], end = end, end + math.prod(shape) * dtype.itemsize
        name = _SAFETENSORS_DTYPES[dtype.name]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [starts[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return {key: TensorOffset(8 + len(text) + start) for key, start in starts.items()}

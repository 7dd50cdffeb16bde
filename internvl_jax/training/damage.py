"""Whether the content of a saved step is damaged, as against storage, memory or packages that fail while it is read."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from internvl_jax.utils import files

STATE, DATA = "state", "data"  # the items of a step

_REQUIRED = (f"{DATA}/metadata", f"{STATE}/_METADATA", f"{STATE}/manifest.ocdbt")
_JSON = re.compile(rf"{DATA}/metadata|{STATE}/(_METADATA|array_metadatas/[^/]+)")
_DIRECTORIES = re.compile(rf"{DATA}|{STATE}(/d|/array_metadatas|/ocdbt\.process_\w+(/d)?)?")
# How TensorStore says that files are short, missing or not what their checksums say; decoders give no code.
_CONTENT = re.compile(
    r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |.*(Error decoding|ZSTD_|Zstd-)", re.DOTALL
)
# An error of the operating system, and files that a newer package wrote.
_NO_EVIDENCE = re.compile(r"os_error_code|supported version", re.IGNORECASE)


def find_damage(step: Path) -> str | None:
    """Look for damage in DIRECTORY/steps/N, by reading all of it, without what the caller expects it to hold.

    Returns:
        What is wrong with its content: a file that is missing, shorter than others say, or not decodable. None: all of
        it can be read, so that whatever went wrong before had another cause.

    Raises:
        OSError: a file cannot be read, which says nothing about its content.
        Exception: whatever else came in the way; no evidence either.
    """
    for path in _files(step):
        with open(path, "rb") as file:
            file.read(1)
    for name in _REQUIRED:
        if not (step / name).exists():
            return f"{name} is missing"
    for path in _files(step):
        if _JSON.fullmatch(path.relative_to(step).as_posix()):
            try:
                files.read_json(path)
            except files.TextError:
                return f"{path.relative_to(step)} is not JSON"
    try:
        _read_arrays(step / STATE)
    except ValueError as error:
        text = str(error)
        if _NO_EVIDENCE.search(text) or not _CONTENT.search(text):
            raise
        return re.split(r" ?\[(?:source|tensorstore_spec)", text)[0]
    return None


def _files(directory: Path, below: str = "") -> Iterator[Path]:
    """The files of a step. Raises OSError for what cannot be listed, and for a directory that no step has: a file's
    name may be its own, on a file system that answers wrongly."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name = f"{below}{entry.name}"
        if not entry.is_dir():
            yield Path(entry.path)
        elif _DIRECTORIES.fullmatch(name):
            yield from _files(Path(entry.path), f"{name}/")
        else:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), entry.path)


def _read_arrays(state: Path) -> None:
    """Read every array, a chunk at a time."""
    database: dict[str, Any] = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    suffix = b"/.zarray"
    for key in ts.KvStore.open(database).result().list().result():
        if not key.endswith(suffix):
            continue
        spec = {"driver": "zarr", "kvstore": {**database, "path": f"{key.removesuffix(suffix).decode()}/"}}
        store = ts.open({**spec, "fill_missing_data_reads": False}, open=True).result()
        chunk = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
        for number in np.ndindex(*(-(-size // part) for size, part in zip(store.shape, chunk))):
            where = tuple(
                slice(i * part, min((i + 1) * part, size)) for i, part, size in zip(number, chunk, store.shape)
            )
            store[where].read().result()

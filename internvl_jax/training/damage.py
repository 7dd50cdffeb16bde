"""Tells a saved step with damaged content from failures of storage, memory or packages while it is read."""

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
# TensorStore's errors for files that are too short, missing or have a wrong checksum; decoders give no code.
_CONTENT = re.compile(
    r"(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |.*(Error decoding|ZSTD_|Zstd-)", re.DOTALL
)
# Errors of the operating system, and of files that a newer package wrote, are no evidence of damage.
_NO_EVIDENCE = re.compile(r"os_error_code|supported version", re.IGNORECASE)


def find_damage(step: Path) -> str | None:
    """Look for damage in DIRECTORY/steps/N by reading all of it, without expectations about its arrays.

    Returns:
        What is damaged: a file is missing, too short, or cannot be decoded. None if everything can be read, so that the
        error that led here had another cause.

    Raises:
        OSError: A file cannot be read, which says nothing about its content.
        Exception: Any other failure; no evidence either.
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
        read_arrays(step / STATE)
    except ValueError as error:
        text = str(error)
        if _NO_EVIDENCE.search(text) or not _CONTENT.search(text):
            raise
        return re.split(r" ?\[(?:source|tensorstore_spec)", text)[0]
    return None


def _files(directory: Path, below: str = "") -> Iterator[Path]:
    """Yield the files of a step.

    Raises OSError for a directory that cannot be listed, and for one that no step has: a failing file system may show a
    file as a directory.
    """
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name = f"{below}{entry.name}"
        if not entry.is_dir():
            yield Path(entry.path)
        elif _DIRECTORIES.fullmatch(name):
            yield from _files(Path(entry.path), f"{name}/")
        else:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), entry.path)


def read_arrays(state: Path) -> None:
    """Read every array of the item "state" of a step, chunk by chunk. Raises ValueError for one that cannot be read."""
    database: dict[str, Any] = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    suffix = b"/.zarray"
    for key in ts.KvStore.open(database).result().list().result():
        if not key.endswith(suffix):
            continue
        spec = {"driver": "zarr", "kvstore": {**database, "path": f"{key.removesuffix(suffix).decode()}/"}}
        store = ts.open({**spec, "fill_missing_data_reads": False}, open=True).result()
        chunk: Any = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
        for number in np.ndindex(*(-(-size // part) for size, part in zip(store.shape, chunk))):
            where = tuple(
                slice(i * part, min((i + 1) * part, size)) for i, part, size in zip(number, chunk, store.shape)
            )
            store[where].read().result()

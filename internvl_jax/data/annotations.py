"""Meta files and annotation files, read by random access and never held in memory.

A meta file is InternVL's: {name: {"root": directory of the images, "annotation": file, "repeat_time": 1,
"data_augment": false, "length": samples}}. Annotations are JSONL, one conversation per line, or LLaVA's JSON list of
conversations. The byte ranges of a file's entries are computed once, cached in the user's cache directory and
memory-mapped, so neither memory nor start-up time grows with the data, however many processes read it. If that
directory is not writable, the index is kept in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from internvl_jax.utils import files

Progress = Callable[[int, int, str], None]

CHUNK = 1 << 24  # bytes read at a time
JSON_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]\n]', re.DOTALL)
ROW = 3 * np.dtype(np.int64).itemsize  # bytes of an index
KEYS = {"root", "annotation", "repeat_time", "data_augment", "length", "max_dynamic_patch"}


_in_memory: dict[str, np.ndarray] = {}  # indexes without a file


class DataError(ValueError):
    """Training data cannot be used. The message names the file, and the line if there is one."""


@dataclass(frozen=True)
class Source:
    """One data set of a meta file.

    Attributes:
        name: its key in the meta file.
        root: directory that its relative image paths start from.
        annotation: the annotation file.
        repeat_time: how often an epoch uses each entry; below 1 it uses only the first part of the file.
        augment: whether images are augmented.
        length: number of samples that the meta file states, or None.
    """

    name: str
    root: Path
    annotation: Path
    repeat_time: float = 1
    augment: bool = False
    length: int | None = None

    def samples(self, num_entries: int) -> int:
        """The number of samples per epoch from a file of `num_entries`.

        Raises:
            DataError: there are none.
        """
        count = round(num_entries * self.repeat_time)
        if not count:
            raise DataError(f"{self.name}: repeat_time {self.repeat_time} leaves none of {num_entries} samples")
        return count


def read_meta(path: Path, base: Path | None = None) -> list[Source]:
    """Read the data sets of a meta file.

    Args:
        path: a meta file; or an annotation file (.jsonl, or .json with a list), which is then the only data set.
        base: directory that relative paths start from. None: that of the meta file (in the reference code: the current
            directory).

    Raises:
        DataError: with everything that is wrong with the file.
    """
    base = path.parent if base is None else base
    if not path.is_file():
        raise DataError(f"{path} {files.not_a_file(path)}")
    if path.suffix == ".jsonl" or (path.suffix == ".json" and _first_byte(path) == b"["):
        return [Source(path.stem, base, path)]
    problems: list[str] = []
    sources: list[Source] = []
    try:
        meta = json.loads(files.read_text(path), object_pairs_hook=partial(_unique, problems))
    except files.TextError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(meta, dict) or not meta:
        raise DataError(f'{path} must hold a JSON object, {{name: {{"root": ..., "annotation": ...}}}}')
    for name, values in meta.items():
        try:
            sources.append(_source(name, values, base))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise DataError(f"{path}:\n  " + "\n  ".join(problems))
    return sources


def _unique(problems: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these pairs. Python's reader would silently drop all but the last of equal keys."""
    counts = Counter(name for name, _ in pairs)
    problems += [f"{name}: appears {count} times" for name, count in counts.items() if count > 1]
    return dict(pairs)


def _first_byte(path: Path) -> bytes:
    """The first byte after white space and a byte order mark. Raises DataError for UTF-16."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _source(name: str, values: Any, base: Path) -> Source:
    if not isinstance(values, dict):
        raise ValueError(f"must be an object, not {type(values).__name__}")
    if unknown := values.keys() - KEYS:
        raise ValueError(f"unknown keys {', '.join(sorted(unknown))}; there are {', '.join(sorted(KEYS))}")
    annotation, root = values.get("annotation"), values.get("root", "")
    if not isinstance(annotation, str) or not isinstance(root, str):
        raise ValueError('"annotation" must be a file and "root" a directory')
    if "://" in annotation or "://" in root:
        raise ValueError("URLs are not read: copy the files here, or mount the bucket")
    repeat, augment = values.get("repeat_time", 1), values.get("data_augment", False)
    length = values.get("length")
    if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 < repeat < 1e6:
        raise ValueError(f'"repeat_time" must be a number above 0, not {repeat!r}')
    if not isinstance(augment, bool):
        raise ValueError(f'"data_augment" must be true or false, not {augment!r}')
    if isinstance(length, bool) or not (length is None or isinstance(length, int)):
        raise ValueError(f'"length" must be a number of samples, not {length!r}')
    if values.get("max_dynamic_patch", 1) != 1:
        raise ValueError('"max_dynamic_patch" asks for image tiles, which this model does not have: leave it out')
    path = base / annotation
    if not path.is_file():
        raise ValueError(f"the annotation {path} {files.not_a_file(path)}")
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"the annotation {path} is neither .jsonl nor .json")
    return Source(name, base / root, path, repeat, augment, length)


class Entries:
    """The entries of one annotation file, by number. Can be shared by threads, and pickled.

    Attributes:
        path: the annotation file.
        index: where its entries are: the cached index file, or the index itself if the cache is not usable.

    Raises:
        DataError: the file has no entries, or is a .json that is not a list of objects.
    """

    def __init__(self, path: Path, progress: Progress | None = None):
        self.path = path
        self.index = _load_or_build_index(path, progress)
        self._open()
        if not len(self):
            raise DataError(f"{path} has no entries")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: SupportsIndex) -> bytes:
        start, end, _ = self._spans[number].tolist()
        return os.pread(self._file.fileno(), end - start, start)

    def location(self, number: int) -> str:
        """FILE:LINE of an entry. For a JSON list, which may be a single line, also its number in the list."""
        location = f"{self.path}:{int(self._spans[number][2])}"
        return location if self.path.suffix != ".json" else f"{location} (entry {number + 1})"

    def _open(self) -> None:
        self._spans = _map_index(self.index) if isinstance(self.index, Path) else self.index
        self._file = open(self.path, "rb")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _load_or_build_index(path: Path, progress: Progress | None) -> Path | np.ndarray:
    """The index of a file: rows of (first byte, last byte + 1, line) int64, built once per path, size and time.

    Returns:
        A file in the cache, or an array if the cache is not usable.
    """
    about = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:32]
    if key in _in_memory:
        return _in_memory[key]
    directory = files.cache_directory("annotations")
    if directory is not None:
        index = directory / f"{key}.i64"
        try:
            if index.exists() and index.stat().st_size % ROW == 0:  # otherwise it was cut off
                return index
            with files.replacing(index) as temporary, open(temporary, "wb") as file:
                for rows in _rows(path, progress):
                    file.write(rows.tobytes())
            return index
        except OSError as error:  # the disk is full, or the file is another user's
            files.warn_of_cache(directory, error)
    found = list(_rows(path, progress))
    _in_memory[key] = np.concatenate(found) if found else np.empty((0, 3), np.int64)
    return _in_memory[key]


def _map_index(index: Path) -> np.ndarray:
    """Memory-map an index file."""
    return np.memmap(index, np.int64, "r").reshape(-1, 3) if index.stat().st_size else np.empty((0, 3), np.int64)


def _rows(path: Path, progress: Progress | None) -> Iterator[np.ndarray]:
    size = path.stat().st_size
    first = _first_byte(path)
    for rows, done in json_spans(path, first) if path.suffix == ".json" else line_spans(path):
        yield np.ascontiguousarray(rows, np.int64)
        if progress is not None:
            progress(done, size, f"indexing {path.name}")


def line_spans(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Yield index rows of the lines that are not blank, chunk by chunk, and the number of bytes read so far."""
    start, line, offset, before = 0, 1, 0, b"\n"
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            # A line of one byte may be the "\r" of a blank one.
            blank = np.frombuffer(before + chunk, np.uint8)[ends] == ord("\r")
            ends, offset, before = ends + offset, offset + len(chunk), chunk[-1:]
            if len(ends):
                starts = np.concatenate([[start], ends[:-1] + 1])
                rows = np.stack([starts, ends, line + np.arange(len(ends))], axis=1)
                yield rows[ends - starts > blank], offset
                start, line = int(ends[-1]) + 1, line + len(ends)
        if start < offset:  # the last line does not end
            yield np.asarray([[start, offset, line]]), offset


def json_spans(path: Path, first: bytes) -> Iterator[tuple[np.ndarray, int]]:
    """Yield index rows of the objects of a list, some thousands at a time, and the number of bytes read so far.

    Only strings and brackets are parsed; errors inside an object show when it is read.

    Raises:
        DataError: the file is not a list, or is cut off.
    """
    if first != b"[":
        raise DataError(f"{path} must hold a JSON list of conversations; one per line belongs in a .jsonl")
    rows: list[tuple[int, int, int]] = []
    depth, line, start, start_line = 0, 1, 0, 1
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in JSON_PARTS.finditer(data):
            part = match.group()
            if part == b"\n":
                line += 1
            elif part in (b"{", b"["):
                if depth == 1:
                    start, start_line = match.start(), line
                depth += 1
            elif part in (b"}", b"]"):
                depth -= 1
                if depth == 1:
                    rows.append((start, match.end(), start_line))
                    if len(rows) == 10_000:
                        yield np.asarray(rows), match.end()
                        rows = []
        if depth:
            raise DataError(f"{path} is cut off: its brackets do not close (download it again)")
        if rows:
            yield np.asarray(rows), len(data)


@dataclass(frozen=True)
class Record:
    """One entry, as written in its file.

    Attributes:
        source: its data set.
        location: FILE:LINE.
        text: JSON.
    """

    source: Source
    location: str
    text: bytes


class Corpus:
    """All records of an epoch in the order of the meta file, as a grain random-access data source."""

    def __init__(self, sources: Sequence[Source], progress: Progress | None = None):
        self.sources = tuple(sources)
        self.entries = tuple(Entries(source.annotation, progress) for source in sources)
        counts = [source.samples(len(entries)) for source, entries in zip(sources, self.entries)]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: SupportsIndex) -> Record:
        number = int(number)
        which = int(np.searchsorted(self._ends, number, side="right"))
        first = int(self._ends[which - 1]) if which else 0
        entries = self.entries[which]
        at = (number - first) % len(entries)
        return Record(self.sources[which], entries.location(at), entries[at])

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and weights. A saved position is valid for the same fingerprint only."""
        facts = [
            (s.name, s.annotation.name, s.annotation.stat().st_size, s.repeat_time, s.augment) for s in self.sources
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

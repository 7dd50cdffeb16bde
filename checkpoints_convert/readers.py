"""Published weights on disk, read one tensor at a time: pytorch_model*.bin pickles and model*.safetensors, with index.

Both forms are memory-mapped, so that a tensor costs only its own bytes. Mapped pages count as memory in use while the
map exists, so one shard is mapped at a time, and mapped again after every REMAP bytes. Pickles of torch before 1.6
cannot be mapped: one whole shard at a time is in memory.
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes  # noqa: F401  (makes numpy know the name "bfloat16")
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoints_convert.mapping import PACKED, PART, TOWER, ConversionError, is_buffer, packed_keys, unpack
from internvl_jax.config import ChatConfig, ConfigError, find_vision_tower, vision_tower_name
from internvl_jax.utils import formats
from internvl_jax.utils.files import read_json_object, wrong_download

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

REMAP = 256 * 2**20  # bytes

# Index and single file of either form; transformers looks for safetensors first.
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_TEXT_HALF = re.compile(r"text_model\.|text_projection\.|visual_projection\.|logit_scale$")  # of a whole CLIP
_SHARD = re.compile(r"(pytorch_model|model)-\d+-of-\d+\.(bin|safetensors)")


class Weights:
    """The tensors of a published directory; a context manager that ends the mapping.

    Args:
        directory: the directory.
        files: names of its weight files.
        index: the file of each tensor as the index says; None without an index.

    Attributes:
        weight_map: the file of each tensor, in the order of the files and of the keys in them. A tower's files are
            below the name of its directory.
        shapes: the shape of each tensor.
        dtypes: the dtype of each tensor.

    Raises:
        ConversionError: a file is missing or damaged, or index and files differ; all problems are listed.
    """

    weight_map: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def __init__(self, directory: Path, files: list[str], index: Mapping[str, str] | None):
        self.directory = directory
        self.weight_map, self.shapes, self.dtypes = {}, {}, {}
        self._places: dict[str, tuple[Path, str]] = {}  # key -> its file and its name in that file
        self._open: tuple[Path, dict[str, torch.Tensor]] | None = None
        self._parts: dict[str, tuple[str, int, Callable[[np.ndarray], Any]]] = {}  # of packed tensors
        self._read = 0  # bytes read from the open shard
        problems = []
        for file in files:
            try:
                tensors = _map(directory / file)
            except ConversionError as error:
                problems.append(str(error))
                continue
            problems += self._add(file, tensors)
            if index is not None:
                problems += _compare(file, {key for key, name in index.items() if name == file}, set(tensors))
        if problems:
            raise ConversionError(f"{directory}: the weights cannot be read:\n  " + "\n  ".join(problems))

    def _add(self, file: str, tensors: dict[str, Any]) -> list[str]:
        """Register the tensors of a file; returns its problems."""
        problems = []
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                problems.append(f"{file}: {key} is a {type(tensor).__name__}, not a tensor")
                continue
            if key in self.weight_map:
                problems.append(f"{key} is in {self.weight_map[key]} and in {file}")
            self.weight_map[key] = file
            self._places[key] = self.directory / file, key
            self.shapes[key] = tuple(tensor.shape)
            try:
                self.dtypes[key] = _numpy_dtype(tensor.dtype)
            except TypeError:
                problems.append(f"{file}: {key} is {tensor.dtype}, which numpy has no type for")
        return problems

    def add_tower(self, directory: Path, part: str) -> None:
        """Add a vision tower that is published apart, under the names that LLaVA's layout has for it.

        Args:
            directory: the tower's directory.
            part: the directory of its files in the weight_map.
        """
        tower = open_weights(directory)
        for name in tower.weight_map:
            if _TEXT_HALF.match(name):
                continue
            key = TOWER + name
            self.weight_map[key] = f"{part}/{tower.weight_map[name]}"
            self._places[key] = tower._places[name]
            self.shapes[key], self.dtypes[key] = tower.shapes[name], tower.dtypes[name]

    def split(self, key: str, parts: Mapping[str, tuple[int, ...]], cut: Callable[[np.ndarray], Any]) -> None:
        """Replace a packed tensor by its parts.

        Args:
            key: the packed tensor.
            parts: the shape of each part, by the part's key.
            cut: makes the parts' values of the tensor's, in the order of `parts`.
        """
        self.weight_map = _in_place_of(self.weight_map, key, dict.fromkeys(parts, self.weight_map[key]))
        self.shapes = _in_place_of(self.shapes, key, parts)
        self.dtypes = _in_place_of(self.dtypes, key, dict.fromkeys(parts, self.dtypes[key]))
        for number, part in enumerate(parts):
            self._parts[part] = key, number, cut

    @property
    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(math.prod(shape) * self.dtypes[key].itemsize for key, shape in self.shapes.items())

    def read(self, key: str) -> np.ndarray:
        """Read one tensor in its shape and dtype, bit for bit, into memory of its own."""
        if key in self._parts:
            packed, number, cut = self._parts[key]
            return np.ascontiguousarray(cut(self._read_stored(packed, self.dtypes[key]))[number])
        return self._read_stored(key, self.dtypes[key])

    def _read_stored(self, key: str, dtype: np.dtype) -> np.ndarray:
        file, name = self._places[key]
        if self._open is None or self._open[0] != file:
            self._open = None  # unmap the old shard first
            self._open, self._read = (file, _map(file)), 0
        tensor = self._open[1][name].detach()
        # numpy cannot convert a bfloat16 tensor of torch: its bits are passed as integers.
        bits = tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        values = np.array(bits.numpy(), order="C").view(dtype)
        self._read += values.nbytes
        if self._read > REMAP and not _is_legacy(file):
            self._open = None
        return values

    def close(self) -> None:
        """Unmap the open shard."""
        self._open = None

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _in_place_of(table: Mapping[str, Value], key: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """The table with `values` where its entry `key` was."""
    entries = (values.items() if name == key else ((name, value),) for name, value in table.items())
    return dict(itertools.chain.from_iterable(entries))


def open_checkpoint(directory: str | Path, vision_tower: str | Path | None = None) -> Weights:
    """Open the weights of a published directory, and those of its vision tower if that is published apart.

    InternVL-Chat-V1-0 has LLaVA's layout but contains its tower: it needs the tower's directory for the configuration
    only.

    Args:
        directory: the published directory.
        vision_tower: the tower's directory, as for `config.find_vision_tower`.

    Returns:
        The weights.

    Raises:
        ConversionError: as for `open_weights`.
        ConfigError: the tower is missing.
    """
    directory = Path(directory)
    weights = open_weights(directory)
    config = read_json_object(directory / "config.json", ConfigError)
    tower = find_vision_tower(directory, config, vision_tower)
    name = vision_tower_name(config)
    if tower is not None and name is not None and not any(key.startswith(TOWER) for key in weights.weight_map):
        weights.add_tower(tower, name)
    return weights


def split_packed(weights: Weights, config: ChatConfig) -> None:
    """Replace packed tensors by the parts that the mapping tables name. What does not fit is left for `plan`."""
    keys = [key for key in packed_keys(config) if key in weights.shapes]
    if not keys:
        return
    text = config.required_text
    kv, heads, dim = text.num_key_value_heads, text.num_attention_heads, text.head_dim
    for key in keys:
        if weights.shapes[key] == ((heads + 2 * kv) * dim, text.hidden_size):
            sizes = zip(PACKED, (heads, kv, kv))
            parts = {f"{key}{PART}{name}": (count * dim, text.hidden_size) for name, count in sizes}
            weights.split(key, parts, lambda values: list(unpack(text, values).values()))


def open_weights(directory: str | Path) -> Weights:
    """Find the weights of a published directory and list their tensors; none is read yet.

    Raises:
        ConversionError: files are missing, truncated or damaged, or index and files differ; all problems are listed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a directory: pass the one that holds config.json and the weights")
    forms = [_form(directory, index_name, single) for index_name, single in (SAFETENSORS, PICKLES)]
    for form, other in zip(forms, reversed(forms)):
        if form is None:
            continue
        names, index = form
        absent = [name for name in names if not (directory / name).exists()]
        if absent and other is not None and all((directory / name).is_file() for name in other[0]):
            stale = SAFETENSORS[0] if form is forms[0] else PICKLES[0]
            raise ConversionError(
                f"{directory}: missing: {_some(absent)} (named in {stale}); but what is there is complete: "
                f"{_some(other[0])}. Remove {stale} to read that"
            )
        return Weights(directory, names, index)
    shards = sorted(path.name for path in directory.iterdir() if _SHARD.fullmatch(path.name))
    if len(shards) == 1 and re.search("-0*1-of-0*1[.]", shards[0]):
        return Weights(directory, shards, None)
    if shards:
        index_name = (SAFETENSORS if shards[0].endswith("safetensors") else PICKLES)[0]
        raise ConversionError(f"{directory} has {', '.join(shards)} but no {index_name}: download that file too")
    raise ConversionError(
        f"{directory} has no weights: neither pytorch_model*.bin nor model*.safetensors is there; was it downloaded "
        "completely?"
    )


def _form(directory: Path, index_name: str, single: str) -> tuple[list[str], dict[str, str] | None] | None:
    """The files of one form, and its index if there is one; None if the directory has no such files."""
    if (directory / index_name).is_file():
        index = read_index(directory / index_name)
        return sorted(set(index.values())), index
    return ([single], None) if (directory / single).exists() else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_index(path: Path) -> dict[str, str]:
    """Read the weight_map of an index: the file of each tensor. Raises ConversionError."""
    try:
        index = read_json_object(path, ConfigError).get("weight_map")
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ConversionError(f'{path} has no "weight_map" of keys and file names: download it again')
    outside = sorted({name for name in index.values() if Path(name).is_absolute() or ".." in Path(name).parts})
    if outside:
        raise ConversionError(f"{path} names files outside its directory: {', '.join(outside)}")
    return index


def _map(path: Path) -> dict[str, Any]:
    """Map the tensors of one file without reading them. Raises ConversionError, or OSError as the system reports it."""
    if not path.exists():
        raise ConversionError(f"missing: {path.name} (named in the index)")
    if path.stat().st_size == 0:
        raise _damaged(path, "it is empty")
    if (
        problem := wrong_download(path)
    ) is not None:  # opened and read: what the system refuses is not taken for damage
        raise ConversionError(problem.replace(str(path), path.name))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConversionError(f"{path.name} has a path that is not UTF-8, which torch cannot open: rename it") from None
    try:
        tensors = _map_safetensors(path) if path.suffix == ".safetensors" else _map_pickle(path)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's errors
        number = re.search(r"\((?:os error )?(\d+)\)$", _first_line(error))
        if number is None or int(number[1]) not in errno.errorcode:
            raise ConversionError(
                f"{path.name} is truncated or damaged ({_first_line(error)}); download it again"
            ) from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if not isinstance(tensors, dict):
        raise ConversionError(f"{path.name} holds a {type(tensors).__name__}, not a dictionary of tensors")
    return tensors


def _map_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except ValueError as error:
        raise _damaged(path, error) from None


def _map_pickle(path: Path) -> Any:
    if legacy := _is_legacy(path):
        logger.info(
            "%s was written by torch before 1.6 and cannot be mapped: it is read as a whole, %s of memory",
            path.name, formats.memory(path.stat().st_size),
        )  # fmt: skip
    else:
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", mmap=not legacy, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise _damaged(path, "not a pickle of tensors") from None
        raise ConversionError(
            f"{path.name} holds more than tensors, it asks for {asked[1]}. Code in a pickle is never run: get the "
            "safetensors form, or have its author save the state_dict alone"
        ) from None
    except (OSError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # a damaged zip or pickle can fail in any way
        raise ConversionError(
            f"{path.name} is truncated or damaged ({_first_line(error)}); download it again"
        ) from None


def _check_zip(path: Path) -> None:
    """Raise ConversionError for a zip without its directory, which torch may report as EINVAL of the system."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
        try:
            zipfile.ZipFile(file).close()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception | str) -> ConversionError:
    why = error if isinstance(error, str) else _first_line(error)
    return ConversionError(f"{path.name} is truncated or damaged ({why}); download it again")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_legacy(path: Path) -> bool:
    """Whether torch before version 1.6 wrote a file: not a zip, but a series of pickles and then the values."""
    if path.suffix == ".safetensors":
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x80\x02"


def _compare(file: str, indexed: set[str], found: set[str]) -> list[str]:
    lacks = [key for key in sorted(indexed - found) if not is_buffer(key)]
    holds = [key for key in sorted(found - indexed) if not is_buffer(key)]
    return [f"{file} lacks {key}, which the index names" for key in lacks] + [
        f"{file} holds {key}, which the index does not name there" for key in holds
    ]


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return np.dtype(str(dtype).removeprefix("torch."))

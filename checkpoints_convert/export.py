"""Export this project's format to the published layout, bit for bit, one tensor at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints_convert.conversion_report import ConversionReport, make_report
from checkpoints_convert.convert import BUFFERS, PUBLISHED, published_dtypes, published_map
from checkpoints_convert.mapping import (
    EMBEDDING,
    PART,
    TOWER,
    ConversionError,
    Tensor,
    canonical,
    pack,
    physical,
    tensors,
)
from checkpoints_convert.readers import PICKLES, SAFETENSORS, Weights
from checkpoints_convert.side_files import copy_all_side_files
from checkpoints_convert.writers import Specs, assign_files, is_safe, lay_out, write_at, write_index
from internvl_jax import checkpoint
from internvl_jax.checkpoint import Progress
from internvl_jax.config import ChatConfig, load_config
from internvl_jax.models import chat_model
from internvl_jax.utils.files import new_directory, resolve

MAX_SHARD = 5 * 10**9  # bytes, where the published files are unknown

_PICKLED_LAYOUTS = ("internvl_chat", "intern_vit_6b", "llava")
_NOT_THE_SAME = "it belongs to other parameters; remove that file and the export chooses names and files itself"


def export(
    source: str | Path,
    destination: str | Path,
    *,
    safe_serialization: bool | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Export a directory in this project's format under the published names.

    Converted parameters go back into the same files, including layers past select_layer, repeated heads and buffers. A
    vision tower that had a directory of its own gets one of the same name (of a CLIP, the vision model only). Other
    parameters go into files of at most MAX_SHARD bytes. config.json, the tokenizer and other small files are copied.
    Memory is bounded by a few copies of the largest tensor. If the export fails, `destination` is not created.

    Args:
        source: a directory in this project's format.
        destination: the directory to write; it must not exist.
        safe_serialization: True writes model*.safetensors, False pytorch_model*.bin; None: the form that was converted,
            or the one in which the layout is published.
        progress: called as progress(done_bytes, total_bytes, what).

    Returns:
        A report of what was written.

    Raises:
        CheckpointError: the source is damaged.
        ConversionError: the source is quantized, or its parameters do not fit config.json.
        ConfigError: config.json has a problem.
    """
    started = time.perf_counter()
    source, destination = resolve(source), resolve(destination)
    config = load_config(source)
    specs, read = _pack(*_published(source, config), config)
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in specs.items()}
    total, done = sum(sizes.values()), 0
    weight_map = {physical(key): file for key, file in _files(source, config, sizes, safe_serialization).items()}
    with new_directory(destination, total, error=ConversionError) as directory:
        copy_all_side_files(source, directory, skip=(PUBLISHED,))
        for file in dict.fromkeys(weight_map.values()):
            names = {_name(key, file): key for key in specs if weight_map[key] == file}
            (directory / file).parent.mkdir(exist_ok=True)
            places = lay_out(directory / file, {name: specs[key] for name, key in names.items()})
            for name, place in places.items():
                key = names[name]
                write_at(directory / file, place, read(key))
                done += sizes[key]
                if progress is not None:
                    progress(done, total, "exporting")
        for part in dict.fromkeys(Path(file).parent for file in weight_map.values()):
            keys = [key for key, file in weight_map.items() if Path(file).parent == part]
            files = {_name(key, weight_map[key]): Path(weight_map[key]).name for key in keys}
            write_index(directory / part, files, sum(sizes[key] for key in keys))
    return make_report(destination, len(specs), total, started)


def _name(key: str, file: str) -> str:
    """The name of a tensor in its file: in a directory of its own, a vision tower has names without a prefix."""
    return key.removeprefix(TOWER) if Path(file).parent.name else key


def _published(source: Path, config: ChatConfig) -> tuple[Specs, Callable[[str], np.ndarray]]:
    """The tensors to write, in the order of the published files, and the function that reads one of them."""
    stored = checkpoint.Reader(source)
    if any(name.endswith(f"/{checkpoint.QVALUE}") for name in stored.leaves):
        raise ConversionError(
            f"{source} is quantized, and the published weights cannot be restored from it: export the checkpoint "
            "that was converted without --quantize"
        )
    _check_complete(source, config, {name: shape for name, (shape, _) in stored.leaves.items()})
    table = {tensor.key: tensor for tensor in tensors(config)}
    buffers = Weights(source, [BUFFERS], None) if (source / BUFFERS).exists() else None
    narrower = published_dtypes(source)
    chosen: dict[str, Tensor] = {}
    specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for key in published_map(source) or table:
        name = canonical(config, key)
        if name is None and buffers is not None and key in buffers.shapes:
            specs[key] = buffers.shapes[key], buffers.dtypes[key]
            continue
        tensor = None if name is None else table.get(name)
        if tensor is None and config.text is not None and config.text.tie_word_embeddings:
            tensor = next(t for t in table.values() if t.path == EMBEDDING)  # a tied head
        if tensor is None:
            raise ConversionError(f"{source / PUBLISHED} names {key}, which {source} does not have: {_NOT_THE_SAME}")
        chosen[key] = tensor
        specs[key] = tensor.shape, narrower.get(key, stored.leaves[tensor.path][1])
    absent = sorted(table.keys() - {tensor.key for tensor in chosen.values()})
    if absent:
        raise ConversionError(f"{source / PUBLISHED} does not name {', '.join(absent)}: {_NOT_THE_SAME}")

    def read(key: str) -> np.ndarray:
        if key not in chosen and buffers is not None:
            return buffers.read(key)
        tensor = chosen[key]
        return tensor.to_theirs(stored.read(tensor.path, tensor.index)).astype(specs[key][1], copy=False)

    return specs, read


def _pack(
    specs: Specs, read: Callable[[str], np.ndarray], config: ChatConfig
) -> tuple[Specs, Callable[[str], np.ndarray]]:
    """The same tensors with packed ones in place of their parts."""
    parts: dict[str, list[str]] = {}
    for key in specs:
        parts.setdefault(physical(key), []).append(key)
    if len(parts) == len(specs):
        return specs, read
    packed = {}
    for key, names in parts.items():
        shapes = [specs[name][0] for name in names]
        packed[key] = (sum(shape[0] for shape in shapes), *shapes[0][1:]), specs[names[0]][1]

    def read_packed(key: str) -> np.ndarray:
        if parts[key] == [key]:
            return read(key)
        return pack(config.required_text, {name.partition(PART)[2]: read(name) for name in parts[key]})

    return {key: packed[key] if parts[key] != [key] else specs[key] for key in parts}, read_packed


def _check_complete(source: Path, config: ChatConfig, stored: dict[str, tuple[int, ...]]) -> None:
    """Check that names and shapes are those of config.json, so that the export is complete."""
    wanted = {name: leaf.shape for name, leaf in checkpoint.named_leaves(chat_model.abstract_params(config))}
    problems = [
        f"{name}: {stored.get(name, 'missing')}, config.json asks for {wanted.get(name, 'none')}"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if problems:
        raise ConversionError(f"{source}: parameters and config.json do not agree:\n  " + "\n  ".join(problems))


def _files(source: Path, config: ChatConfig, sizes: dict[str, int], safe: bool | None) -> dict[str, str]:
    """The file of every tensor: the published one, if it is known and has the requested form."""
    recorded = published_map(source)
    if recorded is not None and safe in (None, is_safe(recorded)):
        return recorded
    if safe is None:
        safe = config.layout not in _PICKLED_LAYOUTS
    return assign_files(sizes, MAX_SHARD, (SAFETENSORS if safe else PICKLES)[1])

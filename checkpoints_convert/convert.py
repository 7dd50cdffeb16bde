"""Convert a published directory to this project's format, or load it into memory, one tensor at a time.

The layouts of `internvl_jax.config.LAYOUTS` can be converted. A leaf keeps the dtype of its tensors in the files, so
that export.py restores them bit for bit; what has no place in a parameter tree is stored beside it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file

from checkpoints_convert.conversion_report import ConversionReport, make_report
from checkpoints_convert.mapping import EMBEDDING, ConversionError, Tensor, canonical, plan, quantized_by
from checkpoints_convert.readers import Weights, open_checkpoint, read_index, split_packed
from checkpoints_convert.side_files import check_side_files, copy_all_side_files
from internvl_jax import checkpoint
from internvl_jax.checkpoint import Progress, first_non_finite
from internvl_jax.config import ChatConfig, ConfigError, load_config
from internvl_jax.models import chat_model
from internvl_jax.models.axes import axes_of
from internvl_jax.parallel import distributed
from internvl_jax.quantize import Scheme, is_quantized, quantize_kernel, quantize_params, quantize_while_reading
from internvl_jax.utils.files import new_directory, read_json_object, resolve

PUBLISHED = "published.json"  # the file of each tensor
BUFFERS = "published_buffers.safetensors"  # tensors that are not parameters
FLOATS = tuple(np.dtype(name) for name in ("float32", "float16", "bfloat16"))
FLOAT64 = np.dtype("float64")  # read as float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """A leaf, or one layer of a stack, and its tensors by key: several where our leaf is fused, as q, k and v."""

    path: str
    layer: int | None
    tensors: tuple[tuple[str, Tensor], ...]

    def read(self, weights: Weights, dtype: np.dtype) -> np.ndarray:
        """Read the part in our shape."""
        parts = [_read_tensor(weights, key, tensor, dtype) for key, tensor in self.tensors]
        if len(parts) == 1:
            return parts[0]
        axis = len(self.tensors[0][1].index) - 2  # index is (layer, slices, part)
        order = np.argsort([tensor.index[-1] for _, tensor in self.tensors])
        return np.stack([parts[number] for number in order], axis)


def _read_tensor(weights: Weights, key: str, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow is found below
        values = tensor.to_ours(weights.read(key)).astype(dtype, copy=False)
    if (found := first_non_finite(values)) is not None:
        raise ConversionError(
            f"{weights.directory}: {key} has values that are not finite ({found} in {dtype}): its training diverged, "
            "its dtype was too narrow, or the file is damaged; take another copy"
        )
    return values


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    quantize: Scheme | str | None = None,
    vision_tower: str | Path | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert a published directory to this project's format.

    Memory is bounded by a few copies of the largest tensor. config.json, the tokenizer and other small files are
    copied; `published.json` records what an export needs to restore the published files. If the conversion fails,
    `destination` is not created.

    Args:
        source: the published directory.
        destination: the directory to write; it must not exist.
        quantize: "int8" or "int4" weights; such a directory cannot be exported.
        vision_tower: the directory of the vision tower, where the layout has one of its own; None: it is looked for in
            source and beside it (config.find_vision_tower). The destination will contain the tower.
        progress: called as progress(done_bytes, total_bytes, what).

    Returns:
        A report of what was written.

    Raises:
        ConversionError: tensors or files are missing, unexpected or damaged; all are listed before anything is written.
        ConfigError: config.json has a problem.
    """
    started = time.perf_counter()
    source, destination = resolve(source), resolve(destination)
    checkpoint.check_path(destination)
    if checkpoint.is_converted(source):
        raise ConversionError(f"{source} is converted already")
    config = load_config(source, vision_tower)
    check_side_files(source, vision_tower)
    with open_checkpoint(source, vision_tower) as weights:
        parts, dtypes = _match(config, weights)
        abstract = _with_dtypes(chat_model.abstract_params(config), dtypes)
        if quantize is not None:
            abstract = jax.eval_shape(partial(quantize_params, scheme=quantize), abstract)
        kernels = {name: leaf for name, leaf in checkpoint.named_leaves(abstract, is_quantized) if is_quantized(leaf)}
        total, done = weights.total_bytes, 0
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        with new_directory(destination, size, error=ConversionError) as directory:
            with checkpoint.Writer(directory, abstract) as writer:
                for part in parts:
                    values = part.read(weights, dtypes[part.path])
                    place = ... if part.layer is None else part.layer
                    if part.path in kernels:
                        qtype, inputs = kernels[part.path].qvalue.dtype, axes_of(part.path).inputs
                        kernel = _quantize(values, inputs=inputs, qtype=qtype, name=part.path)
                        for name, leaf in checkpoint.named_leaves(kernel):
                            writer.write(f"{part.path}/{name}", place, np.asarray(leaf))
                    else:
                        writer.write(part.path, place, values)
                    done += values.nbytes
                    if progress is not None:
                        progress(done, total, "converting")
                writer.commit()
            copy_all_side_files(source, directory, vision_tower)
            if quantize is None:
                _keep_published(config, weights, directory, parts, dtypes)
    return make_report(destination, len(weights.shapes), size, started)


_quantize = jax.jit(quantize_kernel, static_argnames=("inputs", "qtype", "name"))


def load_hf(directory: str | Path, abstract: Any, *, progress: Progress | None = None) -> Any:
    """Load a published directory into a tree of jax arrays, without converting it first.

    Host memory is bounded by the largest leaf beside the loaded arrays.

    Args:
        directory: the published directory.
        abstract: a tree of jax.ShapeDtypeStruct as in `checkpoint.load`, with dtypes and, if wanted, shardings. Kernels
            that are quantized in it are quantized here, a layer at a time. If its vision stack is shorter than the
            stored one, further layers are not read.
        progress: called as progress(done_bytes, total_bytes, what).

    Returns:
        The tree of arrays.

    Raises:
        ConversionError: tensors are missing, unexpected or damaged (all are listed before one is read), or have values
            that are not finite.
        ConfigError: config.json has a problem.
        CheckpointError: `abstract` does not fit the checkpoint.
    """
    with distributed.barrier():
        return _load_hf(resolve(directory), abstract, progress)


def _load_hf(directory: Path, abstract: Any, progress: Progress | None) -> Any:
    config = load_config(directory)
    with open_checkpoint(directory) as weights:
        parts, dtypes = _match(config, weights)
        wanted = dict(checkpoint.named_leaves(abstract, is_quantized))
        shapes = {name: leaf.shape for name, leaf in checkpoint.named_leaves(chat_model.abstract_params(config))}
        checkpoint.check_shapes(directory, wanted, shapes)
        by_path: dict[str, dict[int | None, _Part]] = {}
        for part in parts:
            if part.path in wanted and (part.layer is None or part.layer < wanted[part.path].shape[0]):
                by_path.setdefault(part.path, {})[part.layer] = part
        stored = {name: dtypes[name] if is_quantized(leaf) else leaf.dtype for name, leaf in wanted.items()}
        total = sum(math.prod(leaf.shape) * stored[name].itemsize for name, leaf in wanted.items())
        done, leaves = 0, []

        def read(path: str, layer: int | None) -> np.ndarray:
            nonlocal done
            values = by_path[path][layer].read(weights, stored[path])
            done += values.nbytes
            if progress is not None:
                progress(done, total, "loading")
            return values

        for path, leaf in wanted.items():
            if is_quantized(leaf):
                part_of = lambda layer, where, path=path: _put(read(path, layer), where)  # noqa: E731
                leaves.append(quantize_while_reading(path, leaf, part_of))
                continue
            host = np.empty(leaf.shape, leaf.dtype)
            for layer in by_path[path]:
                host[... if layer is None else layer] = read(path, layer)
            leaves.append(_put(host, getattr(leaf, "sharding", None)))
    return jax.tree.unflatten(jax.tree.structure(abstract, is_leaf=is_quantized), leaves)


def _put(host: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)  # jnp.asarray would compile a program for every shape
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _match(config: ChatConfig, weights: Weights) -> tuple[list[_Part], dict[str, np.dtype]]:
    """Match a checkpoint's tensors with our tree.

    A stack whose layers have several dtypes gets the one that represents all their values exactly.

    Returns:
        The parts of our tree in the order of the files, and the dtype of every leaf.

    Raises:
        ConversionError: tensors do not fit, are quantized, or have a dtype that is not supported.
    """
    method = quantized_by(weights.shapes)
    if method is not None:
        raise ConversionError(
            f"{weights.directory} is quantized by {method}, which is not supported: take the checkpoint that it "
            "was made from (--quantize int8 or int4 quantizes it here)"
        )
    split_packed(weights, config)
    matched = plan(config, weights.shapes)
    grouped: dict[tuple[str, int | None], list[tuple[str, Tensor]]] = {}
    dtypes: dict[str, np.dtype] = {}
    mixed: set[str] = set()
    problems = []
    for key, dtype in weights.dtypes.items():
        if dtype not in (*FLOATS, FLOAT64) and canonical(config, key) is not None:
            problems.append(f"{key} is {dtype}: only {', '.join(map(str, FLOATS))} can be read")
    for key, tensor in matched.items():
        grouped.setdefault((tensor.path, tensor.index[0] if tensor.index else None), []).append((key, tensor))
        dtype = weights.dtypes[key]
        if dtype == FLOAT64:
            dtype = np.dtype(np.float32)
            mixed.add(tensor.path)
        if dtypes.setdefault(tensor.path, dtype) != dtype:
            mixed.add(tensor.path)
            if dtype in FLOATS and dtypes[tensor.path] in FLOATS:
                dtypes[tensor.path] = jnp.promote_types(dtype, dtypes[tensor.path])
    problems += _untied(config, weights, matched)
    if problems:
        raise ConversionError(f"{weights.directory} cannot be read:\n  " + "\n  ".join(problems))
    if mixed:
        logger.info(
            "%s: the layers of %s are stored in several dtypes, or in float64: read as %s",
            weights.directory,
            ", ".join(sorted(mixed)[:3]) + (f" and {len(mixed) - 3} more" if len(mixed) > 3 else ""),
            ", ".join(sorted({str(dtypes[path]) for path in mixed})),
        )
    return [_Part(path, layer, tuple(tensors)) for (path, layer), tensors in grouped.items()], dtypes


def _untied(config: ChatConfig, weights: Weights, matched: dict[str, Tensor]) -> list[str]:
    """Problems of a stored head that config.json calls tied: it has to equal the embedding."""
    problems = []
    heads = [key for key in weights.shapes if key not in matched and canonical(config, key) is not None]
    for head in heads:  # apart from buffers, `plan` leaves out only these
        embedding = next(key for key, tensor in matched.items() if tensor.path == EMBEDDING)
        same = weights.shapes[head] == weights.shapes[embedding]
        if not same or not _equal(weights.read(head), weights.read(embedding)):
            problems.append(f"config.json has tie_word_embeddings, but {head} differs from {embedding}")
    return problems


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit, in the narrower of their dtypes."""
    if a.dtype != b.dtype:
        narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        a, b = a.astype(narrow), b.astype(narrow)
    return a.tobytes() == b.tobytes()


def _with_dtypes(abstract: Any, dtypes: dict[str, np.dtype]) -> Any:
    leaves = [jax.ShapeDtypeStruct(leaf.shape, dtypes[name]) for name, leaf in checkpoint.named_leaves(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _keep_published(
    config: ChatConfig, weights: Weights, directory: Path, parts: Sequence[_Part], dtypes: Mapping[str, np.dtype]
) -> None:
    """Record what the tree does not: each tensor's file, dtypes that differ from the stack's, and buffers."""
    record: dict[str, Any] = {"weight_map": weights.weight_map}
    other = {
        key: str(weights.dtypes[key])
        for part in parts
        for key, _ in part.tensors
        if weights.dtypes[key] not in (dtypes[part.path], FLOAT64)
    }
    if other:
        record["dtypes"] = other
    (directory / PUBLISHED).write_text(json.dumps(record, indent=1), encoding="utf-8")
    buffers = [key for key in weights.shapes if canonical(config, key) is None]
    if buffers:
        save_file({key: as_torch(weights.read(key)) for key in buffers}, directory / BUFFERS)


def as_torch(values: np.ndarray) -> torch.Tensor:
    """A torch tensor that shares the memory of a numpy array."""
    if values.dtype == jnp.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def published_map(directory: Path) -> dict[str, str] | None:
    """The file of each tensor as recorded by `convert`; None for parameters that were not converted."""
    path = directory / PUBLISHED
    return read_index(path) if path.exists() else None


def published_dtypes(directory: Path) -> dict[str, np.dtype]:
    """The dtypes that `convert` recorded, of tensors that are stored in a wider dtype with the rest of their stack."""
    path = directory / PUBLISHED
    recorded = read_json_object(path, ConfigError).get("dtypes", {}) if path.exists() else {}
    wrong = [name for name in recorded.values() if name not in map(str, FLOATS)]
    if wrong:
        raise ConversionError(f"{path} has the dtype {wrong[0]!r}: {', '.join(map(str, FLOATS))} are known")
    return {key: np.dtype(name) for key, name in recorded.items()}

"""The weights of both sides of a comparison, read one tensor at a time."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert.mapping import Tensor, plan, tensors
from checkpoints_convert.parity.report import ParityError
from checkpoints_convert.readers import Weights, open_checkpoint, split_packed
from internvl_jax import checkpoint
from internvl_jax.config import ChatConfig
from internvl_jax.models import chat_model
from internvl_jax.models.layers import Params


@lru_cache(maxsize=8)
def parameter_shapes(config: ChatConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of our parameters, by name."""
    return dict(checkpoint.named_leaves(chat_model.abstract_params(config)))


class ParitySource:
    """A published or a converted directory, read one tensor at a time under the published names or ours.

    Args:
        directory: the checkpoint's directory.
        config: its configuration.
        tower: the directory of the vision tower, where the layout has one of its own.

    Raises:
        ParityError: the directory is quantized.
        ConversionError: tensors are missing, unexpected or have the wrong shape.
        CheckpointError: the same, for a converted directory.
    """

    def __init__(self, directory: Path, config: ChatConfig, tower: Path | None):
        self._leaves = parameter_shapes(config)
        self._weights: Weights | None = None
        self._names: dict[str, str] = {}  # the mapping table's key -> the files' key
        if checkpoint.is_converted(directory):
            self._reader = checkpoint.Reader(directory)
            if any(name.endswith(f"/{checkpoint.QVALUE}") for name in self._reader.leaves):
                raise ParityError(
                    f"{directory} is quantized, which is not what the reference computes: compare the checkpoint that "
                    "was converted without --quantize"
                )
            stored = {name: shape for name, (shape, _) in self._reader.leaves.items()}
            checkpoint.check_shapes(directory, self._leaves, stored)
            self._tensors = {tensor.key: tensor for tensor in tensors(config)}
        else:
            self._weights = open_checkpoint(directory, tower)
            split_packed(self._weights, config)
            matched = plan(config, self._weights.shapes)
            self._tensors = {tensor.key: tensor for tensor in matched.values()}
            self._names = {tensor.key: name for name, tensor in matched.items()}
        self.bytes_read = 0
        # Layers past select_layer never run.
        last = config.num_vision_layers if config.vision is not None else 0
        self.bytes_needed = sum(
            self._size(tensor)
            for tensor in self._tensors.values()
            if not (tensor.path.startswith("vision_model/layers/") and tensor.index[0] >= last)
        )

    @property
    def keys(self) -> list[str]:
        """The published names of all tensors."""
        return list(self._tensors)

    def theirs(self, key: str) -> np.ndarray:
        """A tensor by its published name, in its published shape and stored dtype."""
        tensor = self._tensors[key]
        self.bytes_read += self._size(tensor)
        if self._weights is not None:
            return self._weights.read(self._names[key])
        return tensor.to_theirs(self._reader.read(tensor.path, tensor.index))

    def ours(self, part: str, layer: int | None = None) -> Params:
        """The subtree `part` of our parameters in float32; one layer of it if `part` is a stack."""
        tree: Params = {}
        index = () if layer is None else (layer,)
        for name, leaf in self._leaves.items():
            if not name.startswith(f"{part}/"):
                continue
            *parents, last = name[len(part) + 1 :].split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = self._leaf(name, leaf.shape[len(index) :], index)
        return tree

    def _leaf(self, name: str, shape: tuple[int, ...], index: tuple[int, ...]) -> jax.Array:
        sources = [t for t in self._tensors.values() if t.path == name and t.index[: len(index)] == index]
        self.bytes_read += sum(map(self._size, sources))
        if self._weights is None:
            values = self._reader.read(name, index)
        else:
            parts = [(t.index[len(index) :], t.to_ours(self._weights.read(self._names[t.key]))) for t in sources]
            values = parts[0][1]
            if parts[0][0]:  # q, k and v of a fused leaf
                values = np.empty(shape, values.dtype)
                for part, of_part in parts:
                    values[part] = of_part
        # Cast by jax: a second float32 copy in numpy would set the peak of memory.
        return jnp.asarray(values).astype(jnp.float32)

    def _size(self, tensor: Tensor) -> int:
        if self._weights is not None:
            itemsize = self._weights.dtypes[self._names[tensor.key]].itemsize
        else:
            itemsize = self._reader.leaves[tensor.path][1].itemsize
        return math.prod(tensor.shape) * itemsize

    def __enter__(self) -> ParitySource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._weights is not None:
            self._weights.close()

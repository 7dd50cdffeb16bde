"""Low-rank adapters (Hu et al., "LoRA", 2021), a tree of their own beside the parameters, which do not change.

    {"language_model": {"layers": {"self_attn": {"q_proj": {"lora_a": [L,D,R], "lora_b": [L,R,N,H]}, ...}}}}

A product x @ kernel becomes x @ kernel + alpha / rank * (dropout(x) @ lora_a) @ lora_b. `attach` makes of them the Flax
collection "lora", where models.layers.Linear finds them, for training and for serving unmerged; kernels may be
quantized. `merge` adds them to the kernels. On disk an adapter is a directory with adapter.json and its own params/.

Parameters that were trained whole beside adapters, such as LLaVA's projector, are under REPLACED at their path in the
parameters, {"replaced": {"mlp1": {"fc1": {"kernel": [D,D], ...}}}}, and replace the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import checkpoint
from internvl_jax.models.axes import axes_of, linear_layers
from internvl_jax.models.layers import ADAPTER, Adapter, Array, Params, Variables, precision_of
from internvl_jax.models.stack import depth
from internvl_jax.parallel import distributed
from internvl_jax.parallel.partitioning import path_of
from internvl_jax.quantize import is_quantized, quantize_kernel
from internvl_jax.utils import files

FILE = "adapter.json"
REPLACED = "replaced"  # beside the parts in a tree of adapters
ADAPTABLE = ("language_model", "vision_model")  # parts of the model that can have adapters


class LoraError(ValueError):
    """Adapters that do not fit the model, or invalid settings. The message says what would fit."""


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters of one part of the model. Defaults are the reference's.

    Attributes:
        rank: rank of the product lora_a @ lora_b.
        alpha: the product is scaled by alpha / rank; None for twice the rank.
        dropout: rate at which inputs of the adapters are dropped in training.
        targets: linear layers that have adapters, names of `axes.linear_layers`; None for all.

    Raises:
        LoraError: rank or dropout is out of range.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise LoraError(f"rank {self.rank} and dropout {self.dropout}: a rank is positive, dropout in [0, 1)")

    @property
    def scale(self) -> float:
        """The factor of the product of both matrices, alpha / rank."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def targets_of(self, tower: str) -> tuple[str, ...]:
        """The linear layers of a part that have an adapter.

        Raises:
            LoraError: the part does not have such a layer.
        """
        known = linear_layers(tower)
        chosen = known if self.targets is None else self.targets
        if not chosen or set(chosen) - set(known):
            raise LoraError(f"adapters of {tower} go to {', '.join(known) or 'nothing'}, not to {', '.join(chosen)}")
        return chosen


LoraSettings = Mapping[str, Lora]  # by part of the model, "language_model" or "vision_model"


def init_adapters(key: Array, params: Params, settings: LoraSettings) -> Params:
    """Initialize adapters as peft does: lora_a uniform in +-1/sqrt(inputs), lora_b zero, so that nothing changes yet.

    Args:
        key: a PRNG key.
        params: the model's parameters with stacked layers, as anything with shapes, in true shapes
            (`param_sharding.pad_params` pads adapters too).
        settings: of each part that gets adapters.

    Returns:
        A tree of adapters, float32.

    Raises:
        LoraError: the model does not have such a part or layer.
    """
    adapters: Params = {}
    for tower, lora in settings.items():
        if tower not in params:
            raise LoraError(f"adapters are asked for {tower}, which the model does not have")
        layers: Params = {}
        for target in lora.targets_of(tower):
            kernel = leaf_at(params[tower]["layers"], target)["kernel"]
            inputs, outputs = sides(f"{tower}/layers/{target}", kernel.shape[1:])
            key, drawn = jax.random.split(key)
            bound = 1 / math.sqrt(math.prod(inputs))
            pair = {
                "lora_a": jax.random.uniform(drawn, (kernel.shape[0], *inputs, lora.rank), jnp.float32, -bound, bound),
                "lora_b": jnp.zeros((kernel.shape[0], lora.rank, *outputs), jnp.float32),
            }
            put_at(layers, target, pair)
        adapters[tower] = {"layers": layers}
    return adapters


def attach(params: Params, adapters: Params, settings: LoraSettings) -> Variables:
    """Make a model's variables, {"params": ..., "lora": ...}, of parameters and adapters. Works under jit.

    With an rng "dropout", applying a module to them drops inputs of the adapters at the rate of their settings.

    Args:
        params: the model's parameters. Those that adapters replace determine padding, quantization and sharding of
            the new ones.
        adapters: adapters of all layers or of the first ones, stacked.
        settings: of each part that has adapters.

    Returns:
        A new tree of parameters, and the collection "lora", its layers stacked.
    """
    attached: Params = {}
    for tower, tree in _towers(adapters).items():
        count = depth(params[tower]["layers"])
        attached[tower] = {"layers": _to_collection(tree["layers"], settings[tower], count)}
    return {"params": _with_replaced(params, adapters), "lora": attached}


def _to_collection(pairs: Params, lora: Lora, count: int) -> Params:
    """The adapters of `count` layers as variables; zeros where there are fewer."""

    def fill(leaf: Any) -> Any:
        missing = count - leaf.shape[0]
        return jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    if "lora_a" not in pairs:
        return {name: _to_collection(pair, lora, count) for name, pair in pairs.items()}
    return {ADAPTER: Adapter(fill(pairs["lora_a"]), fill(pairs["lora_b"]) * lora.scale, lora.dropout)}


def _towers(adapters: Params) -> Params:
    return {tower: tree for tower, tree in adapters.items() if tower != REPLACED}


def _with_replaced(params: Params, adapters: Params) -> Params:
    """`params` with the parameters in place that adapters hold under REPLACED."""
    result = dict(params)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(adapters.get(REPLACED, {})):
        name = path_of(keys)
        part, _, rest = name.partition("/")
        branch = jax.tree.map(lambda value: value, result[part], is_leaf=is_quantized)  # copies the dictionaries
        put_at(branch, rest, _in_place_of(leaf_at(branch, rest), leaf, name))
        result[part] = branch
    return result


def _in_place_of(old: Any, new: Any, name: str) -> Any:
    """A new parameter, quantized, padded and sharded as the old one."""
    if is_quantized(old):
        inputs = axes_of(name).inputs
        new = quantize_kernel(jnp.asarray(new, jnp.float32), inputs=inputs, qtype=old.qvalue.dtype, name=name)

    def fit(new: Any, old: Any) -> Any:
        pads = [(0, theirs - ours) for ours, theirs in zip(new.shape, old.shape, strict=True)]
        fitted = jnp.pad(jnp.asarray(new, old.dtype), pads)
        under_jit = isinstance(old, jax.core.Tracer) or not isinstance(old, jax.Array)
        return fitted if under_jit else jax.device_put(fitted, old.sharding)

    return jax.tree.map(fit, new, old)


def merge(params: Params, adapters: Params, settings: LoraSettings) -> Params:
    """Add adapters to their kernels. Sums are float32, results have the kernels' dtypes.

    Args:
        params: the model's parameters, layers stacked.
        adapters: adapters of all layers or of the first ones (vision layers past select_layer are never trained).
        settings: of each part that has adapters.

    Returns:
        A new tree of parameters.

    Raises:
        LoraError: kernels are quantized.
    """
    params = _with_replaced(params, adapters)
    return {
        **params,
        **{
            tower: {**params[tower], "layers": _merged(params[tower]["layers"], tree["layers"], settings[tower].scale)}
            for tower, tree in _towers(adapters).items()
        },
    }


def _merged(kernels: Params, pairs: Params, scale: float) -> Params:
    merged = dict(kernels)
    for name, pair in pairs.items():
        if "lora_a" not in pair:
            merged[name] = _merged(kernels[name], pair, scale)
            continue
        if is_quantized(kernels[name]["kernel"]):
            raise LoraError("adapters cannot be merged into quantized weights: merge first, then quantize")
        merged[name] = {**kernels[name], "kernel": _add(kernels[name]["kernel"], pair["lora_a"], pair["lora_b"], scale)}
    return merged


def _add(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """kernel [L,...] + scale * a [l,inputs,R] @ b [l,R,outputs], for the first l layers."""
    count, rank = a.shape[0], a.shape[-1]
    product = jnp.einsum(
        "LIR,LRO->LIO",
        a.reshape(count, -1, rank).astype(jnp.float32),
        b.reshape(count, rank, -1).astype(jnp.float32),
        precision=precision_of(jnp.float32),
    )
    first = kernel[:count].astype(jnp.float32) + scale * product.reshape(count, *kernel.shape[1:])
    return jnp.concatenate([first.astype(kernel.dtype), kernel[count:]])


def merge_checkpoint(
    directory: str | Path, base: str | Path, adapters: str | Path, *, progress: checkpoint.Progress | None = None
) -> None:
    """Copy a checkpoint with adapters merged in. Memory is bounded by one layer.

    Args:
        directory: the new checkpoint.
        base: the checkpoint that the adapters belong to.
        adapters: the directory of adapters.
        progress: called as progress(done, total, what) after every piece that is written.

    Raises:
        LoraError: the adapters are not of this model, or `base` is quantized.
        CheckpointError: `directory` exists, or `base` is damaged.
    """
    directory, base = files.resolve(directory), files.resolve(base)
    tree = checkpoint.stored_tree(base)
    if any(is_quantized(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_quantized)):
        raise LoraError(f"{base} is quantized: merge into the checkpoint that it was made from, then quantize")
    pairs, settings = load(adapters, tree)
    scales = {tower: lora.scale for tower, lora in settings.items()}
    known = {f"{path_of(keys[:-1])}/{keys[-1].key}": leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(pairs)}

    def change(name: str, layer: int | None, values: np.ndarray) -> np.ndarray:
        replaced = known.get(f"{REPLACED}/{name}")
        if replaced is not None:
            return np.asarray(replaced)
        kernel = name.removesuffix("/kernel")
        a, b = known.get(f"{kernel}/lora_a"), known.get(f"{kernel}/lora_b")
        if layer is None or a is None or b is None or layer >= len(a):
            return values
        one = slice(layer, layer + 1)
        return np.asarray(_add(jnp.asarray(values[None]), a[one], b[one], scales[name.split("/")[0]])[0])

    checkpoint.write_mapped(directory, base, change, progress=progress)


def save(directory: str | Path, adapters: Params, settings: LoraSettings) -> None:
    """Write adapters: adapter.json and params/, whole or not at all.

    Where there are several processes, all of them call this.

    Args:
        directory: the new directory.
        adapters: the adapters, in true shapes.
        settings: of each part that has adapters.

    Raises:
        CheckpointError: `directory` exists.
        OutputInUseError: another process is writing it.
    """
    with checkpoint.new_directory(directory) as temporary:
        with distributed.process_0_first() as first:
            if first:
                text = json.dumps({tower: asdict(lora) for tower, lora in settings.items()}, indent=2) + "\n"
                (temporary / FILE).write_text(text, encoding="utf-8")
        checkpoint.save(temporary, adapters)


def load(directory: str | Path, params: Params | None = None) -> tuple[Params, dict[str, Lora]]:
    """Read adapters and their settings.

    Args:
        directory: what `save` wrote.
        params: parameters of the model that the adapters must fit, as `check` takes them; None to skip the check.

    Raises:
        LoraError: the directory holds no adapters, or those of another model.
        CheckpointError: the adapters are damaged, or hold NaN or Inf.
        OSError: a file cannot be read.
    """
    directory = files.resolve(directory)
    settings = _read_settings(directory)
    adapters = checkpoint.load(directory, checkpoint.stored_tree(directory))
    if set(_towers(adapters)) != set(settings):
        raise LoraError(
            f"{directory}: {FILE} describes adapters of {', '.join(settings) or 'nothing'}, "
            f"{checkpoint.PARAMS}/ holds those of {', '.join(_towers(adapters)) or 'nothing'}"
        )
    if params is not None:
        check(params, adapters)
    return adapters, settings


def _read_settings(directory: Path) -> dict[str, Lora]:
    path = directory / FILE
    try:
        written = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        if (directory / "adapter_config.json").exists():
            raise LoraError(
                f"{directory} holds an adapter of Hugging Face's peft: read it with "
                f"'internvl-jax adapters from-peft {directory} DST'"
            ) from None
        raise LoraError(f"{directory} holds no adapter, which has {FILE} and {checkpoint.PARAMS}/") from None
    try:
        return {
            tower: Lora(**{**entry, "targets": entry["targets"] and tuple(entry["targets"])})
            for tower, entry in written.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LoraError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def check(params: Params, adapters: Params) -> None:
    """Check that adapters fit a model.

    Args:
        params: the model's parameters with stacked layers, as anything with shapes.
        adapters: the adapters.

    Raises:
        LoraError: lists all adapters that have no kernel, or one of another shape.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    shapes = {path_of(keys): tuple(leaf.shape) for keys, leaf in leaves}
    problems = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(adapters.get(REPLACED, {})):
        expected = shapes.get(path_of(keys))
        if expected is None:
            problems.append(f"{path_of(keys)}: no such parameter")
        elif expected != tuple(leaf.shape):
            problems.append(f"{path_of(keys)} is {list(leaf.shape)}, the model has {list(expected)}")
    for keys, leaf in jax.tree_util.tree_leaves_with_path(_towers(adapters)):
        name, kind = path_of(keys[:-1]), keys[-1].key
        kernel = shapes.get(f"{name}/kernel")
        if kernel is None:
            problems.append(f"{name}: no such layer")
            continue
        inputs, outputs = sides(name, kernel[1:])
        expected, found = (inputs, leaf.shape[1:-1]) if kind == "lora_a" else (outputs, leaf.shape[2:])
        if leaf.shape[0] > kernel[0]:
            problems.append(f"{name}/{kind} is for {leaf.shape[0]} layers, the model has {kernel[0]}")
        if tuple(expected) != tuple(found):
            problems.append(f"{name}/{kind} is for {list(found)}, the model has {list(expected)}")
    if problems:
        raise LoraError("the adapter is not of this model:\n  " + "\n  ".join(sorted(problems)))


def replaced_names(adapters: Params) -> list[str]:
    """Names of the parameters that adapters replace, "mlp1/fc1/kernel"."""
    return [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(adapters.get(REPLACED, {}))]


def sides(layer: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split a kernel's shape into inputs and outputs.

    Args:
        layer: path of the linear layer, "language_model/layers/self_attn/q_proj".
        shape: the kernel's shape without the axis of layers.
    """
    inputs = axes_of(f"{layer}/kernel").inputs
    return tuple(shape[:inputs]), tuple(shape[inputs:])


def leaf_at(tree: Params, path: str) -> Any:
    """The leaf or subtree at the path "a/b/c"."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def put_at(tree: Params, path: str, value: Any) -> None:
    """Put a value at the path "a/b/c", and create the dictionaries on the way."""
    *parents, last = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value

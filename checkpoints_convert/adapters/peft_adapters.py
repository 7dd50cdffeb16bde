"""Read and write low-rank adapters in the layout of Hugging Face's peft.

The reference wraps each tower separately, and so adapters are written: DST/language_model/ and DST/vision_model/ with
adapter_config.json and adapter_model.safetensors, which peft's PeftModel.from_pretrained takes for
`model.language_model` or `model.vision_model`. lora_A is [rank, in] there, lora_B [out, rank]. Adapters of a whole
model can be read too, with the parameters that LLaVA trains beside them and saves in non_lora_trainables.bin.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from checkpoints_convert.adapters.peft_config import MERGE_IT, PeftConfig, read_config
from checkpoints_convert.mapping import PART, ConversionError, Tensor, canonical, tensors
from checkpoints_convert.readers import Weights
from internvl_jax.config import ChatConfig
from internvl_jax.lora import ADAPTABLE, REPLACED, Lora, LoraSettings, leaf_at, put_at, sides
from internvl_jax.models.axes import linear_layers
from internvl_jax.models.layers import Params
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BESIDE = "non_lora_trainables.bin"  # LLaVA's parameters that were trained beside an adapter, mostly the projector
_WRAPPED = "base_model.model."  # peft's prefix for the names of a wrapped model

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_PAIR = re.compile(r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight")
_TRAINING_ONLY = (".lora_velora_embed",)  # VeLoRA's, for the backward pass
_LAYER = re.compile(r"(?:^|(?<=\.))layers?\.\d+\.")  # the rest of a name is within a layer
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(0|2)\.(weight|bias)")  # LLaVA's names, for its other layouts too
# Files that trainers leave beside an adapter and that do not change its result.
_ORDINARY = re.compile(
    r"(README|LICEN[SC]E|NOTICE|USE_POLICY).*|\..*|.*token.*\.(json|model)|vocab\..*|merges\.txt|chat_template.*|"
    r"(generation_|preprocessor_|processor_|video_preprocessor_)?config\.json|training_args\.(bin|json|yaml)|"
    r"(trainer_state|train_results|eval_results|all_results|trainer_log)\.jsonl?|(optimizer|scheduler|scaler)\.(pt|bin)|"
    r"rng_state.*\.pth|latest|zero_to_fp32\.py|events\.out\..*|runs|logs|wandb|(checkpoint-|global_step)\d+|.*\.(log|png|txt)"
)


# To peft.


def export_peft(directory: str | Path, adapters: Params, settings: LoraSettings, config: ChatConfig) -> None:
    """Write adapters for peft in float32, a subdirectory for each tower.

    Args:
        directory: the directory to write; it must not exist.
        adapters: the adapters, as `lora.load` returns them.
        settings: their settings by tower.
        config: of the model that the adapters are for, in the published layout of V1-1, LLaMA or InternViT.

    Raises:
        ConversionError: `directory` exists, or the layout's towers have other layers.
    """
    with files.new_directory(directory, error=ConversionError) as temporary:
        for tower in (name for name in adapters if name != REPLACED):
            (temporary / tower).mkdir()
            _export_tower(temporary / tower, tower, adapters[tower], settings[tower], config)
        if REPLACED in adapters:
            part = temporary / "language_model"  # beside the adapter, where LLaVA looks for it
            values = _replaced_to_theirs(adapters[REPLACED], config)
            torch.save(values, (part if part.exists() else temporary) / BESIDE)


def _export_tower(directory: Path, tower: str, tree: Params, lora: Lora, config: ChatConfig) -> None:
    arrays, names, count = {}, set(), 0
    for target, tensor, key in _targets(tower, lora, config):
        pair = leaf_at(tree["layers"], target)
        layer = tensor.index[0]
        count = pair["lora_a"].shape[0]
        if layer >= count:  # past select_layer: never trained
            continue
        outputs, inputs = tensor.shape
        a, b = (np.asarray(pair[name][layer], np.float32) for name in ("lora_a", "lora_b"))
        arrays[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(inputs, lora.rank).T)
        arrays[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, outputs).T)
        names.add(key.rsplit(".", 1)[-1] if tower == "language_model" else ".".join(key.rsplit(".", 2)[-2:]))
    value: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if tower == "language_model" else None,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if tower == "vision_model":
        value |= {"layers_to_transform": list(range(count)), "layers_pattern": "layers"}
    save_file(arrays, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _targets(tower: str, lora: Lora, config: ChatConfig) -> Iterator[tuple[str, Tensor, str]]:
    """The layers with an adapter: our target, the published tensor of its kernel, and peft's name."""
    wanted = {f"{tower}/layers/{target}/kernel": target for target in lora.targets_of(tower)}
    missing = set(wanted)
    for tensor in tensors(config):
        if tensor.path not in wanted:
            continue
        if PART in tensor.key:
            raise ConversionError(
                f"{tensor.key.partition(PART)[0]} is packed: peft files with adapters of its q, k and v are not "
                "implemented"
            )
        if len(tensor.index) != 1:
            raise ConversionError(
                f"{config.layout}: {tensor.key} is a part of {tensor.path}, which has one adapter here"
            )
        missing.discard(tensor.path)
        yield wanted[tensor.path], tensor, _WRAPPED + tensor.key.removeprefix(f"{tower}.").removesuffix(".weight")
    if missing:
        raise ConversionError(f"the model has no {', '.join(sorted(missing))}")


def _replaced_to_theirs(tree: Params, config: ChatConfig) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in tensors(config):
        if not tensor.index and (values := _leaf_or_none(tree, tensor.path)) is not None:
            found[_WRAPPED + tensor.key] = torch.tensor(tensor.to_theirs(np.asarray(values, np.float32)))
    return found


def _leaf_or_none(tree: Params, path: str) -> Any:
    try:
        return leaf_at(tree, path)
    except KeyError:
        return None


# From peft.


def import_peft(directory: str | Path, config: ChatConfig) -> tuple[Params, dict[str, Lora]]:
    """Read adapters that peft or `export_peft` wrote.

    The result is peft's: where ranks or scales differ between layers, or layers have no adapter, matrices are padded
    with zeros and scales are multiplied into lora_b. Parameters that were trained beside the adapters (modules_to_save,
    LLaVA's non_lora_trainables.bin) are under lora.REPLACED. Other files are named in a warning.

    Args:
        directory: an adapter of the whole model or of one tower, or a directory with one for each tower.
        config: of the model that the adapters are for.

    Returns:
        The adapters, float32 numpy arrays, and their settings by tower.

    Raises:
        ConversionError: there is no adapter, it is of a kind that is not supported, or tensors are missing, unexpected,
            of another shape or not finite; all are listed.
        OSError: a file cannot be read.
    """
    directory = files.resolve(directory)
    towers = [tower for tower in ADAPTABLE if (directory / tower / CONFIG).exists()]
    if (directory / CONFIG).exists():
        if towers:
            raise ConversionError(f"{directory} is an adapter, and so is {towers[0]}/ in it: pass one of them")
        found = [_read(directory, config, None)]
    elif towers:
        found = [_read(directory / tower, config, tower) for tower in towers]
        if (directory / BESIDE).exists():
            found.append(_read_beside(directory, config))
        _name_unread(directory, {*towers, BESIDE})
    else:
        raise ConversionError(_no_adapter(directory))
    problems = [f"{one.directory.name}: {text}" if len(found) > 1 else text for one in found for text in one.problems]
    if problems:
        raise ConversionError(
            f"{directory}: the adapter does not fit the model:\n  " + "\n  ".join(sorted(set(problems)))
        )
    adapters: Params = {}
    settings: dict[str, Lora] = {}
    for one in found:
        for tower, pairs in one.pairs.items():
            adapters[tower], settings[tower] = _stacked(tower, pairs, one.config, config)
        for path, values in one.replaced.items():
            put_at(adapters, f"{REPLACED}/{path}", values)
    if not settings:
        raise ConversionError(f"{directory}: the adapter holds no matrices lora_A and lora_B of this model")
    return adapters, settings


def _no_adapter(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} {'is a file' if directory.exists() else 'does not exist'}: pass an adapter's directory"
    inside = sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG}"))
    inside += sorted(str(path.parent) for path in directory.glob(f"*/*/{CONFIG}"))
    names = ", ".join((CONFIG, *(f"{tower}/{CONFIG}" for tower in ADAPTABLE)))
    return f"{directory} has none of {names}" + (f"; pass {' or '.join(inside)}" if inside else "")


class _Pair(NamedTuple):
    """The adapter of one layer, or of one part of a fused layer."""

    a: np.ndarray  # [inputs, R]
    b: np.ndarray  # [R, outputs]
    scale: float
    part: int | None  # 0, 1, 2 for q, k and v, which are one kernel here


@dataclass
class _Read:
    """The contents of one directory."""

    directory: Path
    config: PeftConfig
    pairs: dict[str, dict[tuple[str, int], list[_Pair]]] = field(default_factory=dict)  # by tower, target and layer
    replaced: dict[str, np.ndarray] = field(default_factory=dict)  # by path of the leaf
    problems: list[str] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # keys of kernels whose adapters were found


class _Names:
    """peft's names of a model's layers, of the whole model or of a tower that was wrapped separately."""

    def __init__(self, config: ChatConfig, tower: str | None):
        self.config = config
        self.kernels: dict[str, tuple[str, str, Tensor]] = {}  # key without ".weight" -> tower, target, tensor
        self.whole: dict[str, Tensor] = {}  # tensors that are a whole leaf
        for tensor in tensors(config):
            one, _, rest = tensor.path.partition("/layers/")
            target = rest.removesuffix("/kernel")
            if not tensor.index:
                self.whole[tensor.key] = tensor
            elif target in linear_layers(one) and tower in (None, one):
                self.kernels[tensor.key.removesuffix(".weight")] = one, target, tensor
        # The language model first: names of CLIP's layers end like those of its layers.
        self._order = sorted(self.kernels, key=lambda key: ADAPTABLE.index(self.kernels[key][0]))

    def kernel(self, name: str) -> str | None:
        """The key of the layer that peft calls `name`."""
        for full in (name, f"model.{name}"):
            key = (canonical(self.config, f"{full}.weight") or "").removesuffix(".weight")
            if key in self.kernels:
                return key
        return next((key for key in self._order if key.endswith(f".{name}")), None)

    def leaf(self, name: str) -> Tensor | None:
        """The tensor, a whole leaf, that is called `name` in a file."""
        projector = _PROJECTOR.fullmatch(name)
        if projector and self.config.projector is not None and not self.config.projector.layer_norm:
            path = f"mlp1/fc{1 if projector[1] == '0' else 2}/{'kernel' if projector[2] == 'weight' else 'bias'}"
            return next(tensor for tensor in self.whole.values() if tensor.path == path)
        for full in (name, f"model.{name}"):
            tensor = self.whole.get(canonical(self.config, full) or "")
            if tensor is not None:
                return tensor
        return next((tensor for key, tensor in self.whole.items() if key.endswith(f".{name}")), None)


def _read(directory: Path, config: ChatConfig, tower: str | None) -> _Read:
    read = _Read(directory, read_config(directory / CONFIG))
    weights_file = next((name for name in (WEIGHTS, PICKLE) if (directory / name).exists()), None)
    if weights_file is None:
        raise ConversionError(f"{directory} has neither {WEIGHTS} nor {PICKLE}: was it downloaded completely?")
    present = [weights_file, *([BESIDE] if (directory / BESIDE).exists() else ())]
    _name_unread(directory, {CONFIG, *present})
    names = _Names(config, tower)
    with Weights(directory, present, None) as weights:
        matrices: dict[str, dict[str, str]] = {}
        others = []
        for key in weights.shapes:
            match = _PAIR.fullmatch(key)
            if match is None and not key.endswith(_TRAINING_ONLY):
                others.append(key)
            elif match is not None:
                matrices.setdefault(match["name"], {})[match["side"]] = key
        for name, sides_of in matrices.items():
            _read_pair(read, weights, names, name, sides_of)
        read.problems += _left_out(read, names, [name.removeprefix(_WRAPPED) for name in matrices])
        _read_replaced(read, weights, names, others)
    return read


def _read_beside(directory: Path, config: ChatConfig) -> _Read:
    """Read the parameters that LLaVA trained beside adapters, from a file beside the towers' directories."""
    read = _Read(directory, PeftConfig())
    with Weights(directory, [BESIDE], None) as weights:
        _read_replaced(read, weights, _Names(config, None), list(weights.shapes))
    return read


def _read_pair(read: _Read, weights: Weights, names: _Names, wrapped: str, keys: dict[str, str]) -> None:
    name = wrapped.removeprefix(_WRAPPED)
    key = names.kernel(name)
    if key is None:
        read.problems += [f"unexpected: {one}, no layer of the model that adapters go to" for one in keys.values()]
        return
    tower, target, tensor = names.kernels[key]
    if key in read.taken:
        read.problems.append(f"{name} is there twice, under two names")
        return
    read.taken.add(key)
    if not read.config.selects(name):
        read.problems.append(f"unexpected: {name} has an adapter, but {CONFIG} selects other layers")
        return
    (outputs, inputs), rank = tensor.shape, read.config.rank_of(name)
    arrays = []
    for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        expected = f"{wrapped}.lora_{side}.weight"
        found = weights.shapes.get(expected, "missing")
        if found != shape:
            read.problems.append(f"{expected} is {found}, the model asks for {shape}")
        elif (values := _values(read, weights, expected)) is not None:
            arrays.append(values)
    if len(arrays) == 2:
        layer, part = tensor.index[0], tensor.index[-1] if len(tensor.index) > 1 else None
        pair = _Pair(arrays[0].T, arrays[1].T, read.config.scale_of(name), part)
        read.pairs.setdefault(tower, {}).setdefault((target, layer), []).append(pair)


def _values(read: _Read, weights: Weights, key: str) -> np.ndarray | None:
    """A tensor in float32; None, and a problem, where it is not of finite floating-point numbers."""
    dtype = weights.dtypes[key]
    if dtype.name not in _FLOATS:
        read.problems.append(f"{key} is {dtype.name}: adapters are read in {', '.join(_FLOATS)}")
        return None
    with np.errstate(over="ignore"):
        values = weights.read(key).astype(np.float32)
    if not np.isfinite(values).all():
        read.problems.append(f"{key} holds NaN or infinite values")
        return None
    return values


def _left_out(read: _Read, names: _Names, found: list[str]) -> list[str]:
    """Layers that adapter_config.json selects and the file lacks, in the towers that have adapters."""
    prefixes: dict[str, set[tuple[str, str]]] = {}  # by tower, how names begin: in the file, and in the tables
    for name in found:
        key, start = names.kernel(name), _LAYER.search(name)
        if key is not None and start is not None:
            begin = key.removesuffix(name[start.start() :])
            prefixes.setdefault(names.kernels[key][0], set()).add((name[: start.start()], begin))
    missing = []
    for key, (tower, _, _) in names.kernels.items():
        for theirs, ours in prefixes.get(tower, ()):
            name = theirs + key.removeprefix(ours)
            if name not in found and read.config.selects(name):
                missing.append(f"missing: {name}.lora_A.weight and lora_B.weight, which {CONFIG} selects")
    return missing


def _read_replaced(read: _Read, weights: Weights, names: _Names, keys: list[str]) -> None:
    """Read the parameters that were trained as a whole, and report those that the model lacks."""
    saved = set()
    for key in keys:
        name = key.removeprefix(_WRAPPED)
        tensor = names.leaf(name)
        if tensor is None:
            read.problems.append(f"unexpected: {key}, {_why_unexpected(key)}; {MERGE_IT}")
        elif weights.shapes[key] != tensor.shape:
            read.problems.append(f"{key} is {weights.shapes[key]}, the model asks for {tensor.shape}")
        elif tensor.path.startswith("language_model/embed") and names.config.required_text.tie_word_embeddings:
            read.problems.append(f"unexpected: {key}, the head shares the embedding of this model; {MERGE_IT}")
        elif (values := _values(read, weights, key)) is not None:
            if tensor.path in read.replaced:
                read.problems.append(f"{key} is there twice, under two names")
            read.replaced[tensor.path] = tensor.to_ours(values)
        saved.add(name.rpartition(".")[0])
    for module in read.config.modules_to_save:
        if not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for name in saved):
            read.problems.append(f"missing: modules_to_save names {module}, of which the files hold nothing")
    projector = {tensor.path: tensor.key for tensor in names.whole.values() if tensor.path.startswith("mlp1/")}
    if not read.problems and read.replaced.keys() & projector.keys():
        absent = projector.keys() - read.replaced.keys()
        read.problems += [f"missing: {projector[path]} of the projector" for path in absent]


def _why_unexpected(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "which DoRA has"
    if "lora_embedding_" in key:
        return "an adapter of an embedding"
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", key):
        return "the name of an adapter is in it: save it with peft's save_pretrained"
    if re.search(r"\.lora_B\.bias$", key):
        return "a bias of an adapter"
    if "trainable_tokens_" in key:
        return "rows of an embedding"
    return "which has no place beside adapters of this model"


def _stacked(
    tower: str, pairs: dict[tuple[str, int], list[_Pair]], peft: PeftConfig, config: ChatConfig
) -> tuple[Params, Lora]:
    """A tower's adapters in our form: all layers, one rank, one scale."""
    depth = config.num_vision_layers if tower == "vision_model" else config.required_text.num_hidden_layers
    idle = sorted(
        {layer for (_, layer), parts in pairs.items() if layer >= depth and any(part.b.any() for part in parts)}
    )
    if idle:
        logger.warning(
            "adapters of %s layers %s are left out: these layers never run", tower, ", ".join(map(str, idle))
        )
    rank = max(sum(part.a.shape[1] for part in parts) for parts in pairs.values())
    scales = {part.scale for parts in pairs.values() for part in parts}
    scale = next(iter(scales)) if len(scales) == 1 and any(scales) else 1.0
    plain = rank == peft.r and scale == peft.lora_alpha / rank
    table = {
        (tensor.path.partition("/layers/")[2].removesuffix("/kernel"), tensor.index[0]): tensor
        for tensor in tensors(config)
        if tensor.path.startswith(f"{tower}/layers/") and tensor.path.endswith("/kernel")
    }
    tree: Params = {}
    targets = tuple(target for target in linear_layers(tower) if any(target == one for one, _ in pairs))
    for target in targets:
        tensor = table[target, 0]
        ins, outs = sides(f"{tower}/layers/{target}", tensor.our_shape)
        if len(tensor.index) > 1:
            outs = (3, *outs)  # q, k and v
        a, b = np.zeros((depth, *ins, rank), np.float32), np.zeros((depth, rank, *outs), np.float32)
        for layer in range(depth):
            start = 0
            for part in pairs.get((target, layer), ()):
                rows = slice(start, start + part.a.shape[1])
                place = b[layer, rows] if part.part is None else b[layer, rows, part.part]
                a[layer, ..., rows] = part.a.reshape(*ins, -1)
                place[...] = (part.b * np.float32(part.scale / scale)).reshape(place.shape)
                start = rows.stop
        put_at(tree, f"{target}/lora_a", a)
        put_at(tree, f"{target}/lora_b", b)
    alpha = peft.lora_alpha if plain else scale * rank
    return {"layers": tree}, Lora(rank, alpha, peft.lora_dropout, None if targets == linear_layers(tower) else targets)


def _name_unread(directory: Path, read: set[str]) -> None:
    """Warn of files that are not read, except for those that trainers always leave."""
    unread = sorted(path.name for path in directory.iterdir() if path.name not in read)
    unread = [name for name in unread if not _ORDINARY.fullmatch(name)]
    if unread:
        logger.warning("%s: not read: %s", directory, ", ".join(unread))

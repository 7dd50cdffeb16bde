"""Low-rank adapters in the layout of Hugging Face's peft, and back.

The reference wraps each tower on its own, so there is a peft directory for each: DST/language_model/ and
DST/vision_model/ with adapter_config.json and adapter_model.safetensors, which peft's PeftModel.from_pretrained takes
for `model.language_model` or `model.vision_model`. A matrix lora_A is [rank, in] there, lora_B [out, rank].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoints_convert.mapping import ConversionError, Tensor, tensors
from checkpoints_convert.readers import Weights
from internvl_jax.config import ChatConfig
from internvl_jax.lora import TARGETS, Lora, Settings, leaf_at, put_at, sides
from internvl_jax.models.layers import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = "base_model.model."  # what peft puts before a wrapped model's own names


def export_peft(directory: str | Path, adapters: Params, settings: Settings, config: ChatConfig) -> None:
    """Write adapters for peft, float32, a directory for each tower.

    config: of the model that the adapters are for, in the published layout of V1-1, LLaMA or InternViT.
    Raises ConversionError where `directory` exists, and for layouts whose towers have other layers.
    """
    directory = Path(directory)
    if directory.exists():
        raise ConversionError(f"{directory} exists already: remove it, or write somewhere else")
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for tower in adapters:
            (temporary / tower).mkdir(parents=True)
            _export_tower(temporary / tower, tower, adapters[tower], settings[tower], config)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def import_peft(directory: str | Path, config: ChatConfig) -> tuple[Params, dict[str, Lora]]:
    """Adapters and settings from directories that peft or `export_peft` wrote, float32 numpy arrays.

    Raises ConversionError for directories without one, for kinds of adapter that are not plain LoRA, and for tensors
    that are missing, unexpected or of another shape, all listed.
    """
    directory = Path(directory)
    adapters: Params = {}
    settings: dict[str, Lora] = {}
    for tower in TARGETS:
        if (directory / tower / CONFIG).is_file():
            adapters[tower], settings[tower] = _import_tower(directory / tower, tower, config)
    if not adapters:
        raise ConversionError(f"{directory} has no {' or '.join(f'{tower}/{CONFIG}' for tower in TARGETS)}")
    return adapters, settings


def _import_tower(directory: Path, tower: str, config: ChatConfig) -> tuple[Params, Lora]:
    written = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    for name, plain in (("bias", "none"), ("use_dora", False), ("use_rslora", False), ("modules_to_save", None)):
        if written.get(name, plain) not in (plain, None):
            raise ConversionError(f"{directory / CONFIG} has {name} {written[name]!r}: only plain LoRA is read")
    for name in ("rank_pattern", "alpha_pattern"):
        if written.get(name):
            raise ConversionError(f"{directory / CONFIG} has {name}: one rank for all layers is read")
    weights = Weights(directory, [WEIGHTS], None)
    found = set(weights.shapes)
    rank = written["r"]
    parts: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    problems = []
    for target, tensor, key in _targets(tower, Lora(rank), config):
        outputs, inputs = tensor.shape
        expected = {f"{key}.lora_A.weight": (rank, inputs), f"{key}.lora_B.weight": (outputs, rank)}
        if not found & expected.keys():
            continue
        wrong = [
            f"{name} is {weights.shapes.get(name, 'missing')}, the model asks for {shape}"
            for name, shape in expected.items()
            if weights.shapes.get(name) != shape
        ]
        problems += wrong
        found -= expected.keys()
        if not wrong:
            ins, outs = sides(target, (0, *tensor.our_shape))
            a, b = (weights.read(name).astype(np.float32).T for name in expected)
            parts.setdefault(target, {})[tensor.index[0]] = (a.reshape(*ins, rank), b.reshape(rank, *outs))
    problems += [f"unexpected: {name}" for name in found]
    depths = {tuple(sorted(layers)) for layers in parts.values()}
    if not problems and (len(depths) != 1 or next(iter(depths)) != tuple(range(len(next(iter(depths)))))):
        problems.append("the adapters are not of the same first layers for every target")
    if problems:
        raise ConversionError(f"{directory}: the adapter does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    tree: Params = {}
    for target, layers in parts.items():
        for number, name in enumerate(("lora_a", "lora_b")):
            put_at(tree, f"{target}/{name}", np.stack([layers[layer][number] for layer in sorted(layers)]))
    all_of_them = set(parts) == set(TARGETS[tower])
    targets = None if all_of_them else tuple(target for target in TARGETS[tower] if target in parts)
    return {"layers": tree}, Lora(rank, written["lora_alpha"], written.get("lora_dropout", 0.0), targets)


def _targets(tower: str, lora: Lora, config: ChatConfig) -> Iterator[tuple[str, Tensor, str]]:
    """The layers that have an adapter: our target, the published tensor of its kernel, peft's name for it."""
    wanted = {f"{tower}/layers/{target}/kernel": target for target in lora.targets_of(tower)}
    missing = set(wanted)
    for tensor in tensors(config):
        if tensor.path not in wanted:
            continue
        if len(tensor.index) != 1:
            raise ConversionError(
                f"{config.layout}: {tensor.key} is a part of {tensor.path}, which has one adapter here"
            )
        missing.discard(tensor.path)
        yield wanted[tensor.path], tensor, _WRAPPED + tensor.key.removeprefix(f"{tower}.").removesuffix(".weight")
    if missing:
        raise ConversionError(f"the model has no {', '.join(sorted(missing))}")

"""peft's adapter_config.json: which layers have an adapter, and their rank and scale.

A field that changes the result and is not implemented is refused by name, and so is an unknown field; a field that
cannot change the result is ignored. The lists are those of peft 0.21 and of adapters that earlier versions wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_convert.mapping import ConversionError
from internvl_jax.utils import files

MERGE_IT = "merge the adapter with peft (model.merge_and_unload(), save_pretrained) and convert that model"

# Fields about where an adapter comes from, how it was trained or how it is run.
HARMLESS_FIELDS = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config fan_in_fan_out inference_mode
    lora_ga_config loftq_config megatron_core merge_weights peft_version qalora_group_size revision runtime_config
    task_type unsloth_fixed velora_config""".split()
)
# Fields that only an empty value makes plain LoRA, and what other values mean.
REFUSED_FIELDS = {
    "alora_invocation_tokens": "activated LoRA works from certain tokens on, not on whole texts",
    "arrow_config": "Arrow chooses among adapters token by token",
    "enable_lora": "adapters of parts of a layer are not read",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers, which makes another model",
    "lora_bias": "adapters with a bias are not read",
    "megatron_config": "adapters of Megatron's layers are not read",
    "monteclora_config": "adapters that are drawn at random are not read",
    "target_parameters": "adapters of parameters that are not layers are not read",
    "trainable_token_indices": "rows of the embedding that were trained are not read",
    "use_bdlora": "block-diagonal adapters are not read",
    "use_dora": "DoRA scales the sum of weights and adapter",
    "use_qalora": "QALoRA sums inputs in groups",
}
# Values of init_lora_weights that do not change the base weights, and prefixes of those that do.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LAYER_LISTS = "target_modules exclude_modules modules_to_save layers_pattern".split()


@dataclass(frozen=True)
class PeftConfig:
    """Plain LoRA, with the fields of peft's LoraConfig. Names are those of modules in the model that peft wrapped."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")  # what peft chooses for LLaMA
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: int | tuple[int, ...] = ()
    layers_pattern: str | tuple[str, ...] = ()

    def selects(self, name: str) -> bool:
        """Whether the layer `name` has an adapter, by peft's rules (tuners_utils.check_target_module_exists)."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, name):
                return False
        elif _named(name, self.exclude_modules):
            return False
        if self.saves(name):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or bool(re.fullmatch(self.target_modules, name))
        if name in self.target_modules:
            return True
        return _named(name, self.target_modules) and self._is_transformed(name)

    def saves(self, name: str) -> bool:
        """Whether `name` is, or is in, a module that was trained and saved as a whole."""
        return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in self.modules_to_save)

    def rank_of(self, name: str) -> int:
        """The rank of the adapter of layer `name`."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, name), self.r)

    def scale_of(self, name: str) -> float:
        """The scale of layer `name`: alpha / rank."""
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, name), self.lora_alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _is_transformed(self, name: str) -> bool:
        chosen = self.layers_to_transform
        if chosen == ():
            return True
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in patterns or (r"[^.]*",):
            # Without a pattern peft wants something in front of the list of layers.
            start = rf"(?:^|.*?\.){pattern}" if patterns else r".*?\.[^.]*"
            found = re.match(rf"{start}\.(?P<index>\d+)\.", name)
            if found:
                return int(found["index"]) in ((chosen,) if isinstance(chosen, int) else chosen)
        return False


def read_config(path: Path) -> PeftConfig:
    """Read an adapter_config.json.

    Raises:
        OSError: the file cannot be read.
        TextError: it is not JSON.
        ConversionError: fields that are not plain LoRA, all listed with what to do.
    """
    written = files.read_json(path)
    if not isinstance(written, dict):
        raise ConversionError(f"{path} holds a {type(written).__name__}, not an object of fields")
    problems = _refusals(written)
    values: dict[str, Any] = {}
    for name in PeftConfig.__dataclass_fields__:
        if name not in written:
            continue
        try:
            value = _checked(name, written[name])
        except ValueError as error:
            problems.append(f"{name} = {written[name]!r}: {error}")
            continue
        if value is not None:
            values[name] = value
    if problems:
        raise ConversionError(
            f"{path} describes an adapter that is not read:\n  " + "\n  ".join(problems) + f"\nelse {MERGE_IT}"
        )
    return PeftConfig(**values)


def _refusals(written: Mapping[str, Any]) -> list[str]:
    problems = []
    if written.get("peft_type") != "LORA":
        problems.append(f"peft_type = {written.get('peft_type')!r}: only LORA is read")
    for name, why in REFUSED_FIELDS.items():
        if written.get(name):
            problems.append(f"{name} = {written[name]!r}: {why}")
    if written.get("bias", "none") not in ("none", None):
        problems.append(f"bias = {written['bias']!r}: biases that were trained with an adapter are not read")
    init = written.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGING_INITS):
        plain = "; save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), as plain LoRA"
        problems.append(
            f"init_lora_weights = {init!r}: it changes the base weights, and the adapter is for the changed ones"
            + ("" if init.lower().startswith("loftq") else plain)
        )
    elif (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        problems.append(f"init_lora_weights = {init!r}: this way of beginning is not known")
    if isinstance(written.get("target_modules"), str) and written.get("layers_to_transform") not in (None, []):
        problems.append("target_modules is a pattern and layers_to_transform is given: peft takes one of them")
    known = {
        *PeftConfig.__dataclass_fields__,
        *HARMLESS_FIELDS,
        *REFUSED_FIELDS,
        "peft_type",
        "bias",
        "init_lora_weights",
    }
    for name in sorted(set(written) - known):
        if written[name]:  # else it is turned off
            problems.append(
                f"{name} = {str(written[name])[:80]!r}: not known here; remove it from the file if it changes nothing"
            )
    return problems


def _checked(name: str, value: Any) -> Any:
    """The value of an understood field; None: peft's default. Raises ValueError that says what it must be."""
    if name == "r":
        return _whole(value)
    if name == "lora_alpha":
        return _number(value)
    if name == "lora_dropout":
        if value is None or 0 <= _number(value) < 1:
            return value
        raise ValueError("it must be in [0, 1)")
    if name == "use_rslora":
        if value not in (True, False, None):
            raise ValueError("it must be true or false")
        return value
    if name in ("rank_pattern", "alpha_pattern"):
        if value is not None and not isinstance(value, dict):
            raise ValueError("it must be an object of patterns and numbers")
        for pattern, number in (value or {}).items():
            _compiled(pattern)
            (_whole if name == "rank_pattern" else _number)(number)
        return value
    if name == "layers_to_transform":
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        if isinstance(value, list) and all(isinstance(one, int) for one in value):
            return tuple(value)
        raise ValueError("it must be a number or a list of numbers")
    assert name in _LAYER_LISTS
    if value is None or (isinstance(value, str) and name != "modules_to_save"):
        return value if value is None or value.lower() == "all-linear" else _compiled(value)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("it must be a list of names")
    return tuple(value if name in ("target_modules", "exclude_modules") else map(_compiled, value))


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a rank is a positive whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("it must be a number")
    return value


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


def _named(name: str, names: tuple[str, ...]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in names)


def _pattern_of(patterns: Mapping[str, Any], name: str) -> str:
    """The first pattern that fits the end of a name, as peft.utils.get_pattern_key finds it."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), name)

"""config.json of a language model, and the section for it in the layouts of chat models.

LLaMA, InternLM2, Qwen2 and Qwen3 are read and written, each with its own fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_jax.config.hf_section import NO_DROPOUT, Section
from internvl_jax.config.schema import FAMILIES, RopeScaling, TextConfig
from internvl_jax.config.validation import ConfigError

# Language models of InternVL that are not implemented, by the beginning of their model_type.
_NOT_IMPLEMENTED = {
    "phi3": "Phi3 (InternVL-Chat Mini and InternVL2-4B)",
    "internlm3": "InternLM3 (InternVL3-9B)",
    "qwen2_moe": "mixtures of experts",
    "qwen3_moe": "mixtures of experts (InternVL3.5 30B-A3B and 241B-A28B)",
    "gpt_oss": "GPT-OSS (InternVL3.5-GPT-OSS-20B)",
}
_MAX_POSITIONS = {"llama": 2048, "internlm2": 2048, "qwen2": 32768, "qwen3": 32768}  # transformers' defaults


def read_text(
    values: Mapping[str, Any], where: str, tie_word_embeddings: bool | None = None, family: str | None = None
) -> TextConfig:
    """Convert the configuration of a language model.

    Args:
        values: the JSON object.
        where: how error messages name it.
        tie_word_embeddings: overrides its own flag.
        family: of the language model; None: by its model_type.

    Raises:
        ConfigError: the language model is not implemented, or a field asks for something that is not.
    """
    section = Section(values, where)
    family = _family(values, where) if family is None else family
    section.only("hidden_act", "silu", why="the language model is implemented with SiLU only")
    section.only("attention_dropout", 0, why=NO_DROPOUT)
    if family == "internlm2":
        section.only("bias", False, why="InternLM2 is implemented without biases")
    if family in ("qwen2", "qwen3"):
        section.only("use_sliding_window", False, why="attention within a sliding window is not implemented")
        for name in ("sliding_window", "max_window_layers"):  # of no effect without use_sliding_window
            section.get(name)
        kinds = set(section.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise ConfigError(f"{where} has layer_types {', '.join(sorted(kinds))}: only full_attention is implemented")
    hidden, heads = section.need("hidden_size"), section.need("num_attention_heads")
    if section.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{where} has hidden_size {hidden}, which is not a multiple of num_attention_heads ({heads})")
    eos = section.get("eos_token_id", 2)
    theta, scaling = _rope(section)
    tied = section.get("tie_word_embeddings", False)
    config = TextConfig(
        vocab_size=section.need("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=section.need("num_hidden_layers"),
        num_attention_heads=heads,
        intermediate_size=section.need("intermediate_size"),
        num_key_value_heads=section.get("num_key_value_heads") or heads,
        head_dim=section.get("head_dim") or hidden // heads,
        max_position_embeddings=section.get("max_position_embeddings", _MAX_POSITIONS[family]),
        rms_norm_eps=section.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied if tie_word_embeddings is None else tie_word_embeddings,
        attention_bias=family in ("llama", "qwen3") and section.get("attention_bias", False),
        mlp_bias=family == "llama" and section.get("mlp_bias", False),
        family=family,
        bos_token_id=section.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        pad_token_id=section.get("pad_token_id"),
    )
    section.finish()
    return config


def _family(values: Mapping[str, Any], where: str) -> str:
    """The family by model_type and architecture."""
    model_type = values.get("model_type", "llama")
    for prefix, what in _NOT_IMPLEMENTED.items():
        if str(model_type).startswith(prefix):
            raise ConfigError(f"{where} has model_type {model_type!r}: {what} is not implemented; {_KNOWN}")
    architecture = (values.get("architectures") or [FAMILIES.get(model_type)])[0]
    if model_type not in FAMILIES or architecture != FAMILIES[model_type]:
        raise ConfigError(f"{where} has model_type {model_type!r} and architectures [{architecture!r}]; {_KNOWN}")
    return model_type


_KNOWN = f"the language models that are implemented: {', '.join(FAMILIES.values())}"


def _rope(section: Section) -> tuple[float, RopeScaling | None]:
    """(base, scaling) of transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    old = section.get("rope_scaling")
    values = dict(section.get("rope_parameters") or old or {})
    theta = values.pop("rope_theta", None) or section.get("rope_theta") or 10000.0
    section.used.add("rope_theta")
    values.setdefault("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    known = {name: values.pop(name, None) for name in RopeScaling.__dataclass_fields__}
    scaling = None if known["rope_type"] == "default" else RopeScaling(**known)
    if values:
        raise ConfigError(f"{section.where}: rope scaling has fields that are not implemented: {sorted(values)}")
    return theta, scaling


def write_text(text: TextConfig) -> dict[str, Any]:
    """Return the configuration of a language model in its family's form."""
    eos = text.eos_token_ids
    scaling = text.rope_scaling
    own: dict[str, Any] = {}
    if text.family == "llama":
        own = {"head_dim": text.head_dim, "attention_bias": text.attention_bias, "mlp_bias": text.mlp_bias}
    elif text.family == "internlm2":
        own = {"bias": False}
    elif text.family == "qwen2":
        own = {"use_sliding_window": False}
    elif text.family == "qwen3":
        own = {"head_dim": text.head_dim, "attention_bias": text.attention_bias, "use_sliding_window": False}
    return {
        "architectures": [FAMILIES[text.family]],
        "model_type": text.family,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None if scaling is None else {k: v for k, v in vars(scaling).items() if v is not None},
        "tie_word_embeddings": text.tie_word_embeddings,
        **own,
        "hidden_act": "silu",
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": text.pad_token_id,
    }

"""LLaMA's config.json, and the section for the language model in the layouts of chat models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_jax.config.hf_section import NO_DROPOUT, Section
from internvl_jax.config.schema import RopeScaling, TextConfig
from internvl_jax.config.validation import ConfigError


def text_from_llama(values: Mapping[str, Any], where: str, tie_word_embeddings: bool | None = None) -> TextConfig:
    """Convert a LlamaConfig; tie_word_embeddings overrides its own flag."""
    section = Section(values, where)
    section.only("hidden_act", "silu", why="LLaMA is implemented with SiLU only")
    section.only("attention_dropout", 0, why=NO_DROPOUT)
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
        max_position_embeddings=section.get("max_position_embeddings", 2048),
        rms_norm_eps=section.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied if tie_word_embeddings is None else tie_word_embeddings,
        attention_bias=section.get("attention_bias", False),
        mlp_bias=section.get("mlp_bias", False),
        bos_token_id=section.get("bos_token_id", 1),
        eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        pad_token_id=section.get("pad_token_id"),
    )
    section.finish()
    return config


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


def text_to_llama(text: TextConfig) -> dict[str, Any]:
    """Return the LlamaConfig of a language model."""
    eos = text.eos_token_ids
    scaling = text.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": None if scaling is None else {k: v for k, v in vars(scaling).items() if v is not None},
        "tie_word_embeddings": text.tie_word_embeddings,
        "attention_bias": text.attention_bias,
        "mlp_bias": text.mlp_bias,
        "hidden_act": "silu",
        "bos_token_id": text.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": text.pad_token_id,
    }

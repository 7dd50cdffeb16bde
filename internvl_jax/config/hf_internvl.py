"""Reading and writing config.json of OpenGVLab's InternViT and InternVL-Chat, and of transformers' InternVL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_jax.config.hf_section import NO_DROPOUT, Section
from internvl_jax.config.hf_text import read_text, write_text
from internvl_jax.config.schema import ChatConfig, ProjectorConfig, VisionConfig
from internvl_jax.config.validation import ConfigError, require, unshuffle_factor


def read_internvl_chat(config: Mapping[str, Any]) -> ChatConfig:
    """Convert OpenGVLab's InternVLChatConfig."""
    section = Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("llm_config")
    section.only("use_backbone_lora", 0, why="merge the LoRA weights into the checkpoint first")
    section.only("use_llm_lora", 0, why="merge the LoRA weights into the checkpoint first")
    vision = vision_from_intern_vit(vision_section, "config.json: vision_config")
    text = read_text(text_section, "config.json: llm_config")
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * unshuffle_factor(ratio) ** 2, text.hidden_size),
        text=text,
        layout="internvl_chat",
        select_layer=section.get("select_layer", -1),
        downsample_ratio=ratio,
        ps_version=section.get("ps_version", "v1"),
        image_size=section.get("force_image_size") or vision.image_size,
        template=section.get("template"),
        system_message=section.get("system_message"),
        dynamic_image_size=section.get("dynamic_image_size", False),
        min_dynamic_patch=section.get("min_dynamic_patch", 1),
        max_dynamic_patch=section.get("max_dynamic_patch", 6),
        use_thumbnail=section.get("use_thumbnail", False),
        pad_to_square=section.get("pad2square", False),
    )
    section.finish("tie_word_embeddings")  # llm_config says whether embeddings are tied
    return chat


def read_hf_internvl(config: Mapping[str, Any]) -> ChatConfig:
    """Convert transformers' InternVLConfig."""
    section = Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("text_config")
    section.only("projector_hidden_act", "gelu", why="the projector is implemented with exact GELU only")
    section.only(
        "vision_feature_select_strategy", "default", why="only features without the class token are implemented"
    )
    if text_section.get("model_type") not in ("llama", "qwen2", "qwen3"):
        raise ConfigError(
            f"text_config has model_type {text_section.get('model_type')!r}: of transformers' layout llama, qwen2 and "
            "qwen3 are implemented"
        )
    select = section.get("vision_feature_layer", -1)
    if isinstance(select, (list, tuple)):
        raise ConfigError(f"config.json has vision_feature_layer = {select!r}: only one layer can be selected")
    vision = _vision_from_hf(vision_section, "config.json: vision_config")
    # transformers 5 reads the outer flag, earlier versions wrote the inner one only.
    tied = section.get("tie_word_embeddings")
    text = read_text(text_section, "config.json: text_config", tied)
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * unshuffle_factor(ratio) ** 2, text.hidden_size),
        text=text,
        layout="internvl",
        select_layer=select,
        downsample_ratio=ratio,
        ps_version="v2",
        template=section.get("template"),
        image_token_id=section.need("image_token_id"),
    )
    stated = section.get("image_seq_length", chat.tokens_per_image)
    require(
        stated == chat.tokens_per_image,
        f"config.json has image_seq_length {stated}, its image and patch sizes give {chat.tokens_per_image}",
    )
    section.finish()
    return chat


def vision_from_intern_vit(values: Mapping[str, Any], where: str) -> VisionConfig:
    """Convert OpenGVLab's InternVisionConfig."""
    section = Section(values, where)
    section.only("hidden_act", "gelu", why="InternViT is implemented with exact GELU only")
    section.only("dropout", 0, why=NO_DROPOUT)
    section.only("attention_dropout", 0, why=NO_DROPOUT)
    eps = section.get("layer_norm_eps", 1e-6)
    config = VisionConfig(
        hidden_size=section.need("hidden_size"),
        num_hidden_layers=section.need("num_hidden_layers"),
        num_attention_heads=section.need("num_attention_heads"),
        intermediate_size=section.need("intermediate_size"),
        image_size=section.need("image_size"),
        patch_size=section.get("patch_size", 14),
        num_channels=section.get("num_channels", 3),
        norm_type=section.get("norm_type", "rms_norm"),
        layer_norm_eps=eps,
        qk_normalization=section.get("qk_normalization", True),
        qk_norm_eps=eps,
        qkv_bias=section.get("qkv_bias", False),
        drop_path_rate=section.get("drop_path_rate", 0.0),
    )
    section.finish("bos_token_id eos_token_id pad_token_id tie_word_embeddings")
    return config


def _vision_from_hf(values: Mapping[str, Any], where: str) -> VisionConfig:
    section = Section(values, where)
    section.only("hidden_act", "gelu", why="InternViT is implemented with exact GELU only")
    for name in ("hidden_dropout_prob", "attention_dropout", "projection_dropout"):
        section.only(name, 0, why=NO_DROPOUT)
    section.only("use_mean_pooling", True, why="the final LayerNorm of class-token pooling is not implemented")
    section.only("use_absolute_position_embeddings", True, why="position embeddings are required")
    section.get("use_mask_token")
    config = VisionConfig(
        hidden_size=section.need("hidden_size"),
        num_hidden_layers=section.need("num_hidden_layers"),
        num_attention_heads=section.need("num_attention_heads"),
        intermediate_size=section.need("intermediate_size"),
        image_size=_square(section.need("image_size"), where, "image_size"),
        patch_size=_square(section.get("patch_size", 14), where, "patch_size"),
        num_channels=section.get("num_channels", 3),
        norm_type=section.get("norm_type", "layer_norm"),
        layer_norm_eps=section.get("layer_norm_eps", 1e-6),
        qk_normalization=section.get("use_qk_norm", False),
        qk_norm_eps=1e-6,  # transformers does not pass layer_norm_eps to q_norm and k_norm
        qkv_bias=section.get("attention_bias", False),
    )
    section.finish()
    return config


def _square(value: Any, where: str, name: str) -> int:
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ConfigError(f"{where} has {name} = {value!r}: only square images and patches are implemented")
    return sides[0]


def write_internvl_chat(config: ChatConfig) -> dict[str, Any]:
    """Return OpenGVLab's InternVLChatConfig."""
    text = config.required_text
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": vision_to_intern_vit(config.required_vision),
        "llm_config": write_text(text),
        "select_layer": config.select_layer,
        "downsample_ratio": config.downsample_ratio,
        "ps_version": config.ps_version,
        "force_image_size": config.image_size,
        "template": config.template,
        "pad2square": config.pad_to_square,
        **({} if config.system_message is None else {"system_message": config.system_message}),
        "dynamic_image_size": config.dynamic_image_size,
        "use_thumbnail": config.use_thumbnail,
        **_tiles(config),
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def _tiles(config: ChatConfig) -> dict[str, int]:
    """Bounds of the number of tiles, where they are not those of a file without these fields."""
    if (config.min_dynamic_patch, config.max_dynamic_patch) == (1, 6) and not config.dynamic_image_size:
        return {}
    return {"min_dynamic_patch": config.min_dynamic_patch, "max_dynamic_patch": config.max_dynamic_patch}


def vision_to_intern_vit(vision: VisionConfig) -> dict[str, Any]:
    """Return OpenGVLab's InternVisionConfig."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.num_channels,
        "norm_type": vision.norm_type,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": "gelu",
        "qk_normalization": vision.qk_normalization,
        "qkv_bias": vision.qkv_bias,
        "drop_path_rate": vision.drop_path_rate,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def write_hf_internvl(config: ChatConfig) -> dict[str, Any]:
    """Return transformers' InternVLConfig."""
    vision, text = config.required_vision, config.required_text
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "num_channels": vision.num_channels,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu",
            "use_qk_norm": vision.qk_normalization,
            "attention_bias": vision.qkv_bias,
            "use_mean_pooling": True,
        },
        "text_config": write_text(text),
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": "gelu",
        "image_token_id": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "tie_word_embeddings": text.tie_word_embeddings,
    }

"""Reading and writing config.json of LLaVA's own layout, of transformers' LLaVA, and of CLIP's vision model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from internvl_jax.config.hf_internvl import vision_from_intern_vit
from internvl_jax.config.hf_section import NO_DROPOUT, Section
from internvl_jax.config.hf_text import read_text, write_text
from internvl_jax.config.schema import IMAGE_TOKEN_INDEX, ChatConfig, ProjectorConfig, VisionConfig, clip_vision
from internvl_jax.config.validation import ConfigError

# transformers' defaults, which its files omit.
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}

# LLaVA's fields beside LLaMA's, without and with an effect on the model.
_LLAVA_IGNORED = """freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_grid_pinpoints
    image_split_resolution mm_projector_lr mm_use_im_patch_token mm_vision_tower_lr tokenizer_model_max_length
    tokenizer_padding_side tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj""".split()
_LLAVA_FIELDS = """force_image_size image_aspect_ratio mm_hidden_size mm_patch_merge_type mm_projector_type
    mm_resampler_type mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer mm_vision_tower
    template""".split()


def read_llava(config: Mapping[str, Any], vision_tower: Mapping[str, Any] | None) -> ChatConfig:
    """Convert LLaVA's own LlavaConfig, with the vision tower's config.json beside it."""
    if config.get("mm_vision_tower") is None:
        raise ConfigError("config.json of model_type 'llava' has neither a text_config nor an mm_vision_tower")
    section = Section({name: config[name] for name in _LLAVA_FIELDS if name in config}, "config.json")
    section.only("mm_projector_type", "mlp2x_gelu", why="only LLaVA-1.5's two-layer projector is implemented")
    section.only("mm_vision_select_feature", "patch", why="only features without the class token are implemented")
    section.only("mm_use_im_start_end", False, why="tokens around images (LLaVA-1) are not implemented")
    section.only("mm_resampler_type", None, why="resamplers are not implemented")
    section.only("mm_patch_merge_type", "flat", why="tiles (LLaVA-1.6) are not implemented")
    section.only("image_aspect_ratio", "square", "pad", None, why="tiles (LLaVA-1.6) are not implemented")
    name = section.need("mm_vision_tower")
    if not isinstance(name, str):
        raise ConfigError(f"config.json has mm_vision_tower = {name!r}, which is not a string")
    if vision_tower is None:
        raise ConfigError(f"config.json names the vision tower {name}: the tower's config.json is needed too")
    kind = vision_tower.get("model_type")
    if kind == "intern_vit_6b":
        vision = vision_from_intern_vit(vision_tower, f"config.json of {name}")
        image_size = 448 if "448" in name else 336  # the reference's rule; image_size of the tower is not used
    elif kind in ("clip", "clip_vision_model"):
        values = vision_tower.get("vision_config") or {} if kind == "clip" else vision_tower
        vision = _vision_from_clip(values, f"config.json of {name}")
        image_size = vision.image_size
    else:
        raise ConfigError(f"config.json of {name} has model_type {kind!r}: clip and intern_vit_6b are implemented")
    section.only("mm_hidden_size", vision.hidden_size, why=f"the width of {name} is {vision.hidden_size}")
    own = {k: v for k, v in config.items() if k not in (*_LLAVA_FIELDS, *_LLAVA_IGNORED)}
    text = read_text(own, "config.json", family="llama")
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size, text.hidden_size, layer_norm=False),
        text=text,
        layout="llava",
        select_layer=section.need("mm_vision_select_layer"),
        downsample_ratio=1.0,
        ps_version="v2",
        image_size=section.get("force_image_size") or image_size,
        template=section.get("template") or "vicuna_v1",
        pad_to_square=section.get("image_aspect_ratio") == "pad",
        center_crop=True,
        image_token_id=IMAGE_TOKEN_INDEX,
        vision_tower=name,
    )


def read_hf_llava(config: Mapping[str, Any]) -> ChatConfig:
    """Convert transformers' LlavaConfig."""
    section = Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("text_config")
    section.only("projector_hidden_act", "gelu", why="the projector is implemented with exact GELU only")
    section.only("multimodal_projector_bias", True, why="the projector is implemented with biases only")
    section.only(
        "vision_feature_select_strategy", "default", why="only features without the class token are implemented"
    )
    if text_section.get("model_type") != "llama":
        raise ConfigError(f"text_config has model_type {text_section.get('model_type')!r}: only llama is implemented")
    if vision_section.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ConfigError(f"vision_config has model_type {vision_section['model_type']!r}: only CLIP's is implemented")
    select = section.get("vision_feature_layer", -2)
    if isinstance(select, (list, tuple)):
        raise ConfigError(f"config.json has vision_feature_layer = {select!r}: only one layer can be selected")
    vision = _vision_from_clip(vision_section, "config.json: vision_config")
    values, pad = {**_LLAMA_DEFAULTS, **text_section}, section.get("pad_token_id")
    if values.get("pad_token_id") is None:
        values["pad_token_id"] = pad
    text = read_text(values, "config.json: text_config", section.get("tie_word_embeddings"))
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size, text.hidden_size, layer_norm=False),
        text=text,
        layout="llava_hf",
        select_layer=select,
        downsample_ratio=1.0,
        ps_version="v2",
        template=section.get("template") or "vicuna_v1",
        center_crop=True,
        image_token_id=section.get("image_token_id") or section.need("image_token_index"),
    )
    # image_seq_length is 576 by default whatever the image size; only transformers' processor reads it.
    section.finish("ignore_index image_seq_length image_token_index vocab_size")
    return chat


def _vision_from_clip(values: Mapping[str, Any], where: str) -> VisionConfig:
    """Convert transformers' CLIPVisionConfig."""
    section = Section({**_CLIP_DEFAULTS, **values}, where)
    section.only("hidden_act", "quick_gelu", why="CLIP is implemented with quick GELU only")
    section.only("attention_dropout", 0, why=NO_DROPOUT)
    section.only("dropout", 0, why=NO_DROPOUT)
    config = clip_vision(
        **{name: section.need(name) for name in _CLIP_DEFAULTS}, num_channels=section.get("num_channels", 3)
    )
    config = replace(config, layer_norm_eps=section.get("layer_norm_eps", 1e-5))
    # vocab_size and the token ids belong to CLIP's text model.
    section.finish("projection_dim vocab_size bos_token_id eos_token_id pad_token_id tie_word_embeddings")
    return config


def write_llava(config: ChatConfig) -> dict[str, Any]:
    """Return LLaVA's own LlavaConfig."""
    return {
        **write_text(config.required_text),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": config.vision_tower,
        "mm_hidden_size": config.required_vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "force_image_size": config.image_size,
        "image_aspect_ratio": "pad" if config.pad_to_square else "square",
    }


def write_hf_llava(config: ChatConfig) -> dict[str, Any]:
    """Return transformers' LlavaConfig."""
    text = config.required_text
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": vision_to_clip(config.required_vision),
        "text_config": write_text(text),
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "pad_token_id": text.pad_token_id,
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def vision_to_clip(vision: VisionConfig) -> dict[str, Any]:
    """Return transformers' CLIPVisionConfig."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": vision.num_channels,
        "hidden_act": vision.hidden_act,
        "layer_norm_eps": vision.layer_norm_eps,
    }

"""Hugging Face's config.json: from and to the project's configurations, one pair of functions per layout.

A field that would change the numbers and that this code does not implement raises ConfigError; a field that this code
does not know is named in a warning; Hugging Face's boilerplate that cannot change the numbers is skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from internvl_jax.config.schema import (
    IMAGE_TOKEN_INDEX,
    LAYOUTS,
    LIMITS,
    ChatConfig,
    ConfigError,
    ProjectorConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
    clip_vision,
    require,
    require_size,
    unshuffle_of,
)
from internvl_jax.processing.conversation import TEMPLATES

logger = logging.getLogger(__name__)

_OWN_TEMPLATE = {"llava": "vicuna_v1", "llava_hf": "vicuna_v1"}

# What PretrainedConfig writes into every section (older versions GenerationConfig's fields too), and what describes
# training, generation defaults or kernels only.
_BOILERPLATE = frozenset(
    """_experts_implementation _from_model_config _model_name_or_path _output_attentions assistant_confidence_threshold
    assistant_early_exit assistant_ensemble_weight assistant_lookbehind attn_implementation cache_config
    cache_implementation cls_token_id compile_config compression_config constraints continuous_batching_config
    disable_compile dola_layers encoder_repetition_penalty epsilon_cutoff eta_cutoff experts_implementation
    force_words_ids gradient_checkpointing guidance_scale is_assistant is_composition keys_to_ignore_at_inference
    low_memory mask_token_id max_cache_len max_matching_ngram_size max_new_tokens max_time min_new_tokens min_p
    name_or_path num_assistant_tokens num_assistant_tokens_schedule output_logits penalty_alpha prefill_chunk_size
    prompt_lookup_num_tokens quantization_config renormalize_logits sequence_bias speculation_type stop_strings
    target_lookbehind token_healing top_h unk_token_id use_mtp use_return_dict watermarking_config
    _commit_hash _name_or_path _attn_implementation _attn_implementation_autoset add_cross_attention architectures
    auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_factor initializer_range is_decoder is_encoder_decoder label2id layer_scale_init_value length_penalty
    max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache use_flash_attn""".split()
)


def read(config: Mapping[str, Any], tower: Mapping[str, Any] | None = None) -> ChatConfig:
    """The configuration that a published config.json describes. Raises ConfigError naming what cannot be run.

    tower: the dictionary of the vision tower's own config.json, which LLaVA's layout needs.
    """
    model_type = config.get("model_type")
    if model_type == "llava_llama":  # what LLaVA's code calls its layout since transformers took the name
        model_type = "llava"
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        known = ", ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
        raise ConfigError(f"config.json has model_type {model_type!r}; the layouts that can be read are: {known}")
    try:
        _refuse_quantized(config, "config.json")
        _refuse_quantized(tower or {}, "the vision tower's config.json")
        if model_type == "internvl_chat":
            return _chat_from_internvl_chat(config)
        if model_type == "internvl":
            return _chat_from_hf_internvl(config)
        if model_type == "llava" and "text_config" in config:
            return _chat_from_hf_llava(config)
        if model_type == "llava":
            return _chat_from_llava(config, tower)
        if model_type == "intern_vit_6b":
            vision = _vision_from_internvit(config, "config.json")
            return ChatConfig(vision=vision, projector=None, text=None, layout="intern_vit_6b")
        return ChatConfig(vision=None, projector=None, text=_text_from_hf(config, "config.json"), layout="llama")
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A text where a number belongs, a list where a section belongs: the file is not what its model_type says.
        raise ConfigError(f"config.json of model_type {model_type!r} has a value of the wrong kind ({error})") from None


def _refuse_quantized(values: Mapping[str, Any], where: str) -> None:
    """Quantized tensors have other names and dtypes; lists of those would not say why."""
    for name in ("quantization_config", "compression_config"):
        settings = values.get(name)
        if not settings:
            continue
        settings = settings if isinstance(settings, Mapping) else {}
        loaded = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        method = settings.get("quant_method") or ("bitsandbytes" if loaded else "a method that it does not name")
        if str(method).startswith("bitsandbytes") and not loaded:
            continue  # what training with both turned off leaves there
        bits = settings.get("bits") or settings.get("w_bit") or (4 if settings.get("load_in_4bit") else None)
        raise ConfigError(
            f"{where} has a {name}: the checkpoint is quantized by {method}{f' ({bits} bits)' if bits else ''}, which "
            "is not read: take the checkpoint that it was made from (convert --quantize int8 or int4 quantizes it here)"
        )
    for name in ("vision_config", "text_config", "llm_config"):
        if isinstance(values.get(name), Mapping):
            _refuse_quantized(values[name], f"{where}: {name}")


def write(config: ChatConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json dictionary of a configuration in its layout, over the fields of `base` that we do not know."""
    merged = dict(base or {})
    if config.layout == "internvl_chat":
        values = _chat_to_internvl_chat(config)
    elif config.layout == "internvl":
        values = _chat_to_hf_internvl(config)
    elif config.layout == "llava":
        values = _chat_to_llava(config)
    elif config.layout == "llava_hf":
        values = _chat_to_hf_llava(config)
    elif config.layout == "intern_vit_6b":
        values = _vision_to_internvit(config.vision)
    else:
        values = _text_to_hf(config.text)
    # The others' layouts have no place for a template; one that is not their own is told as internvl_chat's is.
    if config.layout in ("internvl", "llava", "llava_hf") and config.template in TEMPLATES:
        if config.template != _OWN_TEMPLATE.get(config.layout):
            values["template"] = config.template
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if nested else value
    return merged


def write_tower(config: ChatConfig) -> dict[str, Any] | None:
    """The config.json dictionary of the vision tower's own directory; None where the layout has none."""
    if config.layout != "llava":
        return None
    if not config.vision.embedding_norm:
        return _vision_to_internvit(config.vision)
    return {"architectures": ["CLIPVisionModel"], **_vision_to_clip(config.vision)}


@dataclass
class _Section:
    """One JSON object, read field by field, so that what nobody asked for can be named at the end."""

    values: Mapping[str, Any]
    where: str
    used: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        value = self.values.get(name, default)
        if name in LIMITS and value is not None:
            sides = value if isinstance(value, (list, tuple)) and name in ("image_size", "patch_size") else ()
            for size in sides or [value]:
                require_size(name, size, f"{self.where} has {name} =")
        return value

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{self.where} has no {name!r}")
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a field whose value would need code that is not here."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ConfigError(f"{self.where} has {name} = {value!r}: {why}")

    def finish(self, ignored: str = "") -> None:
        unknown = sorted(set(self.values) - self.used - _BOILERPLATE - set(ignored.split()))
        if unknown:
            logger.warning("%s: ignored fields: %s", self.where, ", ".join(unknown))


_NO_DROPOUT = "dropout is not implemented (no published recipe uses it)"


def _vision_from_internvit(values: Mapping[str, Any], where: str) -> VisionConfig:
    section = _Section(values, where)
    section.only("hidden_act", "gelu", why="InternViT is implemented with exact GELU only")
    section.only("dropout", 0, why=_NO_DROPOUT)
    section.only("attention_dropout", 0, why=_NO_DROPOUT)
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


def _vision_from_hf_internvl(values: Mapping[str, Any], where: str) -> VisionConfig:
    section = _Section(values, where)
    section.only("hidden_act", "gelu", why="InternViT is implemented with exact GELU only")
    for name in ("hidden_dropout_prob", "attention_dropout", "projection_dropout"):
        section.only(name, 0, why=_NO_DROPOUT)
    section.only("use_mean_pooling", True, why="the final LayerNorm of class-token pooling is not implemented")
    section.only("use_absolute_position_embeddings", True, why="a position table is required")
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
        qk_norm_eps=1e-6,  # transformers' module does not pass the config's eps on to q_norm and k_norm
        qkv_bias=section.get("attention_bias", False),
    )
    section.finish()
    return config


def _square(value: Any, where: str, name: str) -> int:
    sides = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ConfigError(f"{where} has {name} = {value!r}: only square images and patches are implemented")
    return sides[0]


def _text_from_hf(values: Mapping[str, Any], where: str, tie_word_embeddings: bool | None = None) -> TextConfig:
    section = _Section(values, where)
    section.only("hidden_act", "silu", why="LLaMA is implemented with SiLU only")
    section.only("attention_dropout", 0, why=_NO_DROPOUT)
    hidden, heads = section.need("hidden_size"), section.need("num_attention_heads")
    if section.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{where} has hidden_size {hidden}, which {heads} num_attention_heads do not divide")
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


def _rope(section: _Section) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
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


def _chat_from_internvl_chat(config: Mapping[str, Any]) -> ChatConfig:
    section = _Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("llm_config")
    section.only("dynamic_image_size", False, why="dynamic tiling (InternVL 1.5 and later) is not implemented")
    section.only("use_backbone_lora", 0, why="merge the LoRA weights into the checkpoint first")
    section.only("use_llm_lora", 0, why="merge the LoRA weights into the checkpoint first")
    architecture = (text_section.get("architectures") or ["LlamaForCausalLM"])[0]
    if text_section.get("model_type", "llama") != "llama" or architecture != "LlamaForCausalLM":
        raise ConfigError(f"llm_config has architectures {architecture}: only LlamaForCausalLM is implemented")
    vision = _vision_from_internvit(vision_section, "config.json: vision_config")
    text = _text_from_hf(text_section, "config.json: llm_config")
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * unshuffle_of(ratio) ** 2, text.hidden_size),
        text=text,
        layout="internvl_chat",
        select_layer=section.get("select_layer", -1),
        downsample_ratio=ratio,
        ps_version=section.get("ps_version", "v1"),
        image_size=section.get("force_image_size") or vision.image_size,
        template=section.get("template"),
        pad_to_square=section.get("pad2square", False),
    )
    # Dynamic tiling is refused above, so its bounds mean nothing; the LLM's own section says whether heads are tied.
    section.finish("max_dynamic_patch min_dynamic_patch use_thumbnail tie_word_embeddings")
    return chat


def _chat_from_hf_internvl(config: Mapping[str, Any]) -> ChatConfig:
    section = _Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("text_config")
    section.only("projector_hidden_act", "gelu", why="the projector is implemented with exact GELU only")
    section.only("vision_feature_select_strategy", "default", why="only patch features without the class token")
    if text_section.get("model_type") != "llama":
        raise ConfigError(f"text_config has model_type {text_section.get('model_type')!r}: only llama is implemented")
    select = section.get("vision_feature_layer", -1)
    if isinstance(select, (list, tuple)):
        raise ConfigError(f"config.json has vision_feature_layer = {select!r}: only one layer can be selected")
    vision = _vision_from_hf_internvl(vision_section, "config.json: vision_config")
    # transformers 5 ties by the outer flag, earlier versions wrote the inner one only.
    tied = section.get("tie_word_embeddings")
    text = _text_from_hf(text_section, "config.json: text_config", tied)
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * unshuffle_of(ratio) ** 2, text.hidden_size),
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


# transformers' defaults, which its files leave out.
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


def _vision_from_clip(values: Mapping[str, Any], where: str) -> VisionConfig:
    """transformers' CLIPVisionConfig."""
    section = _Section({**_CLIP_DEFAULTS, **values}, where)
    section.only("hidden_act", "quick_gelu", why="CLIP's tower is implemented with quick GELU only")
    section.only("attention_dropout", 0, why=_NO_DROPOUT)
    section.only("dropout", 0, why=_NO_DROPOUT)
    config = clip_vision(
        **{name: section.need(name) for name in _CLIP_DEFAULTS}, num_channels=section.get("num_channels", 3)
    )
    config = replace(config, layer_norm_eps=section.get("layer_norm_eps", 1e-5))
    # vocab_size and the token ids are the text half's.
    section.finish("projection_dim vocab_size bos_token_id eos_token_id pad_token_id tie_word_embeddings")
    return config


# What LLaVA's config.json has beside LLaMA's fields and does not change the numbers.
_LLAVA_IGNORED = """freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_grid_pinpoints
    image_split_resolution mm_projector_lr mm_use_im_patch_token mm_vision_tower_lr tokenizer_model_max_length
    tokenizer_padding_side tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj""".split()
_LLAVA_FIELDS = """force_image_size image_aspect_ratio mm_hidden_size mm_patch_merge_type mm_projector_type
    mm_resampler_type mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer mm_vision_tower
    template""".split()


def _chat_from_llava(config: Mapping[str, Any], tower: Mapping[str, Any] | None) -> ChatConfig:
    """LLaVA's own layout: LLaMA's fields and mm_... in one object, the tower's configuration in another file."""
    if config.get("mm_vision_tower") is None:
        raise ConfigError("config.json of model_type 'llava' has neither a text_config nor an mm_vision_tower")
    section = _Section({name: config[name] for name in _LLAVA_FIELDS if name in config}, "config.json")
    section.only("mm_projector_type", "mlp2x_gelu", why="only LLaVA-1.5's two-layer projector is implemented")
    section.only("mm_vision_select_feature", "patch", why="only patch features without the class token")
    section.only("mm_use_im_start_end", False, why="tokens around images (LLaVA-1) are not implemented")
    section.only("mm_resampler_type", None, why="resamplers are not implemented")
    section.only("mm_patch_merge_type", "flat", why="tiles (LLaVA-1.6) are not implemented")
    section.only("image_aspect_ratio", "square", "pad", None, why="tiles (LLaVA-1.6) are not implemented")
    name = section.need("mm_vision_tower")
    if not isinstance(name, str):
        raise ConfigError(f"config.json has mm_vision_tower = {name!r}, which is not a name")
    if tower is None:
        raise ConfigError(f"config.json names the vision tower {name}: its own config.json is needed too")
    kind = tower.get("model_type")
    if kind == "intern_vit_6b":
        vision = _vision_from_internvit(tower, f"config.json of {name}")
        image_size = 448 if "448" in name else 336  # the rule of the reference, whatever the position table
    elif kind in ("clip", "clip_vision_model"):
        values = tower.get("vision_config") or {} if kind == "clip" else tower
        vision = _vision_from_clip(values, f"config.json of {name}")
        image_size = vision.image_size
    else:
        raise ConfigError(f"config.json of {name} has model_type {kind!r}: clip and intern_vit_6b are implemented")
    section.only("mm_hidden_size", vision.hidden_size, why=f"the width of {name} is {vision.hidden_size}")
    text = _text_from_hf({k: v for k, v in config.items() if k not in (*_LLAVA_FIELDS, *_LLAVA_IGNORED)}, "config.json")
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
        centre_crop=True,
        image_token_id=IMAGE_TOKEN_INDEX,
        tower=name,
    )


def _chat_from_hf_llava(config: Mapping[str, Any]) -> ChatConfig:
    section = _Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("text_config")
    section.only("projector_hidden_act", "gelu", why="the projector is implemented with exact GELU only")
    section.only("multimodal_projector_bias", True, why="the projector is implemented with biases only")
    section.only("vision_feature_select_strategy", "default", why="only patch features without the class token")
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
    text = _text_from_hf(values, "config.json: text_config", section.get("tie_word_embeddings"))
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size, text.hidden_size, layer_norm=False),
        text=text,
        layout="llava_hf",
        select_layer=select,
        downsample_ratio=1.0,
        ps_version="v2",
        template=section.get("template") or "vicuna_v1",
        centre_crop=True,
        image_token_id=section.get("image_token_id") or section.need("image_token_index"),
    )
    # image_seq_length is 576 by default whatever the images, and read by the processor only.
    section.finish("ignore_index image_seq_length image_token_index vocab_size")
    return chat


def _vision_to_internvit(vision: VisionConfig) -> dict[str, Any]:
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


def _text_to_hf(text: TextConfig) -> dict[str, Any]:
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


def _chat_to_internvl_chat(config: ChatConfig) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": _vision_to_internvit(config.vision),
        "llm_config": _text_to_hf(config.text),
        "select_layer": config.select_layer,
        "downsample_ratio": config.downsample_ratio,
        "ps_version": config.ps_version,
        "force_image_size": config.image_size,
        "template": config.template,
        "pad2square": config.pad_to_square,
        "dynamic_image_size": False,
        "use_thumbnail": False,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def _chat_to_hf_internvl(config: ChatConfig) -> dict[str, Any]:
    vision = config.vision
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
        "text_config": _text_to_hf(config.text),
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": "gelu",
        "image_token_id": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def _vision_to_clip(vision: VisionConfig) -> dict[str, Any]:
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


def _chat_to_llava(config: ChatConfig) -> dict[str, Any]:
    return {
        **_text_to_hf(config.text),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": config.tower,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "force_image_size": config.image_size,
        "image_aspect_ratio": "pad" if config.pad_to_square else "square",
    }


def _chat_to_hf_llava(config: ChatConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": _vision_to_clip(config.vision),
        "text_config": _text_to_hf(config.text),
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_image,
        "pad_token_id": config.text.pad_token_id,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }

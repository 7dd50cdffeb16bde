"""Configurations: frozen dataclasses read from, and written back to, Hugging Face `config.json` dictionaries.

One `ChatConfig` describes every model of the family; a part that a checkpoint does not have is None, so a bare
InternViT or a bare LLaMA is a ChatConfig with one part. `layout` remembers which published layout (key names of the
tensors and of config.json) the configuration came from, because that is the layout an export goes back to.

Values are read from the checkpoint's own file; nothing here assumes a published size. A field that would change the
numbers and that this code does not implement raises ConfigError; a field that this code does not know is named in a
ConfigWarning; Hugging Face's boilerplate that cannot change the numbers is skipped silently.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A config.json that this code cannot run as written; the message names the field and what to do."""


class ConfigWarning(UserWarning):
    """A field of a config.json that has no effect here."""


# config.json's "model_type" -> what the layout holds. The names are Hugging Face's.
LAYOUTS = {
    "internvl_chat": "OpenGVLab's InternVLChatModel (InternVL-Chat-V1-1)",
    "internvl": "transformers' InternVLForConditionalGeneration",
    "intern_vit_6b": "OpenGVLab's standalone InternViT",
    "llama": "a plain LlamaForCausalLM",
}

# What PretrainedConfig writes into every section and what describes training, generation defaults or kernels only.
_BOILERPLATE = frozenset(
    """_commit_hash _name_or_path _attn_implementation _attn_implementation_autoset add_cross_attention architectures
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


@dataclass(frozen=True)
class VisionConfig:
    """InternViT (Chen et al., "InternVL", 2023): a pre-norm ViT with layer scale and q/k norm over all heads."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int  # pixels per side of the images that the position table was trained for
    patch_size: int = 14
    num_channels: int = 3
    norm_type: str = "rms_norm"  # or "layer_norm"
    layer_norm_eps: float = 1e-6
    qk_normalization: bool = True
    qk_norm_eps: float = 1e-6
    qkv_bias: bool = False
    drop_path_rate: float = 0.0

    def __post_init__(self):
        _require_positive(self, "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size")
        _require(self.hidden_size % self.num_attention_heads == 0, "vision hidden_size must be a multiple of its heads")
        _require(self.image_size >= self.patch_size > 0, "vision image_size must be at least one patch_size")
        _require(self.norm_type in ("rms_norm", "layer_norm"), f"vision norm_type {self.norm_type!r} is not known")
        _require(0.0 <= self.drop_path_rate < 1.0, "vision drop_path_rate must lie in [0, 1)")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches per side of an image of the native size."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling; the names and formulas are transformers' (`rope_scaling` / `rope_parameters`).

    "dynamic" (NTK) changes frequencies only beyond max_position_embeddings, which this code refuses to pass, so it
    is read and equals no scaling.
    """

    rope_type: str  # "linear", "dynamic" or "llama3"
    factor: float
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    original_max_position_embeddings: int | None = None  # llama3

    def __post_init__(self):
        _require(
            self.rope_type in ("linear", "dynamic", "llama3"),
            f"rope scaling {self.rope_type!r} is not implemented (linear, dynamic and llama3 are)",
        )
        _require(isinstance(self.factor, (int, float)), f"rope scaling {self.rope_type!r} needs a factor")
        if self.rope_type == "llama3":
            values = (self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
            _require(
                None not in values,
                "rope scaling llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings",
            )


@dataclass(frozen=True)
class TextConfig:
    """LLaMA (Touvron et al., 2023): pre-RMSNorm decoder with rotary positions and a SiLU-gated MLP."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    def __post_init__(self):
        _require_positive(
            self,
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size num_key_value_heads "
            "head_dim max_position_embeddings",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        _require(self.head_dim % 2 == 0, "head_dim must be even for rotary positions")


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP between the towers: LayerNorm -> Linear -> exact GELU -> Linear (published as mlp1.{0,1,3})."""

    in_features: int
    out_features: int
    layer_norm_eps: float = 1e-5  # torch's default, which the reference uses: no config.json names it


@dataclass(frozen=True)
class ChatConfig:
    """A chat model: vision tower, pixel unshuffle, projector, language model. A missing part is None."""

    vision: VisionConfig | None
    projector: ProjectorConfig | None
    text: TextConfig | None
    layout: str = "internvl_chat"
    select_layer: int = -1  # index into hidden_states (0 is the embedding output, -1 the last layer's)
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    image_size: int | None = None  # pixels per side fed to the tower (force_image_size); may differ from vision's
    template: str | None = None
    pad_to_square: bool = False
    image_token_id: int | None = None  # only where config.json gives it; else the tokenizer's <IMG_CONTEXT>

    def __post_init__(self):
        _require(self.layout in LAYOUTS, f"layout {self.layout!r} is not one of {sorted(LAYOUTS)}")
        _require(self.ps_version in ("v1", "v2"), f"ps_version {self.ps_version!r} is not known (v1 and v2 are)")
        if self.vision is not None:
            layers = self.vision.num_hidden_layers
            _require(
                -layers - 1 <= self.select_layer <= layers,
                f"select_layer {self.select_layer} is outside the hidden states of {layers} vision layers",
            )
            if self.image_size is None:
                object.__setattr__(self, "image_size", self.vision.image_size)
            _require(
                self.image_size >= self.vision.patch_size,
                f"image_size {self.image_size} is smaller than a patch ({self.vision.patch_size})",
            )
        if self.projector is not None:
            _require(self.vision is not None and self.text is not None, "a projector needs a tower on either side")
            ratio = self.unshuffle
            _require(
                abs(ratio * self.downsample_ratio - 1) < 1e-6,
                f"downsample_ratio {self.downsample_ratio} is not one over a whole number",
            )
            grid = self.image_size // self.vision.patch_size
            _require(
                grid % ratio == 0,
                f"an image of {self.image_size} pixels has {grid} patches per side, not a multiple of {ratio}",
            )
            _require(
                self.projector.in_features == self.vision.hidden_size * ratio**2,
                f"the projector reads {self.projector.in_features} features, the tower gives "
                f"{self.vision.hidden_size} x {ratio**2}",
            )
            _require(self.projector.out_features == self.text.hidden_size, "projector width differs from the LLM's")

    @property
    def unshuffle(self) -> int:
        """Side of the square of patches that pixel_unshuffle folds into one token."""
        return round(1 / self.downsample_ratio)

    @property
    def num_vision_layers(self) -> int:
        """Vision layers that run: those after select_layer never influence the language model."""
        if self.select_layer >= 0:
            return self.select_layer
        return self.vision.num_hidden_layers + 1 + self.select_layer

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that the language model reads for one image."""
        return (self.image_size // self.vision.patch_size // self.unshuffle) ** 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ChatConfig:
        """Read the dictionary of a published config.json. Raises ConfigError naming the field that cannot be run."""
        model_type = config.get("model_type")
        if model_type == "internvl_chat":
            return _chat_from_internvl_chat(config)
        if model_type == "internvl":
            return _chat_from_hf_internvl(config)
        if model_type == "intern_vit_6b":
            vision = _vision_from_internvit(config, "config.json")
            return cls(vision=vision, projector=None, text=None, layout="intern_vit_6b")
        if model_type == "llama":
            return cls(vision=None, projector=None, text=_text_from_hf(config, "config.json"), layout="llama")
        known = ", ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
        raise ConfigError(f"config.json has model_type {model_type!r}; the layouts that can be read are: {known}")

    @classmethod
    def from_file(cls, path: str | Path) -> ChatConfig:
        """Read `path`, a config.json or the directory that holds one."""
        return cls.from_hf(read_json(_config_path(path)))

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json dictionary of this configuration in its layout; `base` gives the fields that we skip."""
        merged = dict(base or {})
        for key, value in _TO_HF[self.layout](self).items():
            if isinstance(value, dict) and isinstance(merged.get(key), Mapping):
                merged[key] = {**merged[key], **value}
            else:
                merged[key] = value
        return merged


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ConfigError says which file is missing or where it stops being JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint directory needs its {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _config_path(path: str | Path) -> Path:
    path = Path(path)
    return path / "config.json" if path.is_dir() else path


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{type(config).__name__}.{name} must be a positive whole number, not {value!r}")


@dataclass
class _Section:
    """One JSON object, read field by field, so that what nobody asked for can be named at the end."""

    values: Mapping[str, Any]
    where: str
    used: set[str] = dataclass_field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return self.values.get(name, default)

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
            warnings.warn(f"{self.where}: no effect here: {', '.join(unknown)}", ConfigWarning, stacklevel=4)


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
    if values["rope_type"] == "default":
        return float(theta), None
    known = {name: values.pop(name, None) for name in RopeScaling.__dataclass_fields__}
    scaling = RopeScaling(**known)
    if values:
        raise ConfigError(f"{section.where}: rope scaling has fields that are not implemented: {sorted(values)}")
    return float(theta), scaling


def _chat_from_internvl_chat(config: Mapping[str, Any]) -> ChatConfig:
    section = _Section(config, "config.json")
    vision_section, text_section = section.need("vision_config"), section.need("llm_config")
    section.only("dynamic_image_size", False, why="dynamic tiling (InternVL 1.5 and later) is not implemented")
    section.only("use_backbone_lora", 0, why="merge the LoRA weights into the checkpoint first")
    section.only("use_llm_lora", 0, why="merge the LoRA weights into the checkpoint first")
    architecture = (text_section.get("architectures") or ["LlamaForCausalLM"])[0]
    if text_section.get("model_type", "llama") != "llama" or architecture != "LlamaForCausalLM":
        raise ConfigError(f"llm_config is {architecture}: only LlamaForCausalLM is implemented")
    vision = _vision_from_internvit(vision_section, "config.json: vision_config")
    text = _text_from_hf(text_section, "config.json: llm_config")
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * round(1 / ratio) ** 2, text.hidden_size),
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
    if not isinstance(select, int):
        raise ConfigError(f"config.json has vision_feature_layer = {select!r}: only one layer can be selected")
    vision = _vision_from_hf_internvl(vision_section, "config.json: vision_config")
    # transformers 5 ties by the outer flag, earlier versions wrote the inner one only.
    tied = section.get("tie_word_embeddings")
    text = _text_from_hf(text_section, "config.json: text_config", tied)
    ratio = section.get("downsample_ratio", 0.5)
    chat = ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size * round(1 / ratio) ** 2, text.hidden_size),
        text=text,
        layout="internvl",
        select_layer=select,
        downsample_ratio=ratio,
        ps_version="v2",
        image_token_id=section.need("image_token_id"),
    )
    stated = section.get("image_seq_length", chat.tokens_per_image)
    _require(
        stated == chat.tokens_per_image,
        f"config.json has image_seq_length {stated}, its image and patch sizes give {chat.tokens_per_image}",
    )
    section.finish()
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


_TO_HF = {
    "internvl_chat": _chat_to_internvl_chat,
    "internvl": _chat_to_hf_internvl,
    "intern_vit_6b": lambda config: _vision_to_internvit(config.vision),
    "llama": lambda config: _text_to_hf(config.text),
}


def _internvl_chat_v1_1() -> ChatConfig:
    """InternVL-Chat-V1-1 at full size (19.11B). vocab_size was not published: the card's 13.12B parameters of the
    LLM allow 41.7k to 42.7k; a real checkpoint brings its own number."""
    vision = VisionConfig(
        hidden_size=3200,
        num_hidden_layers=48,
        num_attention_heads=25,
        intermediate_size=12800,
        image_size=448,
    )
    text = TextConfig(
        vocab_size=42186,
        hidden_size=5120,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
        intermediate_size=13824,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(in_features=4 * 3200, out_features=5120),
        text=text,
        select_layer=-4,
        template="internvl_zh",
    )


def _nano() -> ChatConfig:
    """The small model that ships with the project: every code path of V1-1 in a few million parameters."""
    vision = VisionConfig(
        hidden_size=160, num_hidden_layers=7, num_attention_heads=5, intermediate_size=512, image_size=112
    )
    text = TextConfig(
        vocab_size=800,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(in_features=4 * 160, out_features=192),
        text=text,
        select_layer=-2,
        template="internvl_zh",
    )


PRESETS = {"internvl_chat_v1_1": _internvl_chat_v1_1, "nano": _nano}

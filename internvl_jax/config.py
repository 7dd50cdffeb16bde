"""Configurations: frozen dataclasses, validated. hf_config.py reads and writes them as Hugging Face's config.json.

One `ChatConfig` describes every model of the family; a part that a checkpoint does not have is None, so a bare
InternViT or a bare LLaMA is a ChatConfig with one part. `layout` remembers which published layout (key names of the
tensors and of config.json) the configuration came from, because that is the layout an export goes back to.

Values are read from the checkpoint's own file; nothing here assumes a published size.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
        require_kinds(self)
        require_positive(
            self,
            "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size num_channels "
            "layer_norm_eps qk_norm_eps",
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
            f"({self.num_attention_heads})",
        )
        require(
            self.image_size >= self.patch_size,
            f"vision image_size ({self.image_size}) must be at least one patch_size ({self.patch_size})",
        )
        require(self.norm_type in ("rms_norm", "layer_norm"), f"vision norm_type {self.norm_type!r} is not known")
        require(0.0 <= self.drop_path_rate < 1.0, "vision drop_path_rate must lie in [0, 1)")

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
        require(
            self.rope_type in ("linear", "dynamic", "llama3"),
            f"rope scaling {self.rope_type!r} is not implemented (linear, dynamic and llama3 are)",
        )
        require(self.factor is not None, f"rope scaling {self.rope_type!r} needs a factor")
        require_kinds(self)
        if self.rope_type == "llama3":
            values = (self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
            require(
                None not in values,
                "rope scaling llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings",
            )
            require_positive(self, "original_max_position_embeddings")
            require(
                self.low_freq_factor < self.high_freq_factor,
                f"rope scaling llama3 needs a low_freq_factor ({self.low_freq_factor}) below its high_freq_factor "
                f"({self.high_freq_factor})",
            )
        require_positive(self, "factor")


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
        require_kinds(self)
        require_positive(
            self,
            "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size num_key_value_heads "
            "head_dim max_position_embeddings rms_norm_eps rope_theta",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        require(self.head_dim % 2 == 0, "head_dim must be even for rotary positions")


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP between the towers: LayerNorm -> Linear -> exact GELU -> Linear (published as mlp1.{0,1,3})."""

    in_features: int
    out_features: int
    layer_norm_eps: float = 1e-5  # torch's default, which the reference uses: no config.json names it

    def __post_init__(self):
        require_kinds(self)
        require_positive(self, "in_features out_features layer_norm_eps")


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
        require_kinds(self)
        require(self.layout in LAYOUTS, f"layout {self.layout!r} is not one of {sorted(LAYOUTS)}")
        require(self.ps_version in ("v1", "v2"), f"ps_version {self.ps_version!r} is not known (v1 and v2 are)")
        unshuffle_of(self.downsample_ratio)
        if self.vision is not None:
            layers = self.vision.num_hidden_layers
            require(
                -layers - 1 <= self.select_layer <= layers,
                f"select_layer {self.select_layer} is outside the hidden states of {layers} vision layers",
            )
            if self.image_size is None:
                object.__setattr__(self, "image_size", self.vision.image_size)
            require(
                self.image_size >= self.vision.patch_size,
                f"image_size {self.image_size} is smaller than a patch ({self.vision.patch_size})",
            )
        if self.projector is not None:
            require(self.vision is not None and self.text is not None, "a projector needs a tower on either side")
            ratio = self.unshuffle
            grid = self.image_size // self.vision.patch_size
            require(
                grid % ratio == 0,
                f"an image of {self.image_size} pixels has {grid} patches per side, not a multiple of {ratio} "
                f"(downsample_ratio {self.downsample_ratio})",
            )
            require(
                self.projector.in_features == self.vision.hidden_size * ratio**2,
                f"the projector reads {self.projector.in_features} features, the tower gives "
                f"{self.vision.hidden_size} x {ratio**2}",
            )
            require(self.projector.out_features == self.text.hidden_size, "projector width differs from the LLM's")

    @property
    def unshuffle(self) -> int:
        """Side of the square of patches that pixel_unshuffle folds into one token."""
        return unshuffle_of(self.downsample_ratio)

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
        from internvl_jax import hf_config  # it builds these classes, so it imports this module

        return hf_config.read(config)

    @classmethod
    def from_file(cls, path: str | Path) -> ChatConfig:
        """Read `path`, a config.json or the directory that holds one."""
        return cls.from_hf(read_json(_config_path(path)))

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json dictionary of this configuration in its layout; `base` gives the fields that we skip."""
        from internvl_jax import hf_config

        return hf_config.write(self, base)


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


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


# How an error names what a field's annotation asks for.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple[int, ...]": "whole numbers",
    "None": "null",
}


def require_kinds(config: Any) -> None:
    """Every plain field of a configuration holds what its annotation says: config.json may hold anything."""
    for field in dataclasses.fields(config):
        kinds = [kind for kind in str(field.type).split(" | ") if kind in _KINDS]
        value = getattr(config, field.name)
        if kinds[:1] not in ([], ["None"]) and not any(_is_kind(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ConfigError(f"{type(config).__name__}.{field.name} must be {expected}, not {value!r}")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "tuple[int, ...]":
        return isinstance(value, tuple) and all(_is_kind(item, "int") for item in value)
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    number = (int,) if kind == "int" else (int, float)
    return isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)


def require_positive(config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be positive, not {value!r}")


def unshuffle_of(downsample_ratio: Any) -> int:
    """The whole number that a downsample_ratio is one over."""
    valid = _is_kind(downsample_ratio, "float") and 0 < downsample_ratio <= 1
    ratio = round(1 / downsample_ratio) if valid else 0
    require(
        abs(ratio * downsample_ratio - 1) < 1e-6 if valid else False,
        f"downsample_ratio {downsample_ratio!r} is not one over a whole number",
    )
    return ratio


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
        hidden_size=120, num_hidden_layers=6, num_attention_heads=5, intermediate_size=480, image_size=112
    )
    text = TextConfig(
        vocab_size=649,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=352,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(in_features=4 * 120, out_features=128),
        text=text,
        select_layer=-2,
        template="internvl_zh",
    )


PRESETS = {"internvl_chat_v1_1": _internvl_chat_v1_1, "nano": _nano}

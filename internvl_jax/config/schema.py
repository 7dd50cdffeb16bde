"""Configurations: frozen dataclasses, validated. hf_config.py reads and writes them as Hugging Face's config.json.

One `ChatConfig` describes every model of the family; a part that a checkpoint does not have is None, so a bare
InternViT or a bare LLaMA is a ChatConfig with one part. `layout` remembers which published layout (key names of the
tensors and of config.json) the configuration came from, because that is the layout an export goes back to.

Values are read from the checkpoint's own file; nothing here assumes a published size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.processing.chat_template import template_of
from internvl_jax.utils import files


class ConfigError(ValueError):
    """A config.json that this code cannot run as written; the message names the field and what to do."""


# config.json's "model_type" -> what the layout holds. The names are Hugging Face's, which has one for two: "llava" is
# LLaVA's own layout where config.json names an mm_vision_tower, and transformers' where it has a text_config.
LAYOUTS = {
    "internvl_chat": "OpenGVLab's InternVLChatModel (InternVL-Chat-V1-1)",
    "internvl": "transformers' InternVLForConditionalGeneration",
    "intern_vit_6b": "OpenGVLab's standalone InternViT",
    "llava": "LLaVA's own LlavaLlamaForCausalLM (LLaVA-1.5, InternVL-Chat-V1-0), the vision tower in another directory",
    "llava_hf": "transformers' LlavaForConditionalGeneration",
    "llama": "a plain LlamaForCausalLM",
}


# What stands for an image in the token ids of LLaVA's own layout, whose vocabulary has no token for it: LLaVA's number.
IMAGE_TOKEN_INDEX = -200


@dataclass(frozen=True)
class VisionConfig:
    """A pre-norm ViT. The defaults are InternViT's (Chen et al., "InternVL", 2023): layer scale, q/k norm of all heads.

    CLIP's tower (Radford et al., 2021) is the one of `clip_vision`: no layer scale, no q/k norm, biases on q, k and v,
    none on the patches, quick GELU, and a norm on the embeddings.
    """

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
    hidden_act: str = "gelu"  # the exact form, or "quick_gelu", x * sigmoid(1.702 x)
    layer_scale: bool = True
    embedding_norm: bool = False  # a LayerNorm between embeddings and layers: CLIP's pre_layrnorm
    patch_bias: bool = True

    def __post_init__(self):
        require_kinds(self)
        require_sizes(self)
        require_positive(self, "layer_norm_eps qk_norm_eps")
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
        require(self.hidden_act in ("gelu", "quick_gelu"), f"vision hidden_act {self.hidden_act!r} is not known")
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
        require_sizes(self)
        require_positive(self, "rms_norm_eps rope_theta")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({self.num_key_value_heads})",
        )
        require(self.head_dim % 2 == 0, "head_dim must be even for rotary positions")


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP between the towers: LayerNorm -> Linear -> exact GELU -> Linear (published as mlp1.{0,1,3}).

    LLaVA's mlp2x_gelu is the same without the norm.
    """

    in_features: int
    out_features: int
    layer_norm_eps: float = 1e-5  # torch's default, which the reference uses: no config.json names it
    layer_norm: bool = True

    def __post_init__(self):
        require_kinds(self)
        require_positive(self, "in_features out_features layer_norm_eps")


@dataclass(frozen=True)
class ChatConfig:
    """A chat model: vision tower, pixel unshuffle, projector, language model. A missing part is None.

    Without unshuffle downsample_ratio is 1 and ps_version "v2": the identity.
    """

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
    centre_crop: bool = False  # pictures keep their aspect ratio and lose what their centre square does not hold
    image_token_id: int | None = None  # only where the layout gives it; else the tokenizer's, by the template
    tower: str | None = None  # the name of the vision tower's own directory, where the layout has one

    def __post_init__(self):
        require_kinds(self)
        require_sizes(self)
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
    def from_hf(cls, config: Mapping[str, Any], tower: Mapping[str, Any] | None = None) -> ChatConfig:
        """Read the dictionary of a published config.json. Raises ConfigError naming the field that cannot be run.

        tower: the dictionary of the vision tower's config.json, where the tower has a directory of its own.
        """
        from internvl_jax.config import hf  # it builds these classes, so it imports this module

        return hf.read(config, tower)

    @classmethod
    def from_file(cls, path: str | Path, vision_tower: str | Path | None = None) -> ChatConfig:
        """Read `path`, a config.json or the directory that holds one, and the tower's own (as `tower_directory`)."""
        path = _config_path(path)
        config = read_json(path)
        tower = tower_directory(path.parent, config, vision_tower)
        made = cls.from_hf(config, None if tower is None else read_json(tower / "config.json"))
        if made.layout in ("internvl", "llava", "llava_hf") and config.get("template") is None:
            made = dataclasses.replace(made, template=template_of(path.parent, made.layout) or made.template)
        return made

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The config.json dictionary of this configuration in its layout; `base` gives the fields that we skip."""
        from internvl_jax.config import hf

        return hf.write(self, base)

    def tower_to_hf(self) -> dict[str, Any] | None:
        """The config.json dictionary of the vision tower's own directory; None where the layout has none."""
        from internvl_jax.config import hf

        return hf.write_tower(self)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ConfigError says which file is missing or where it stops being JSON."""
    try:
        value = files.read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint directory needs its {path.name}") from None
    except files.TextError as error:
        raise ConfigError(files.not_itself(path) or f"{error}; download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def tower_directory(directory: Path, config: Mapping[str, Any], given: str | Path | None = None) -> Path | None:
    """Where the vision tower of LLaVA's layout lies; None for layouts that have no directory of its own for it.

    config: the dictionary of directory/config.json. given: where the user says it lies; None: looked for under
        `tower_name`, in `directory` and beside it.
    Raises ConfigError that says where the tower has to be put, and where one is given that has no place.
    """
    last = tower_name(config)
    if last is None and given is not None:
        raise ConfigError(f"{directory / 'config.json'} names no vision tower of its own directory: leave {given} out")
    if last is None:
        return None
    places = (directory / last, directory.absolute().parent / last) if given is None else (Path(given),)
    for place in places:
        if (place / "config.json").is_file():
            return place
    if given is not None:
        raise ConfigError(f"{given} has no config.json: name the directory of the vision tower {last}")
    raise ConfigError(
        f"{directory / 'config.json'} names the vision tower {config['mm_vision_tower']}, which is published apart: "
        f"put its directory (config.json, preprocessor_config.json and weights) at {directory / last}, or beside "
        f"{directory}, or name it (convert and parity have --vision-tower)"
    )


def tower_name(config: Mapping[str, Any]) -> str | None:
    """The name of the directory that LLaVA's layout has for its vision tower; None for other layouts.

    config: the dictionary of config.json, whose mm_vision_tower names the tower as its training did, by a path or a
        repository: the last part of that.
    """
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or "text_config" in config:
        return None
    last = Path(name.rstrip("/")).name
    if last in ("", "..") or "\0" in last:
        raise ConfigError(f"config.json has mm_vision_tower = {name!r}, which names no directory")
    return last


def _config_path(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        return path / "config.json"
    require(path.suffix == ".json", f"{path} is a file: pass the directory that holds config.json")
    return path


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
    if isinstance(value, bool) or not isinstance(value, (int,) if kind == "int" else (int, float)):
        return False
    return abs(value) <= _LARGEST  # neither inf nor nan, nor a whole number that no float holds


# The largest sizes that are read: several times those of any published model. A damaged or hostile config.json is
# refused by name, before work in proportion to its numbers begins.
LIMITS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 27,
    "image_size": 1 << 14,
    "patch_size": 1 << 12,
    "num_channels": 1 << 8,
}
_LARGEST = 1e300


def require_size(name: str, value: Any, where: str) -> None:
    """Raise ConfigError unless a size of LIMITS is a whole number from 1 to its limit."""
    if not (_is_kind(value, "int") and 1 <= value <= LIMITS[name]):
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
        raise ConfigError(f"{where} {shown}: a whole number from 1 to {LIMITS[name]} is needed")


def require_sizes(config: Any) -> None:
    for name in LIMITS:
        if getattr(config, name, None) is not None:
            require_size(name, getattr(config, name), f"{type(config).__name__}.{name} is")


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


def intern_vit_6b(image_size: int) -> VisionConfig:
    """InternViT-6B at full size, with the position table of images of `image_size` pixels."""
    return VisionConfig(
        hidden_size=3200,
        num_hidden_layers=48,
        num_attention_heads=25,
        intermediate_size=12800,
        image_size=image_size,
    )


def clip_vision(**sizes: int) -> VisionConfig:
    """CLIP's vision tower of the given sizes (those of VisionConfig)."""
    return VisionConfig(
        **sizes,
        norm_type="layer_norm",
        layer_norm_eps=1e-5,
        qk_normalization=False,
        qkv_bias=True,
        hidden_act="quick_gelu",
        layer_scale=False,
        embedding_norm=True,
        patch_bias=False,
    )


def _internvl_chat_v1_1() -> ChatConfig:
    """InternVL-Chat-V1-1 at full size (19.11B). vocab_size was not published: the card's 13.12B parameters of the
    LLM allow 41.7k to 42.7k; a real checkpoint brings its own number."""
    return ChatConfig(
        vision=intern_vit_6b(448),
        projector=ProjectorConfig(in_features=4 * 3200, out_features=5120),
        text=dataclasses.replace(_vicuna_13b(), vocab_size=42186),
        select_layer=-4,
        template="internvl_zh",
    )


def _vicuna_13b() -> TextConfig:
    """Vicuna-13B v1.5, of LLaMA2-13B's shape."""
    return TextConfig(
        vocab_size=32000,
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


def _vicuna_7b() -> TextConfig:
    return dataclasses.replace(
        _vicuna_13b(),
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
    )


def _llava(vision: VisionConfig, text: TextConfig, tower: str, *, image_size: int, select_layer: int) -> ChatConfig:
    """A model of LLaVA's code: every patch is a token, two linear layers, Vicuna."""
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(vision.hidden_size, text.hidden_size, layer_norm=False),
        text=text,
        layout="llava",
        select_layer=select_layer,
        downsample_ratio=1.0,
        ps_version="v2",
        image_size=image_size,
        template="vicuna_v1",
        pad_to_square=True,
        centre_crop=True,
        image_token_id=IMAGE_TOKEN_INDEX,
        tower=tower,
    )


def _internvl_chat_v1_0_7b() -> ChatConfig:
    """InternVL-Chat-V1-0 with Vicuna-7B: InternViT-6B-224px at 336 pixels, 576 tokens."""
    return _llava(intern_vit_6b(224), _vicuna_7b(), "OpenGVLab/InternViT-6B-224px", image_size=336, select_layer=-4)


def _internvl_chat_v1_0_13b() -> ChatConfig:
    """InternVL-Chat-V1-0 with Vicuna-13B, at 336 pixels."""
    return _llava(intern_vit_6b(224), _vicuna_13b(), "OpenGVLab/InternViT-6B-224px", image_size=336, select_layer=-4)


def _internvl_chat_v1_0_13b_448px() -> ChatConfig:
    """InternVL-Chat-V1-0 with Vicuna-13B, at 448 pixels: 1024 tokens."""
    return _llava(
        intern_vit_6b(448), _vicuna_13b(), "OpenGVLab/InternViT-6B-448px-V1-0", image_size=448, select_layer=-4
    )


def _llava_1_5_13b() -> ChatConfig:
    """LLaVA-1.5-13B (Liu et al., 2023): CLIP ViT-L/14 at 336 pixels, 576 tokens, Vicuna-13B."""
    vision = clip_vision(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=336
    )
    return _llava(vision, _vicuna_13b(), "openai/clip-vit-large-patch14-336", image_size=336, select_layer=-2)


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


PRESETS = {
    "internvl_chat_v1_1": _internvl_chat_v1_1,
    "internvl_chat_v1_0_7b": _internvl_chat_v1_0_7b,
    "internvl_chat_v1_0_13b": _internvl_chat_v1_0_13b,
    "internvl_chat_v1_0_13b_448px": _internvl_chat_v1_0_13b_448px,
    "llava_1_5_13b": _llava_1_5_13b,
    "nano": _nano,
}

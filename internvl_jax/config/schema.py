"""Configurations of models as frozen, validated dataclasses.

One `ChatConfig` describes every model of the family. A part that a checkpoint does not have is None, so an InternViT or
a LLaMA alone is a ChatConfig with one part. `layout` names the published layout (key names of the tensors and of
config.json) that the configuration came from and that an export writes.

Values are read from the checkpoint's own file; no published size is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from internvl_jax.config.validation import (
    ConfigError,
    require,
    require_kinds,
    require_positive,
    require_sizes,
    unshuffle_factor,
)

Part = TypeVar("Part")


# Layout -> description. The names are config.json's "model_type", except that two layouts share "llava": LLaVA's own,
# with an mm_vision_tower, and transformers', with a text_config ("llava_hf" here).
LAYOUTS = {
    "internvl_chat": "OpenGVLab's InternVLChatModel (InternVL-Chat-V1-1 and later)",
    "internvl": "transformers' InternVLForConditionalGeneration",
    "intern_vit_6b": "OpenGVLab's standalone InternViT",
    "llava": "LLaVA's own LlavaLlamaForCausalLM (LLaVA-1.5, InternVL-Chat-V1-0), the vision tower in its own directory",
    "llava_hf": "transformers' LlavaForConditionalGeneration",
    "llama": "a plain LlamaForCausalLM",
}


MAX_TILES = 40  # of one image

# Token id of an image in LLaVA's own layout, whose vocabulary has no token for it.
IMAGE_TOKEN_INDEX = -200


@dataclass(frozen=True)
class VisionConfig:
    """A pre-norm vision transformer.

    The defaults are InternViT's (Chen et al., "InternVL", 2023): layer scale, and q/k norm over all heads.
    `clip_vision` gives CLIP's (Radford et al., 2021): no layer scale, no q/k norm, biases on q, k and v but none on the
    patches, quick GELU, and a norm on the embeddings.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int  # pixels per side at which the position embeddings were trained
    patch_size: int = 14
    num_channels: int = 3
    norm_type: str = "rms_norm"  # or "layer_norm"
    layer_norm_eps: float = 1e-6
    qk_normalization: bool = True
    qk_norm_eps: float = 1e-6
    qkv_bias: bool = False
    drop_path_rate: float = 0.0
    hidden_act: str = "gelu"  # exact (erf), or "quick_gelu": x * sigmoid(1.702 x)
    layer_scale: bool = True
    embedding_norm: bool = False  # LayerNorm after the embeddings (CLIP's pre_layrnorm)
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
        require(0.0 <= self.drop_path_rate < 1.0, "vision drop_path_rate must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches per side at `image_size`."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, with transformers' names and formulas (`rope_scaling`, `rope_parameters`).

    "dynamic" (NTK) changes the frequencies only beyond max_position_embeddings, by the length of the row
    (`TextConfig.context`).
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
            if (
                self.low_freq_factor is None
                or self.high_freq_factor is None
                or self.original_max_position_embeddings is None
            ):
                raise ConfigError(
                    "rope scaling llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings"
                )
            require_positive(self, "original_max_position_embeddings")
            require(
                self.low_freq_factor < self.high_freq_factor,
                f"rope scaling llama3 needs a low_freq_factor ({self.low_freq_factor}) below its high_freq_factor "
                f"({self.high_freq_factor})",
            )
        require_positive(self, "factor")


# Family of language models -> its class in transformers, or in remote code. They are one decoder with other settings,
# and differ in the names of published tensors and of fields of config.json.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class TextConfig:
    """LLaMA (Touvron et al., 2023): decoder with RMSNorm before each block, rotary positions and a SiLU-gated MLP.

    InternLM2 (Cai et al., 2024) is the same model, published with packed q, k and v. Qwen2 (2024) has biases on q, k
    and v, Qwen3 (2025) an RMSNorm on each head of q and k.
    """

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
    attention_bias: bool = False  # on q, k, v and the output
    mlp_bias: bool = False
    family: str = "llama"
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
        require(self.family in FAMILIES, f"language model {self.family!r} is not one of {', '.join(FAMILIES)}")

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k has an RMSNorm."""
        return self.family == "qwen3"

    @property
    def extends_context(self) -> bool:
        """Whether dynamic NTK extends the context. Qwen's published code ignores it, transformers 5 does not."""
        scaling = self.rope_scaling
        return scaling is not None and scaling.rope_type == "dynamic" and self.family in ("llama", "internlm2")

    @property
    def context(self) -> int:
        """Positions of a prompt and its answer: max_position_embeddings, times the factor of dynamic NTK.

        The published code of dynamic NTK has no limit. Training is within max_position_embeddings.
        """
        factor = self.rope_scaling.factor if self.rope_scaling is not None and self.extends_context else 1.0
        return int(self.max_position_embeddings * max(factor, 1.0))


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP from vision to text features: LayerNorm, Linear, exact GELU, Linear (published as mlp1.{0,1,3}).

    LLaVA's mlp2x_gelu has no norm.
    """

    in_features: int
    out_features: int
    layer_norm_eps: float = 1e-5  # torch's default; config.json has no field for it
    layer_norm: bool = True

    def __post_init__(self):
        require_kinds(self)
        require_positive(self, "in_features out_features layer_norm_eps")


@dataclass(frozen=True)
class ChatConfig:
    """A chat model: vision model, pixel unshuffle, projector, language model. A missing part is None.

    A model without pixel unshuffle has downsample_ratio 1 and ps_version "v2". Code that needs a part reads
    `required_vision`, `required_projector`, `required_text` or `required_image_size`.
    """

    vision: VisionConfig | None
    projector: ProjectorConfig | None
    text: TextConfig | None
    layout: str = "internvl_chat"
    select_layer: int = -1  # index into hidden_states: 0 is the embedding output, -1 the last layer's output
    downsample_ratio: float = 0.5
    ps_version: str = "v1"
    image_size: int | None = None  # pixels per side of the model's input (force_image_size); may differ from vision's
    template: str | None = None
    system_message: str | None = None  # instead of the template's own
    dynamic_image_size: bool = False  # images are cut into tiles of image_size, as many as suit their aspect ratio
    min_dynamic_patch: int = 1  # tiles
    max_dynamic_patch: int = 6
    use_thumbnail: bool = False  # of the whole image after several tiles
    pad_to_square: bool = False
    center_crop: bool = False  # keep the aspect ratio and crop the image to its center square
    image_token_id: int | None = None  # where the layout has one; otherwise the tokenizer's, by the template
    vision_tower: str | None = None  # name of the separately published vision tower, for layouts that have one

    def __post_init__(self):
        require_kinds(self)
        require_sizes(self)
        require(self.layout in LAYOUTS, f"layout {self.layout!r} is not one of {sorted(LAYOUTS)}")
        require(self.ps_version in ("v1", "v2"), f"ps_version {self.ps_version!r} is not known (v1 and v2 are)")
        unshuffle_factor(self.downsample_ratio)
        require(
            1 <= self.min_dynamic_patch <= self.max_dynamic_patch <= MAX_TILES,
            f"min_dynamic_patch {self.min_dynamic_patch} and max_dynamic_patch {self.max_dynamic_patch} must satisfy "
            f"1 <= min <= max <= {MAX_TILES}",
        )
        if self.vision is not None:
            layers = self.vision.num_hidden_layers
            require(
                -layers - 1 <= self.select_layer <= layers,
                f"select_layer {self.select_layer} is outside the hidden states of {layers} vision layers",
            )
            if self.image_size is None:
                object.__setattr__(self, "image_size", self.vision.image_size)
            require(
                self.required_image_size >= self.vision.patch_size,
                f"image_size {self.image_size} is smaller than a patch ({self.vision.patch_size})",
            )
        if self.projector is not None:
            if self.vision is None or self.text is None:
                raise ConfigError("a projector needs a vision model and a language model")
            ratio = self.unshuffle
            grid = self.required_image_size // self.vision.patch_size
            require(
                grid % ratio == 0,
                f"an image of {self.image_size} pixels has {grid} patches per side, not a multiple of {ratio} "
                f"(downsample_ratio {self.downsample_ratio})",
            )
            require(
                self.projector.in_features == self.vision.hidden_size * ratio**2,
                f"the projector reads {self.projector.in_features} features, the vision model gives "
                f"{self.vision.hidden_size} x {ratio**2}",
            )
            require(
                self.projector.out_features == self.text.hidden_size,
                "projector.out_features differs from the language model's hidden_size",
            )

    @property
    def required_vision(self) -> VisionConfig:
        """The vision model's configuration. Raises ConfigError where the model has none."""
        return _required(self.vision, "vision model")

    @property
    def required_projector(self) -> ProjectorConfig:
        """The projector's configuration. Raises ConfigError where the model has none."""
        return _required(self.projector, "projector")

    @property
    def required_text(self) -> TextConfig:
        """The language model's configuration. Raises ConfigError where the model has none."""
        return _required(self.text, "language model")

    @property
    def required_image_size(self) -> int:
        """Pixels per side of the model's input. Raises ConfigError where the model has no vision model."""
        return _required(self.image_size, "vision model")

    @property
    def unshuffle(self) -> int:
        """Side of the square of patches that pixel_unshuffle merges into one token."""
        return unshuffle_factor(self.downsample_ratio)

    @property
    def num_vision_layers(self) -> int:
        """Number of vision layers that run: layers after select_layer have no effect on the language model."""
        if self.select_layer >= 0:
            return self.select_layer
        return self.required_vision.num_hidden_layers + 1 + self.select_layer

    @property
    def tokens_per_image(self) -> int:
        """Number of visual tokens of one image."""
        return (self.required_image_size // self.required_vision.patch_size // self.unshuffle) ** 2


def _required(part: Part | None, name: str) -> Part:
    if part is None:
        raise ConfigError(f"the model has no {name}")
    return part


def clip_vision(**sizes: int) -> VisionConfig:
    """Return the configuration of a CLIP vision model of the given sizes (fields of VisionConfig)."""
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

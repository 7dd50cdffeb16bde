"""The PyTorch side of a comparison, one stage at a time: transformers' modules with a published checkpoint's weights.

The module for each stage of the original code:
    pixels              PIL (convert to RGB) and transformers' CLIPImageProcessor; EXIF orientation is ignored
    vision.embeddings   transformers' InternVLVisionEmbeddings; of CLIP CLIPVisionEmbeddings, torch.nn LayerNorm
    vision.layers.N     transformers' InternVLVisionLayer (rms_norm, use_qk_norm, eager attention) or CLIPEncoderLayer
    features            hidden_states[select_layer], InternVLModel.pixel_shuffle (v1: its last transpose undone); in
                        LLaVA's layouts without the shuffle
    projector           torch.nn LayerNorm, Linear, GELU, Linear; in LLaVA's layouts without the first
    text.embeddings     torch.nn.functional.embedding; rows of image tokens are overwritten
    text.layers.N       transformers' LlamaDecoderLayer under LlamaRotaryEmbedding and create_causal_mask, or Qwen2's or
                        Qwen3's; InternLM2's layer is a LLaMA's, under other names
    text.norm, logits   transformers' LlamaRMSNorm, or Qwen's; torch.nn.functional.linear
Everything is float32. This file reads config.json and key names itself and shares no code with the implementation that
it is compared with, except that InternLM2's packed q, k and v reach it taken apart; tests compare it with hidden states
that the original InternVL code computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLVisionEmbeddings, InternVLVisionLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

Stage = Callable[[np.ndarray], np.ndarray]

# OpenGVLab's names -> transformers', within the embeddings and within a layer (qkv is also split).
_VISION_NAMES = (
    (r"^class_embedding$", "cls_token"),
    (r"^position_embedding$", "position_embeddings"),
    (r"^patch_embedding\.", "patch_embeddings.projection."),
    (r"^attn\.proj\.", "attention.projection_layer."),
    (r"^attn\.", "attention."),
    (r"^ls([12])$", r"lambda_\1"),
    (r"^norm1\.", "layernorm_before."),
    (r"^norm2\.", "layernorm_after."),
)
_PROJECTOR_NAMES = ((r"^layer_norm\.", "0."), (r"^linear_1\.", "1."), (r"^linear_2\.", "3."))
_LLAVA_PROJECTOR_NAMES = ((r"^linear_1\.", "0."), (r"^linear_2\.", "2."))
_TOWER = "model.vision_tower.vision_tower."  # in LLaVA's own layout
_PIXEL_SHUFFLE: Any = InternVLModel.pixel_shuffle  # a method that does not use its object


class _Decoder(NamedTuple):
    """transformers' classes of one family of language models."""

    config: Any
    layer: Any
    rotary: Any
    norm: Any
    model: Any


_LLAMA = _Decoder(LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaRMSNorm, LlamaForCausalLM)
_DECODERS = {
    "llama": _LLAMA,
    "internlm2": _LLAMA,
    "qwen2": _Decoder(Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding, Qwen2RMSNorm, Qwen2ForCausalLM),
    "qwen3": _Decoder(Qwen3Config, Qwen3DecoderLayer, Qwen3RotaryEmbedding, Qwen3RMSNorm, Qwen3ForCausalLM),
}
# InternLM2's names -> LLaMA's, behind the prefix.
_INTERNLM2_NAMES = (
    (r"\.tok_embeddings\.", ".embed_tokens."),
    (r"(^|\.)output\.weight$", r"\1lm_head.weight"),
    (r"\.attention\.wqkv\.weight#(\w+)$", r".self_attn.\1.weight"),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
)

# How the names of tensors begin, by layout: vision tower, projector, language model. Parts that a layout lacks have "".
_PREFIXES = {
    "internvl_chat": ("vision_model.", "mlp1.", "language_model."),
    "internvl": ("vision_tower.", "multi_modal_projector.", "language_model."),
    "llava": (_TOWER, "model.mm_projector.", ""),
    "llava_hf": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model."),
    "intern_vit_6b": ("", "", ""),
    "llama": ("", "", ""),
}


class Reference:
    """The reference model of one published config.json.

    A method for a stage reads the stage's weights and returns a function that holds them: drop it to free them. Arrays
    are float32: pixels [1,3,S,S], hidden states [1,T,D].

    Args:
        directory: the checkpoint's directory.
        keys: the names of the checkpoint's tensors, in the layout's current form.
        read: returns a tensor's values by name.
        tower: the directory of the vision tower's configuration, where the layout has one of its own.
    """

    def __init__(self, directory: Path, keys: list[str], read: Callable[[str], np.ndarray], tower: Path | None = None):
        raw = _read_json(directory / "config.json")
        self._read = read
        # LLaVA takes its tower's processor.
        self._processor_directory = directory if tower is None else tower
        layout = raw["model_type"]
        if layout in ("llava", "llava_llama"):
            layout = "llava_hf" if "text_config" in raw else "llava"
        self._is_llava = layout in ("llava", "llava_hf")
        self._native = layout == "internvl"  # transformers' own layout
        self._prefixes = _PREFIXES[layout]
        self._vision, self._text, select, family = _part_configs(layout, raw, tower)
        self._decoder = _DECODERS[family]
        # Name as in LLaMA's layout -> name that `read` takes.
        self._keys = _rename({key: key for key in keys}, _INTERNLM2_NAMES if family == "internlm2" else ())
        self._ps_version = "v2" if layout == "internvl" else raw.get("ps_version", "v1")
        for config in (self._vision, self._text):
            if config is not None:
                config._attn_implementation = "eager"
        if self._vision is not None:
            self.num_vision_layers = range(self._vision.num_hidden_layers + 1)[select]
            self._is_clip = isinstance(self._vision, CLIPVisionConfig)
            self._ratio = raw.get("downsample_ratio", 0.5)
            native = self._vision.image_size if self._is_clip else self._vision.image_size[0]
            if layout == "llava":
                self._pad_to_square = raw.get("image_aspect_ratio") == "pad"
                if self._is_clip:
                    self._prefixes = (f"{_TOWER}vision_model.", *self._prefixes[1:])
                else:  # the original's rule
                    native = 448 if "448" in raw["mm_vision_tower"] else 336
            else:
                self._pad_to_square = raw.get("pad2square", False)
            self._size = raw.get("force_image_size") or native
            # The original passes the config's eps to q_norm and k_norm; transformers' module does not.
            self._qk_norm_eps = None if self._native or self._is_clip else self._vision.layer_norm_eps
        self.num_text_layers = 0 if self._text is None else self._text.num_hidden_layers

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Pixel values of one image [1,3,S,S], as the evaluation scripts make them."""
        values = _read_json(self._processor_directory / "preprocessor_config.json")
        rgb = image.convert("RGB")
        if self._pad_to_square:
            side = max(rgb.size)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in values["image_mean"]))
            square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
            rgb = square
        sides = {"height": self._size, "width": self._size}
        # V1-1's scripts resize to S x S first, so that the processor's own resize and crop change nothing.
        sizes: dict[str, Any] = (
            {"size": {"shortest_edge": self._size}, "crop_size": sides} if self._is_llava else {"size": sides}
        )
        processor = CLIPImageProcessorPil(
            **sizes, do_center_crop=self._is_llava, image_mean=values["image_mean"], image_std=values["image_std"]
        )
        return processor(rgb, return_tensors="np")["pixel_values"]

    def vision_embeddings(self) -> Stage:
        """pixels [1,3,S,S] -> [1,1+P,D]."""
        return self._clip_embeddings() if self._is_clip else _run(self._intern_embeddings())

    def _intern_embeddings(self) -> nn.Module:
        state = _rename(self._state(f"{self._prefixes[0]}embeddings."), _VISION_NAMES)
        return _module(lambda: InternVLVisionEmbeddings(self._vision), state)

    def _clip_embeddings(self) -> Stage:
        prefix, config = self._prefixes[0], self._vision
        embeddings: Any = _module(lambda: CLIPVisionEmbeddings(config), self._state(f"{prefix}embeddings."))
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # not in the checkpoint
        state = self._state(f"{prefix}pre_layrnorm.")
        norm = _module(lambda: nn.LayerNorm(config.hidden_size, config.layer_norm_eps), state)
        return _run(lambda x: norm(embeddings(x, interpolate_pos_encoding=True)))

    def vision_layer(self, layer: int) -> Stage:
        """[1,1+P,D] -> [1,1+P,D]."""
        if self._is_clip:
            state = self._state(f"{self._prefixes[0]}encoder.layers.{layer}.")
            encoder = _module(lambda: CLIPEncoderLayer(self._vision), state)
            return _run(lambda x: encoder(x, attention_mask=None))
        return _run(self._intern_layer(layer))

    def _intern_layer(self, layer: int) -> nn.Module:
        state = self._state(f"{self._prefixes[0]}encoder.{'layer' if self._native else 'layers'}.{layer}.")
        for kind in ("weight", "bias"):
            if f"attn.qkv.{kind}" in state:
                parts = state.pop(f"attn.qkv.{kind}").chunk(3)
                state.update({f"attention.{n}_proj.{kind}": part for n, part in zip("qkv", parts)})
        module: Any = _module(lambda: InternVLVisionLayer(self._vision), _rename(state, _VISION_NAMES))
        if self._qk_norm_eps is not None:
            for norm in (module.attention.q_norm, module.attention.k_norm):
                norm.variance_epsilon = self._qk_norm_eps
        return module

    def features(self) -> Stage:
        """[1,1+P,D] -> [1,P*ratio**2,D/ratio**2], without the class token."""
        return _run((lambda x: x[:, 1:]) if self._is_llava else self._fold)

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        side = round((x.shape[1] - 1) ** 0.5)
        grid = x[:, 1:].reshape(x.shape[0], side, side, -1)
        folded = _PIXEL_SHUFFLE(None, grid, scale_factor=self._ratio)
        if self._ps_version == "v1":
            folded = folded.transpose(1, 2)
        return folded.reshape(x.shape[0], -1, folded.shape[-1])

    def projector(self) -> Stage:
        """[1,P,E] -> [1,P,D]."""
        return _run(self._mlp())

    def _mlp(self) -> nn.Module:
        names = _LLAVA_PROJECTOR_NAMES if self._is_llava else _PROJECTOR_NAMES
        state = _rename(self._state(self._prefixes[1]), names)
        outputs, inputs = state["0.weight" if self._is_llava else "1.weight"].shape

        def build() -> nn.Module:
            mlp = nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
            return nn.Sequential(*mlp) if self._is_llava else nn.Sequential(nn.LayerNorm(inputs), *mlp)

        return _module(build, state)

    def text_embeddings(self, ids: np.ndarray, image_token_id: int | None) -> Callable[[np.ndarray | None], np.ndarray]:
        """ids [T]; visual tokens [1,P,D] or None -> [1,T,D]."""
        table = self._tensor(f"{self._prefixes[2]}model.embed_tokens.weight")

        def embed(features: np.ndarray | None) -> np.ndarray:
            words = np.maximum(ids, 0)  # LLaVA writes -200 for an image
            x = nn.functional.embedding(torch.from_numpy(words).long(), table).numpy().copy()
            if features is not None:
                x[ids == image_token_id] = features.reshape(-1, x.shape[-1])
            return x[None]

        return embed

    def text_layer(self, layer: int) -> Stage:
        """[1,T,D] -> [1,T,D], at positions 0 to T-1."""
        state = self._state(f"{self._prefixes[2]}model.layers.{layer}.")
        module = _module(lambda: self._decoder.layer(self._text, layer), state)
        rotary = self._decoder.rotary(self._text)

        def run(x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[1])[None]
            mask = create_causal_mask(self._text, x, attention_mask=None, past_key_values=None, position_ids=positions)
            return module(x, attention_mask=mask, position_embeddings=rotary(x, positions))

        return _run(run)

    def text_norm(self) -> Stage:
        """[1,T,D] -> [1,T,D]."""
        state = self._state(f"{self._prefixes[2]}model.norm.")
        return _run(_module(lambda: self._decoder.norm(self._text.hidden_size, self._text.rms_norm_eps), state))

    def logits(self) -> Stage:
        """[1,T,D] -> [1,T,V]."""
        tied = self._text.tie_word_embeddings
        head = self._tensor(f"{self._prefixes[2]}{'model.embed_tokens' if tied else 'lm_head'}.weight")
        return _run(lambda x: nn.functional.linear(x, head))

    def whole(self, image_token_id: int) -> nn.Module:
        """Build an InternVL model as one trainable module, with transformers' own language model.

        Its parts are embeddings, layers (those that run), projector and language. forward(pixel_values [M,3,S,S],
        input_ids, attention_mask, labels [B,T]) returns the loss.

        Args:
            image_token_id: the id of the tokens that visual tokens replace.

        Returns:
            The module.

        Raises:
            ValueError: the model has another layout or lacks a part.
        """
        if self._vision is None or self._text is None or self._is_llava:
            raise ValueError("only an InternVL model with both of its parts can be built as a whole")
        state = self._state(self._prefixes[2])
        language: Any = _module(lambda: self._decoder.model(self._text), state)
        language.model.rotary_emb = self._decoder.rotary(self._text)  # not in the checkpoint
        return _Whole(
            self._intern_embeddings(),
            [self._intern_layer(layer) for layer in range(self.num_vision_layers)],
            self._fold,
            self._mlp(),
            language,
            image_token_id,
        )

    def _tensor(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._read(self._keys[key]).astype(np.float32)))

    def _state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: self._tensor(key) for key in self._keys if key.startswith(prefix)}


class _Whole(nn.Module):
    def __init__(
        self, embeddings: nn.Module, layers: list[nn.Module], fold: Any, projector: nn.Module, language: Any, image: int
    ):
        super().__init__()
        self.embeddings, self.layers, self.fold = embeddings, nn.ModuleList(layers), fold
        self.projector, self.language, self.image = projector, language, image

    def forward(self, pixel_values: Any, input_ids: Any, attention_mask: Any, labels: Any) -> torch.Tensor:
        x = self.embeddings(pixel_values)
        for layer in self.layers:
            x = layer(x)
        features = self.projector(self.fold(x))
        embedded = self.language.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.image)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(is_image, features)
        return self.language(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels).loss


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _part_configs(layout: str, raw: dict[str, Any], tower: Path | None) -> tuple[Any, Any, int, str]:
    """The configurations of vision tower and language model, None for a part that is absent; select_layer; family."""
    if layout == "internvl_chat":
        text, family = _text_config(raw["llm_config"])
        return _vision_config(raw["vision_config"]), text, raw.get("select_layer", -1), family
    if layout in ("internvl", "llava_hf"):
        text, family = _text_config(raw["text_config"])
        text.tie_word_embeddings = raw.get("tie_word_embeddings", text.tie_word_embeddings)  # transformers 5's rule
        if layout == "internvl":
            vision = InternVLVisionConfig.from_dict(raw["vision_config"])
            return vision, text, raw.get("vision_feature_layer", -1), family
        return CLIPVisionConfig.from_dict(raw["vision_config"]), text, raw.get("vision_feature_layer", -2), family
    if layout == "llava":
        if tower is None:
            raise ValueError("a checkpoint of LLaVA's layout needs the directory of its vision tower")
        text = LlamaConfig.from_dict({k: v for k, v in raw.items() if k != "model_type" and k[:3] != "mm_"})
        return _tower_config(_read_json(tower / "config.json")), text, raw["mm_vision_select_layer"], "llama"
    if layout == "intern_vit_6b":
        return _vision_config(raw), None, -1, "llama"
    text, family = _text_config(raw)
    return None, text, -1, family


def _text_config(raw: dict[str, Any]) -> tuple[Any, str]:
    """The configuration of a language model, and its family. InternLM2's fields are LLaMA's."""
    family = raw.get("model_type", "llama")
    fields = {name: value for name, value in raw.items() if family != "internlm2" or name not in ("model_type", "bias")}
    return _DECODERS[family].config.from_dict(fields), family


def _tower_config(raw: dict[str, Any]) -> Any:
    """The configuration of LLaVA's vision tower: InternViT, a CLIP vision model, or a whole CLIP."""
    if raw["model_type"] == "intern_vit_6b":
        return _vision_config(raw)
    return CLIPVisionConfig.from_dict(raw["vision_config"] if raw["model_type"] == "clip" else raw)


def _vision_config(raw: dict[str, Any]) -> InternVLVisionConfig:
    """OpenGVLab's intern_vit_6b configuration, with its defaults, under transformers' names."""
    return InternVLVisionConfig(
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        image_size=raw["image_size"],
        patch_size=raw.get("patch_size", 14),
        num_channels=raw.get("num_channels", 3),
        hidden_act=raw.get("hidden_act", "gelu"),
        norm_type=raw.get("norm_type", "rms_norm"),
        layer_norm_eps=raw.get("layer_norm_eps", 1e-6),
        use_qk_norm=raw.get("qk_normalization", True),
        attention_bias=raw.get("qkv_bias", False),
    )


def _rename(state: dict[str, Any], names: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key, changed = re.subn(pattern, replacement, key)
            if changed:
                break
        renamed[key] = value
    return renamed


def _module(build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
    """Build a module on the meta device and assign these tensors to it; every name is required."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def _run(function: Callable[[torch.Tensor], torch.Tensor]) -> Stage:
    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return function(torch.from_numpy(np.ascontiguousarray(x))).numpy()

    return run

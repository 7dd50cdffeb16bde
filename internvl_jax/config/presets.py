"""Configurations of published models at full size, and of the nano model that ships with the project."""

from __future__ import annotations

import dataclasses

from internvl_jax.config.presets_newer import NEWER_PRESETS
from internvl_jax.config.schema import (
    IMAGE_TOKEN_INDEX,
    ChatConfig,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    clip_vision,
)


def intern_vit_6b(image_size: int) -> VisionConfig:
    """Return the configuration of InternViT-6B, with position embeddings for `image_size` pixels per side."""
    return VisionConfig(
        hidden_size=3200,
        num_hidden_layers=48,
        num_attention_heads=25,
        intermediate_size=12800,
        image_size=image_size,
    )


def _internvl_chat_v1_1() -> ChatConfig:
    """InternVL-Chat-V1-1 (19.11B). vocab_size was not published: the model card's 13.12B parameters of the language
    model allow 41.7k to 42.7k. A real checkpoint's config.json has the true number."""
    return ChatConfig(
        vision=intern_vit_6b(448),
        projector=ProjectorConfig(in_features=4 * 3200, out_features=5120),
        text=dataclasses.replace(_vicuna_13b(), vocab_size=42186),
        select_layer=-4,
        template="internvl_zh",
    )


def _vicuna_13b() -> TextConfig:
    """Vicuna-13B v1.5 (the shape of LLaMA2-13B)."""
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


def _llava(
    vision: VisionConfig, text: TextConfig, vision_tower: str, *, image_size: int, select_layer: int
) -> ChatConfig:
    """A model in LLaVA's layout: one token per patch, a two-layer projector, Vicuna."""
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
        center_crop=True,
        image_token_id=IMAGE_TOKEN_INDEX,
        vision_tower=vision_tower,
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
    """The small model that ships with the project: all code paths of V1-1 in a few million parameters."""
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


# Name -> a function that returns the configuration.
PRESETS = {
    "internvl_chat_v1_1": _internvl_chat_v1_1,
    "internvl_chat_v1_0_7b": _internvl_chat_v1_0_7b,
    "internvl_chat_v1_0_13b": _internvl_chat_v1_0_13b,
    "internvl_chat_v1_0_13b_448px": _internvl_chat_v1_0_13b_448px,
    "llava_1_5_13b": _llava_1_5_13b,
    "nano": _nano,
    **NEWER_PRESETS,
}

"""Configurations of InternVL-Chat-V1-2 and V1-5, InternVL 2, 2.5, 3 and 3.5 at full size.

Sizes are those of the language models that the model cards name. What depends on a checkpoint alone, such as ids of
special tokens, stands here for compile reports and benchmarks; a checkpoint's own config.json has the true values. The
vocabularies of V1-2, InternVL2-40B and InternVL2-76B were not found published: they are their language models' own,
without the image tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from internvl_jax.config.schema import ChatConfig, ProjectorConfig, RopeScaling, TextConfig, VisionConfig

INTERN_VIT_300M = VisionConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    image_size=448,
    norm_type="layer_norm",
    qk_normalization=False,
    qkv_bias=True,
)
# InternViT-6B-448px-V1-2, V1-5 and V2.5: the layers that select_layer -4 left out are not stored.
INTERN_VIT_6B = VisionConfig(
    hidden_size=3200, num_hidden_layers=45, num_attention_heads=25, intermediate_size=12800, image_size=448
)


def _internlm2(
    hidden_size: int, layers: int, heads: int, intermediate_size: int, *, kv_heads: int = 8, factor: float = 2.0
) -> TextConfig:
    return TextConfig(
        vocab_size=92553,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=RopeScaling("dynamic", factor),
        family="internlm2",
        pad_token_id=2,
    )


def _qwen2(
    hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int, *, vocab_size: int = 151674
) -> TextConfig:
    """Qwen2 or 2.5. Embeddings are untied, whatever Qwen's own checkpoint of that size does."""
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=32768,
        rope_theta=1e6,
        family="qwen2",
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


def _qwen3(
    hidden_size: int, layers: int, heads: int, intermediate_size: int, *, kv_heads: int = 8, tied: bool = False
) -> TextConfig:
    return TextConfig(
        vocab_size=151936,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate_size,
        max_position_embeddings=40960,
        rope_theta=1e6,
        family="qwen3",
        tie_word_embeddings=tied,
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


_YI_34B = TextConfig(
    vocab_size=64000,
    hidden_size=7168,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=20480,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=5e6,
    eos_token_ids=(7,),
    pad_token_id=0,
)
_LLAMA3_70B = TextConfig(
    vocab_size=128256,
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=28672,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    bos_token_id=128000,
    eos_token_ids=(128003,),
)

_INTERNLM2_2B = _internlm2(2048, 24, 16, 8192)
_INTERNLM2_7B = _internlm2(4096, 32, 32, 14336)
_INTERNLM2_20B = _internlm2(6144, 48, 48, 16384, factor=3.0)
_QWEN25 = {
    "0.5b": _qwen2(896, 24, 14, 2, 4864),
    "1.5b": _qwen2(1536, 28, 12, 2, 8960),
    "3b": _qwen2(2048, 36, 16, 2, 11008),
    "7b": _qwen2(3584, 28, 28, 4, 18944),
    "14b": _qwen2(5120, 48, 40, 8, 13824),
    "32b": _qwen2(5120, 64, 40, 8, 27648),
    "72b": _qwen2(8192, 80, 64, 8, 29568),
}
# InternVL3 asks for dynamic NTK, which has no effect up to max_position_embeddings.
_QWEN25_V3 = {
    size: dataclasses.replace(text, rope_scaling=RopeScaling("dynamic", 2.0)) for size, text in _QWEN25.items()
}

# Name -> vision tower, language model, template.
_SYSTEMS = {
    "internvl_chat_v1_5": (INTERN_VIT_6B, _INTERNLM2_20B, "internlm2-chat"),
    "internvl2_1b": (INTERN_VIT_300M, dataclasses.replace(_QWEN25["0.5b"], vocab_size=151655), "Hermes-2"),
    "internvl2_2b": (INTERN_VIT_300M, _INTERNLM2_2B, "internlm2-chat"),
    "internvl2_8b": (INTERN_VIT_300M, _INTERNLM2_7B, "internlm2-chat"),
    "internvl2_26b": (INTERN_VIT_6B, _INTERNLM2_20B, "internlm2-chat"),
    "internvl2_40b": (INTERN_VIT_6B, _YI_34B, "Hermes-2"),
    "internvl2_76b": (INTERN_VIT_6B, _LLAMA3_70B, "internlm2-chat"),
    "internvl2_5_1b": (INTERN_VIT_300M, _QWEN25["0.5b"], "internvl2_5"),
    "internvl2_5_2b": (INTERN_VIT_300M, _INTERNLM2_2B, "internvl2_5"),
    "internvl2_5_4b": (INTERN_VIT_300M, _QWEN25["3b"], "internvl2_5"),
    "internvl2_5_8b": (INTERN_VIT_300M, _INTERNLM2_7B, "internvl2_5"),
    "internvl2_5_26b": (INTERN_VIT_6B, _INTERNLM2_20B, "internvl2_5"),
    "internvl2_5_38b": (INTERN_VIT_6B, _QWEN25["32b"], "internvl2_5"),
    "internvl2_5_78b": (INTERN_VIT_6B, _QWEN25["72b"], "internvl2_5"),
    "internvl3_1b": (INTERN_VIT_300M, _QWEN25_V3["0.5b"], "internvl2_5"),
    "internvl3_2b": (INTERN_VIT_300M, _QWEN25_V3["1.5b"], "internvl2_5"),
    "internvl3_8b": (INTERN_VIT_300M, _QWEN25_V3["7b"], "internvl2_5"),
    "internvl3_14b": (INTERN_VIT_300M, _QWEN25_V3["14b"], "internvl2_5"),
    "internvl3_38b": (INTERN_VIT_6B, _QWEN25_V3["32b"], "internvl2_5"),
    "internvl3_78b": (INTERN_VIT_6B, _QWEN25_V3["72b"], "internvl2_5"),
    "internvl3_5_1b": (INTERN_VIT_300M, _qwen3(1024, 28, 16, 3072, tied=True), "internvl2_5"),
    "internvl3_5_2b": (INTERN_VIT_300M, _qwen3(2048, 28, 16, 6144, tied=True), "internvl2_5"),
    "internvl3_5_4b": (INTERN_VIT_300M, _qwen3(2560, 36, 32, 9728, tied=True), "internvl2_5"),
    "internvl3_5_8b": (INTERN_VIT_300M, _qwen3(4096, 36, 32, 12288), "internvl2_5"),
    "internvl3_5_14b": (INTERN_VIT_300M, _qwen3(5120, 40, 40, 17408), "internvl2_5"),
    "internvl3_5_38b": (INTERN_VIT_6B, _qwen3(5120, 64, 64, 25600), "internvl2_5"),
}


def _tiled(name: str) -> ChatConfig:
    """A system with dynamic tiling."""
    vision, text, template = _SYSTEMS[name]
    return ChatConfig(
        vision=vision,
        projector=ProjectorConfig(4 * vision.hidden_size, text.hidden_size),
        text=text,
        ps_version="v2",
        template=template,
        dynamic_image_size=True,
        max_dynamic_patch=12,
        use_thumbnail=True,
    )


def _internvl_chat_v1_2() -> ChatConfig:
    """InternVL-Chat-V1-2 and V1-2-Plus: one image of 448 pixels, Nous-Hermes-2-Yi-34B."""
    return ChatConfig(
        vision=INTERN_VIT_6B,
        projector=ProjectorConfig(4 * INTERN_VIT_6B.hidden_size, _YI_34B.hidden_size),
        text=_YI_34B,
        template="Hermes-2",
    )


NEWER_PRESETS: dict[str, Callable[[], ChatConfig]] = {
    "internvl_chat_v1_2": _internvl_chat_v1_2,
    **{name: partial(_tiled, name) for name in _SYSTEMS},
}

"""Validation of a model's inputs, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.inference.generation.sampling import GenerationConfig

DEFAULT_NEW_TOKENS = 1024  # longest answer if the caller sets no limit and the context has room


def check_settings(config: ChatConfig, settings: Mapping[str, Any], name: str) -> None:
    """Check fields of GenerationConfig. None stands for the default.

    Args:
        config: configuration of the model.
        settings: values by field name.
        name: the model's name, for error messages.

    Raises:
        ValueError: the model generates no text, or a setting is unknown or out of range.
    """
    if config.text is None:
        raise ValueError(f"{name} is a vision tower without a language model: it can only `encode`")
    unknown = set(settings) - set(GenerationConfig.__dataclass_fields__)
    if unknown:
        known = ", ".join(GenerationConfig.__dataclass_fields__)
        raise ValueError(f"no such generation setting: {', '.join(sorted(unknown))}; there are {known}")
    GenerationConfig(**{field: value for field, value in settings.items() if value is not None})


def complete_settings(
    config: ChatConfig, settings: Mapping[str, Any], attention_mask: np.ndarray, eos_token_ids: tuple[int, ...] | None
) -> GenerationConfig:
    """Add the defaults of a checkpoint. Without max_new_tokens the context limits the answer.

    Args:
        config: configuration of the model.
        settings: fields of GenerationConfig; None stands for the default.
        attention_mask: [B,T] of 0 and 1, of the prompts.
        eos_token_ids: default end tokens; None: those of `config`.

    Raises:
        ValueError: the longest prompt leaves no room for an answer.
    """
    values = {field: value for field, value in settings.items() if value is not None}
    longest = int(np.asarray(attention_mask).sum(axis=-1).max(initial=0))
    context = config.required_text.context
    if "max_new_tokens" not in values:
        if longest >= context:
            raise ValueError(
                f"the prompt has {longest} tokens, which leaves no room for an answer in the context of {context}: "
                "shorten the question or its history, or show fewer images"
            )
        values["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, context - longest)
    values.setdefault("eos_token_ids", eos_token_ids)
    return GenerationConfig(**values)


def check_pixels(config: ChatConfig, pixel_values: Any, name: str) -> np.ndarray:
    """Check images that are already arrays.

    Args:
        config: configuration of the model.
        pixel_values: [M,3,H,W], or [3,H,W] for one image; float, normalized.
        name: the model's name, for error messages.

    Returns:
        [M,3,H,W] float32.

    Raises:
        ValueError: the model has no vision tower, or the shape or dtype is wrong.
    """
    vision = config.vision
    if vision is None:
        raise ValueError(f"{name} is a language model without a vision tower: it reads no images")
    given = np.asarray(pixel_values)
    pixels = given[None] if given.ndim == 3 else given
    if pixels.ndim != 4 or pixels.shape[1] != vision.num_channels:
        raise ValueError(f"pixel_values must be [images, 3, height, width], not {list(given.shape)}")
    if not pixels.shape[0]:
        raise ValueError("pixel_values holds no images: leave it out for prompts without images")
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values must be normalized floats, not {given.dtype}: use chat.processor(image), or scale to 0...1, "
            "subtract the mean and divide by the standard deviation of preprocessor_config.json"
        )
    ratio = 1 if config.projector is None else config.unshuffle
    grid = [side // vision.patch_size for side in pixels.shape[2:]]
    if not all(grid) or any(side % ratio for side in grid):
        raise ValueError(
            f"pixel_values of {pixels.shape[2]} x {pixels.shape[3]} pixels have {grid[0]} x {grid[1]} patches: "
            f"whole multiples of {ratio * vision.patch_size} pixels are needed, best {config.image_size}"
        )
    return pixels.astype(np.float32, copy=False)


def features_shape(config: ChatConfig, pixels: np.ndarray, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the features [M,P,D] of checked images [M,3,H,W]."""
    patch = config.required_vision.patch_size
    tokens = math.prod(side // patch // config.unshuffle for side in pixels.shape[2:])
    return jax.ShapeDtypeStruct((len(pixels), tokens, config.required_text.hidden_size), dtype)

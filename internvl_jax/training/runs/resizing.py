"""Resizes the vision tower's position embeddings, as stage 1 starts: InternViT at 224 pixels becomes 448."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from internvl_jax.config import ChatConfig, ConfigError, config_to_hf
from internvl_jax.models.intern_vit import resize_positions
from internvl_jax.models.layers import Params
from internvl_jax.utils.files import read_json_object

POSITIONS = "vision_model/embeddings/position_embedding"


def resized_config(config: ChatConfig, image_size: int) -> ChatConfig:
    """Return the configuration for images of another size.

    Args:
        config: Configuration of the model.
        image_size: Height and width of images in pixels.

    Raises:
        ConfigError: The size is not a multiple of the patch size, or the projector cannot fold it.
    """
    vision = config.required_vision
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise ConfigError(
            f"images of {image_size} pixels do not divide into patches: use a multiple of {vision.patch_size} pixels"
        )
    return replace(config, vision=replace(vision, image_size=image_size), image_size=image_size)


def resize_tower(params: Params, config: ChatConfig, resized: ChatConfig) -> Params:
    """Resize the position embeddings bicubically, as the published conversion does. Everything else is unchanged.

    Args:
        params: Parameters, possibly on a mesh.
        config: Their configuration.
        resized: Configuration of `resized_config`.
    """
    vision = params["vision_model"]
    table = vision["embeddings"]["position_embedding"]
    grid, new_grid = config.required_vision.grid, resized.required_vision.grid
    resize = jax.jit(lambda table: resize_positions(table, grid, new_grid, new_grid).astype(table.dtype))
    embeddings = {**vision["embeddings"], "position_embedding": resize(table)}
    return {**params, "vision_model": {**vision, "embeddings": embeddings}}


def resized_files(base: Path, config: ChatConfig) -> dict[str, str]:
    """Return config.json and preprocessor_config.json of a checkpoint for the image size of `config`, by name.

    Args:
        base: Checkpoint directory.
        config: Configuration of `resized_config`.
    """
    contents: dict[str, Any] = {
        "config.json": config_to_hf(config, read_json_object(base / "config.json", ConfigError))
    }
    if (base / "preprocessor_config.json").exists():
        values = read_json_object(base / "preprocessor_config.json", ConfigError)
        for name in ("size", "crop_size"):
            if isinstance(values.get(name), dict):
                values[name] = dict.fromkeys(values[name], config.image_size)
            elif name in values:
                values[name] = config.image_size
        contents["preprocessor_config.json"] = values
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in contents.items()}

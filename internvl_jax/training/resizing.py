"""A tower for pictures of another size, as stage 1 begins: InternViT-224 becomes 448."""

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
    """The configuration for pictures of that size.

    Raises ConfigError for a size that is no whole number of patches or that the projector cannot fold.
    """
    patch = config.vision.patch_size
    if image_size < patch or image_size % patch:
        raise ConfigError(
            f"images of {image_size} pixels have no whole number of patches per side: {patch} pixels each"
        )
    return replace(config, vision=replace(config.vision, image_size=image_size), image_size=image_size)


def resize_tower(params: Params, config: ChatConfig, resized: ChatConfig) -> Params:
    """The table of positions resized bicubically, once and for good, as the published conversion does; all else stays.

    config: as the parameters are; resized: of `resized_config`. The parameters may lie on a mesh.
    """
    vision = params["vision_model"]
    table = vision["embeddings"]["position_embedding"]
    grid = resized.vision.grid
    resize = jax.jit(lambda table: resize_positions(table, config.vision.grid, grid, grid).astype(table.dtype))
    embeddings = {**vision["embeddings"], "position_embedding": resize(table)}
    return {**params, "vision_model": {**vision, "embeddings": embeddings}}


def resized_files(base: Path, config: ChatConfig) -> dict[str, str]:
    """config.json and preprocessor_config.json of the checkpoint `base` for pictures of config's size, by name."""
    files: dict[str, Any] = {"config.json": config_to_hf(config, read_json_object(base / "config.json", ConfigError))}
    if (base / "preprocessor_config.json").exists():
        values = read_json_object(base / "preprocessor_config.json", ConfigError)
        for name in ("size", "crop_size"):
            if isinstance(values.get(name), dict):
                values[name] = dict.fromkeys(values[name], config.image_size)
            elif name in values:
                values[name] = config.image_size
        files["preprocessor_config.json"] = values
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in files.items()}

"""Configurations of models: validated dataclasses, presets, and the published config.json layouts."""

from internvl_jax.config.hf import (
    config_from_hf,
    config_to_hf,
    find_vision_tower,
    load_config,
    vision_tower_name,
    vision_tower_to_hf,
)
from internvl_jax.config.presets import PRESETS
from internvl_jax.config.schema import (
    IMAGE_TOKEN_INDEX,
    LAYOUTS,
    ChatConfig,
    ProjectorConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
    clip_vision,
)
from internvl_jax.config.validation import ConfigError

__all__ = [
    "IMAGE_TOKEN_INDEX",
    "LAYOUTS",
    "PRESETS",
    "ChatConfig",
    "ConfigError",
    "ProjectorConfig",
    "RopeScaling",
    "TextConfig",
    "VisionConfig",
    "clip_vision",
    "config_from_hf",
    "config_to_hf",
    "find_vision_tower",
    "load_config",
    "vision_tower_name",
    "vision_tower_to_hf",
]

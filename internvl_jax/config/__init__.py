"""Configurations of models: frozen, validated dataclasses, presets, and the published config.json layouts."""

from internvl_jax.config.schema import (
    IMAGE_TOKEN_INDEX,
    LAYOUTS,
    PRESETS,
    ChatConfig,
    ConfigError,
    ProjectorConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)

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
]

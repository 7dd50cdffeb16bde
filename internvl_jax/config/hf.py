"""Hugging Face's config.json from and to `ChatConfig`.

A field that would change the numbers and that is not implemented raises ConfigError. An unknown field is named in a
warning. Fields of Hugging Face's that cannot change the numbers are skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.config.chat_template import find_template
from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.config.hf_internvl import (
    read_hf_internvl,
    read_internvl_chat,
    vision_from_intern_vit,
    vision_to_intern_vit,
    write_hf_internvl,
    write_internvl_chat,
)
from internvl_jax.config.hf_llava import read_hf_llava, read_llava, vision_to_clip, write_hf_llava, write_llava
from internvl_jax.config.hf_section import refuse_quantized
from internvl_jax.config.hf_text import read_text, write_text
from internvl_jax.config.schema import LAYOUTS, ChatConfig
from internvl_jax.config.validation import ConfigError, require
from internvl_jax.utils.files import read_json_object

# Layouts without a field for the template, and the template of their models.
_DEFAULT_TEMPLATES = {"internvl": None, "llava": "vicuna_v1", "llava_hf": "vicuna_v1"}


def load_config(path: str | Path, vision_tower: str | Path | None = None) -> ChatConfig:
    """Read the configuration of a checkpoint.

    Args:
        path: the checkpoint directory, or its config.json.
        vision_tower: the directory of the vision tower, for layouts that publish it separately; None: searched for by
            `find_vision_tower`.

    Raises:
        ConfigError: a file is missing or damaged, or the model is not implemented; the message names the field.
    """
    path = _config_path(path)
    values = read_json_object(path, ConfigError)
    tower = find_vision_tower(path.parent, values, vision_tower)
    config = config_from_hf(values, None if tower is None else read_json_object(tower / "config.json", ConfigError))
    if config.layout in _DEFAULT_TEMPLATES and values.get("template") is None:
        config = dataclasses.replace(config, template=find_template(path.parent, config.layout) or config.template)
    return config


def config_from_hf(values: Mapping[str, Any], vision_tower: Mapping[str, Any] | None = None) -> ChatConfig:
    """Convert the contents of a published config.json.

    Args:
        values: the JSON object.
        vision_tower: the JSON object in the vision tower's config.json; required by LLaVA's own layout.

    Raises:
        ConfigError: the model is not implemented; the message names the field.
    """
    model_type = values.get("model_type")
    if model_type == "llava_llama":  # LLaVA's name for its layout since transformers took "llava"
        model_type = "llava"
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        known = ", ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
        raise ConfigError(f"config.json has model_type {model_type!r}; the supported layouts are: {known}")
    try:
        refuse_quantized(values, "config.json")
        refuse_quantized(vision_tower or {}, "the vision tower's config.json")
        if model_type == "internvl_chat":
            return read_internvl_chat(values)
        if model_type == "internvl":
            return read_hf_internvl(values)
        if model_type == "llava" and "text_config" in values:
            return read_hf_llava(values)
        if model_type == "llava":
            return read_llava(values, vision_tower)
        if model_type == "intern_vit_6b":
            vision = vision_from_intern_vit(values, "config.json")
            return ChatConfig(vision=vision, projector=None, text=None, layout="intern_vit_6b")
        return ChatConfig(vision=None, projector=None, text=read_text(values, "config.json"), layout="llama")
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A string in place of a number, a list in place of a section.
        raise ConfigError(f"config.json of model_type {model_type!r} has a value of the wrong type ({error})") from None


def config_to_hf(config: ChatConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the config.json object of a configuration, in its layout.

    Args:
        config: the configuration.
        base: an object whose other fields are kept, such as the published config.json.
    """
    merged = dict(base or {})
    if config.layout == "internvl_chat":
        values = write_internvl_chat(config)
    elif config.layout == "internvl":
        values = write_hf_internvl(config)
    elif config.layout == "llava":
        values = write_llava(config)
    elif config.layout == "llava_hf":
        values = write_hf_llava(config)
    elif config.layout == "intern_vit_6b":
        values = vision_to_intern_vit(config.required_vision)
    else:
        values = write_text(config.required_text)
    # A template other than the layout's own is written to internvl_chat's field.
    if config.layout in _DEFAULT_TEMPLATES and config.template in TEMPLATES:
        if config.template != _DEFAULT_TEMPLATES[config.layout]:
            values["template"] = config.template
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if nested else value
    return merged


def vision_tower_to_hf(config: ChatConfig) -> dict[str, Any] | None:
    """Return the config.json object of a separately published vision tower; None for layouts without one."""
    if config.layout != "llava":
        return None
    vision = config.required_vision
    if not vision.embedding_norm:
        return vision_to_intern_vit(vision)
    return {"architectures": ["CLIPVisionModel"], **vision_to_clip(vision)}


def find_vision_tower(directory: Path, values: Mapping[str, Any], given: str | Path | None = None) -> Path | None:
    """Find the directory of a separately published vision tower (LLaVA's own layout).

    Args:
        directory: the checkpoint directory.
        values: the JSON object in its config.json.
        given: the tower's directory, if the user named it; None: `vision_tower_name` inside or beside `directory`.

    Returns:
        The directory, or None for layouts that contain their vision tower.

    Raises:
        ConfigError: the tower was not found, or `given` is set for a layout that contains its tower.
    """
    name = vision_tower_name(values)
    if name is None and given is not None:
        raise ConfigError(f"the model in {directory} has no separate vision tower: leave out {given}")
    if name is None:
        return None
    candidates = (directory / name, directory.absolute().parent / name) if given is None else (Path(given),)
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    if given is not None:
        raise ConfigError(f"{given} has no config.json: name the directory of the vision tower {name}")
    raise ConfigError(
        f"{directory / 'config.json'} names the vision tower {values['mm_vision_tower']}, which is published "
        f"separately: put its directory (config.json, preprocessor_config.json and weights) at {directory / name} or "
        f"beside {directory}, or pass its path (--vision-tower of convert and parity)"
    )


def vision_tower_name(values: Mapping[str, Any]) -> str | None:
    """Return the directory name of a separately published vision tower; None for layouts that contain theirs.

    Args:
        values: the JSON object in config.json, whose mm_vision_tower is a path or a repository.

    Raises:
        ConfigError: mm_vision_tower does not end in a directory name.
    """
    path = values.get("mm_vision_tower")
    if not isinstance(path, str) or "text_config" in values:
        return None
    name = Path(path.rstrip("/")).name
    if name in ("", "..") or "\0" in name:
        raise ConfigError(f"config.json has mm_vision_tower = {path!r}, which is not the path of a directory")
    return name


def _config_path(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        return path / "config.json"
    require(path.suffix == ".json", f"{path} is a file: pass the directory that holds config.json")
    return path

"""A small converted checkpoint with nano's tokenizer, and conversations about colored squares."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from support.golden import random_tree

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.config import PRESETS, config_to_hf
from internvl_jax.models import chat_model

NANO = Path(internvl_jax.__file__).parent / "nano" / "model"


def tiny_config(**text):
    config = PRESETS["nano"]()
    vision = replace(
        config.vision, num_hidden_layers=3, hidden_size=40, intermediate_size=64, image_size=56, num_attention_heads=5
    )
    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
            "intermediate_size": 96, "max_position_embeddings": 128, **text}  # fmt: skip
    projector = replace(config.projector, in_features=160, out_features=text["hidden_size"])
    return replace(config, vision=vision, text=replace(config.text, **text), projector=projector, image_size=56)


def write_checkpoint(directory, config=None, dtype="float32", seed=0):
    """Returns the directory, and its parameters as they were before they were rounded to dtype."""
    config = tiny_config() if config is None else config
    directory.mkdir(parents=True)
    for path in (*NANO.glob("*token*"), NANO / "preprocessor_config.json"):
        shutil.copy(path, directory)
    values = json.loads((directory / "preprocessor_config.json").read_text())
    values["size"] = values["crop_size"] = config.image_size
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    (directory / "config.json").write_text(json.dumps(config_to_hf(config), indent=2))
    params = jax.tree.map(lambda leaf: 0.3 * leaf, random_tree(chat_model.abstract_params(config), seed))
    checkpoint.save(directory, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    return directory, params


COLORS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (30, 60, 210)}


def write_squares(directory, count=24, name="squares", text_only=True):
    """A data set of images of one color and the question for it; returns the meta file."""
    rng = np.random.default_rng(count)
    lines = []
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        color = list(COLORS)[number % 3]
        pixels = np.clip(np.asarray(COLORS[color]) + rng.integers(-25, 25, (60, 60, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(directory / "images" / f"{name}{number}.png")
        turns = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": color}]
        entry = {"id": number, "conversations": turns, "image": f"images/{name}{number}.png"}
        if text_only and number % 6 == 5:
            del entry["image"]
            turns[0]["value"], turns[1]["value"] = "Hello!", "Hello!"
        lines.append(json.dumps(entry))
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    meta = directory / f"{name}.json"
    meta.write_text(json.dumps({name: {"root": "", "annotation": f"{name}.jsonl", "length": count}}))
    return meta

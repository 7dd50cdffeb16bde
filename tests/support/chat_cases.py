"""The golden checkpoint of InternVL-Chat-V1-1: prompts, images, arrays and settings of its recorded answers."""

from dataclasses import replace

import numpy as np
from support.golden import DATA, bundle

BUNDLE = DATA / "internvl_chat_v1_1"
CHECKPOINT = BUNDLE / "checkpoint"
ARRAYS, FACTS = bundle("internvl_chat_v1_1")
PROMPTS = {prompt["id"]: prompt for prompt in FACTS["prompts"]}

# The goldens are the quick-start page's: images resized in their own mode, EXIF ignored.
REFERENCE = {"honor_exif": False, "image_path": "native", "max_new_tokens": 32}


def image_path(name):
    return BUNDLE / FACTS["images"][name]["file"]


def asked(prompt):
    """question, images, history of a golden prompt."""
    history = [tuple(turn) for turn in prompt["history"] or ()]
    return prompt["question"], [image_path(name) for name in prompt["images"]], history


def without_timings(reply):
    return replace(reply, timings={})


def golden_pixels(names):
    return np.stack([ARRAYS[f"images/{name}/quickstart"] for name in names])

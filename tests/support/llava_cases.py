"""What the tests of LLaVA-1.5 and InternVL-Chat-V1-0 share: both golden bundles, at every image size they have."""

import dataclasses
import functools

import jax
import numpy as np
from support import modules
from support.golden import DATA, bundle

from internvl_jax.config import IMAGE_TOKEN_INDEX, ChatConfig, load_config
from internvl_jax.models import chat_model

V1_0 = DATA / "internvl_chat_v1_0"
LLAVA = DATA / "llava_1_5"

# The golden model's images stand for those of 336 pixels, where the tower's positions are resized, and of 448.
SIZES = {"r1": 84, "r2": 56}

forward = jax.jit(modules.forward, static_argnames=("config", "dtype", "collect"))
encode = jax.jit(modules.encode_images, static_argnames=("config", "dtype", "collect"))


@functools.cache
def loaded(directory):
    """Configuration and float32 parameters of a published directory."""
    from checkpoints_convert.convert import load_hf

    config = load_config(directory)
    return config, jax.device_get(load_hf(directory, chat_model.abstract_params(config)))


@functools.cache
def facts(name):
    """goldens.npz in memory and goldens.json."""
    arrays, facts = bundle(name)
    return dict(arrays), facts


def expand(ids, tokens, image_token_id=IMAGE_TOKEN_INDEX):
    """The bundles write one id per image: as many as it has tokens."""
    return [i for token in ids for i in [token] * (tokens if token == image_token_id else 1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A golden prompt: what goes into the model, and which logits are to come out."""

    name: str
    config: ChatConfig
    params: dict
    ids: np.ndarray  # [B,T]
    valid: np.ndarray  # [B,T]
    pixels: np.ndarray  # [M,3,S,S]
    logits: np.ndarray  # [B,T,V]

    def run(self, **options):
        logits, out = forward(
            self.params, self.config, self.ids, self.pixels, self.valid,
            image_token_id=self.config.image_token_id, **options,
        )  # fmt: skip
        return np.asarray(logits), jax.device_get(out)


def v1_0(prompt):
    arrays, known = facts("internvl_chat_v1_0")
    case = next(case for case in known["prompts"] if case["id"] == prompt)
    config, params = loaded(V1_0 / "checkpoint")
    config = dataclasses.replace(config, image_size=SIZES[case["resolution"]])
    pixels = [v1_0_pixels(config, name) for name in case["images"]]
    ids = np.array([expand(case["input_ids"], config.tokens_per_image)])
    expected = arrays[f"logits/{prompt}/fp32"][None]
    return Case(prompt, config, params, ids, np.ones(ids.shape, bool), np.stack(pixels), expected)


def v1_0_pixels(config, name):
    resolution = next(key for key, size in SIZES.items() if size == config.image_size)
    return facts("internvl_chat_v1_0")[0][f"images/{name}/pixel_values_{resolution}"]


def llava(prompt, directory="original"):
    arrays, known = facts("llava_1_5")
    case = next(case for case in known["orig_prompts"] if case["id"] == prompt)
    config, params = loaded(LLAVA / directory)
    pixels = np.stack([arrays[f"orig/pixel_values/{name}"] for name in case["images"]])
    ids = np.array([expand(case["input_ids"], config.tokens_per_image)])
    return Case(prompt, config, params, ids, np.ones(ids.shape, bool), pixels, arrays[f"orig/logits/{prompt}"][None])


def llava_hf(prompt):
    arrays, known = facts("llava_1_5")
    case = next(case for case in known["hf_prompts"] if case["id"] == prompt)
    config, params = loaded(LLAVA / "hf")
    pixels = np.stack([hf_pixels(name) for name in case["images"]])
    ids = np.array([expand(row, config.tokens_per_image, config.image_token_id) for row in case["input_ids"]])
    expected = arrays[f"hf/logits/{prompt}"].reshape(*ids.shape, -1)
    return Case(prompt, config, params, ids, ids != known["config"]["pad_token_id_hf"], pixels, expected)


def hf_pixels(name):
    return facts("llava_1_5")[0][f"hf/pixel_values/{name}"]

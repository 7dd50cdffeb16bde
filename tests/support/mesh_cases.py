"""Tiny models and batches for meshes: heads and vocabularies that no mesh axis divides."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig, ProjectorConfig, TextConfig, VisionConfig, clip_vision
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.models import chat_model
from internvl_jax.parallel import partitioning

IMAGE = 3  # the token at which images stand


@cache
def config_of(vision_heads: int, kv_heads: int) -> ChatConfig:
    """A tiny model: 5 or 25 vision heads, 8 language heads that share kv_heads, a vocabulary that nothing divides."""
    width = {5: 40, 25: 100}[vision_heads]
    vision = VisionConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=vision_heads,
        intermediate_size=64,
        image_size=56,
        qkv_bias=vision_heads == 5,
    )
    text = TextConfig(
        vocab_size=99,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=96,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=128,
        attention_bias=kv_heads == 2,
        eos_token_ids=(),
    )
    return ChatConfig(vision, ProjectorConfig(4 * width, 64), text, select_layer=-1)


@cache
def grouped_of() -> ChatConfig:
    """The tiny model with groups of 3 heads, which share 2 kv heads."""
    base = config_of(5, 2)
    return dataclasses.replace(base, text=dataclasses.replace(base.text, num_attention_heads=6))


@cache
def llava_of(system: str) -> ChatConfig:
    """A tiny model of LLaVA's family: LLaVA-1.5's CLIP with 6 heads, or V1-0's InternViT with resized positions."""
    base = config_of(5, 8)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}
    vision = clip_vision(**sizes, image_size=56) if system == "llava" else base.vision
    return ChatConfig(
        vision,
        ProjectorConfig(vision.hidden_size, 64, layer_norm=False),
        base.text,
        layout="llava",
        select_layer=-1,
        downsample_ratio=1.0,
        ps_version="v2",
        image_size=56 if system == "llava" else 84,
    )


@cache
def params_of(config: ChatConfig):
    """Every parameter random, norm scales and biases too, so that each of them matters."""
    rng = np.random.RandomState(1)

    def draw(path, leaf):
        center = 1.0 if partitioning.path_of(path).endswith("scale") else 0.0
        return jnp.asarray(center + 0.1 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, chat_model.abstract_params(config))


@cache
def batch_of(config: ChatConfig, rows: int):
    """Prompts [rows,8+P], the last one short, one image in each; pixels [rows,3,S,S]; valid [rows,8+P]."""
    rng = np.random.RandomState(3)
    ids = rng.randint(4, config.text.vocab_size, (rows, 8 + config.tokens_per_image)).astype(np.int32)
    ids[:, 2 : 2 + config.tokens_per_image] = IMAGE
    valid = np.ones(ids.shape, bool)
    valid[-1, -3:] = False
    return ids, rng.randn(rows, 3, config.image_size, config.image_size).astype(np.float32), valid


def answers(params, config, rows, *, mesh=None, cache_dtype=None):
    """Greedy tokens [rows,10] of the prompts with their images."""
    ids, pixels, valid = batch_of(config, rows)
    model = bind_model(config, params, dtype=jnp.float32, cache_dtype=cache_dtype)
    generator = Generator(model, image_token_id=IMAGE, mesh=mesh)
    gen = GenerationConfig(max_new_tokens=10)
    return generator.generate(ids, valid.astype(int), generator.encode(pixels), gen)[0]

"""This implementation's stages, on the modules of internvl_jax.models. Compiled once for all layers of a tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from checkpoints_convert.parity.report import ParityError
from checkpoints_convert.parity.source import ParitySource
from internvl_jax.config import ChatConfig, ProjectorConfig, TextConfig, VisionConfig
from internvl_jax.models import chat_model, intern_vit, llama, projector
from internvl_jax.models.layers import Params
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.processing.images import ImageProcessor

RunStage = Callable[[Any], np.ndarray]  # a stage with its weights: hidden state in, hidden state out


@partial(jax.jit, static_argnames="config")
def _vision_embeddings(params: Params, x: jax.Array, config: VisionConfig) -> jax.Array:
    return intern_vit.Embeddings(config, jnp.float32).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _vision_layer(params: Params, x: jax.Array, config: VisionConfig) -> jax.Array:
    return intern_vit.Block(config, jnp.float32).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _features(params: Params, x: jax.Array, config: ChatConfig) -> jax.Array:
    side = config.required_image_size // config.required_vision.patch_size
    grid = x[:, 1:].reshape(x.shape[0], side, side, -1)
    folded = projector.pixel_unshuffle(grid, config.unshuffle, config.ps_version)
    return folded.reshape(x.shape[0], -1, folded.shape[-1])


@partial(jax.jit, static_argnames="config")
def _projector(params: Params, x: jax.Array, config: ProjectorConfig) -> jax.Array:
    return projector.Projector(config).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _text_layer(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    # Llama returns the last layer's output after the final norm only, so two run; XLA drops the second.
    layers = {"layers": (params, params), "norm": {"scale": jnp.ones(config.hidden_size)}}
    positions = jnp.arange(x.shape[1])[None]
    valid = jnp.ones_like(positions, bool)
    _, _, out = llama.Llama(config).apply({"params": layers}, x, positions, valid, collect=True)
    return out["hidden_states"][1]


@partial(jax.jit, static_argnames="config")
def _text_norm(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    return llama.RMSNorm((config.hidden_size,), config.rms_norm_eps).apply({"params": params}, x)


@partial(jax.jit, static_argnames="config")
def _logits(params: Params, x: jax.Array, config: TextConfig) -> jax.Array:
    return llama.Llama(config).apply({"params": {_head(config): params}}, x, method="logits")


def _head(config: TextConfig) -> str:
    return "embed_tokens" if config.tie_word_embeddings else "lm_head"


class OurStages:
    """This implementation, stage by stage, with the methods of `reference.Reference`.

    Weights of a published directory go through the mapping table, those of a converted one are read as they are. A
    method reads a stage's weights and returns the function that holds them.
    """

    def __init__(self, config: ChatConfig, processor: ImageProcessor | None, source: ParitySource):
        self._config, self._source = config, source
        self.processor = processor
        self.has_projector = config.projector is not None
        self.num_vision_layers = 0 if config.vision is None else config.num_vision_layers

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Pixel values of one image, [1,3,S,S]."""
        if self.processor is None:
            raise ParityError("the checkpoint has no preprocessor_config.json")
        return self.processor.tiles(image, max_num=1 if self.processor.tiling is not None else None)

    def vision_embeddings(self) -> RunStage:
        """[1,3,S,S] -> [1,1+P,D]."""
        return self._stage(_vision_embeddings, self._config.vision, "vision_model/embeddings")

    def vision_layer(self, layer: int) -> RunStage:
        """[1,1+P,D] -> [1,1+P,D]."""
        return self._stage(_vision_layer, self._config.vision, "vision_model/layers", layer)

    def features(self) -> RunStage:
        """[1,1+P,D] -> visual tokens before the projector."""
        return lambda x: np.asarray(_features({}, jnp.asarray(x), self._config))

    def projector(self) -> RunStage:
        """[1,P,E] -> [1,P,D]."""
        return self._stage(_projector, self._config.projector, "mlp1")

    def text_embeddings(self, ids: np.ndarray, image_token_id: int | None) -> RunStage:
        """Visual tokens [1,P,D] or None, with ids [T] -> [1,T,D]."""
        params = {"language_model": {"embed_tokens": self._source.ours("language_model/embed_tokens")}}
        model = chat_model.InternVLChat(self._config)
        index = image_token_index(ids[None] == image_token_id)
        return lambda features: np.asarray(
            model.apply({"params": params}, jnp.asarray(ids)[None], features, index, method="embed_prompt")
        )

    def text_layer(self, layer: int) -> RunStage:
        """[1,T,D] -> [1,T,D]."""
        return self._stage(_text_layer, self._config.text, "language_model/layers", layer)

    def text_norm(self) -> RunStage:
        """[1,T,D] -> [1,T,D]."""
        return self._stage(_text_norm, self._config.text, "language_model/norm")

    def logits(self) -> RunStage:
        """[1,T,D] -> [1,T,V]."""
        return self._stage(_logits, self._config.text, f"language_model/{_head(self._config.required_text)}")

    def _stage(self, function: Callable[..., jax.Array], config: Any, part: str, layer: int | None = None) -> RunStage:
        params = self._source.ours(part, layer)
        return lambda x: np.asarray(function(params, jnp.asarray(x), config))

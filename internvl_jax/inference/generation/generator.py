"""Generator: from prompts as numpy arrays to generated tokens, over the jitted steps of generate.py."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMG_CONTEXT
from internvl_jax.inference.generation import generate
from internvl_jax.inference.generation.beam_search import EARLY_STOPPING, SearchSettings
from internvl_jax.inference.generation.bound_model import BoundModel, PromptBatch
from internvl_jax.inference.generation.generate import DecodeState
from internvl_jax.inference.generation.sampling import GenerationConfig, RowSettings, make_row_settings
from internvl_jax.models.layers import Array, Params
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.processing.tokenizer import Tokenizer

SMALLEST_BUCKET = 64  # tokens; shorter prompts cost about the same


def prompt_bucket(size: int) -> int:
    """Round tokens of a prompt up to 64, 96, 128, ..., 256, 288, ..., 512, 576, ..., 1024, 1152, ...

    From 225 tokens on at most an eighth of them is padding, in eight programs for each doubling of the length. Prefill
    takes time in proportion to its tokens, while a program is compiled once and kept on disk.
    """
    step = max(SMALLEST_BUCKET // 2, 1 << ((size - 1).bit_length() - 4 if size > SMALLEST_BUCKET else 0))
    return max(SMALLEST_BUCKET, -(-size // step) * step)


def cache_bucket(size: int) -> int:
    """Round slots of a KV cache up to 64, 96, 128, 192, 256, 384, 512, 768, ...: at most half of them are spare.

    The TPU kernel reads the slots in use, so spare ones cost memory, not time.
    """
    power = SMALLEST_BUCKET
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


class Generator:
    """Runs the jitted inference steps of one model: numpy arrays in, numpy arrays out.

    Prompts are padded on the left, whatever side the caller padded, so that the last column has the last token of
    every row and only one position needs logits. Batches of any size are accepted: they are padded to what divides the
    mesh.

    Args:
        model: the model.
        image_token_id: the token that image features replace; None for text-only models.
        mesh: the mesh over which the parameters are sharded (`param_sharding.place_params`); None: one device.
        known: [vocab_size] bool, tokens that may be generated; None: all. End tokens always may.

    Attributes:
        row_multiple: what the number of rows is padded to a multiple of.
    """

    def __init__(
        self,
        model: BoundModel,
        *,
        image_token_id: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        known: np.ndarray | None = None,
    ):
        self.model = model
        self.mesh = mesh
        self.image_token_id = image_token_id
        self.known = None if known is None or known.all() else known
        self.row_multiple = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
        self._image_multiple = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in model.image_axes)

    @classmethod
    def for_tokenizer(
        cls, model: BoundModel, tokenizer: Tokenizer | None, mesh: jax.sharding.Mesh | None = None
    ) -> Generator:
        """A generator with the image token of the configuration or the tokenizer.

        It generates only tokens that the tokenizer has: a model may have vocabulary rows for more.
        """
        config, known = model.config, None
        image_token_id = config.image_token_id
        if tokenizer is not None:
            image_token_id = tokenizer.token_to_id(IMG_CONTEXT) if image_token_id is None else image_token_id
            known = None if config.text is None else tokenizer.known_ids(config.text.vocab_size)
        return cls(model, image_token_id=image_token_id, mesh=mesh, known=known)

    @property
    def config(self) -> ChatConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def params(self) -> Params:
        """Parameters of the model."""
        return self.model.params

    @property
    def dtype(self) -> np.dtype:
        """Compute dtype."""
        return self.model.dtype

    @property
    def cache_dtype(self) -> np.dtype:
        """Dtype of the KV cache."""
        return self.model.cache_dtype

    @property
    def pad_token_id(self) -> int:
        """Padding of rows that ended early: the config's pad token, else its first end token, else 0."""
        pad = self.config.required_text.pad_token_id
        return pad if pad is not None else next(iter(self.config.required_text.eos_token_ids), 0)

    def with_params(self, params: Params, adapters: Params | None = None) -> Generator:
        """The same model with other parameters. Nothing is compiled again if their shapes and dtypes are the same.

        Args:
            params: parameters, as the constructor takes them.
            adapters: adapters for them; None: none.
        """
        other = copy.copy(self)
        other.model = self.model.replace(params=params, adapters=adapters)
        return other

    def encode(self, pixel_values: np.ndarray | Array) -> Array:
        """Encode images; compiled once per power of two of M.

        Args:
            pixel_values: [M,3,H,W] float32, normalized.

        Returns:
            Image features [M,P,D].

        Raises:
            ValueError: M is 0.
        """
        images = pixel_values.shape[0]
        if images == 0:
            raise ValueError("no images to encode: pass None for the features of prompts without images")
        with self.on_mesh():
            return generate.encode_step(self.model, pad_images(pixel_values, self._image_multiple))[:images]

    def prefill(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        features: Array | None,
        gen: GenerationConfig,
    ) -> DecodeState:
        """Read prompts and generate the first token of each; `decode` continues. Arguments as for `generate`."""
        if gen.num_beams > 1:
            raise ValueError("beams cannot be decoded in steps: use generate(), or num_beams=1")
        prompt, settings = self.prepare(input_ids, attention_mask, features, gen)
        slots = cache_bucket(prompt.input_ids.shape[1] + gen.max_new_tokens)
        with self.on_mesh():
            return generate.prefill_step(self.model, prompt, settings, slots=slots)

    def decode(self, state: DecodeState, steps: int) -> DecodeState:
        """Generate up to `steps` more tokens per row. The buffers of `state` are donated: do not use it again."""
        with self.on_mesh():
            return generate.decode_loop(self.model, state, np.int32(steps))

    def read(self, state: DecodeState) -> tuple[list[list[int]], list[str], np.ndarray]:
        """Copy a decode state to the host.

        Returns:
            Each row's tokens so far; each row's finish reason: "stop" after an end token, "error" for non-finite
            logits, otherwise "length" (meaningless while the row is running); which rows are running, [B] bool.
        """
        fields = (state.prompt_length, state.tokens, state.count, state.done, state.stopped, state.failed)
        lengths, *fields = jax.device_get(fields)
        # Rows without a prompt only fill up the mesh.
        tokens, count, done, stopped, failed = (field[lengths > 0] for field in fields)
        rows = [row[:length].tolist() for row, length in zip(tokens, count)]
        return rows, _reasons(stopped, failed), ~done

    def end_rows(self, state: DecodeState, ended: np.ndarray) -> DecodeState:
        """End the rows for which `ended` [B] bool is True, for example at a stop string."""
        done = np.array(state.done)
        done[: len(ended)] |= np.asarray(ended, bool)
        return state.replace(done=jax.device_put(done, None if self.mesh is None else state.done.sharding))

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        features: Array | None = None,
        gen: GenerationConfig | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """Generate an answer to each prompt. Stop strings are ignored.

        Args:
            input_ids: [B,T] integers, with image tokens in place.
            attention_mask: [B,T] of 0 and 1, 0 on padding, which may be anywhere; None: no padding.
            features: [M,P,D] from `encode`, images in prompt order over the batch; None without images.
            gen: generation settings; None: the defaults.

        Returns:
            New tokens [B,<=max_new_tokens] int32, as wide as the longest row, end tokens included, padded with
            `pad_token_id`; and why each row ended: "stop" (end token), "length" or "error" (non-finite logits: the row
            has the tokens before them, in beam search none).

        Raises:
            ValueError: a prompt has no tokens, tokens outside the vocabulary or no room for max_new_tokens, or the
                numbers of image tokens and images differ.
        """
        gen = gen or GenerationConfig()
        if gen.num_beams > 1:
            rows, reasons = self.beam_search(input_ids, attention_mask, features, gen)
        else:
            state = self.prefill(input_ids, attention_mask, features, gen)
            rows, reasons, _ = self.read(self.decode(state, gen.max_new_tokens))
        return self._padded(rows), reasons

    def beam_search(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        features: Array | None,
        gen: GenerationConfig,
    ) -> tuple[list[list[int]], list[str]]:
        """Search for an answer to each prompt with gen.num_beams beams. Arguments and errors as for `generate`.

        Returns:
            Each row's tokens, and its finish reason; rows that failed have no tokens.
        """
        prompt, settings = self.prepare(input_ids, attention_mask, features, gen)
        width = prompt.input_ids.shape[1]
        prompt_length = prompt.valid.sum(axis=1, dtype=np.int32)
        search = SearchSettings(
            rows=settings,
            length_penalty=np.float32(gen.length_penalty),
            early_stopping=np.int32(EARLY_STOPPING[gen.early_stopping]),
            num_beams=gen.num_beams,
            max_tokens=cache_bucket(width + gen.max_new_tokens) - width,
        )
        with self.on_mesh():
            logits, cache = generate.read_prompt_step(self.model, prompt, slots=width)
            result = generate.beam_search_step(self.model, logits, cache, prompt_length, search)
        fields = (field[prompt_length > 0] for field in jax.device_get(result))
        tokens, lengths, stopped, failed = fields
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths)]
        return rows, _reasons(stopped, failed)

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, features: Array | None = None
    ) -> np.ndarray:
        """Logits at every position, [B,T,V] float32, undefined on padding. Arguments as for `generate`."""
        input_ids, valid = self.check(input_ids, attention_mask, features, None)
        rows, length = input_ids.shape
        width = ((0, -rows % self.row_multiple), (0, prompt_bucket(length) - length))
        prompt = self._prompt_batch(np.pad(input_ids, width), np.pad(valid, width), features)
        with self.on_mesh():
            logits = generate.score_step(self.model, prompt)
        return np.asarray(logits)[:rows, :length, : self.config.required_text.vocab_size]

    def check(
        self,
        input_ids: Any,
        attention_mask: Any,
        features: Array | jax.ShapeDtypeStruct | None,
        gen: GenerationConfig | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Validate the inputs of `generate` (without `gen`: of `logits`) before anything runs.

        Args:
            input_ids: as for `generate`.
            attention_mask: as for `generate`.
            features: as for `generate`, or their shape while they are still to be encoded.
            gen: generation settings, or None.

        Returns:
            input_ids [B,T] int32 and valid [B,T] bool.

        Raises:
            ValueError: as for `generate`.
        """
        input_ids, valid = self._check_tokens(input_ids, attention_mask)
        self._check_images(input_ids, valid, features)
        self._check_length(valid, 0 if gen is None else gen.max_new_tokens)
        if gen is not None:
            self._settings(gen, len(input_ids))
        return input_ids, valid

    def prepare(
        self, input_ids: Any, attention_mask: Any, features: Array | None, gen: GenerationConfig
    ) -> tuple[PromptBatch, RowSettings]:
        """Validate prompts and pad them to their bucket. Arguments and errors as for `generate`.

        Returns:
            The prompts, padded on the left, and the settings of their rows; the number of rows divides the mesh.
        """
        input_ids, valid = self.check(input_ids, attention_mask, features, gen)
        settings = self._settings(gen, len(input_ids))
        rows = [ids[keep] for ids, keep in zip(input_ids, valid)]
        width = min(prompt_bucket(max(map(len, rows))), self.config.required_text.context)
        padded = len(rows) + -len(rows) % self.row_multiple
        aligned = np.zeros((padded, width), np.int32)
        valid = np.zeros((padded, width), bool)
        for number, row in enumerate(rows):
            aligned[number, width - len(row) :] = row
            valid[number, width - len(row) :] = True
        return self._prompt_batch(aligned, valid, features), settings

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context in which the programs of `generate` run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _settings(self, gen: GenerationConfig, batch: int) -> RowSettings:
        vocabulary = self.config.required_text.vocab_size
        outside = [i for i in gen.eos_token_ids or () if i >= vocabulary]
        if outside:
            raise ValueError(f"eos_token_ids {outside} are outside the vocabulary of {vocabulary} tokens")
        settings = make_row_settings(gen, batch, self.config.required_text.eos_token_ids)
        extra = -batch % self.row_multiple
        settings = jax.tree.map(lambda row: np.pad(row, [(0, extra)] + [(0, 0)] * (row.ndim - 1), "edge"), settings)
        settings.max_new_tokens[batch:] = 1  # rows that fill up the mesh end at once
        return settings.replace(known=self.known)

    def _padded(self, rows: list[list[int]]) -> np.ndarray:
        tokens = np.full((len(rows), max(map(len, rows))), self.pad_token_id, np.int32)
        for padded, row in zip(tokens, rows):
            padded[: len(row)] = row
        return tokens

    def _prompt_batch(self, input_ids: np.ndarray, valid: np.ndarray, features: Array | None) -> PromptBatch:
        if features is None:
            return PromptBatch(input_ids, valid)
        image_index = image_token_index(valid & (input_ids == self.image_token_id))
        return PromptBatch(input_ids, valid, pad_images(features), image_index)

    def _check_tokens(self, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [B,T] int32 with 0 for padding, and valid [B,T] bool."""
        input_ids = np.asarray(input_ids)
        if input_ids.ndim != 2 or 0 in input_ids.shape or not np.issubdtype(input_ids.dtype, np.integer):
            raise ValueError(
                f"input_ids must be integers [rows, tokens], not {input_ids.dtype} {list(input_ids.shape)}"
            )
        if attention_mask is None:
            valid = np.ones(input_ids.shape, bool)
        else:
            mask = np.asarray(attention_mask)
            if mask.shape != input_ids.shape or not np.isin(mask, (0, 1)).all():
                raise ValueError(
                    f"attention_mask must hold 0 and 1 in the shape of input_ids {list(input_ids.shape)}; this one "
                    f"is {mask.dtype} {list(mask.shape)}"
                )
            valid = mask.astype(bool)
        empty = np.flatnonzero(~valid.any(axis=1))
        if empty.size:
            raise ValueError(f"row {_names(empty)}: the prompt has no tokens")
        vocabulary = self.config.required_text.vocab_size
        outside = valid & ((input_ids < 0) | (input_ids >= vocabulary))
        if self.image_token_id is not None:  # which may be outside the vocabulary
            outside &= input_ids != self.image_token_id
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise ValueError(
                f"row {row}: token {input_ids[row, column]} at position {column} is outside the vocabulary of "
                f"{vocabulary} tokens; do tokenizer and checkpoint belong together?"
            )
        return np.where(valid, input_ids, 0).astype(np.int32), valid

    def _check_images(self, input_ids: np.ndarray, valid: np.ndarray, features: Any) -> None:
        """Under jit no count can be checked, and a wrong one would put features at the wrong tokens."""
        if features is not None and self.image_token_id is None:
            raise ValueError("there are images, but this model has no image token to put them at")
        counts = (valid & (input_ids == self.image_token_id)).sum(axis=1)
        if features is None:
            images, tokens = 0, 1
        else:
            width = self.config.required_text.hidden_size
            if features.ndim != 3 or features.shape[2] != width:
                raise ValueError(f"features must be [images, tokens, {width}], not {list(features.shape)}")
            images, tokens = features.shape[:2]
        uneven = np.flatnonzero(counts % tokens)
        if uneven.size:
            raise ValueError(
                f"row {_names(uneven)}: {_names(counts[uneven])} image tokens (id {self.image_token_id}), "
                f"which is not a multiple of {tokens}, the tokens of one image"
            )
        if counts.sum() != images * tokens:
            rows = ", ".join(f"row {row}: {count}" for row, count in enumerate(counts) if count) or "none"
            expected = f"{images} images x {tokens} tokens = {images * tokens}" if images else "there are no images"
            raise ValueError(
                f"the prompts have {counts.sum()} image tokens (id {self.image_token_id}; {rows}), but {expected}"
            )

    def _check_length(self, valid: np.ndarray, max_new_tokens: int) -> None:
        context = self.config.required_text.context
        lengths = valid.sum(axis=1)
        row = int(lengths.argmax())
        if lengths[row] + max_new_tokens > context:
            raise ValueError(
                f"row {row}: {lengths[row]} prompt tokens + {max_new_tokens} new ones exceed the context of {context} "
                "tokens; shorten the prompt or lower max_new_tokens"
            )


def _reasons(stopped: np.ndarray, failed: np.ndarray) -> list[str]:
    return ["error" if bad else "stop" if stop else "length" for stop, bad in zip(stopped, failed)]


def _names(numbers: np.ndarray) -> str:
    return ", ".join(str(number) for number in numbers)


def pad_images(images: Any, multiple: int = 1) -> Any:
    """Pad the leading axis with zeros to a power of two, then to a multiple of `multiple`."""
    count = images.shape[0]
    size = 1 << (count - 1).bit_length()
    extra = size + -size % multiple - count
    if not extra:
        return images
    library = np if isinstance(images, np.ndarray) else jnp
    return library.pad(images, [(0, extra)] + [(0, 0)] * (images.ndim - 1))

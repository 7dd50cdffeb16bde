"""Generation: the prompt is read once, then tokens are decoded on the device until every row has ended.

Whatever may change from call to call without changing a shape is an array argument: lengths, temperature, penalties,
end tokens, seeds. What remains is compiled once per shape, and shapes are rounded up to buckets:

    prefill_step    rows B, prompt bucket T, cache bucket S, image bucket M     the prompt and the first token
    decode_loop     rows B, cache bucket S                                      all others
    read_prompt     as prefill_step                                             the prompt, for beam search
    beam_search     rows B, prompt bucket T, cache bucket S, num_beams          beam.py
    encode_step     image bucket M                                              images to features

Prompts are padded on the left here, whatever side the caller padded, so that the last slot holds the last token of
every row and only one position needs logits. Slots say where a token is stored, positions where it stands in its row.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from internvl_jax.config import ChatConfig
from internvl_jax.inference.beam_search import EARLY_STOPPING, beam_search
from internvl_jax.inference.sampling import GenerationConfig, Settings, all_finite, make_settings, select_tokens
from internvl_jax.models import cpu
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.models.kv_cache import KVCache, cache_specs, init_cache
from internvl_jax.models.layers import Array, Params, positions_from_valid
from internvl_jax.models.llama import Llama, next_logits
from internvl_jax.models.stack import is_stacked
from internvl_jax.parallel.partitioning import BATCH, TENSOR, constrain, constrain_to

SMALLEST_BUCKET = 64  # tokens; shorter prompts cost about the same


class DecodeState(flax.struct.PyTreeNode):
    """Rows on their way. A value: `decode_loop` takes one and returns the next, and its buffers are donated."""

    cache: KVCache  # keys and values of the prompt and of every generated token but the last
    settings: Settings  # what each row asked for
    prompt_length: Array  # [B] int32, real tokens of each prompt
    tokens: Array  # [B,S] int32, generated tokens from column 0; what lies beyond `count` means nothing
    count: Array  # [B] int32, tokens generated so far
    last: Array  # [B] int32, the last one: generated, not yet read by the model
    seen: Array  # [B,V] bool, tokens that the row has generated
    done: Array  # [B] bool, rows that ended: by an end token, by their limit or by the caller
    stopped: Array  # [B] bool, rows that ended by an end token
    failed: Array  # [B] bool, rows that ended because their logits were not finite


# On the device.


def state_specs(state: DecodeState) -> DecodeState:
    """How a state lies over a mesh, as a DecodeState of PartitionSpecs. What the host reads is on every device."""
    specs = jax.tree.map(lambda leaf: P(), state)
    return specs.replace(cache=cache_specs(state.cache), seen=P(BATCH, TENSOR))


def place(state: DecodeState) -> DecodeState:
    """Lay a state out by `state_specs`, so that what goes in and what comes out is laid out alike."""
    return jax.tree.map(constrain_to, state, state_specs(state))


def add_token(state: DecodeState, logits: Array) -> DecodeState:
    """Select a token from logits [B,V] and append it to every row that still runs; logits not finite end theirs."""
    failed = ~state.done & ~all_finite(logits)
    running = ~state.done & ~failed
    token = jnp.where(running, select_tokens(logits, state.seen, state.count, state.settings), state.last)
    rows = jnp.arange(token.shape[0])
    column = jnp.where(running, state.count, state.tokens.shape[1])  # beyond the buffer: dropped
    count = state.count + running
    ended = running & jnp.any(token[:, None] == state.settings.eos_ids, axis=1)
    return state.replace(
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        count=count,
        last=token,
        seen=state.seen | (jnp.arange(state.seen.shape[1]) == token[:, None]),
        done=state.done | ended | failed | (count >= state.settings.max_new_tokens),
        stopped=state.stopped | ended,
        failed=state.failed | failed,
    )


def read_prompt(
    params: Params,
    input_ids: Array,
    valid: Array,
    features: Array | None,
    image_token_id: Array,
    *,
    config: ChatConfig,
    slots: int,
    dtype: Any,
    cache_dtype: Any = None,
) -> tuple[Array, KVCache]:
    """Read left-padded prompts into a new cache of `slots` slots. Returns the last position's logits [B,V], the cache.

    input_ids [B,T] int32, valid [B,T] bool; features [M,P,D] of the images in prompt order (more than needed is fine:
    padding) or None. cache_dtype: int8, or a float type; None: dtype.
    """
    language = params["language_model"]
    x = InternVLChat(config, dtype).apply(
        {"params": params}, input_ids, features, image_token_id, method="embed_prompt"
    )
    stacked = is_stacked(language["layers"])
    cache = init_cache(config.text, input_ids.shape[0], slots, cache_dtype or dtype, stacked=stacked)
    cache = jax.tree.map(constrain_to, cache, cache_specs(cache))
    llama = Llama(config.text, dtype)
    hidden, cache = llama.apply({"params": language}, x, positions_from_valid(valid), valid, cache, fresh=True)
    return llama.apply({"params": language}, hidden[:, -1], method="logits"), cache


def prefill_step(
    params: Params,
    input_ids: Array,
    valid: Array,
    features: Array | None,
    image_token_id: Array,
    settings: Settings,
    *,
    config: ChatConfig,
    slots: int,
    dtype: Any,
    cache_dtype: Any = None,
) -> DecodeState:
    """Read prompts and generate the first token of each. Arguments as for `read_prompt`."""
    logits, cache = read_prompt(
        params,
        input_ids,
        valid,
        features,
        image_token_id,
        config=config,
        slots=slots,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    batch, vocabulary = logits.shape
    state = DecodeState(
        cache=cache,
        settings=settings,
        prompt_length=jnp.sum(valid, axis=1, dtype=jnp.int32),
        tokens=jnp.zeros((batch, slots), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        last=jnp.zeros(batch, jnp.int32),
        seen=jnp.zeros((batch, vocabulary), bool),
        done=jnp.zeros(batch, bool),
        stopped=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
    )
    return place(add_token(state, logits))


def decode_loop(params: Params, state: DecodeState, steps: Array, *, config: ChatConfig, dtype: Any) -> DecodeState:
    """Up to `steps` ([] int32) more tokens for every row that runs; ends early when all rows are done."""

    def step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, left = carry
        positions = (state.prompt_length + state.count - 1)[:, None]
        logits, cache = next_logits(
            params["language_model"], state.last, positions, ~state.done[:, None], state.cache, config.text, dtype
        )
        return add_token(state.replace(cache=cache), logits), left - 1

    def running(carry: tuple[DecodeState, Array]) -> Array:
        state, left = carry
        return (left > 0) & ~jnp.all(state.done)

    state = place(state)
    state = jax.lax.while_loop(running, step, (state.replace(cache=cpu.fold_cache(state.cache)), steps))[0]
    return place(state.replace(cache=cpu.unfold_cache(state.cache)))


def score_step(
    params: Params,
    input_ids: Array,
    valid: Array,
    features: Array | None,
    image_token_id: Array,
    *,
    config: ChatConfig,
    dtype: Any,
) -> Array:
    """Logits at every position, [B,T,V] float32. Arguments as for `read_prompt`, with padding on either side."""
    language = params["language_model"]
    x = InternVLChat(config, dtype).apply(
        {"params": params}, input_ids, features, image_token_id, method="embed_prompt"
    )
    llama = Llama(config.text, dtype)
    hidden, _ = llama.apply({"params": language}, x, positions_from_valid(valid), valid)
    return llama.apply({"params": language}, hidden, method="logits")


def encode_step(
    params: Params, pixel_values: Array, *, config: ChatConfig, dtype: Any, image_axes: tuple[str, ...] = BATCH
) -> Array:
    """Visual tokens of images, [M,3,H,W] -> [M,P,D], on every device: any row may have any image.

    Of a bare tower its last state [M,1+P,D].
    """
    if config.projector is None:
        tower = InternViT(config.vision, dtype, image_axes=image_axes)
        encoded = tower.apply({"params": params["vision_model"]}, pixel_values)
    else:
        model = InternVLChat(config, dtype, image_axes=image_axes)
        encoded = model.apply({"params": params}, pixel_values, method="encode_images")
    return constrain(encoded, *[None] * encoded.ndim)


# One compiled form of each, shared by every Generator of a process.
_encode = jax.jit(encode_step, static_argnames=("config", "dtype", "image_axes"))
_score = jax.jit(score_step, static_argnames=("config", "dtype"))
_read_prompt = jax.jit(read_prompt, static_argnames=("config", "slots", "dtype", "cache_dtype"))
_prefill = jax.jit(prefill_step, static_argnames=("config", "slots", "dtype", "cache_dtype"))
_beam_search = jax.jit(beam_search, static_argnames=("config", "num_beams", "max_tokens", "dtype"))
_decode = jax.jit(decode_loop, static_argnames=("config", "dtype"), donate_argnames=("state",))


# On the host.


def bucket(size: int) -> int:
    """Round a number of tokens up to 64, 96, 128, 192, 256, 384, 512, 768, ...: at most half too many."""
    power = SMALLEST_BUCKET
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


@dataclass(frozen=True)
class Prompt:
    """Checked prompts, padded on the left to their bucket."""

    input_ids: np.ndarray  # [B,T] int32
    valid: np.ndarray  # [B,T] bool
    features: Array | None  # [M,P,D], M padded to its bucket
    settings: Settings  # of B rows
    rows: int  # the caller's; B is the next number that divides the mesh, and rows beyond have no tokens


class Generator:
    """Parameters, and the programs that run them: numpy arrays in, numpy arrays out.

    params: chat_model's tree, layers stacked or as tuples of per-layer trees. dtype: of computation.
    cache_dtype: of the cache, int8 or a float type; None: dtype.
    image_token_id: the token that stands where images are merged in; None where there is none.
    mesh: the devices over which params are sharded (place_params); None: one device. Batches of any size are accepted:
        they are padded to what divides the mesh.
    image_axes: mesh axes along which the vision tower's images are sharded (mesh.IMAGE_AXES).
    known: [vocab_size] bool, tokens that may be generated; None: all. End tokens always may.
    """

    def __init__(
        self,
        config: ChatConfig,
        params: Params,
        *,
        dtype: Any,
        image_token_id: int | None,
        cache_dtype: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        image_axes: tuple[str, ...] = BATCH,
        known: np.ndarray | None = None,
    ):
        self.config = config
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = self.dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        self.image_token_id = image_token_id
        self.mesh = mesh
        self._image_axes = image_axes
        self._known = None if known is None or known.all() else known
        self._row_multiple = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
        self._image_multiple = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in image_axes)
        self._static: dict[str, Any] = {"config": config, "dtype": self.dtype}
        # A token id that nothing carries: without images the comparison with it must never be true.
        self._image_id = np.int32(-1 if image_token_id is None else image_token_id)

    @property
    def pad_token_id(self) -> int:
        """What fills rows that ended early: the config's pad token, else its first end token, else 0."""
        pad = self.config.text.pad_token_id
        return pad if pad is not None else next(iter(self.config.text.eos_token_ids), 0)

    def encode(self, pixel_values: np.ndarray | Array) -> Array:
        """Visual tokens of images, [M,P,D]. pixel_values [M,3,H,W]; compiled per power of two of M."""
        images = pixel_values.shape[0]
        if images == 0:
            raise ValueError("no images to encode: pass None for the features of prompts without images")
        padded = _pad_images(pixel_values, self._image_multiple)
        with self._on_mesh():
            return _encode(self.params, padded, image_axes=self._image_axes, **self._static)[:images]

    def prefill(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        features: Array | None,
        gen: GenerationConfig,
    ) -> DecodeState:
        """Read prompts and generate the first token of each; `decode` goes on from there. Arguments as `generate`'s."""
        if gen.num_beams > 1:
            raise ValueError("beams cannot be decoded in steps: use generate(), or num_beams=1")
        prompt = self._prepare(input_ids, attention_mask, features, gen)
        slots = bucket(prompt.input_ids.shape[1] + gen.max_new_tokens)
        with self._on_mesh():
            return _prefill(
                *self._arguments(prompt), prompt.settings, slots=slots, cache_dtype=self.cache_dtype, **self._static
            )

    def decode(self, state: DecodeState, steps: int) -> DecodeState:
        """Up to `steps` more tokens per row. The state passed in is used up: its buffers become the result's."""
        with self._on_mesh():
            return _decode(self.params, state, np.int32(steps), **self._static)

    def read(self, state: DecodeState) -> tuple[list[list[int]], list[str], np.ndarray]:
        """Copy to the host: each row's tokens so far, its finish reason, and which rows still run [B] bool.

        The reason is "stop" after an end token, "error" where logits were not finite, otherwise "length" (meaningless
        while the row runs).
        """
        fields = (state.prompt_length, state.tokens, state.count, state.done, state.stopped, state.failed)
        lengths, *fields = jax.device_get(fields)
        # Rows without a prompt are padding.
        tokens, count, done, stopped, failed = (field[lengths > 0] for field in fields)
        rows = [row[:length].tolist() for row, length in zip(tokens, count)]
        return rows, _reasons(stopped, failed), ~done

    def end_rows(self, state: DecodeState, ended: np.ndarray) -> DecodeState:
        """Make rows end here, where `ended` [B] bool says so (a stop string, a reader who left)."""
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
        """New tokens [B, <=max_new_tokens] int32, and why each row ended: "stop" (end token), "length" or "error".

        input_ids [B,T] integers; attention_mask [B,T], 0 on padding, which may stand anywhere; features [M,P,D] of
        `encode`, images in prompt order over the batch. The end token is kept; rows that end early are filled up with
        the pad id, and the result is as wide as its longest row. Stop strings are not looked for. A row whose logits
        were not finite ends with "error": it has the tokens before, in beam search none.
        Raises ValueError for prompts without tokens, tokens outside the vocabulary, image tokens and images that do
        not agree, and prompts that leave no room for max_new_tokens.
        """
        gen = gen or GenerationConfig()
        if gen.num_beams > 1:
            return self._search(self._prepare(input_ids, attention_mask, features, gen), gen)
        state = self.prefill(input_ids, attention_mask, features, gen)
        rows, reasons, _ = self.read(self.decode(state, gen.max_new_tokens))
        return self._pad(rows), reasons

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, features: Array | None = None
    ) -> np.ndarray:
        """Logits at every position, [B,T,V] float32; positions of padding mean nothing. Arguments as `generate`'s."""
        input_ids, valid, _ = self.check(input_ids, attention_mask, features, None)
        rows, length = input_ids.shape
        width = ((0, -rows % self._row_multiple), (0, bucket(length) - length))
        with self._on_mesh():
            logits = _score(
                self.params,
                np.pad(input_ids, width, constant_values=self._filler),
                np.pad(valid, width),
                None if features is None else _pad_images(features),
                self._image_id,
                **self._static,
            )
        return np.asarray(logits)[:rows, :length, : self.config.text.vocab_size]

    def check(
        self,
        input_ids: Any,
        attention_mask: Any,
        features: Array | jax.ShapeDtypeStruct | None,
        gen: GenerationConfig | None,
    ) -> tuple[np.ndarray, np.ndarray, Settings | None]:
        """Refuse whatever `generate` (with gen None: `logits`) would refuse, before anything runs.

        features: those of `encode`, or anything of their shape while they are still to be encoded.
        Returns what passed: input_ids [B,T] int32, valid [B,T] bool, settings of the padded batch.
        """
        input_ids, valid = self._check_tokens(input_ids, attention_mask)
        self._check_images(input_ids, valid, features)
        self._check_length(valid, 0 if gen is None else gen.max_new_tokens)
        return input_ids, valid, None if gen is None else self._settings(gen, len(input_ids))

    def _search(self, prompt: Prompt, gen: GenerationConfig) -> tuple[np.ndarray, list[str]]:
        width = prompt.input_ids.shape[1]
        with self._on_mesh():
            logits, cache = _read_prompt(
                *self._arguments(prompt), slots=width, cache_dtype=self.cache_dtype, **self._static
            )
            result = _beam_search(
                self.params,
                logits,
                cache,
                prompt.valid.sum(axis=1, dtype=np.int32),
                prompt.settings,
                np.float32(gen.length_penalty),
                np.int32(EARLY_STOPPING[gen.early_stopping]),
                num_beams=gen.num_beams,
                max_tokens=bucket(width + gen.max_new_tokens) - width,
                **self._static,
            )
        tokens, lengths, stopped, failed = (field[: prompt.rows] for field in jax.device_get(result))
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths)]
        return self._pad(rows), _reasons(stopped, failed)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _arguments(self, prompt: Prompt) -> tuple[Any, ...]:
        return self.params, prompt.input_ids, prompt.valid, prompt.features, self._image_id

    def _settings(self, gen: GenerationConfig, batch: int) -> Settings:
        vocabulary = self.config.text.vocab_size
        outside = [i for i in gen.eos_token_ids or () if i >= vocabulary]
        if outside:
            raise ValueError(f"eos_token_ids {outside} are outside the vocabulary of {vocabulary} tokens")
        settings = make_settings(gen, batch, self.config.text.eos_token_ids)
        extra = -batch % self._row_multiple
        settings = jax.tree.map(lambda row: np.pad(row, [(0, extra)] + [(0, 0)] * (row.ndim - 1), "edge"), settings)
        settings.max_new_tokens[batch:] = 1  # rows of padding end at once
        return settings.replace(known=self._known)

    def _pad(self, rows: list[list[int]]) -> np.ndarray:
        tokens = np.full((len(rows), max(map(len, rows))), self.pad_token_id, np.int32)
        for padded, row in zip(tokens, rows):
            padded[: len(row)] = row
        return tokens

    def _prepare(self, input_ids: Any, attention_mask: Any, features: Array | None, gen: GenerationConfig) -> Prompt:
        input_ids, valid, settings = self.check(input_ids, attention_mask, features, gen)
        rows = [ids[keep] for ids, keep in zip(input_ids, valid)]
        width = min(bucket(max(map(len, rows))), self.config.text.max_position_embeddings)
        padded = len(rows) + -len(rows) % self._row_multiple
        aligned = np.full((padded, width), self._filler, np.int32)
        valid = np.zeros((padded, width), bool)
        for number, row in enumerate(rows):
            aligned[number, width - len(row) :] = row
            valid[number, width - len(row) :] = True
        features = None if features is None else _pad_images(features)
        return Prompt(aligned, valid, features, settings, len(rows))

    @property
    def _filler(self) -> int:
        """A token for padding: any but the image token, which would take an image's features."""
        return 1 if self.image_token_id == 0 else 0

    def _check_tokens(self, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 with padding replaced by a harmless token, and valid [B,T] bool."""
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
        vocabulary = self.config.text.vocab_size
        outside = valid & ((input_ids < 0) | (input_ids >= vocabulary))
        if self.image_token_id is not None:  # which need not be one of the vocabulary
            outside &= input_ids != self.image_token_id
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise ValueError(
                f"row {row}: token {input_ids[row, column]} at position {column} is outside the vocabulary of "
                f"{vocabulary} tokens; do tokenizer and checkpoint belong together?"
            )
        return np.where(valid, input_ids, self._filler).astype(np.int32), valid

    def _check_images(self, input_ids: np.ndarray, valid: np.ndarray, features: Any) -> None:
        """No count can be checked under jit, and a wrong one would put images into the wrong places."""
        if features is not None and self.image_token_id is None:
            raise ValueError("there are images, but this model has no image token to put them at")
        counts = (valid & (input_ids == self._image_id)).sum(axis=1)
        if features is None:
            images, tokens = 0, 1
        else:
            width = self.config.text.hidden_size
            if features.ndim != 3 or features.shape[2] != width:
                raise ValueError(f"features must be [images, tokens, {width}], not {list(features.shape)}")
            images, tokens = features.shape[:2]
        uneven = np.flatnonzero(counts % tokens)
        if uneven.size:
            raise ValueError(
                f"row {_names(uneven)}: {_names(counts[uneven])} image tokens (id {self._image_id}), which is not a "
                f"multiple of {tokens}, the tokens of one image"
            )
        if counts.sum() != images * tokens:
            rows = ", ".join(f"row {row}: {count}" for row, count in enumerate(counts) if count) or "none"
            expected = f"{images} images x {tokens} tokens = {images * tokens}" if images else "there are no images"
            raise ValueError(
                f"the prompts have {counts.sum()} image tokens (id {self._image_id}; {rows}), but {expected}"
            )

    def _check_length(self, valid: np.ndarray, max_new_tokens: int) -> None:
        context = self.config.text.max_position_embeddings
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


def _pad_images(images: Any, multiple: int = 1) -> Any:
    """Pad the leading axis with zeros up to a power of two, and on to a multiple of `multiple`."""
    count = images.shape[0]
    size = 1 << (count - 1).bit_length()
    extra = size + -size % multiple - count
    if not extra:
        return images
    library = np if isinstance(images, np.ndarray) else jnp
    return library.pad(images, [(0, extra)] + [(0, 0)] * (images.ndim - 1))

"""Generation: the prompt is read once, then tokens are decoded on the device until every row has ended.

Two programs do the work, `prefill_step` and `decode_loop` (three for beam search, see beam.py). Whatever may change
from call to call without changing a shape is an array argument: lengths, temperature, penalties, end tokens, seeds.
What remains is compiled once per shape, and shapes are rounded up to buckets:

    prefill_step    rows B, prompt bucket T, cache bucket S, image bucket M
    decode_loop     rows B, cache bucket S

Prompts are padded on the left here, whatever side the caller padded, so that the last slot holds the last token of
every row and only one position needs logits. Slots say where a token is stored, positions where it stands in its row.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.models import chat_model, llama
from internvl_jax.models.layers import Array, Params, positions_from_valid
from internvl_jax.models.llama import KVCache

SMALLEST_BUCKET = 64  # tokens; shorter prompts cost about the same
EOS_SLOTS = 8  # end tokens a compiled program has room for; more than that come in further eights
NO_TOKEN = np.iinfo(np.int32).max  # fills the unused room: no token has this id


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; names and meanings are transformers'. Raises ValueError for values that make no sense."""

    max_new_tokens: int = 1024
    min_new_tokens: int = 0  # no end token before that many tokens
    temperature: float = 0.0  # 0 is greedy: the most probable token, top_k and top_p without effect
    top_k: int = 0  # sample among the k most probable tokens; 0: among all
    top_p: float = 1.0  # sample among the fewest tokens whose probabilities reach top_p
    repetition_penalty: float = 1.0  # above 1 makes tokens that were generated before less likely
    seed: int | tuple[int, ...] = 0  # row i samples with seed + i; a tuple gives each row its own
    num_beams: int = 1
    length_penalty: float = 1.0  # beams are ranked by log-probability / length ** length_penalty
    early_stopping: bool | str = False  # when beams stop: True, False or "never", see beam.py
    stop: tuple[str, ...] = ()  # stop strings; only who decodes text can look for them (chat.py)
    eos_token_ids: tuple[int, ...] | None = None  # None: the checkpoint's

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("num_beams", 1)):
            self._set(name, _whole(name, getattr(self, name), least))
        for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, not {value!r}")
            self._set(name, float(value))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}; 1 is off")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}; 1 is off")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping must be True, False or "never", not {self.early_stopping!r}')
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample: set temperature to 0, or num_beams to 1")
        seeds = self.seed if isinstance(self.seed, (tuple, list, np.ndarray)) else None
        if seeds is None:
            self._set("seed", _whole("seed", self.seed, 0))
        else:
            self._set("seed", tuple(_whole("seed", seed, 0) for seed in seeds))
        self._set("stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings that are not empty, not {self.stop!r}")
        if self.eos_token_ids is not None:
            ids = self.eos_token_ids
            ids = (ids,) if isinstance(ids, numbers.Integral) else tuple(ids)
            self._set("eos_token_ids", tuple(_whole("eos_token_ids", i, 0) for i in ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"{name} must be at least {least} and below 2**31, not {value}")
    return int(value)


@flax.struct.dataclass
class Settings:
    """A GenerationConfig on the device. Rows have their own values, so that one batch may serve several callers."""

    max_new_tokens: Array  # [B] int32
    min_new_tokens: Array  # [B] int32
    temperature: Array  # [B] float32, 0 is greedy
    top_k: Array  # [B] int32, 0 is off
    top_p: Array  # [B] float32, 1 is off
    repetition_penalty: Array  # [B] float32, 1 is off
    seed: Array  # [B] uint32
    eos_ids: Array  # [B,E] int32, filled up with NO_TOKEN


@flax.struct.dataclass
class DecodeState:
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


def make_settings(gen: GenerationConfig, batch: int, eos_token_ids: Sequence[int]) -> Settings:
    """The same settings for `batch` rows, as numpy arrays. eos_token_ids serve where gen names none."""
    eos = gen.eos_token_ids if gen.eos_token_ids is not None else tuple(eos_token_ids)
    room = EOS_SLOTS * max(1, -(-len(eos) // EOS_SLOTS))
    if isinstance(gen.seed, tuple):
        if len(gen.seed) != batch:
            raise ValueError(f"{len(gen.seed)} seeds for {batch} rows: give one per row, or a single number")
        seeds = np.asarray(gen.seed, np.uint32)
    else:
        seeds = np.arange(gen.seed, gen.seed + batch).astype(np.uint32)

    def rows(value: Any, dtype: Any) -> np.ndarray:
        return np.full(batch, value, dtype)

    return Settings(
        max_new_tokens=rows(gen.max_new_tokens, np.int32),
        min_new_tokens=rows(gen.min_new_tokens, np.int32),
        temperature=rows(gen.temperature, np.float32),
        top_k=rows(gen.top_k, np.int32),
        top_p=rows(gen.top_p, np.float32),
        repetition_penalty=rows(gen.repetition_penalty, np.float32),
        seed=seeds,
        eos_ids=np.tile(np.asarray((*eos, *[NO_TOKEN] * (room - len(eos))), np.int32), (batch, 1)),
    )


# On the device: from logits to tokens.


def penalize(scores: Array, seen: Array, count: Array, settings: Settings) -> Array:
    """Repetition penalty, then no end token before min_new_tokens. scores [B,V] float32, seen [B,V], count [B].

    Scores are logits, or log-probabilities in beam search, as in transformers. Only generated tokens count as seen:
    the reference generates from embeddings, so its list of earlier tokens does not hold the prompt. (Its version
    4.37 starts that list with one bos token, which it therefore penalises from the first step; later ones, and this
    code, start with nothing.)
    """
    penalty = settings.repetition_penalty[:, None]
    scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    rows = jnp.arange(scores.shape[0])[:, None]
    is_eos = jnp.zeros(scores.shape, bool).at[rows, settings.eos_ids].set(True, mode="drop")
    return jnp.where(is_eos & (count < settings.min_new_tokens)[:, None], -jnp.inf, scores)


def keep_likely(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Top-k, then top-p: -inf for every token that may not be sampled. logits [B,V], top_k [B], top_p [B].

    Top-k keeps the k largest. Top-p (Holtzman et al., 2020) keeps the fewest of those whose probabilities, summed from
    the largest, reach top_p, and at least one. Tokens that tie with the last one kept are kept too.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    vocabulary = logits.shape[-1]
    kth = jnp.take_along_axis(ordered, jnp.clip(top_k, 1, vocabulary)[:, None] - 1, axis=-1)
    kth = jnp.where(top_k[:, None] > 0, kth, -jnp.inf)
    probabilities = jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf), axis=-1)
    above = jnp.cumsum(probabilities, axis=-1)[:, :-1]  # the probability of all tokens before the second, third, ...
    kept = 1 + jnp.sum(above < top_p[:, None], axis=-1, keepdims=True)
    nth = jnp.where(top_p[:, None] < 1, jnp.take_along_axis(ordered, kept - 1, axis=-1), -jnp.inf)
    return jnp.where(logits >= jnp.maximum(kth, nth), logits, -jnp.inf)


def sample_tokens(logits: Array, count: Array, settings: Settings) -> Array:
    """Draw a token per row: temperature, top-k, top-p, then the draw. logits [B,V] float32, count [B] -> [B] int32.

    The draw depends on the row's seed, on how many tokens the row has and on its logits: not on the batch around it.
    """
    logits = logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    filtered = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
    logits = jax.lax.cond(
        filtered, lambda: keep_likely(logits, settings.top_k, settings.top_p), lambda: logits
    )  # sorting a vocabulary is worth avoiding

    def draw(seed: Array, count: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), row)

    return jax.vmap(draw)(settings.seed, count, logits).astype(jnp.int32)


def select_tokens(logits: Array, seen: Array, count: Array, settings: Settings) -> Array:
    """The next token of each row, greedy where its temperature is 0. logits [B,V] float32 -> [B] int32.

    The order is transformers': repetition penalty, min_new_tokens, temperature, top-k, top-p.
    """
    logits = penalize(logits, seen, count, settings)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampling = settings.temperature > 0
    return jax.lax.cond(
        jnp.any(sampling), lambda: jnp.where(sampling, sample_tokens(logits, count, settings), best), lambda: best
    )


def add_token(state: DecodeState, logits: Array) -> DecodeState:
    """Select a token from logits [B,V] and append it to every row that still runs."""
    running = ~state.done
    token = jnp.where(running, select_tokens(logits, state.seen, state.count, state.settings), state.last)
    rows = jnp.arange(token.shape[0])
    column = jnp.where(running, state.count, state.tokens.shape[1])  # beyond the buffer: dropped
    count = state.count + running
    ended = running & jnp.any(token[:, None] == state.settings.eos_ids, axis=1)
    return state.replace(
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        count=count,
        last=token,
        seen=state.seen.at[rows, token].set(True),
        done=state.done | ended | (count >= state.settings.max_new_tokens),
        stopped=state.stopped | ended,
    )


# On the device: the programs.


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
) -> tuple[Array, KVCache]:
    """Read left-padded prompts into a new cache of `slots` slots. Returns the last position's logits [B,V], the cache.

    input_ids [B,T] int32, valid [B,T] bool; features [M,P,D] of the images in prompt order (more than needed is fine:
    padding) or None.
    """
    language = params["language_model"]
    x = chat_model.embed_prompt(params, input_ids, features, image_token_id, dtype=dtype)
    stacked = not isinstance(language["layers"], tuple)
    cache = llama.init_cache(config.text, input_ids.shape[0], slots, dtype, stacked=stacked)
    positions = positions_from_valid(valid)
    hidden, cache, _ = llama.forward(language, config.text, x, positions, valid, cache, fresh=True, dtype=dtype)
    return llama.logits(language, hidden[:, -1]), cache


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
) -> DecodeState:
    """Read prompts and generate the first token of each. Arguments as for `read_prompt`."""
    logits, cache = read_prompt(
        params, input_ids, valid, features, image_token_id, config=config, slots=slots, dtype=dtype
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
    )
    return add_token(state, logits)


def decode_loop(params: Params, state: DecodeState, steps: Array, *, config: ChatConfig, dtype: Any) -> DecodeState:
    """Up to `steps` ([] int32) more tokens for every row that runs; ends early when all rows are done."""
    language = params["language_model"]

    def step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, left = carry
        x = llama.embed(language, state.last[:, None], dtype)
        positions = (state.prompt_length + state.count - 1)[:, None]
        hidden, cache, _ = llama.forward(
            language, config.text, x, positions, ~state.done[:, None], state.cache, dtype=dtype
        )
        return add_token(state.replace(cache=cache), llama.logits(language, hidden[:, 0])), left - 1

    def running(carry: tuple[DecodeState, Array]) -> Array:
        state, left = carry
        return (left > 0) & ~jnp.all(state.done)

    return jax.lax.while_loop(running, step, (state, steps))[0]


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
    x = chat_model.embed_prompt(params, input_ids, features, image_token_id, dtype=dtype)
    hidden, _, _ = llama.forward(language, config.text, x, positions_from_valid(valid), valid, dtype=dtype)
    return llama.logits(language, hidden)


def encode_step(params: Params, pixel_values: Array, *, config: ChatConfig, dtype: Any) -> Array:
    """Visual tokens of images. pixel_values [M,3,H,W] -> [M,P,D]."""
    return chat_model.encode_images(params, config, pixel_values, dtype=dtype)[0]


# One compiled form of each, shared by every Generator of a process.
_encode = jax.jit(encode_step, static_argnames=("config", "dtype"))
_score = jax.jit(score_step, static_argnames=("config", "dtype"))
_read_prompt = jax.jit(read_prompt, static_argnames=("config", "slots", "dtype"))
_prefill = jax.jit(prefill_step, static_argnames=("config", "slots", "dtype"))
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


class Generator:
    """Parameters, and the programs that run them: numpy arrays in, numpy arrays out.

    params: chat_model's tree, layers stacked or as tuples of per-layer trees. dtype: of computation and cache.
    image_token_id: the token that stands where images are merged in; None where there is none.
    """

    def __init__(self, config: ChatConfig, params: Params, *, dtype: Any, image_token_id: int | None):
        self.config = config
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.image_token_id = image_token_id
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
        return _encode(self.params, _pad_images(pixel_values), **self._static)[:images]

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
        return _prefill(
            self.params,
            prompt.input_ids,
            prompt.valid,
            prompt.features,
            self._image_id,
            self._settings(gen, len(prompt.input_ids)),
            slots=slots,
            **self._static,
        )

    def decode(self, state: DecodeState, steps: int) -> DecodeState:
        """Up to `steps` more tokens per row. The state passed in is used up: its buffers become the result's."""
        return _decode(self.params, state, np.int32(steps), **self._static)

    def read(self, state: DecodeState) -> tuple[list[list[int]], list[str], np.ndarray]:
        """Copy to the host: each row's tokens so far, its finish reason, and which rows still run [B] bool.

        The reason is "stop" after an end token, otherwise "length" (meaningless while the row runs).
        """
        tokens, count, done, stopped = jax.device_get((state.tokens, state.count, state.done, state.stopped))
        rows = [row[:length].tolist() for row, length in zip(tokens, count)]
        return rows, ["stop" if s else "length" for s in stopped], ~done

    def end_rows(self, state: DecodeState, ended: np.ndarray) -> DecodeState:
        """Make rows end here, where `ended` [B] bool says so (a stop string, a reader who left)."""
        return state.replace(done=np.asarray(state.done) | np.asarray(ended, bool))

    def generate(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        features: Array | None = None,
        gen: GenerationConfig | None = None,
    ) -> tuple[np.ndarray, list[str]]:
        """New tokens [B, <=max_new_tokens] int32, and why each row ended: "stop" (end token) or "length".

        input_ids [B,T] integers; attention_mask [B,T], 0 on padding, which may stand anywhere; features [M,P,D] of
        `encode`, images in prompt order over the batch. The end token is kept; rows that end early are filled up with
        the pad id, and the result is as wide as its longest row. Stop strings are not looked for.
        Raises ValueError for prompts without tokens, tokens outside the vocabulary, image tokens and images that do
        not agree, and prompts that leave no room for max_new_tokens.
        """
        gen = gen or GenerationConfig()
        state = self.prefill(input_ids, attention_mask, features, gen)
        rows, reasons, _ = self.read(self.decode(state, gen.max_new_tokens))
        return self._pad(rows), reasons

    def logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, features: Array | None = None
    ) -> np.ndarray:
        """Logits at every position, [B,T,V] float32; positions of padding mean nothing. Arguments as `generate`'s."""
        input_ids, valid = self._check_tokens(input_ids, attention_mask)
        self._check_images(input_ids, valid, features)
        self._check_length(valid, 0)
        length = input_ids.shape[1]
        width = ((0, 0), (0, bucket(length) - length))
        logits = _score(
            self.params,
            np.pad(input_ids, width),
            np.pad(valid, width),
            None if features is None else _pad_images(features),
            self._image_id,
            **self._static,
        )
        return np.asarray(logits)[:, :length]

    def _settings(self, gen: GenerationConfig, batch: int) -> Settings:
        vocabulary = self.config.text.vocab_size
        outside = [i for i in gen.eos_token_ids or () if i >= vocabulary]
        if outside:
            raise ValueError(f"eos_token_ids {outside} are outside the vocabulary of {vocabulary} tokens")
        return make_settings(gen, batch, self.config.text.eos_token_ids)

    def _pad(self, rows: list[list[int]]) -> np.ndarray:
        tokens = np.full((len(rows), max(map(len, rows))), self.pad_token_id, np.int32)
        for padded, row in zip(tokens, rows):
            padded[: len(row)] = row
        return tokens

    def _prepare(self, input_ids: Any, attention_mask: Any, features: Array | None, gen: GenerationConfig) -> Prompt:
        """Everything that can be refused is refused here, before anything runs."""
        input_ids, valid = self._check_tokens(input_ids, attention_mask)
        self._check_images(input_ids, valid, features)
        self._check_length(valid, gen.max_new_tokens)
        rows = [ids[keep] for ids, keep in zip(input_ids, valid)]
        width = min(bucket(max(map(len, rows))), self.config.text.max_position_embeddings)
        aligned = np.full((len(rows), width), self._filler, np.int32)
        valid = np.zeros((len(rows), width), bool)
        for number, row in enumerate(rows):
            aligned[number, width - len(row) :] = row
            valid[number, width - len(row) :] = True
        return Prompt(aligned, valid, None if features is None else _pad_images(features))

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
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise ValueError(
                f"row {row}: token {input_ids[row, column]} at position {column} is outside the vocabulary of "
                f"{vocabulary} tokens; do tokenizer and checkpoint belong together?"
            )
        return np.where(valid, input_ids, self._filler).astype(np.int32), valid

    def _check_images(self, input_ids: np.ndarray, valid: np.ndarray, features: Array | None) -> None:
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


def _names(numbers: np.ndarray) -> str:
    return ", ".join(str(number) for number in numbers)


def _pad_images(images: Any) -> Any:
    """Pad the leading axis with zeros up to a power of two."""
    count = images.shape[0]
    extra = (1 << (count - 1).bit_length()) - count
    if not extra:
        return images
    library = np if isinstance(images, np.ndarray) else jnp
    return library.pad(images, [(0, extra)] + [(0, 0)] * (images.ndim - 1))

"""From logits to tokens: generation settings, and the functions on the device that follow them."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.models.layers import Array
from internvl_jax.parallel.partitioning import constrain

EOS_SLOTS = 8  # end tokens of a compiled program; more of them are rounded up to a multiple
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
NO_TOKEN = np.iinfo(np.int32).max  # padding of end tokens: no token has this id


NUMBERS = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty")
SAMPLING = ("top_p", "top_k", "seed")  # settings that have no effect at temperature 0


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings; names and meanings are those of transformers.

    Attributes:
        max_new_tokens: longest answer in tokens, the end token included.
        min_new_tokens: no end token before that many tokens.
        temperature: 0 is greedy: always the most probable token, whatever top_k and top_p say.
        top_k: sample among the k most probable tokens; 0: among all.
        top_p: sample among the fewest tokens whose probabilities sum to top_p.
        repetition_penalty: above 1 makes tokens that were generated before less likely.
        presence_penalty: subtracted from the logits of tokens that were generated before, as in OpenAI's API.
        frequency_penalty: subtracted as many times as the token was generated before.
        seed: row i samples with seed + i; a tuple has one seed per row.
        num_beams: beams per row; 1: no beam search.
        length_penalty: beams are ranked by log-probability / length ** length_penalty.
        early_stopping: when a beam search ends: True, False or "never", see beam_search.py.
        stop: stop strings, which `Chat` looks for in the decoded text; token-level functions ignore them.
        eos_token_ids: end tokens; None: the checkpoint's.

    Raises:
        ValueError: a value is out of range or contradicts another.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | tuple[int, ...] = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0), ("num_beams", 1)):
            self._set(name, _whole(name, getattr(self, name), least))
        for name in NUMBERS:
            self._set(name, _number(name, getattr(self, name)))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not _SMALLEST <= self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}; 1 is off")
        if self.repetition_penalty < _SMALLEST:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}; 1 is off")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping must be True, False or "never", not {self.early_stopping!r}')
        if self.num_beams > 1 and (self.presence_penalty or self.frequency_penalty):
            raise ValueError("beam search has no presence_penalty and no frequency_penalty: leave them out")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("beam search does not sample: set temperature to 0, or num_beams to 1")
        seeds = self.seed if isinstance(self.seed, (tuple, list, np.ndarray)) else None
        if seeds is None:
            self._set("seed", _whole("seed", self.seed, 0))
        else:
            self._set("seed", tuple(_whole("seed", seed, 0) for seed in seeds))
        if isinstance(self.stop, str):
            self._set("stop", (self.stop,))
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be non-empty strings, not {self.stop!r}")
        self._set("stop", tuple(self.stop))
        if self.eos_token_ids is not None:
            ids = self.eos_token_ids
            ids = (ids,) if isinstance(ids, numbers.Integral) else tuple(ids)
            self._set("eos_token_ids", tuple(_whole("eos_token_ids", i, 0) for i in ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _number(name: str, value: Any) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be a number, not {reprlib.repr(value)}")
    return float(value)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not least <= int(value) < 2**31:
        raise ValueError(f"{name} must be at least {least} and below 2**31, not {value}")
    return int(value)


class RowSettings(flax.struct.PyTreeNode):
    """Generation settings of each row of a batch, as arrays: rows of one batch may differ.

    Attributes:
        max_new_tokens: [B] int32.
        min_new_tokens: [B] int32.
        temperature: [B] float32, 0 is greedy.
        top_k: [B] int32, 0 is off.
        top_p: [B] float32, 1 is off.
        repetition_penalty: [B] float32, 1 is off.
        presence_penalty: [B] float32, 0 is off.
        frequency_penalty: [B] float32, 0 is off.
        seed: [B] uint32.
        eos_ids: [B,E] int32, padded with NO_TOKEN.
        known: [V] bool, tokens that any row may generate; None: all.
        allowed: [B,W] int32, a bit for each token that the row may generate next; None: all.
    """

    max_new_tokens: Array
    min_new_tokens: Array
    temperature: Array
    top_k: Array
    top_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    seed: Array
    eos_ids: Array
    known: Array | None = None
    allowed: Array | None = None


def make_row_settings(gen: GenerationConfig, batch: int, eos_token_ids: Sequence[int]) -> RowSettings:
    """Expand generation settings to a batch.

    Args:
        gen: the settings.
        batch: number of rows.
        eos_token_ids: end tokens where `gen` has none.

    Returns:
        Numpy arrays of `batch` rows.

    Raises:
        ValueError: `gen` has a number of seeds other than `batch`.
    """
    eos = tuple(dict.fromkeys(eos_token_ids if gen.eos_token_ids is None else gen.eos_token_ids))
    room = EOS_SLOTS * max(1, -(-len(eos) // EOS_SLOTS))
    if isinstance(gen.seed, tuple):
        if len(gen.seed) != batch:
            raise ValueError(f"{len(gen.seed)} seeds for {batch} rows: give one per row, or a single number")
        seeds = np.asarray(gen.seed, np.uint32)
    else:
        seeds = np.arange(gen.seed, gen.seed + batch).astype(np.uint32)

    def rows(value: Any, dtype: Any) -> np.ndarray:
        return np.full(batch, value, dtype)

    return RowSettings(
        max_new_tokens=rows(gen.max_new_tokens, np.int32),
        min_new_tokens=rows(gen.min_new_tokens, np.int32),
        temperature=rows(gen.temperature, np.float32),
        top_k=rows(gen.top_k, np.int32),
        top_p=rows(gen.top_p, np.float32),
        repetition_penalty=rows(gen.repetition_penalty, np.float32),
        presence_penalty=rows(gen.presence_penalty, np.float32),
        frequency_penalty=rows(gen.frequency_penalty, np.float32),
        seed=seeds,
        eos_ids=np.tile(np.asarray((*eos, *[NO_TOKEN] * (room - len(eos))), np.int32), (batch, 1)),
    )


def end_tokens(settings: RowSettings, vocabulary: int) -> Array:
    """Which tokens end each row, [B,V] bool."""
    ids = settings.eos_ids
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, ids].set(True, mode="drop")


def penalize(scores: Array, uses: Array, count: Array, settings: RowSettings) -> Array:
    """Apply the penalties, and rule out end tokens before min_new_tokens and unknown tokens.

    Only generated tokens count as seen: the reference generates from embeddings, so its list of previous tokens does
    not hold the prompt. transformers 4.37 starts that list with one bos token, which it therefore penalizes from the
    first step; transformers 5 and this code start with an empty list.

    Args:
        scores: [B,V] float32, logits, or log-probabilities in beam search.
        uses: [B,V] int32, how often each row has generated each token; in beam search bool.
        count: [B] int32, number of tokens that each row has generated.
        settings: generation settings of the rows.

    Returns:
        [B,V] float32, -inf for tokens that may not be selected.
    """
    penalty, seen = settings.repetition_penalty[:, None], uses > 0
    scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    scores = scores - seen * settings.presence_penalty[:, None] - uses * settings.frequency_penalty[:, None]
    too_early = (count < settings.min_new_tokens)[:, None]
    ends = end_tokens(settings, scores.shape[-1])
    forbidden = ends & too_early
    if settings.known is not None:  # end tokens are allowed: they are never decoded
        known = jnp.pad(settings.known, (0, scores.shape[-1] - settings.known.shape[0]))  # vocabulary padded for a mesh
        forbidden |= ~known & ~ends
    if settings.allowed is not None:
        bits = (settings.allowed[:, :, None] >> jnp.arange(32)) & 1
        forbidden |= bits.reshape(bits.shape[0], -1)[:, : scores.shape[-1]] == 0
    return jnp.where(forbidden, -jnp.inf, scores)


def all_finite(logits: Array) -> Array:
    """Whether all logits of a row are finite, [...,V] -> [...] bool. With one NaN or Inf, no token is meaningful."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def keep_likely(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Apply top-k, then top-p (Holtzman et al., 2020).

    Top-k keeps the k largest logits. Top-p keeps the fewest tokens whose probabilities, summed from the largest, reach
    top_p, and at least one. Tokens that tie with the last one kept are kept too.

    Args:
        logits: [B,V] float32.
        top_k: [B] int32, 0 is off.
        top_p: [B] float32, 1 is off.

    Returns:
        [B,V] float32, -inf for tokens that are not kept.
    """
    # Replicate the vocabulary axis: one all-gather instead of a collective for each of the sums below.
    logits = constrain(logits, "batch", None)
    logits = keep_top(logits, jnp.ones_like(logits), jnp.where(top_k > 0, top_k, jnp.inf))
    return keep_top(logits, jax.nn.softmax(logits, axis=-1), jnp.where(top_p < 1, top_p, jnp.inf))


def keep_top(scores: Array, weights: Array, limit: Array) -> Array:
    """Keep the largest scores until their weights sum to `limit`.

    Without sorting, which takes longer to compile for TPU than the whole model (9 of 12.5 s). The bits of floats are
    ordered like integers, so 32 bisections of their range find the threshold exactly.

    Args:
        scores: [B,V] float32.
        weights: [B,V] float32, not negative.
        limit: [B] float32, above 0.

    Returns:
        [B,V] float32, -inf for every score above which the scores weigh `limit` or more.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)  # no -0
    keys = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, without overflow
        above = jnp.sum(jnp.where(keys > middle[:, None], weights, 0.0), axis=-1)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    limits = jnp.iinfo(jnp.int32)
    start = (jnp.full(limit.shape, limits.min), jnp.full(limit.shape, limits.max))
    threshold, _ = jax.lax.fori_loop(0, 32, halve, start)
    return jnp.where(keys >= threshold[:, None], scores, -jnp.inf)


def sample_tokens(logits: Array, count: Array, settings: RowSettings) -> Array:
    """Draw a token per row, after temperature, top-k and top-p.

    The draw depends on the row's seed, token count and logits, not on the batch around it.

    Args:
        logits: [B,V] float32.
        count: [B] int32, number of tokens that each row has generated.
        settings: generation settings of the rows.

    Returns:
        [B] int32.
    """
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)  # so that a tiny temperature cannot overflow
    logits = logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    filtered = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
    logits = jax.lax.cond(
        filtered, lambda: keep_likely(logits, settings.top_k, settings.top_p), lambda: logits
    )  # the search costs time, so it is skipped if no row needs it

    def draw(seed: Array, count: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), row)

    return jax.vmap(draw)(settings.seed, count, logits).astype(jnp.int32)


def select_tokens(logits: Array, uses: Array, count: Array, settings: RowSettings) -> Array:
    """Select the next token of each row: greedy where its temperature is 0, sampled elsewhere.

    The order is that of transformers: repetition penalty, min_new_tokens, temperature, top-k, top-p. The other two
    penalties follow the first.

    Args:
        logits: [B,V] float32.
        uses: [B,V] int32, how often each row has generated each token.
        count: [B] int32, number of tokens that each row has generated.
        settings: generation settings of the rows.

    Returns:
        [B] int32.
    """
    logits = penalize(logits, uses, count, settings)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampling = settings.temperature > 0
    return jax.lax.cond(
        jnp.any(sampling), lambda: jnp.where(sampling, sample_tokens(logits, count, settings), best), lambda: best
    )

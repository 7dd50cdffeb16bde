"""The engine's compiled programs.

The KV cache of the running answers is a ring. Every row writes its next token into the same slot, as decoding a batch
does (kv_cache.py): one dynamic_update_slice for all rows, no scatter and no pointer per row. After the last slot comes
the first one again. A prompt is read into a cache of its own, chunk by chunk, and then copied into a row so that its
last token is just before the slot that is written next; the cache compares positions, not slots, so a row may begin
anywhere. A row's tokens are the last ones that were written, so they are not overwritten while prompt and answer fit
into the ring.

    chunk_step      [1,C] tokens of a prompt into the prompt's cache
    insert_step     a read prompt into a row of the ring, and its first token
    decode_step     up to `steps` tokens for every running row
    take_block      a chunk's keys and values out of the prompt's cache, for the prefix cache
    put_block       and back
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from internvl_jax.inference.generation.bound_model import BoundModel
from internvl_jax.inference.generation.generate import DecodeState, add_token, constrain_state
from internvl_jax.inference.generation.sampling import RowSettings
from internvl_jax.models import cpu
from internvl_jax.models.kv_cache import KVCache, cache_specs, init_cache
from internvl_jax.models.layers import Array, part_variables
from internvl_jax.models.llama import Llama, next_logits
from internvl_jax.parallel.partitioning import constrain, constrain_to
from internvl_jax.serving.requests import TOP_LOGPROBS

# The fields of a DecodeState that have one entry per row, besides cache and settings.
PER_ROW = ("prompt_length", "tokens", "count", "last", "uses", "done", "stopped", "failed")


class StepOutput(flax.struct.PyTreeNode):
    """What the host reads after a step, for each row.

    Attributes:
        tokens: [B,n] int32, the tokens of this step; columns from `count` on are undefined.
        count: [B] int32, how many tokens that are.
        done: [B] bool, whether the row has ended.
        stopped: [B] bool, ended with an end token.
        failed: [B] bool, ended because its logits were not finite.
        logprobs: [B,n] float32, of `tokens`; computed if a row wants it.
        top_ids: [B,n,TOP_LOGPROBS] int32, the most probable tokens.
        top_logprobs: [B,n,TOP_LOGPROBS] float32, theirs.
    """

    tokens: Array
    count: Array
    done: Array
    stopped: Array
    failed: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


class PromptCache(flax.struct.PyTreeNode):
    """A prompt that is being read.

    Attributes:
        cache: keys and values of its tokens so far, one row with as many slots as the ring.
        logits: [1,V] float32, of the token after the last one.
    """

    cache: KVCache
    logits: Array


def empty_ring(model: BoundModel, settings: RowSettings, *, slots: int) -> DecodeState:
    """A ring whose rows, as many as `settings` has, are all done."""
    rows = settings.seed.shape[0]
    vocabulary = _vocabulary(model)
    state = DecodeState(
        cache=_empty_cache(model, rows, slots),
        settings=settings,
        prompt_length=jnp.zeros(rows, jnp.int32),
        tokens=jnp.zeros((rows, slots), jnp.int32),
        count=jnp.zeros(rows, jnp.int32),
        last=jnp.zeros(rows, jnp.int32),
        uses=jnp.zeros((rows, vocabulary), jnp.int32),
        done=jnp.ones(rows, bool),
        stopped=jnp.zeros(rows, bool),
        failed=jnp.zeros(rows, bool),
    )
    return constrain_state(state)


def empty_prompt(model: BoundModel, *, slots: int) -> PromptCache:
    """A prompt of which nothing has been read."""
    return _constrain_prompt(PromptCache(_empty_cache(model, 1, slots), jnp.zeros((1, _vocabulary(model)))))


def _vocabulary(model: BoundModel) -> int:
    """Vocabulary of the parameters, which a mesh may have padded."""
    llama = Llama(model.config.required_text, model.dtype)
    language = part_variables(model.variables, "language_model")
    hidden = jax.ShapeDtypeStruct((1, model.config.required_text.hidden_size), model.dtype)
    return jax.eval_shape(lambda x: llama.apply(language, x, method="logits"), hidden).shape[-1]


def _empty_cache(model: BoundModel, rows: int, slots: int) -> KVCache:
    layers = part_variables(model.variables, "language_model")["params"]["layers"]
    return init_cache(model.config.required_text, rows, slots, model.cache_dtype, layers=layers)


def _constrain_prompt(prompt: PromptCache) -> PromptCache:
    cache = jax.tree.map(constrain_to, prompt.cache, cache_specs(prompt.cache))
    return PromptCache(cache, constrain(prompt.logits, None, None))


@partial(jax.jit, donate_argnames=("prompt",))
def chunk_step(
    model: BoundModel, prompt: PromptCache, tokens: Array, is_image: Array, features: Array, count: Array
) -> PromptCache:
    """Read the next tokens of a prompt.

    Args:
        model: the model.
        prompt: what was read before; its buffers are donated.
        tokens: [1,C] int32; tokens from `count` on are padding.
        is_image: [1,C] bool, tokens whose embedding is in `features`.
        features: [1,C,D], visual tokens; undefined elsewhere.
        count: [] int32, tokens that are read.
    """
    language = part_variables(model.variables, "language_model")
    llama = Llama(model.config.required_text, model.dtype)
    size = tokens.shape[1]
    valid = (jnp.arange(size) < count)[None]
    x = llama.apply(language, tokens, method="embed")
    x = jnp.where(is_image[..., None], features.astype(x.dtype), x)
    start = prompt.cache.length
    positions = (start + jnp.arange(size))[None]
    hidden, cache = llama.apply(language, x, positions, valid, prompt.cache)
    last = jax.lax.dynamic_index_in_dim(hidden, count - 1, 1, keepdims=False)
    logits = llama.apply(language, last, method="logits")
    return _constrain_prompt(PromptCache(cache.replace(length=start + count), logits))


@partial(jax.jit, donate_argnames=("state",))
def insert_step(
    model: BoundModel, state: DecodeState, prompt: PromptCache, settings: RowSettings, row: Array, wanted: Array
) -> tuple[DecodeState, StepOutput]:
    """Copy a read prompt into a row of the ring, and select its first token.

    Args:
        model: the model.
        state: the ring; its buffers are donated.
        prompt: the prompt; it is read in the next request's place afterwards.
        settings: generation settings of the one row, with the tokens that are allowed.
        row: [] int32.
        wanted: [] bool, whether log-probabilities are wanted.

    Returns:
        The ring, and the output of this one row.
    """
    length, slots = prompt.cache.length, state.cache.slots
    ring = state.cache
    shift = ring.length - length  # the prompt's last token comes just before the ring's next one

    def place(old: Array, new: Array, row_axis: int, slot_axis: int) -> Array:
        start = [jnp.zeros((), jnp.int32)] * old.ndim
        start[row_axis] = row
        moved = jnp.roll(new, shift, axis=slot_axis).astype(old.dtype)
        return jax.lax.dynamic_update_slice(old, moved, start, allow_negative_indices=False)

    keys = partial(place, row_axis=-4, slot_axis=-2)
    per_token = partial(place, row_axis=-3, slot_axis=-1)
    # Slots beyond the prompt may still be marked, of an earlier, longer one.
    valid = prompt.cache.valid & (jnp.arange(slots) < length)
    cache = ring.replace(
        k=jax.tree.map(keys, ring.k, prompt.cache.k),
        v=jax.tree.map(keys, ring.v, prompt.cache.v),
        scales=jax.tree.map(per_token, ring.scales, prompt.cache.scales),
        positions=place(ring.positions, prompt.cache.positions, 0, 1),
        valid=place(ring.valid, valid, 0, 1),
    )
    new = DecodeState(
        cache=prompt.cache,
        settings=settings,
        prompt_length=length[None],
        tokens=jnp.zeros((1, slots), jnp.int32),
        count=jnp.zeros(1, jnp.int32),
        last=jnp.zeros(1, jnp.int32),
        uses=jnp.zeros((1, state.uses.shape[1]), jnp.int32),
        done=jnp.zeros(1, bool),
        stopped=jnp.zeros(1, bool),
        failed=jnp.zeros(1, bool),
    )
    chosen = add_token(new, prompt.logits)
    logprobs = jax.tree.map(lambda leaf: leaf[:, None], _logprobs(model, prompt.logits, chosen.last, wanted))

    def put(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)

    per_row = {name: put(getattr(state, name), getattr(chosen, name)) for name in PER_ROW}
    own = settings.replace(known=None, allowed=None)
    merged = jax.tree.map(put, state.settings.replace(known=None), own)
    state = DecodeState(cache=cache, settings=merged.replace(known=state.settings.known), **per_row)
    return constrain_state(state), _output(new.count, chosen, logprobs)


@partial(jax.jit, static_argnames=("size",), donate_argnames=("state",))
def decode_step(
    model: BoundModel, state: DecodeState, ended: Array, allowed: Array, steps: Array, wanted: Array, *, size: int
) -> tuple[DecodeState, StepOutput]:
    """Generate up to `steps` tokens for every running row. Ends early when all rows are done.

    Args:
        model: the model.
        state: the ring; its buffers are donated.
        ended: [B] bool, rows that end here.
        allowed: [B,W] int32, bits of the tokens that each row may generate next; for several steps all ones.
        steps: [] int32, at most `size`.
        wanted: [] bool, whether log-probabilities are wanted.
        size: columns of the output, n.
    """
    slots = state.cache.slots
    language = part_variables(model.variables, "language_model")

    def step(carry: tuple[DecodeState, Array, Any]) -> tuple[DecodeState, Array, Any]:
        state, index, logprobs = carry
        positions = (state.prompt_length + state.count - 1)[:, None]
        running = ~state.done[:, None]
        config = model.config.required_text
        logits, cache = next_logits(language, state.last, positions, running, state.cache, config, model.dtype)
        settings = state.settings
        state = state.replace(
            cache=cache.replace(length=cache.length % slots), settings=settings.replace(allowed=allowed)
        )
        state = add_token(state, logits).replace(settings=settings)
        new = _logprobs(model, logits, state.last, wanted)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
        return state, index + 1, jax.tree.map(lambda old, new: write(old, new), logprobs, new)

    def running(carry: tuple[DecodeState, Array, Any]) -> Array:
        state, index, _ = carry
        return (index < steps) & ~jnp.all(state.done)

    state = constrain_state(state.replace(done=state.done | ended))
    before = state.count
    rows = before.shape[0]
    empty = (
        jnp.zeros((rows, size)),
        jnp.zeros((rows, size, TOP_LOGPROBS), jnp.int32),
        jnp.zeros((rows, size, TOP_LOGPROBS)),
    )
    folded = state.replace(cache=cpu.fold_cache(state.cache))
    state, _, logprobs = jax.lax.while_loop(running, step, (folded, jnp.int32(0), empty))
    state = constrain_state(state.replace(cache=cpu.unfold_cache(state.cache)))
    return state, _output(before, state, logprobs)


def _output(before: Array, state: DecodeState, logprobs: tuple[Array, Array, Array]) -> StepOutput:
    """What the host reads of `state`, whose rows had `before` [B] tokens; replicated."""
    columns = before[:, None] + jnp.arange(logprobs[0].shape[1])
    output = StepOutput(
        tokens=jnp.take_along_axis(state.tokens, jnp.minimum(columns, state.tokens.shape[1] - 1), axis=1),
        count=state.count - before,
        done=state.done,
        stopped=state.stopped,
        failed=state.failed,
        logprobs=logprobs[0],
        top_ids=logprobs[1],
        top_logprobs=logprobs[2],
    )
    return jax.tree.map(lambda leaf: constrain(leaf, *[None] * leaf.ndim), output)


def _logprobs(model: BoundModel, logits: Array, tokens: Array, wanted: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities [B] of tokens [B], and the most probable tokens [B,TOP_LOGPROBS] with theirs; else zeros."""
    rows, count = logits.shape[0], min(TOP_LOGPROBS, model.config.required_text.vocab_size)

    def compute() -> tuple[Array, Array, Array]:
        all_logprobs = jax.nn.log_softmax(constrain(logits, "batch", None)[:, : model.config.required_text.vocab_size])
        top, ids = jax.lax.top_k(all_logprobs, count)
        chosen = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=1)[:, 0]
        width = ((0, 0), (0, TOP_LOGPROBS - count))
        return chosen, jnp.pad(ids, width).astype(jnp.int32), jnp.pad(top, width, constant_values=-jnp.inf)

    def nothing() -> tuple[Array, Array, Array]:
        return jnp.zeros(rows), jnp.zeros((rows, TOP_LOGPROBS), jnp.int32), jnp.zeros((rows, TOP_LOGPROBS))

    return jax.lax.cond(wanted, compute, nothing)


@partial(jax.jit, static_argnames=("size",))
def take_block(prompt: PromptCache, start: Array, *, size: int) -> Any:
    """Keys and values (and scales) of the slots from `start` on, as trees of the cache's fields k, v and scales."""
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    cache = prompt.cache
    keys = jax.tree.map(lambda leaf: cut(leaf, axis=leaf.ndim - 2), (cache.k, cache.v))
    return *keys, jax.tree.map(lambda leaf: cut(leaf, axis=leaf.ndim - 1), cache.scales)


@partial(jax.jit, donate_argnames=("prompt",))
def put_block(prompt: PromptCache, block: Any, start: Array) -> PromptCache:
    """Continue a prompt, of which `start` tokens are read, with a block of `take_block`."""
    k, v, scales = block
    size = jax.tree.leaves(k)[0].shape[-2]

    def keys(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, old.ndim - 2)

    def per_token(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, old.ndim - 1)

    cache = prompt.cache.replace(length=start)
    cache = cache.append_positions((start + jnp.arange(size))[None], jnp.ones((1, size), bool))
    cache = cache.replace(
        k=jax.tree.map(keys, cache.k, k),
        v=jax.tree.map(keys, cache.v, v),
        scales=jax.tree.map(per_token, cache.scales, scales),
        length=start + size,
    )
    return _constrain_prompt(prompt.replace(cache=cache))


@partial(jax.jit, donate_argnames=("prompt",))
def restart_prompt(prompt: PromptCache) -> PromptCache:
    """The same buffers for another prompt. Slot i always holds position i, so what is stale is masked as the future."""
    return _constrain_prompt(prompt.replace(cache=prompt.cache.replace(length=jnp.zeros((), jnp.int32))))


make_ring = jax.jit(empty_ring, static_argnames=("slots",))
make_prompt = jax.jit(empty_prompt, static_argnames=("slots",))

PROGRAMS: dict[str, Any] = {
    "chunk": chunk_step,
    "insert": insert_step,
    "decode": decode_step,
    "take_block": take_block,
    "put_block": put_block,
    "restart": restart_prompt,
    "make_ring": make_ring,
    "make_prompt": make_prompt,
}


def num_compiles() -> int:
    """How many compiled versions of these programs the process holds."""
    return sum(program._cache_size() for program in PROGRAMS.values())

"""The jitted inference steps: image encoding, prefill, decoding, beam search and scoring.

Whatever may change from call to call without changing a shape is an array argument: lengths, temperature, penalties,
end tokens, seeds. The rest is compiled once per shape, and `Generator` rounds shapes up to buckets:

    encode_step         image bucket M                                            images to features
    prefill_step        rows B, prompt bucket T, cache bucket S, image bucket M   the prompt and the first token
    decode_loop         rows B, cache bucket S                                    all further tokens
    read_prompt_step    as prefill_step                                           the prompt, for beam search
    beam_search_step    rows B, prompt bucket T, num_beams, max_tokens            see beam_search.py
    score_step          rows B, prompt bucket T, image bucket M                   logits at every position

A slot is where the cache stores a token; a position is the token's place in its row, without padding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from internvl_jax.inference.generation.beam_search import beam_search
from internvl_jax.inference.generation.bound_model import BoundModel, PromptBatch
from internvl_jax.inference.generation.sampling import RowSettings, all_finite, select_tokens
from internvl_jax.models import cpu
from internvl_jax.models.chat_model import InternVLChat
from internvl_jax.models.intern_vit import InternViT
from internvl_jax.models.kv_cache import KVCache, cache_specs, init_cache
from internvl_jax.models.layers import Array, part_variables, positions_from_valid
from internvl_jax.models.llama import Llama, next_logits
from internvl_jax.parallel.partitioning import BATCH, TENSOR, constrain, constrain_to


class DecodeState(flax.struct.PyTreeNode):
    """Decode state of a batch. `decode_loop` takes one and returns the next; its buffers are donated.

    Attributes:
        cache: keys and values of the prompt and of every generated token but the last.
        settings: generation settings of each row.
        prompt_length: [B] int32, valid tokens of each prompt.
        tokens: [B,S] int32, generated tokens; columns from `count` on are undefined.
        count: [B] int32, number of tokens generated so far.
        last: [B] int32, the last generated token, which is not in the cache yet.
        uses: [B,V] int32, how often the row has generated each token.
        done: [B] bool, rows that ended: by an end token, their limit, non-finite logits or the caller.
        stopped: [B] bool, rows that ended with an end token.
        failed: [B] bool, rows that ended because their logits were not finite.
    """

    cache: KVCache
    settings: RowSettings
    prompt_length: Array
    tokens: Array
    count: Array
    last: Array
    uses: Array
    done: Array
    stopped: Array
    failed: Array


def state_specs(state: DecodeState) -> DecodeState:
    """PartitionSpecs of a decode state. What the host reads is replicated."""
    specs = jax.tree.map(lambda leaf: P(), state)
    return specs.replace(cache=cache_specs(state.cache), uses=P(BATCH, TENSOR))


def constrain_state(state: DecodeState) -> DecodeState:
    """Shard a decode state by `state_specs`, so that a step's input and output have the same layout."""
    return jax.tree.map(constrain_to, state, state_specs(state))


def add_token(state: DecodeState, logits: Array) -> DecodeState:
    """Select a token for every running row and append it. Rows with non-finite logits end without one.

    Args:
        state: the decode state.
        logits: [B,V] float32, of the next token.
    """
    failed = ~state.done & ~all_finite(logits)
    running = ~state.done & ~failed
    token = jnp.where(running, select_tokens(logits, state.uses, state.count, state.settings), state.last)
    rows = jnp.arange(token.shape[0])
    column = jnp.where(running, state.count, state.tokens.shape[1])  # out of bounds: dropped
    count = state.count + running
    ended = running & jnp.any(token[:, None] == state.settings.eos_ids, axis=1)
    return state.replace(
        tokens=state.tokens.at[rows, column].set(token, mode="drop"),
        count=count,
        last=token,
        uses=state.uses + (running[:, None] & (jnp.arange(state.uses.shape[1]) == token[:, None])),
        done=state.done | ended | failed | (count >= state.settings.max_new_tokens),
        stopped=state.stopped | ended,
        failed=state.failed | failed,
    )


def read_prompt(model: BoundModel, prompt: PromptBatch, *, slots: int) -> tuple[Array, KVCache]:
    """Read left-padded prompts into a new KV cache.

    Args:
        model: the model.
        prompt: the prompts, padded on the left.
        slots: slots per row of the cache, S.

    Returns:
        Logits of the last position [B,V] float32, and the cache.
    """
    config, dtype = model.config, model.dtype
    language = part_variables(model.variables, "language_model")
    x = _embed(model, prompt)
    cache = init_cache(
        config.required_text,
        prompt.input_ids.shape[0],
        slots,
        model.cache_dtype,
        layers=language["params"]["layers"],
    )
    cache = jax.tree.map(constrain_to, cache, cache_specs(cache))
    llama = Llama(config.required_text, dtype)
    positions = positions_from_valid(prompt.valid)
    hidden, cache = llama.apply(language, x, positions, prompt.valid, cache, fresh=True)
    return llama.apply(language, hidden[:, -1], method="logits"), cache


def _embed(model: BoundModel, prompt: PromptBatch) -> Array:
    """Embeddings of the prompts with image features in place, [B,T,D]."""
    return InternVLChat(model.config, model.dtype).apply(
        model.variables, prompt.input_ids, prompt.features, prompt.image_index, method="embed_prompt"
    )


@partial(jax.jit, static_argnames=("slots",))
def prefill_step(model: BoundModel, prompt: PromptBatch, settings: RowSettings, *, slots: int) -> DecodeState:
    """Read left-padded prompts and generate the first token of each.

    Args:
        model: the model.
        prompt: the prompts, padded on the left.
        settings: generation settings of the B rows.
        slots: slots per row of the cache: room for the prompt bucket and all new tokens.
    """
    logits, cache = read_prompt(model, prompt, slots=slots)
    batch, vocabulary = logits.shape
    state = DecodeState(
        cache=cache,
        settings=settings,
        prompt_length=jnp.sum(prompt.valid, axis=1, dtype=jnp.int32),
        tokens=jnp.zeros((batch, slots), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        last=jnp.zeros(batch, jnp.int32),
        uses=jnp.zeros((batch, vocabulary), jnp.int32),
        done=jnp.zeros(batch, bool),
        stopped=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
    )
    return constrain_state(add_token(state, logits))


@partial(jax.jit, donate_argnames=("state",))
def decode_loop(model: BoundModel, state: DecodeState, steps: Array) -> DecodeState:
    """Generate up to `steps` ([] int32) more tokens for every running row. Ends early when all rows are done."""

    def step(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, left = carry
        positions = (state.prompt_length + state.count - 1)[:, None]
        logits, cache = next_logits(
            part_variables(model.variables, "language_model"),
            state.last,
            positions,
            ~state.done[:, None],
            state.cache,
            model.config.required_text,
            model.dtype,
        )
        return add_token(state.replace(cache=cache), logits), left - 1

    def running(carry: tuple[DecodeState, Array]) -> Array:
        state, left = carry
        return (left > 0) & ~jnp.all(state.done)

    state = constrain_state(state)
    state = jax.lax.while_loop(running, step, (state.replace(cache=cpu.fold_cache(state.cache)), steps))[0]
    return constrain_state(state.replace(cache=cpu.unfold_cache(state.cache)))


@jax.jit
def score_step(model: BoundModel, prompt: PromptBatch) -> Array:
    """Logits at every position, [B,T,V] float32. Padding may be on either side."""
    language = part_variables(model.variables, "language_model")
    llama = Llama(model.config.required_text, model.dtype)
    hidden, _ = llama.apply(language, _embed(model, prompt), positions_from_valid(prompt.valid), prompt.valid)
    return llama.apply(language, hidden, method="logits")


@jax.jit
def encode_step(model: BoundModel, pixel_values: Array) -> Array:
    """Image features, replicated: any row may use any image.

    Args:
        model: the model.
        pixel_values: [M,3,H,W] float32, normalized.

    Returns:
        [M,P,D]; for a vision tower without projector its last hidden state [M,1+P,D].
    """
    if model.config.projector is None:
        tower = InternViT(model.config.required_vision, model.dtype, image_axes=model.image_axes)
        encoded = tower.apply(part_variables(model.variables, "vision_model"), pixel_values)
    else:
        chat_model = InternVLChat(model.config, model.dtype, image_axes=model.image_axes)
        encoded = chat_model.apply(model.variables, pixel_values, method="encode_images")
    return constrain(encoded, *[None] * encoded.ndim)


read_prompt_step = jax.jit(read_prompt, static_argnames=("slots",))
beam_search_step = jax.jit(beam_search)

# Shared by every Generator of a process.
PROGRAMS: dict[str, Any] = {
    "encode": encode_step,
    "prefill": prefill_step,
    "decode": decode_loop,
    "score": score_step,
    "read_prompt": read_prompt_step,
    "beam_search": beam_search_step,
}


def num_compiles() -> dict[str, int]:
    """How many compiled versions of each program this process holds, by its name in `PROGRAMS`."""
    return {name: program._cache_size() for name, program in PROGRAMS.items()}

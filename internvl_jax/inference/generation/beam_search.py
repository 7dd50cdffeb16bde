"""Beam search on the device, with the rules of transformers 4.37 (Wolf et al., 2020), which produced V1-1's scores.

At each step the continuations of all beams of a row are ranked together by summed log-probability:

    the best num_beams that do not end become the next beams;
    those that end, if they are among the best num_beams of all, enter the row's list of finished answers, which
    keeps the best num_beams, ranked by summed log-probability / length ** length_penalty. The length counts generated
    tokens, the end token included.

A row is over once its list is full and
    early_stopping True:     at once;
    early_stopping False:    the best continuation of this step, ranked at its present length, is no better than the
                             worst of the list (a heuristic: with a positive penalty a longer one could still be);
    early_stopping "never":  not even at the length where it would rank best: max_new_tokens where the penalty is
                             positive, the present length otherwise.
At max_new_tokens the beams of a row that is not over compete with its list.

transformers 5 differs in two corners, where this code follows 4.37: "the best continuation" there leaves out those that
end at this very step, so that it may stop one step earlier; and a list that fills up at the very last step does not
keep open beams out under early_stopping=True. Two things differ from 4.37 on purpose: an answer ends with the end token
that ended it, where 4.37 writes the first of several; and the repetition penalty starts with no token seen, as in
transformers 5 (see sampling.penalize).
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from internvl_jax.inference.generation.bound_model import BoundModel
from internvl_jax.inference.generation.sampling import RowSettings, all_finite, end_tokens, penalize
from internvl_jax.models.kv_cache import KVCache
from internvl_jax.models.layers import Array, part_variables
from internvl_jax.models.llama import next_logits

EARLY_STOPPING = {False: 0, True: 1, "never": 2}

# The score of a beam that does not exist yet: before the first step, all beams but the first.
_ABSENT = -1e9


class SearchSettings(flax.struct.PyTreeNode):
    """Settings of a beam search.

    Attributes:
        rows: generation settings of the B rows.
        length_penalty: [] float32.
        early_stopping: [] int32, a value of EARLY_STOPPING.
        num_beams: beams per row, W.
        max_tokens: size of the token buffers N, at least every row's max_new_tokens.
    """

    rows: RowSettings
    length_penalty: Array
    early_stopping: Array
    num_beams: int = flax.struct.field(pytree_node=False)
    max_tokens: int = flax.struct.field(pytree_node=False)


class BeamState(flax.struct.PyTreeNode):
    """State of a beam search: W beams for each of B rows.

    Attributes:
        cache: KV cache of B*W rows, the beams of a row side by side.
        tokens: [B,W,N] int32, tokens that each beam has generated.
        scores: [B,W] float32, summed log-probability of each beam, best first.
        seen: [B,W,V] bool, tokens that each beam has generated.
        count: [] int32, tokens per beam so far.
        finished: [B,W] float32, ranks of the finished answers, best first; -inf where there is none.
        best: [B,N] int32, tokens of the best answer so far.
        best_length: [B] int32, number of tokens in `best`.
        best_stopped: [B] bool, whether `best` ended with an end token.
        done: [B] bool, rows that are over.
        failed: [B] bool, rows with non-finite logits; they have no answer.
    """

    cache: KVCache
    tokens: Array
    scores: Array
    seen: Array
    count: Array
    finished: Array
    best: Array
    best_length: Array
    best_stopped: Array
    done: Array
    failed: Array


def beam_search(
    model: BoundModel, logits: Array, cache: KVCache, prompt_length: Array, search: SearchSettings
) -> tuple[Array, Array, Array, Array]:
    """Find the best answer of each row, starting from what `generate.read_prompt` returns.

    Args:
        model: the model.
        logits: [B,V] float32, of the token after each prompt.
        cache: KV cache of the prompts, B rows of T slots.
        prompt_length: [B] int32, valid tokens of each prompt.
        search: settings of the search.

    Returns:
        Tokens [B,N] int32; their number [B] int32, 0 in failed rows; whether the last one is an end token [B] bool;
        whether the row failed because its logits were not finite [B] bool.
    """
    config, dtype, num_beams, max_tokens = model.config, model.dtype, search.num_beams, search.max_tokens
    language = part_variables(model.variables, "language_model")
    batch, vocabulary = logits.shape
    prompt_slots = cache.slots

    def step(state: BeamState) -> BeamState:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=2, keepdims=False).reshape(-1)
        positions = jnp.repeat(prompt_length + state.count - 1, num_beams)[:, None]
        valid = jnp.ones(positions.shape, bool)
        logits, cache = next_logits(language, last, positions, valid, state.cache, config.required_text, dtype)
        logits = logits.reshape(batch, num_beams, vocabulary)
        return add_tokens(state.replace(cache=cache), logits, search, prompt_slots)

    state = BeamState(
        cache=widen(cache, num_beams, max_tokens),
        tokens=jnp.zeros((batch, num_beams, max_tokens), jnp.int32),
        scores=jnp.tile(jnp.where(jnp.arange(num_beams) == 0, 0.0, _ABSENT).astype(jnp.float32), (batch, 1)),
        seen=jnp.zeros((batch, num_beams, vocabulary), bool),
        count=jnp.zeros((), jnp.int32),
        finished=jnp.full((batch, num_beams), -jnp.inf, jnp.float32),
        best=jnp.zeros((batch, max_tokens), jnp.int32),
        best_length=jnp.zeros(batch, jnp.int32),
        best_stopped=jnp.zeros(batch, bool),
        done=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
    )
    state = add_tokens(state, jnp.broadcast_to(logits[:, None], (batch, num_beams, vocabulary)), search, prompt_slots)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), step, state)
    return state.best, jnp.where(state.failed, 0, state.best_length), state.best_stopped, state.failed


def add_tokens(state: BeamState, logits: Array, search: SearchSettings, prompt_slots: int) -> BeamState:
    """Continue every beam by one token. Rows that are over keep their answer.

    Args:
        state: the search so far.
        logits: [B,W,V] float32, of each beam's next token.
        search: settings of the search.
        prompt_slots: slots of the cache that the prompt occupies, which all beams of a row share.
    """
    batch, num_beams, _ = logits.shape
    rows = jnp.arange(batch)[:, None]
    length = state.count + 1
    # A beam without a continuation is scored -inf; its logits mean nothing.
    failed = ~state.done & jnp.any(~all_finite(logits) & (state.scores > -jnp.inf), axis=1)
    scores = score_continuations(state, logits, search.rows)
    open_scores, parent, token = next_beams(scores, search.rows)
    tokens = state.tokens[rows, parent].at[:, :, state.count].set(token)
    top_score, ended, answer = end_beams(state, scores, open_scores, search)
    finished = jax.lax.top_k(jnp.concatenate([state.finished, ended], axis=1), num_beams)[0]
    over = is_over(finished, top_score, length, search)

    # Only the best answer is returned, so only its tokens are kept. At the limit the best open beam is an answer too.
    better = ~state.done & (ended.max(axis=1) > state.finished[:, 0])
    limit = length >= search.rows.max_new_tokens
    cut = ~state.done & ~over & limit & (rank(open_scores[:, 0], length, search) > finished[:, 0])
    best = jnp.where(better[:, None], answer, state.best)
    best = jnp.where(cut[:, None], tokens[:, 0], best)
    return BeamState(
        cache=reorder(state.cache, (rows * num_beams + parent).reshape(-1), prompt_slots),
        tokens=tokens,
        scores=open_scores,
        seen=state.seen[rows, parent].at[rows, jnp.arange(num_beams), token].set(True),
        count=length,
        finished=jnp.where(state.done[:, None], state.finished, finished),
        best=best,
        best_length=jnp.where(better | cut, length, state.best_length),
        best_stopped=(state.best_stopped | better) & ~cut,
        done=state.done | over | limit | failed,
        failed=state.failed | failed,
    )


def rank(score: Array, length: Array, search: SearchSettings) -> Array:
    """Rank summed log-probabilities of answers of `length` tokens."""
    return score / jnp.asarray(length, jnp.float32) ** search.length_penalty


def score_continuations(state: BeamState, logits: Array, settings: RowSettings) -> Array:
    """Return the summed log-probability [B,W,V] of every beam with every next token."""
    count = jnp.broadcast_to(state.count, len(logits))
    scores = jax.nn.log_softmax(logits, axis=-1)
    scores = jax.vmap(penalize, in_axes=(1, 1, None, None), out_axes=1)(scores, state.seen, count, settings)
    return scores + state.scores[:, :, None]


def next_beams(scores: Array, settings: RowSettings) -> tuple[Array, Array, Array]:
    """Return scores, beams that are continued, and their next tokens, each [B,W], of the best that do not end."""
    batch, num_beams, vocabulary = scores.shape
    is_end = end_tokens(settings, vocabulary)[:, None]
    open_scores, index = jax.lax.top_k(jnp.where(is_end, -jnp.inf, scores).reshape(batch, -1), num_beams)
    return open_scores, index // vocabulary, index % vocabulary


def end_beams(
    state: BeamState, scores: Array, open_scores: Array, search: SearchSettings
) -> tuple[Array, Array, Array]:
    """End the beams whose continuation by an end token is among the best num_beams continuations of their row.

    Args:
        state: the search so far.
        scores: [B,W,V] float32, of all continuations.
        open_scores: [B,W] float32, of the next beams.
        search: settings of the search.

    Returns:
        The score [B] of each row's best continuation; the ranks [B,W] of the answers that end here, -inf where there is
        none; and the tokens [B,N] of the best of these answers.
    """
    batch, num_beams, vocabulary = scores.shape
    ends = search.rows.eos_ids
    # Continuations that end are few: one per beam and end token. The best of all are among them and the next beams.
    end_scores = jnp.take_along_axis(scores, jnp.minimum(ends, vocabulary - 1)[:, None], axis=2)
    end_scores = jnp.where(ends[:, None] < vocabulary, end_scores, -jnp.inf).reshape(batch, -1)
    top, index = jax.lax.top_k(jnp.concatenate([open_scores, end_scores], axis=1), num_beams)
    ended = jnp.where(index >= num_beams, rank(top, state.count + 1, search), -jnp.inf)

    first = jnp.argmax(ended, axis=1)
    choice = jnp.take_along_axis(index, first[:, None], axis=1)[:, 0] - num_beams
    rows, num_ends = jnp.arange(batch), ends.shape[1]
    answer = state.tokens[rows, choice // num_ends]
    answer = answer.at[:, state.count].set(ends[rows, choice % num_ends])
    return top[:, 0], ended, answer


def is_over(finished: Array, top_score: Array, length: Array, search: SearchSettings) -> Array:
    """Return the rows [B] whose list of answers is full and, by the rule of early_stopping, final."""
    may_grow = (search.early_stopping == 2) & (search.length_penalty > 0)
    longest = jnp.where(may_grow, search.rows.max_new_tokens, length)
    hopeless = finished[:, -1] >= rank(top_score, longest, search)
    return (finished[:, -1] > -jnp.inf) & ((search.early_stopping == 1) | hopeless)


def widen(cache: KVCache, beams: int, max_tokens: int) -> KVCache:
    """Repeat each row of a KV cache `beams` times, and append max_tokens slots."""

    def grow(leaf: Array, row_axis: int, slot_axis: int) -> Array:
        width = [(0, 0)] * leaf.ndim
        width[slot_axis] = (0, max_tokens)
        return jnp.pad(jnp.repeat(leaf, beams, axis=row_axis), width)

    return cache.replace(
        k=jax.tree.map(lambda leaf: grow(leaf, -4, -2), cache.k),
        v=jax.tree.map(lambda leaf: grow(leaf, -4, -2), cache.v),
        scales=jax.tree.map(lambda leaf: grow(leaf, -3, -1), cache.scales),
        positions=grow(cache.positions, 0, 1),
        valid=grow(cache.valid, 0, 1),
    )


def reorder(cache: KVCache, source: Array, prompt_slots: int) -> KVCache:
    """Copy the cache entries of row source[i] to row i.

    Beams of a row share their prompt, so only the slots after it are copied; positions and validity are equal anyway.

    Args:
        cache: KV cache of B*W rows.
        source: [B*W] int32, a row among the same row's beams.
        prompt_slots: slots that the prompt occupies.
    """

    def move(leaf: Array, row_axis: int, slot_axis: int) -> Array:
        slot_axis %= leaf.ndim
        tail = jax.lax.slice_in_dim(leaf, prompt_slots, None, axis=slot_axis)
        tail = jnp.take(tail, source, axis=row_axis)
        return jax.lax.dynamic_update_slice_in_dim(leaf, tail, prompt_slots, axis=slot_axis)

    return cache.replace(
        k=jax.tree.map(lambda leaf: move(leaf, -4, -2), cache.k),
        v=jax.tree.map(lambda leaf: move(leaf, -4, -2), cache.v),
        scales=jax.tree.map(lambda leaf: move(leaf, -3, -1), cache.scales),
    )

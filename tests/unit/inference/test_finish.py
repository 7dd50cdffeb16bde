"""How rows end: end tokens, limits, non-finite logits; tokens that are never generated."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.generation_cases import LLAMA, NO_END, tokens_of

from internvl_jax.config import config_from_hf
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import EOS_SLOTS, GenerationConfig, all_finite

CONFIG = config_from_hf(LLAMA)
VOCABULARY, CONTEXT, PAD = LLAMA["vocab_size"], LLAMA["max_position_embeddings"], LLAMA["pad_token_id"]


def test_end_tokens_pads_and_reasons(model):
    """Each row ends at its first end token, which is kept; then it is padded, and the result cut to the longest."""
    ids, mask = tokens_of(7, 9, 4, 6)
    free, _ = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))
    for ends in ([free[0, 5]], [free[0, 5], free[1, 2]], [*free[:, 3], free[2, 0]], [int(free[0, 4])] * 2):
        ends = tuple(int(token) for token in ends)
        tokens, reasons = model.generate(ids, mask, None, GenerationConfig(24, eos_token_ids=ends))
        lengths = []
        for row, reason, whole in zip(tokens, reasons, free):
            hits = np.flatnonzero(np.isin(whole, ends))
            lengths.append(hits[0] + 1 if hits.size else 24)
            assert reason == ("stop" if hits.size else "length")
            assert np.array_equal(row[: lengths[-1]], whole[: lengths[-1]])
            assert (row[lengths[-1] :] == PAD).all()
        assert tokens.shape == (3, max(lengths))
    assert min(lengths) < max(lengths)


def test_checkpoint_end_token_is_the_default(model):
    seen = set()
    for seed in range(6):
        ids, mask = tokens_of(seed, 9, 4, 6)
        free, _ = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))
        _, reasons = model.generate(ids, mask, None, GenerationConfig(24))
        assert reasons == ["stop" if LLAMA["eos_token_id"] in row else "length" for row in free]
        seen.update(reasons)
    assert seen == {"stop", "length"}


def test_many_end_tokens(model):
    """More than one program has room for: it compiles again, and is right again."""
    ids, mask = tokens_of(7, 9)
    free = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))[0][0]
    others = [token for token in range(VOCABULARY) if token not in free][: EOS_SLOTS + 3]
    ends = (*others, int(free[6]))
    assert len(ends) > EOS_SLOTS
    tokens, reasons = model.generate(ids, mask, None, GenerationConfig(24, eos_token_ids=ends))
    assert tokens[0].tolist() == free[: free.tolist().index(free[6]) + 1].tolist()
    assert reasons == ["stop"]


def test_pad_token(weights):
    """The config's, or its first end token, or 0."""
    for values, expected in (
        ({}, PAD),
        ({"pad_token_id": None, "eos_token_id": [9, 2]}, 9),
        ({"pad_token_id": None, "eos_token_id": None}, 0),
    ):
        config = config_from_hf({**LLAMA, **values})
        model = Generator(bind_model(config, {"language_model": weights}, dtype=jnp.float32), image_token_id=None)
        assert model.pad_token_id == expected


@pytest.mark.parametrize("limit", [1, 2, 31, 32, 33])
def test_max_new_tokens_is_exact(model, limit):
    """Up to the last slot of a cache bucket and beyond it; a shorter answer is the beginning of a longer one."""
    ids, mask = tokens_of(9, 64, 10, 5)
    longer, _ = model.generate(ids, mask, None, GenerationConfig(40, **NO_END))
    tokens, reasons = model.generate(ids, mask, None, GenerationConfig(limit, **NO_END))
    assert np.array_equal(tokens, longer[:, :limit])
    assert reasons == ["length"] * 3


def test_end_token_as_the_last_one_allowed(model):
    """An end token in the last place is an end, not a lack of room."""
    ids, mask = tokens_of(7, 9)
    free = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))[0][0].tolist()
    place = next(i for i in range(3, 24) if free[i] not in free[:i])
    for limit, reason in ((place + 1, "stop"), (place, "length")):
        tokens, reasons = model.generate(ids, mask, None, GenerationConfig(limit, eos_token_ids=free[place]))
        assert (tokens[0].tolist(), reasons) == (free[:limit], [reason])


def spoiled(weights, token, value=np.nan, known=None):
    """A model with one embedding that is not finite: reading that token makes the row's logits NaN."""
    embedding = weights["embed_tokens"]["embedding"].at[token].set(value)
    weights = {**weights, "embed_tokens": {"embedding": embedding}}
    return Generator(
        bind_model(CONFIG, {"language_model": weights}, dtype=jnp.float32), image_token_id=None, known=known
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5}, {"num_beams": 3}], ids=str)
def test_a_row_that_is_not_finite_is_an_error_of_that_row(weights, options, value):
    ids, mask = tokens_of(7, 9, 4, 6)
    ids[ids == 30], ids[1, 2] = 29, 30  # in the second row only
    known = np.arange(VOCABULARY) != 30  # nor may it be generated
    gen = GenerationConfig(12, **options, **NO_END)
    expected, _ = spoiled(weights, 30, 1.0, known).generate(ids, mask, None, gen)
    tokens, reasons = spoiled(weights, 30, value, known).generate(ids, mask, None, gen)
    assert reasons == ["length", "error", "length"]
    np.testing.assert_array_equal(tokens[[0, 2]], expected[[0, 2]])
    assert (tokens[1] == PAD).all()


def test_a_row_that_becomes_infinite_later_keeps_what_it_had(model, weights):
    ids, mask = tokens_of(7, 9, 4, 6)
    gen = GenerationConfig(24, **NO_END)
    free, _ = model.generate(ids, mask, None, gen)
    token = next(int(token) for token in free[0, 2:] if token not in ids)
    first = [int((row == token).argmax()) + 1 if token in row else 24 for row in free]
    assert 2 < first[0] < 24
    bad = spoiled(weights, token)
    tokens, reasons = bad.generate(ids, mask, None, gen)
    assert reasons == ["error" if count < 24 else "length" for count in first]
    for row, expected, count in zip(tokens, free, first):
        np.testing.assert_array_equal(row[:count], expected[:count])
    state = bad.prefill(ids[:1], mask[:1], None, gen)
    for _ in range(12):  # in chunks, as a stream reads them
        state = bad.decode(state, 2)
    rows, reasons, running = bad.read(state)
    assert (rows, reasons, running.tolist()) == ([free[0, : first[0]].tolist()], ["error"], [False])


def test_one_infinite_logit_is_enough(weights):
    """The largest logit may be finite where another is -Inf: nothing is left to be rather sure of."""
    kernel = weights["lm_head"]["kernel"].at[:, 9].set(jnp.inf)
    bad = Generator(
        bind_model(CONFIG, {"language_model": {**weights, "lm_head": {"kernel": kernel}}}, dtype=jnp.float32),
        image_token_id=None,
    )
    ids, mask = tokens_of(7, 9, 4, 6)
    for beams in (1, 2):
        assert bad.generate(ids, mask, None, GenerationConfig(4, num_beams=beams))[1] == ["error"] * 3
    logits = np.zeros((3, VOCABULARY), np.float32)
    logits[0, 3], logits[1, 4] = -np.inf, np.nan
    assert all_finite(jnp.asarray(logits)).tolist() == [False, False, True]


UNKNOWN = (6, 13, 29, 30)  # holes and the end of the vocabulary


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0},
        {"temperature": 5.0, "top_k": 2},
        {"temperature": 5.0, "top_p": 0.5},
        {"num_beams": 3},
        {"num_beams": 5, "length_penalty": -1.0, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_unknown_tokens_are_never_generated(weights, options):
    """Even where they are by far the likeliest; scores are what they were."""
    kernel = weights["lm_head"]["kernel"]
    columns = np.array(UNKNOWN)
    likely = kernel.at[:, columns].set(8 * kernel[:, columns])
    params = {"language_model": {**weights, "lm_head": {"kernel": likely}}}
    known = ~np.isin(np.arange(VOCABULARY), UNKNOWN)
    free = Generator(bind_model(CONFIG, params, dtype=jnp.float32), image_token_id=None)
    bound = Generator(bind_model(CONFIG, params, dtype=jnp.float32), image_token_id=None, known=known)
    ids, mask = tokens_of(7, 9, 4, 6)
    gen = GenerationConfig(24, **options, **NO_END)
    assert np.isin(free.generate(ids, mask, None, gen)[0], UNKNOWN).any()
    tokens, reasons = bound.generate(ids, mask, None, gen)
    assert not np.isin(tokens, UNKNOWN).any()
    assert reasons == ["length"] * 3
    np.testing.assert_array_equal(bound.logits(ids, mask), free.logits(ids, mask))
    if not options:  # the likeliest of the others
        whole = np.concatenate([ids[:1, :9], tokens[:1]], axis=1)
        best = np.where(known, bound.logits(whole)[0], -np.inf).argmax(axis=-1)
        assert best[8:-1].tolist() == tokens[0].tolist()
    # An end token is no text: it ends the answer, known or not.
    _, reasons = bound.generate(ids, mask, None, GenerationConfig(24, **options, eos_token_ids=UNKNOWN))
    assert "stop" in reasons
    everything = Generator(
        bind_model(CONFIG, params, dtype=jnp.float32), image_token_id=None, known=np.ones(VOCABULARY, bool)
    )
    np.testing.assert_array_equal(everything.generate(ids, mask, None, gen)[0], free.generate(ids, mask, None, gen)[0])

"""Sampling: filters, penalties and minimum lengths against transformers and plain numpy; seeds; rows of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.generation_cases import LLAMA, NO_END, padded, rows_of, tokens_of, torch_llama

from internvl_jax.config import config_from_hf
from internvl_jax.inference.generation import generate
from internvl_jax.inference.generation.bound_model import PromptBatch
from internvl_jax.inference.generation.generator import prompt_bucket
from internvl_jax.inference.generation.sampling import (
    GenerationConfig,
    keep_likely,
    make_row_settings,
    penalize,
    sample_tokens,
    select_tokens,
)

CONFIG = config_from_hf(LLAMA)


# Rules that hold for greedy answers too.


def test_min_new_tokens(model):
    ids, mask = tokens_of(7, 9, 4, 6)
    free, _ = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))
    end = int(free[0, 2])
    plain, _ = model.generate(ids, mask, None, GenerationConfig(24, eos_token_ids=end))
    assert (plain[0] == end).argmax() <= 2
    for options in ({}, {"temperature": 2.0}):
        tokens, _ = model.generate(
            ids, mask, None, GenerationConfig(24, min_new_tokens=6, eos_token_ids=end, **options)
        )
        assert not (tokens[:, :6] == end).any()
    tokens, reasons = model.generate(ids, mask, None, GenerationConfig(24, min_new_tokens=24, eos_token_ids=end))
    assert not (tokens == end).any()
    assert reasons == ["length"] * 3


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
def test_penalty_and_minimum_against_transformers(model, weights):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    reference = torch_llama(jax.tree.map(np.asarray, weights))
    changed = 0
    for seed in range(6):
        ids, _ = tokens_of(seed, 9)
        embeddings = reference.get_input_embeddings()(torch.from_numpy(ids))
        for penalty, minimum, ends in ((1.0, 0, [2]), (1.3, 0, [2]), (1.8, 6, [2, 9, 14]), (0.7, 4, [3, 5])):
            with torch.no_grad():
                expected = reference.generate(
                    inputs_embeds=embeddings,
                    attention_mask=torch.ones(ids.shape, dtype=torch.long),
                    do_sample=False,
                    max_new_tokens=24,
                    min_new_tokens=minimum,
                    repetition_penalty=penalty,
                    eos_token_id=ends,
                    pad_token_id=0,
                )[0].tolist()
            gen = GenerationConfig(24, repetition_penalty=penalty, min_new_tokens=minimum, eos_token_ids=ends)
            tokens = model.generate(ids, None, None, gen)[0][0].tolist()
            assert tokens == expected, (seed, penalty)
            changed += penalty != 1.0 and tokens != model.generate(ids, gen=GenerationConfig(24))[0][0].tolist()
    assert changed > 6


# Draws.


def processed(logits, seen, options):
    """Probabilities of the next token by transformers' rules, in plain numpy float64."""
    scores = logits.astype(np.float64).copy()
    penalty = options.get("repetition_penalty", 1.0)
    for token in seen:
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in options.get("forbidden", ()):
        scores[token] = -np.inf
    scores /= options["temperature"]
    if options.get("top_k"):
        scores[scores < np.sort(scores)[::-1][: options["top_k"]][-1]] = -np.inf
    order = np.argsort(-scores)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    kept, total = [], 0.0
    for token in order:
        kept.append(token)
        total += probabilities[token]
        if total >= options.get("top_p", 1.0):
            break
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.4},
        {"temperature": 2.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 3.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.7, "repetition_penalty": 1.7, "min_new_tokens": 5},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1e-30},
    ],
    ids=str,
)
def test_samples_have_the_processed_distribution(options):
    """40,000 draws: every frequency within 4.5 standard deviations, nothing drawn that is filtered out."""
    draws, vocabulary, end = 40_000, 17, 3
    logits = np.random.RandomState(1).standard_normal(vocabulary).astype(np.float32) * 2
    seen = [int(np.argmax(logits)), 4, 8]
    settings = make_row_settings(GenerationConfig(eos_token_ids=end, **options), draws, ())
    forbidden = (end,) if options.get("min_new_tokens") else ()
    expected = processed(logits, seen, {**options, "forbidden": forbidden})
    mask = np.zeros((draws, vocabulary), bool)
    mask[:, seen] = True
    tokens = jax.jit(select_tokens)(np.tile(logits, (draws, 1)), mask, np.full(draws, 2, np.int32), settings)
    counts = np.bincount(np.asarray(tokens), minlength=vocabulary)
    assert (counts[expected == 0] == 0).all()
    assert (counts[expected > 1e-3] > 0).all()
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 4.5 * spread + 1e-6 * draws).all(), (counts / draws, expected)


def test_filters_against_numpy():
    """Which tokens survive, over many rows with settings of their own."""
    rng = np.random.RandomState(2)
    logits = (rng.standard_normal((200, 40)) * 3).astype(np.float32)
    top_k = rng.choice([0, 1, 3, 10, 39, 40, 400], 200)
    top_p = rng.choice([1e-6, 0.3, 0.9, 0.999, 1.0], 200).astype(np.float32)
    kept = np.isfinite(np.asarray(keep_likely(logits, top_k, top_p)))
    for row in range(200):
        options = {"temperature": 1.0, "top_k": top_k[row], "top_p": top_p[row]}
        assert np.array_equal(kept[row], processed(logits[row], (), options) > 0), options


def test_tied_tokens_are_kept_together():
    logits = np.array([[1.0, 2.0, 2.0, 0.0, 2.0]], np.float32)
    for top_k, top_p in ((1, 1.0), (2, 1.0), (0, 0.1)):
        kept = np.isfinite(keep_likely(logits, np.array([top_k]), np.array([top_p], np.float32)))
        assert kept.tolist() == [[False, True, True, False, True]]


def test_penalty_moves_both_signs_down():
    settings = make_row_settings(
        GenerationConfig(repetition_penalty=2.0, min_new_tokens=3, eos_token_ids=(1, 3)), 1, ()
    )
    scores, seen = np.array([[-1.0, 2.0, 3.0, 4.0]], np.float32), np.array([[True, True, False, False]])
    early = penalize(scores, seen, np.array([2]), settings)
    late = penalize(scores, seen, np.array([3]), settings)
    assert np.asarray(early).tolist() == [[-2.0, -np.inf, 3.0, -np.inf]]
    assert np.asarray(late).tolist() == [[-2.0, 1.0, 3.0, 4.0]]


def test_openai_penalties():
    """Subtracted once, and for every use."""
    settings = make_row_settings(GenerationConfig(presence_penalty=0.5, frequency_penalty=2.0), 1, ())
    scores, uses = np.array([[-1.0, 2.0, 3.0]], np.float32), np.array([[0, 1, 3]])
    assert np.asarray(penalize(scores, uses, np.array([4]), settings)).tolist() == [[-1.0, -0.5, -3.5]]
    with pytest.raises(ValueError, match="no presence_penalty"):
        GenerationConfig(presence_penalty=0.5, num_beams=2)


def test_seeds(model):
    ids, mask = tokens_of(3, 6, 6)
    ids[1] = ids[0]

    def sample(**options):
        return model.generate(ids, mask, None, GenerationConfig(24, temperature=1.0, **options, **NO_END))[0]

    first = sample(seed=5)
    assert np.array_equal(first, sample(seed=5))
    assert not np.array_equal(first, sample(seed=9))
    assert not np.array_equal(first[0], first[1])  # the same prompt, with seeds 5 and 6
    assert np.array_equal(first[1], sample(seed=6)[0])
    assert np.array_equal(*sample(seed=(8, 8)))
    assert len({tuple(sample(seed=seed)[0]) for seed in range(20)}) == 20


def test_every_step_draws_anew():
    """Of flat logits: at another count of tokens, or with another seed, the noise is another one."""
    draws, vocabulary = 64, 32
    logits = jnp.zeros((draws, vocabulary))
    settings = make_row_settings(GenerationConfig(temperature=1.0), draws, ())  # seeds 0, 1, 2, ...
    first, again, second = (np.asarray(sample_tokens(logits, jnp.full(draws, count), settings)) for count in (1, 1, 2))
    assert np.array_equal(first, again)
    assert (first == second).mean() < 0.2  # 1 in 32 by chance
    assert len(set(first.tolist())) > 20
    one = np.asarray(sample_tokens(logits, jnp.arange(draws), settings.replace(seed=np.zeros(draws, np.uint32))))
    assert len(set(one.tolist())) > 20


def test_greedy_ignores_the_filters(model):
    ids, mask = tokens_of(3, 6)
    plain, _ = model.generate(ids, mask, None, GenerationConfig(24, **NO_END))
    filtered, _ = model.generate(ids, mask, None, GenerationConfig(24, top_k=3, top_p=0.2, seed=1, **NO_END))
    assert np.array_equal(plain, filtered)


def test_rows_with_settings_of_their_own(model):
    """A batch whose rows ask for different things gives each what it asked for."""
    ids, mask = tokens_of(12, 9, 4)
    gens = [GenerationConfig(24, **NO_END), GenerationConfig(10, temperature=1.0, top_k=4, seed=7, **NO_END)]
    alone = [model.generate(ids[i : i + 1], mask[i : i + 1], None, gen)[0][0].tolist() for i, gen in enumerate(gens)]
    left = padded(rows_of(ids, mask))
    settings = [make_row_settings(gen, 1, ()) for gen in gens]
    both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *settings)
    width = prompt_bucket(9)
    ids, valid = (np.pad(x, ((0, 0), (width - 9, 0))) for x in left)
    ids = np.where(valid, ids, 0).astype(np.int32)
    state = generate.prefill_step(model.model, PromptBatch(ids, valid > 0), both, slots=96)
    rows, _, running = model.read(model.decode(state, 100))
    assert rows == alone
    assert not running.any()

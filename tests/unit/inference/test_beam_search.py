"""Beam search against transformers: 4.37.2's recorded answers, 5's own run, and the golden bundle."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.generation_cases import (
    LLAMA,
    NO_END,
    RECORDED,
    answers,
    beam_cases,
    beam_model,
    beam_prompt,
    llama_weights,
    torch_beams,
    torch_llama,
)

from internvl_jax.config import config_from_hf
from internvl_jax.inference.generation import beam_search, generate
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig, make_row_settings
from internvl_jax.models import kv_cache
from internvl_jax.models.stack import unstack

CONFIG = config_from_hf(LLAMA)
CASES = beam_cases()


def generator(weights, *, image_token_id=None, stacked=True):
    params = jax.tree.map(jnp.asarray, weights)
    if not stacked:
        params = {**params, "layers": unstack(params["layers"])}
    return Generator(bind_model(CONFIG, {"language_model": params}, dtype=jnp.float32), image_token_id=image_token_id)


def settings(case):
    names = (
        "num_beams max_new_tokens min_new_tokens length_penalty early_stopping repetition_penalty eos_token_ids".split()
    )
    return GenerationConfig(**{name: case[name] for name in names})


def run(case, *, stacked=True):
    ids, mask = beam_prompt(case)
    return generator(beam_model(case), stacked=stacked).generate(ids, mask, None, settings(case))


@pytest.fixture(scope="module")
def ours():
    return [run(case) for case in CASES]


def test_equals_transformers_4_37(ours):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert len(recorded) == len(CASES)
    wrong = []
    for case, (tokens, reasons), expected in zip(CASES, ours, recorded):
        if answers(tokens, case["eos_token_ids"]) != expected:
            wrong.append((case, tokens.tolist(), expected))
        ended = [row[-1] == case["eos_token_ids"][0] for row in expected]
        assert reasons == ["stop" if end else "length" for end in ended], case
    assert not wrong
    # The comparison is worth something only if answers end in both ways, at many lengths.
    ends = [len(row) for case, rows in zip(CASES, recorded) for row in rows if row[-1] == case["eos_token_ids"][0]]
    assert len(ends) > 60
    assert len(set(ends)) > 8


def test_padding_and_width(ours):
    """Rows that end early are filled with the pad id, and the result is as wide as the longest."""
    ragged = 0
    for case, (tokens, reasons) in zip(CASES, ours):
        assert tokens.dtype == np.int32
        lengths = []
        for row, reason in zip(tokens, reasons):
            ends = np.flatnonzero(np.isin(row, case["eos_token_ids"]))
            lengths.append(ends[0] + 1 if reason == "stop" else case["max_new_tokens"])
            assert (row[lengths[-1] :] == CONFIG.text.pad_token_id).all()
        assert tokens.shape[1] == max(lengths)
        ragged += len(set(lengths)) > 1
    assert ragged > 10


def test_min_new_tokens(ours):
    """No answer ends before its time; the same searches without the rule do end there."""
    for case, (tokens, _) in zip(CASES, ours):
        if case["min_new_tokens"]:
            assert not np.isin(tokens[:, : case["min_new_tokens"]], case["eos_token_ids"]).any()
    case = next(
        c
        for c, (tokens, _) in zip(CASES, ours)
        if not c["min_new_tokens"] and np.isin(tokens[0, 0], c["eos_token_ids"])
    )
    assert not np.isin(run({**case, "min_new_tokens": case["max_new_tokens"]})[0], case["eos_token_ids"]).any()


def test_equals_transformers_5(ours):
    """The installed transformers, where it follows 4.37: see beam.py for the corners in which it does not."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # matrices this small only lose by more
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    models, corners = {}, []
    for number, (case, (tokens, _)) in enumerate(zip(CASES[:64], ours)):
        if case["model"] not in models:
            models[case["model"]] = torch_llama(beam_model(case))
        theirs = answers(torch_beams(models[case["model"]], case), case["eos_token_ids"])
        if theirs != answers(tokens, case["eos_token_ids"]):
            corners.append(number)
            assert answers(tokens, case["eos_token_ids"]) == recorded[number]
    assert len(corners) <= 2, f"transformers 5 differs in cases {corners}"


def test_batch_rows_get_what_they_get_alone(ours):
    some = [(case, got) for case, got in zip(CASES, ours) if case["rows"] > 1 and case["num_beams"] == 5][:12]
    for case, (tokens, reasons) in some:
        ids, mask = beam_prompt(case)
        model = generator(beam_model(case))
        for row in range(case["rows"]):
            alone, reason = model.generate(ids[row : row + 1], mask[row : row + 1], None, settings(case))
            assert alone[0].tolist() == tokens[row, : alone.shape[1]].tolist(), case
            assert reason[0] == reasons[row]


def test_stacked_equals_tuple(ours):
    small = [(case, got) for case, got in zip(CASES, ours) if case["rows"] == 1 and case["num_beams"] == 2]
    for case, (tokens, reasons) in small[:12]:
        other, other_reasons = run(case, stacked=False)
        assert np.array_equal(tokens, other)
        assert reasons == other_reasons


def test_images_are_read_once_per_row():
    """Features reach the row they belong to: a batch with ragged image counts equals its rows alone."""
    rng = np.random.RandomState(3)
    image, per_image = 7, 4
    features = rng.standard_normal((3, per_image, LLAMA["hidden_size"])).astype(np.float32)
    rows = [[3] + [image] * 8 + [4, 5], [6, 8, 9], [10] + [image] * 4 + [11]]
    ids = np.zeros((3, 11), np.int32)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    model = generator(llama_weights(1), image_token_id=image)
    gen = GenerationConfig(max_new_tokens=12, num_beams=2)
    together, _ = model.generate(ids, mask, features, gen)
    other, _ = model.generate(ids, mask, features[::-1], gen)
    assert not np.array_equal(together, other)
    for number, part in enumerate((features[:2], None, features[2:])):
        alone, _ = model.generate(np.array([rows[number]]), None, part, gen)
        assert alone[0].tolist() == together[number, : alone.shape[1]].tolist()


def test_better_than_greedy():
    """With length_penalty 0 and no end, the beams' answer is at least as probable as the greedy one."""
    model = generator(llama_weights(5))
    ids = np.array([[4, 9, 3, 17]])
    improved = 0
    for first in range(3, 13):
        ids[0, 0] = first
        gains = []
        for beams in (1, 5):
            options = {"max_new_tokens": 12, "num_beams": beams, "length_penalty": 0.0, "eos_token_ids": ()}
            tokens, _ = model.generate(ids, gen=GenerationConfig(**options))
            whole = np.concatenate([ids, tokens], axis=1)
            scores = np.asarray(jax.nn.log_softmax(model.logits(whole)[0, ids.shape[1] - 1 : -1], axis=-1))
            gains.append(scores[np.arange(12), tokens[0]].sum())
        assert gains[1] >= gains[0] - 1e-4
        improved += gains[1] > gains[0] + 1e-2
    assert improved > 3


def test_settings_compile_nothing():
    model = generator(llama_weights(0))
    ids = np.array([[4, 9, 3, 17]])
    model.generate(ids, gen=GenerationConfig(max_new_tokens=10, num_beams=2))
    before = generate.num_compiles()
    for options in (
        {"max_new_tokens": 20, "length_penalty": 2.0},
        {"max_new_tokens": 5, "early_stopping": True, "min_new_tokens": 2},
        {"max_new_tokens": 5, "early_stopping": "never", "repetition_penalty": 1.5, "eos_token_ids": (3, 4)},
    ):
        model.generate(np.array([[5, 6, 7, 8, 9, 10]]), gen=GenerationConfig(num_beams=2, **options))
    assert generate.num_compiles() == before


def search_settings(gen):
    rule = jnp.asarray(beam_search.EARLY_STOPPING[gen.early_stopping])
    rows = make_row_settings(gen, 1, ())
    return beam_search.SearchSettings(rows, jnp.float32(gen.length_penalty), rule, gen.num_beams, gen.max_new_tokens)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "worst", "over"),
    [
        # The best continuation has log-probability -1 at length 2; at most 10 tokens.
        (False, 1.0, -0.3, True),  # -1/2 is no better
        (False, 1.0, -0.7, False),
        ("never", 1.0, -0.3, False),  # -1/10 would be
        ("never", 1.0, -0.05, True),
        ("never", -1.0, -3.0, False),  # -1*2 is better, and longer is worse: -1*10
        ("never", -1.0, -1.5, True),
        ("never", 0.0, -0.5, True),
        (True, 1.0, -5.0, True),
    ],
)
def test_when_a_search_is_over(early_stopping, length_penalty, worst, over):
    gen = GenerationConfig(10, num_beams=2, length_penalty=length_penalty, early_stopping=early_stopping, **NO_END)
    cache = kv_cache.init_cache(CONFIG.text, 2, 4, jnp.float32, layers={})
    state = beam_search.BeamState(
        cache=cache,
        tokens=jnp.zeros((1, 2, 10), jnp.int32),
        scores=jnp.asarray([[-1.0, -9.0]]),
        seen=jnp.zeros((1, 2, 4), bool),
        count=jnp.asarray(1),
        finished=jnp.asarray([[worst, worst]], jnp.float32),
        best=jnp.zeros((1, 10), jnp.int32),
        best_length=jnp.ones(1, jnp.int32),
        best_stopped=jnp.ones(1, bool),
        done=jnp.zeros(1, bool),
        failed=jnp.zeros(1, bool),
    )
    logits = jnp.asarray([[[0.0, -50.0, -50.0, -50.0]] * 2])  # the next token costs nothing
    after = beam_search.add_tokens(state, logits, search_settings(gen), 2)
    assert after.done.tolist() == [over]
    assert int(after.count) == 2


def test_an_open_beam_that_wins_at_the_limit():
    """It is the answer in place of one that ended, and did not stop; what it has generated is its parent's and more."""
    gen = GenerationConfig(2, num_beams=2, **NO_END)
    state = beam_search.BeamState(
        cache=kv_cache.init_cache(CONFIG.text, 2, 4, jnp.float32, layers={}),
        tokens=jnp.asarray([[[0, 0], [1, 0]]], jnp.int32),
        scores=jnp.asarray([[-1.0, -1.5]]),
        seen=jnp.asarray([[[True, False, False, False], [False, True, False, False]]]),
        count=jnp.asarray(1),
        finished=jnp.asarray([[-9.0, -jnp.inf]]),
        best=jnp.asarray([[3, 0]], jnp.int32),
        best_length=jnp.ones(1, jnp.int32),
        best_stopped=jnp.ones(1, bool),
        done=jnp.zeros(1, bool),
        failed=jnp.zeros(1, bool),
    )
    logits = jnp.asarray([[[0.0] * 4, [-50.0, -50.0, 0.0, -50.0]]])  # only the second beam's next token costs nothing
    after = beam_search.add_tokens(state, logits, search_settings(gen), 2)
    assert after.done.tolist() == [True]
    assert after.best.tolist() == [[1, 2]]
    assert after.best_length.tolist() == [2]
    assert after.best_stopped.tolist() == [False]
    assert after.tokens.tolist() == [[[1, 2], [0, 0]]]
    assert after.seen.tolist() == [[[False, True, True, False], [True, False, False, False]]]
    np.testing.assert_allclose(after.scores, [[-1.5, -1 - np.log(4)]], rtol=1e-5)


def test_beams_neither_sample_nor_stream():
    with pytest.raises(ValueError, match="beam search does not sample"):
        GenerationConfig(num_beams=2, temperature=0.5)
    with pytest.raises(ValueError, match="beams cannot be decoded in steps"):
        generator(llama_weights(0)).prefill(np.array([[3]]), None, None, GenerationConfig(4, num_beams=2))

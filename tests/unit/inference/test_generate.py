"""Generation: tokens against the golden bundle and an independent recomputation without a cache; compiles."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules
from support.generation_cases import IMAGE, LLAMA, NO_END, llama_weights, padded, rows_of, tokens_of
from support.paths import DATA

from internvl_jax.config import config_from_hf, load_config
from internvl_jax.inference.generation import generate
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator, cache_bucket, prompt_bucket
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.models import chat_model
from internvl_jax.models.layers import positions_from_valid
from internvl_jax.models.stack import unstack
from internvl_jax.processing.conversation import image_token_index

CONFIG = config_from_hf(LLAMA)
VOCABULARY, CONTEXT, PAD = LLAMA["vocab_size"], LLAMA["max_position_embeddings"], LLAMA["pad_token_id"]


PER_IMAGE = 4


BUNDLE = DATA / "internvl_chat_v1_1"


def greedy_by_recomputation(weights, rows, steps, features=None):
    """Greedy tokens [rows, steps] from whole forward passes: no cache, no buckets, right-padded, no early end."""
    longest = max(map(len, rows)) + steps
    ids = np.zeros((len(rows), longest), np.int32)
    lengths = np.array([len(row) for row in rows])
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    is_image = np.zeros(ids.shape, bool)
    for number, row in enumerate(rows):
        is_image[number, : len(row)] = np.asarray(row) == IMAGE

    @jax.jit
    def logits_at(ids, lengths):
        valid = jnp.arange(longest)[None] < lengths[:, None]
        x = modules.embed(weights, ids, jnp.float32)
        if features is not None:
            x = chat_model.merge_images(x, jnp.asarray(features), image_token_index(is_image))
        hidden, _, _ = modules.run_llama(weights, CONFIG.text, x, positions_from_valid(valid), valid)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return jnp.dot(last, weights["lm_head"]["kernel"], precision="highest")

    for step in range(steps):
        best = np.asarray(logits_at(ids, lengths + step)).argmax(axis=-1)
        ids[np.arange(len(rows)), lengths + step] = best
    return np.stack([row[length : length + steps] for row, length in zip(ids, lengths)])


@pytest.fixture(scope="module")
def golden():
    pytest.importorskip("torch")
    from checkpoints_convert.convert import load_hf

    directory = BUNDLE / "checkpoint"
    config = load_config(directory)
    params = load_hf(directory, chat_model.abstract_params(config))
    facts = json.loads((BUNDLE / "goldens.json").read_text(encoding="utf-8"))
    arrays = np.load(BUNDLE / "goldens.npz")
    image_token = facts["config"]["token_ids"]["<IMG_CONTEXT>"]
    return Generator(bind_model(config, params, dtype=jnp.float32), image_token_id=image_token), facts, arrays


def golden_features(model, arrays, images):
    return model.encode(np.stack([arrays[f"images/{name}/quickstart"] for name in images])) if images else None


def test_golden_prompts(golden):
    model, facts, arrays = golden
    for prompt in facts["prompts"]:
        features = golden_features(model, arrays, prompt["images"])
        tokens, reasons = model.generate(
            np.array([prompt["input_ids"]]), None, features, GenerationConfig(max_new_tokens=32)
        )
        assert tokens[0].tolist() == prompt["generated_ids"], prompt["id"]
        assert reasons == ["stop" if prompt["finished_by_eos"] else "length"], prompt["id"]


def test_golden_batches(golden):
    model, facts, arrays = golden
    for batch in facts["batches"]:
        name = f"batch/{batch['id']}"
        features = golden_features(model, arrays, batch["images"])
        ids, mask = arrays[f"{name}/input_ids"], arrays[f"{name}/attention_mask"]
        tokens, _ = model.generate(ids, mask, features, GenerationConfig(max_new_tokens=32))
        assert np.array_equal(tokens, arrays[f"{name}/generated_ids"]), batch["id"]
        # The same rows padded on the other side.
        flipped = [np.stack([np.roll(row, -(keep == 0).sum()) for row, keep in zip(x, mask)]) for x in (ids, mask)]
        assert np.array_equal(model.generate(*flipped, features, GenerationConfig(max_new_tokens=32))[0], tokens)


def test_golden_beams(golden):
    model, facts, arrays = golden
    prompts = {prompt["id"]: prompt for prompt in facts["prompts"]}
    for search in facts["beam_search"]:
        prompt = prompts[search["id"]]
        gen = GenerationConfig(
            max_new_tokens=search["max_new_tokens"],
            num_beams=search["num_beams"],
            length_penalty=search["length_penalty"],
        )
        features = golden_features(model, arrays, prompt["images"])
        tokens, _ = model.generate(np.array([prompt["input_ids"]]), None, features, gen)
        assert tokens[0].tolist() == search["generated_ids"], search["id"]


def test_golden_logits(golden):
    model, facts, arrays = golden
    images = {prompt["id"]: prompt["images"] for prompt in facts["prompts"]}
    for name in ("en_single", "zh_multi_turn", "two_separate"):
        features = golden_features(model, arrays, images[name])
        logits = model.logits(arrays[f"logits/{name}/input_ids"][None], None, features)[0]
        assert np.abs(logits - arrays[f"logits/{name}/fp32"]).max() < 2e-4, name
    mask = arrays["batch/batch_two/attention_mask"]
    features = golden_features(model, arrays, facts["batches"][0]["images"])
    logits = model.logits(arrays["batch/batch_two/input_ids"], mask, features)
    assert np.abs((logits - arrays["logits/batch_two/fp32"])[mask > 0]).max() < 2e-4


def test_encode_crops_its_bucket(golden):
    """Three images run as four, and each gets what it gets in any company."""
    model, _, arrays = golden
    names = ["rgb", "exif_rot", "rgba", "gray", "palette"]
    five = np.asarray(golden_features(model, arrays, names))
    assert np.abs(five - arrays["vision/mlp1_batch"]).max() < 1e-4
    three = np.asarray(golden_features(model, arrays, names[:3]))
    assert three.shape == (3, *five.shape[1:])
    assert np.abs(three - five[:3]).max() < 1e-5
    with pytest.raises(ValueError, match="no images"):
        model.encode(np.zeros((0, 3, 112, 112), np.float32))


@pytest.mark.parametrize("lengths", [(9,), (3, 14, 1), (500, 20)])
def test_greedy_equals_recomputation(model, weights, lengths):
    """Prompts of one to 500 tokens: a wrong cache, position or mask shows as another token."""
    ids, mask = tokens_of(sum(lengths), *lengths)
    tokens, reasons = model.generate(ids, mask, None, GenerationConfig(20, **NO_END))
    assert np.array_equal(tokens, greedy_by_recomputation(weights, rows_of(ids, mask), 20))
    assert reasons == ["length"] * len(lengths)


def image_rows():
    rows = [[3] + [IMAGE] * 8 + [4, 5], [6, 8, 9], [10] + [IMAGE] * 4 + [11, 12]]
    features = np.random.RandomState(5).standard_normal((3, PER_IMAGE, LLAMA["hidden_size"])).astype(np.float32)
    return rows, features


def test_images_reach_their_places(model, weights):
    """Two images, none and one in a batch of three, of which three images run as four."""
    rows, features = image_rows()
    expected = greedy_by_recomputation(weights, rows, 16, features)
    tokens, _ = model.generate(*padded(rows), features, GenerationConfig(16, **NO_END))
    assert np.array_equal(tokens, expected)
    swapped, _ = model.generate(*padded(rows), features[::-1], GenerationConfig(16, **NO_END))
    assert not np.array_equal(swapped[0], tokens[0])
    assert np.array_equal(swapped[1], tokens[1])


def test_padding_does_not_matter(model):
    rows, features = image_rows()
    gen = GenerationConfig(16, temperature=1.0, seed=3, **NO_END)
    expected, _ = model.generate(*padded(rows), features, gen)
    for side, extra in (("right", 0), ("left", 100), ("right", 100)):
        assert np.array_equal(model.generate(*padded(rows, side, extra), features, gen)[0], expected), (side, extra)
    ids, mask = (np.insert(x, [3, 5], 0, axis=1) for x in padded(rows))  # padding inside the rows
    assert np.array_equal(model.generate(ids, mask, features, gen)[0], expected)
    assert np.array_equal(model.generate(ids, mask.astype(bool), features, gen)[0], expected)


def test_rows_get_what_they_get_alone(model):
    """Greedy and sampled: row i of a batch with seed s is the row alone with seed s + i."""
    rows, features = image_rows()
    parts = (features[:2], None, features[2:])
    for options in ({}, {"temperature": 1.3}, {"temperature": 0.9, "top_k": 8, "top_p": 0.9}):
        together, _ = model.generate(*padded(rows), features, GenerationConfig(24, seed=40, **options, **NO_END))
        for number, (row, part) in enumerate(zip(rows, parts)):
            gen = GenerationConfig(24, seed=40 + number, **options, **NO_END)
            assert np.array_equal(model.generate(np.array([row]), None, part, gen)[0][0], together[number]), options
        own = GenerationConfig(24, seed=(40, 41, 42), **options, **NO_END)
        assert np.array_equal(model.generate(*padded(rows), features, own)[0], together)


def test_stacked_equals_tuple(model, weights):
    layers = unstack(weights["layers"])
    other = Generator(
        bind_model(CONFIG, {"language_model": {**weights, "layers": layers}}, dtype=jnp.float32), image_token_id=IMAGE
    )
    rows, features = image_rows()
    for options in ({}, {"temperature": 1.0}):
        gen = GenerationConfig(24, **options, **NO_END)
        assert np.array_equal(*(m.generate(*padded(rows), features, gen)[0] for m in (model, other)))
    state = other.prefill(*padded(rows), features, gen)
    assert isinstance(state.cache.k, tuple)


def test_bfloat16(model, weights):
    """Computes and caches in bfloat16, and agrees with float32 where that is not a close call."""
    half = Generator(bind_model(CONFIG, {"language_model": weights}, dtype=jnp.bfloat16), image_token_id=IMAGE)
    ids, mask = tokens_of(4, 9, 4, 6)
    gen = GenerationConfig(8, **NO_END)
    assert half.prefill(ids, mask, None, gen).cache.k.dtype == jnp.bfloat16
    assert np.array_equal(half.generate(ids, mask, None, gen)[0][:, 0], model.generate(ids, mask, None, gen)[0][:, 0])


def test_the_whole_context_can_be_used(model, weights):
    """A prompt in a bucket larger than the room it leaves: positions, not slots, count against the context."""
    ids, mask = tokens_of(10, CONTEXT - 20)
    tokens, _ = model.generate(ids, mask, None, GenerationConfig(20, **NO_END))
    assert np.array_equal(tokens, greedy_by_recomputation(weights, rows_of(ids, mask), 20))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.2}], ids=str)
def test_chunks_equal_one_go(model, options):
    ids, mask = tokens_of(7, 9, 4, 6)
    free, _ = model.generate(ids, mask, None, GenerationConfig(24, **options, **NO_END))
    gen = GenerationConfig(24, eos_token_ids=int(free[0, 7]), **options)
    tokens, reasons = model.generate(ids, mask, None, gen)
    for chunk in (1, 4, 7):
        state = model.prefill(ids, mask, None, gen)
        seen, running = model.read(state)[0], np.ones(3, bool)
        assert [len(row) for row in seen] == [1, 1, 1]
        while running.any():
            state = model.decode(state, chunk)
            rows, got_reasons, running = model.read(state)
            for old, new in zip(seen, rows):
                assert new[: len(old)] == old
                assert len(new) <= len(old) + chunk
            seen = rows
        assert got_reasons == reasons
        assert [row + [PAD] * (tokens.shape[1] - len(row)) for row in seen] == tokens.tolist()
        again = model.read(model.decode(state, chunk))
        assert again[0] == seen  # nothing runs, nothing changes


def test_rows_ended_by_the_caller(model):
    ids, mask = tokens_of(7, 9, 4, 6)
    gen = GenerationConfig(24, **NO_END)
    free, _ = model.generate(ids, mask, None, gen)
    state = model.decode(model.prefill(ids, mask, None, gen), 4)
    state = model.end_rows(state, np.array([False, True, False]))
    rows, reasons, running = model.read(model.decode(state, 6))
    assert running.tolist() == [True, False, True]
    assert [len(row) for row in rows] == [11, 5, 11]
    assert reasons == ["length"] * 3
    assert rows == [row[: len(got)].tolist() for row, got in zip(free, rows)]


def test_logits_equal_the_whole_model(model, weights):
    rows, features = image_rows()
    for side in ("left", "right"):
        ids, mask = padded(rows, side, extra=2)
        got = model.logits(ids, mask, features)
        assert got.shape == (*ids.shape, VOCABULARY)
        assert got.dtype == np.float32
        alone = model.logits(np.array([rows[2]]), None, features[2:])[0]
        assert np.abs(got[2][mask[2] > 0] - alone).max() < 1e-4
    first = model.generate(ids, mask, features, GenerationConfig(1, **NO_END))[0][:, 0]
    assert np.array_equal(first, [row[np.flatnonzero(keep)[-1]].argmax() for row, keep in zip(got, mask)])


COMPILES = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILES.append(event) if event.endswith("backend_compile_duration") else None
)


def test_what_compiles_and_what_does_not(weights):
    """Lengths within a bucket, every setting and other weights reuse the two programs: nothing at all is compiled."""
    config = config_from_hf({**LLAMA, "rms_norm_eps": 2e-5})  # another model than the other tests': nothing cached
    model = Generator(bind_model(config, {"language_model": weights}, dtype=jnp.float32), image_token_id=IMAGE)
    rows, features = image_rows()

    def sizes():
        counts = generate.num_compiles()
        return [counts["prefill"], counts["decode"]]

    start = sizes()
    before = len(COMPILES)
    model.generate(np.array([[3, 4, 5]]), None, None, GenerationConfig(20))
    assert [new - old for new, old in zip(sizes(), start)] == [1, 1]
    assert len(COMPILES) - before >= 2  # or the listener listens to nothing
    model.generate(*padded(rows), features, GenerationConfig(20))
    assert [new - old for new, old in zip(sizes(), start)] == [2, 2]

    before, count = sizes(), len(COMPILES)
    for length, options in (
        (64, {"max_new_tokens": 32}),
        (1, {"max_new_tokens": 1}),
        (20, {"max_new_tokens": 30, "temperature": 0.7}),
        (21, {"max_new_tokens": 30, "temperature": 1.7, "top_k": 4, "top_p": 0.5, "seed": 8}),
        (22, {"max_new_tokens": 8, "repetition_penalty": 1.4, "min_new_tokens": 3, "eos_token_ids": (3, 4, 5)}),
    ):
        ids, mask = tokens_of(1, length)
        model.generate(ids, mask, None, GenerationConfig(**options))
    state = model.prefill(ids, mask, None, GenerationConfig(12))
    for steps in (1, 4, 16):
        state = model.decode(model.end_rows(state, np.array([False])), steps)
        model.read(state)
    other = jax.tree.map(jnp.asarray, llama_weights(12))
    renewed = Generator(bind_model(config, {"language_model": other}, dtype=jnp.float32), image_token_id=IMAGE)
    renewed.generate(ids, mask, None, GenerationConfig(12))
    renewed.generate(*padded(rows, "right"), features[::-1].copy(), GenerationConfig(12, temperature=1.0))
    assert sizes() == before
    assert len(COMPILES) == count


def test_buckets():
    sizes = [cache_bucket(size) for size in range(1, 5000)]
    assert all(size <= got <= max(64, 1.5 * size) for size, got in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(cache_bucket(size) == size for size in set(sizes))


def test_prompt_buckets():
    """V1-1's usual prompt, 256 visual tokens and a question, has little padding; many lengths share few programs."""
    sizes = {size: prompt_bucket(size) for size in range(1, 4097)}
    assert all(size <= got for size, got in sizes.items())
    assert all(got - size <= got / 8 for size, got in sizes.items() if size > 224)
    picked = (1, 64, 65, 97, 256, 257, 300, 512, 513, 1025)
    assert [sizes[size] for size in picked] == [64, 64, 96, 128, 256, 288, 320, 512, 576, 1152]
    assert len(set(sizes.values())) == 7 + 8 * 4
    assert all(prompt_bucket(got) == got and got % 32 == 0 for got in sizes.values())

"""Generation: tokens against the golden bundle, transformers and an independent recomputation without a cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import modules
from support.generation_cases import IMAGE, LLAMA, NO_END, llama_weights, padded, rows_of, tokens_of
from support.paths import DATA

from internvl_jax.config import config_from_hf, load_config
from internvl_jax.inference import generate, generator
from internvl_jax.inference.generator import Generator, bucket
from internvl_jax.inference.sampling import EOS_SLOTS, GenerationConfig, all_finite
from internvl_jax.models import chat_model
from internvl_jax.models.layers import positions_from_valid
from internvl_jax.models.stack import unstack
from internvl_jax.processing.conversation import image_token_index

CONFIG = config_from_hf(LLAMA)
VOCABULARY, CONTEXT, PAD = LLAMA["vocab_size"], LLAMA["max_position_embeddings"], LLAMA["pad_token_id"]
PER_IMAGE = 4
BUNDLE = DATA / "internvl_chat_v1_1"


@pytest.fixture(scope="module")
def weights():
    return jax.tree.map(jnp.asarray, llama_weights(11))


@pytest.fixture(scope="module")
def model(weights):
    return Generator(CONFIG, {"language_model": weights}, dtype=jnp.float32, image_token_id=IMAGE)


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


# Against the golden bundle.


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
    return Generator(config, params, dtype=jnp.float32, image_token_id=image_token), facts, arrays


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


# Greedy, against recomputation.


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
        CONFIG, {"language_model": {**weights, "layers": layers}}, dtype=jnp.float32, image_token_id=IMAGE
    )
    rows, features = image_rows()
    for options in ({}, {"temperature": 1.0}):
        gen = GenerationConfig(24, **options, **NO_END)
        assert np.array_equal(*(m.generate(*padded(rows), features, gen)[0] for m in (model, other)))
    state = other.prefill(*padded(rows), features, gen)
    assert isinstance(state.cache.k, tuple)


def test_bfloat16(model, weights):
    """Computes and caches in bfloat16, and agrees with float32 where that is not a close call."""
    half = Generator(CONFIG, {"language_model": weights}, dtype=jnp.bfloat16, image_token_id=IMAGE)
    ids, mask = tokens_of(4, 9, 4, 6)
    gen = GenerationConfig(8, **NO_END)
    assert half.prefill(ids, mask, None, gen).cache.k.dtype == jnp.bfloat16
    assert np.array_equal(half.generate(ids, mask, None, gen)[0][:, 0], model.generate(ids, mask, None, gen)[0][:, 0])


# Ends.


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
        model = Generator(config, {"language_model": weights}, dtype=jnp.float32, image_token_id=None)
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


def test_the_whole_context_can_be_used(model, weights):
    """A prompt in a bucket larger than the room it leaves: positions, not slots, count against the context."""
    ids, mask = tokens_of(10, CONTEXT - 20)
    tokens, _ = model.generate(ids, mask, None, GenerationConfig(20, **NO_END))
    assert np.array_equal(tokens, greedy_by_recomputation(weights, rows_of(ids, mask), 20))


# In steps.


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


# Compiles.

COMPILES = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILES.append(event) if event.endswith("backend_compile_duration") else None
)


def test_what_compiles_and_what_does_not(weights):
    """Lengths within a bucket, every setting and other weights reuse the two programs: nothing at all is compiled."""
    config = config_from_hf({**LLAMA, "rms_norm_eps": 2e-5})  # another model than the other tests': nothing cached
    model = Generator(config, {"language_model": weights}, dtype=jnp.float32, image_token_id=IMAGE)
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
    renewed = Generator(config, {"language_model": other}, dtype=jnp.float32, image_token_id=IMAGE)
    renewed.generate(ids, mask, None, GenerationConfig(12))
    renewed.generate(*padded(rows, "right"), features[::-1].copy(), GenerationConfig(12, temperature=1.0))
    assert sizes() == before
    assert len(COMPILES) == count


def test_buckets():
    sizes = [bucket(size) for size in range(1, 5000)]
    assert all(size <= got <= max(64, 1.5 * size) for size, got in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(bucket(size) == size for size in set(sizes))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2**31}, r"below 2\*\*31"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, not 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens 5 exceeds max_new_tokens 4"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": 10**400}, "temperature must be a number"),
        ({"length_penalty": 1e39}, "length_penalty must be a number"),  # beyond float32
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be above 0"),  # 0 on the device
        ({"top_p": 1e-300}, "top_p"),
        ({"stop": {"a": 1}}, "stop"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"length_penalty": float("inf")}, "length_penalty"),
        ({"early_stopping": "often"}, "early_stopping"),
        ({"num_beams": 0}, "num_beams"),
        ({"seed": -1}, "seed"),
        ({"seed": (1, 2.5)}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": (3,)}, "stop"),
        ({"eos_token_ids": (2, -1)}, "eos_token_ids"),
        ({"eos_token_ids": (2.5,)}, "eos_token_ids"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**options)


def test_settings_are_plain_values():
    gen = GenerationConfig(
        max_new_tokens=np.int64(3),
        temperature=1,
        seed=[1, 2],
        stop="end",
        eos_token_ids=np.int32(4),
        top_p=np.float32(1),
    )
    assert gen == GenerationConfig(3, temperature=1.0, seed=(1, 2), stop=("end",), eos_token_ids=(4,))
    assert type(gen.max_new_tokens) is int
    hash(gen)


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        ([3, 4], 1, r"0 image tokens \(id 7; none\), but 1 images x 4 tokens = 4"),
        ([3, *[IMAGE] * 4], None, r"4 image tokens \(id 7; row 1: 4\), but there are no images"),
        ([3, *[IMAGE] * 4], 2, r"4 image tokens \(id 7; row 1: 4\), but 2 images x 4 tokens = 8"),
        ([3, *[IMAGE] * 5], 1, r"row 1: 5 image tokens \(id 7\), which is not a multiple of 4"),
    ],
)
def test_images_and_image_tokens_must_agree(model, row, images, message):
    features = None if images is None else np.zeros((images, PER_IMAGE, LLAMA["hidden_size"]), np.float32)
    with pytest.raises(ValueError, match=message):
        model.generate(*padded([[3, 5, 6], row]), features)


def test_images_need_an_image_token_and_the_right_width(model, weights):
    blind = Generator(CONFIG, {"language_model": weights}, dtype=jnp.float32, image_token_id=None)
    features = np.zeros((1, PER_IMAGE, LLAMA["hidden_size"]), np.float32)
    with pytest.raises(ValueError, match="no image token"):
        blind.generate(np.array([[3, *[IMAGE] * 4]]), None, features)
    with pytest.raises(ValueError, match=r"features must be \[images, tokens, 32\], not \[1, 4, 31\]"):
        model.generate(np.array([[3, *[IMAGE] * 4]]), None, features[..., 1:])


@pytest.mark.parametrize("call", ["generate", "logits"])
@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[3, 4], [5, 6]], [[1, 1], [0, 0]], "row 1: the prompt has no tokens"),
        ([[]], None, r"input_ids must be integers \[rows, tokens\]"),
        (np.zeros((0, 3), int), None, "input_ids must be integers"),
        ([3, 4], None, r"not int64 \[2\]"),
        ([[3.0, 4.0]], None, "not float64"),
        ([[3, VOCABULARY]], None, "row 0: token 31 at position 1 is outside the vocabulary of 31 tokens"),
        ([[3, 4], [-1, 4]], None, "row 1: token -1 at position 0"),
        ([[3, 2**40]], None, "token 1099511627776"),
        ([[3, 4]], [[1, 1, 1]], "attention_mask must hold 0 and 1"),
        ([[3, 4]], [[1, 2]], "attention_mask must hold 0 and 1"),
        ([[3] * (CONTEXT + 1)], None, "exceed the context of 640"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts_that_cannot_be_read(model, call, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(ids, mask)


def test_tokens_under_padding_may_be_anything(model):
    ids, mask = np.array([[-100, 3, 4], [5, 6, 7 + VOCABULARY]]), np.array([[0, 1, 1], [1, 1, 0]])
    clean, _ = model.generate(np.array([[0, 3, 4], [0, 5, 6]]), np.array([[0, 1, 1]] * 2), None, GenerationConfig(8))
    assert np.array_equal(model.generate(ids, mask, None, GenerationConfig(8))[0], clean)


def test_no_room_for_the_answer(model):
    ids, mask = tokens_of(1, 30, CONTEXT - 9)
    for beams in (1, 2):
        message = f"row 1: {CONTEXT - 9} prompt tokens \\+ 10 new ones exceed the context of {CONTEXT} tokens"
        with pytest.raises(ValueError, match=message):
            model.generate(ids, mask, None, GenerationConfig(10, num_beams=beams))


def test_settings_that_do_not_fit_the_model(model):
    with pytest.raises(ValueError, match=r"eos_token_ids \[31, 90\] are outside the vocabulary of 31"):
        model.generate(np.array([[3]]), gen=GenerationConfig(4, eos_token_ids=(2, 31, 90)))
    with pytest.raises(ValueError, match="2 seeds for 1 rows"):
        model.generate(np.array([[3]]), gen=GenerationConfig(4, temperature=1.0, seed=(1, 2)))


# What fills up batches.


def test_padding_is_never_an_image(weights):
    """The image token may be token 0, with which padding would be filled: it must not take an image's features."""
    model = Generator(CONFIG, {"language_model": weights}, dtype=jnp.float32, image_token_id=0)
    rng = np.random.RandomState(3)
    features = rng.standard_normal((2, PER_IMAGE, LLAMA["hidden_size"])).astype(np.float32)
    rows = [[5, *[0] * PER_IMAGE, 9, 11, 12], [*[0] * PER_IMAGE, 8]]
    gen = GenerationConfig(8, **NO_END)
    alone = [
        model.generate(np.array([row]), None, features[i : i + 1], gen)[0][0].tolist() for i, row in enumerate(rows)
    ]
    ids, mask = np.zeros((2, 8), np.int64), np.zeros((2, 8), np.int64)
    for side in ("left", "right"):
        ids[:], mask[:] = 0, 0
        for number, row in enumerate(rows):
            place = slice(8 - len(row), None) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        assert model.generate(ids, mask, features, gen)[0].tolist() == alone
        scores = model.logits(ids, mask, features)
        assert [int(scores[i][mask[i] > 0][-1].argmax()) for i in range(2)] == [row[0] for row in alone]


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize(
    ("count", "multiple", "size"), [(1, 1, 1), (3, 1, 4), (4, 4, 4), (3, 8, 8), (5, 6, 12), (1, 3, 3), (9, 8, 16)]
)
def test_images_are_padded_to_a_power_of_two_and_the_mesh(count, multiple, size, library):
    padded = generator.pad_images(library.ones((count, 2, 3)), multiple)
    assert padded.shape == (size, 2, 3)
    assert (padded[:count] == 1).all()
    assert (padded[count:] == 0).all()


def test_images_reach_the_tower_in_numbers_that_divide_the_mesh(model, monkeypatch):
    sizes = []
    monkeypatch.setattr(generate, "encode_step", lambda _, pixels: sizes.append(len(pixels)) or pixels)
    monkeypatch.setattr(model, "_image_multiple", 6)
    assert model.encode(np.ones((3, 3, 4, 4), np.float32)).shape[0] == 3
    assert sizes == [6]


# Logits that are not finite, and tokens that nobody knows.


def spoiled(weights, token, value=np.nan, known=None):
    """A model with one embedding that is not finite: reading that token makes the row's logits NaN."""
    embedding = weights["embed_tokens"]["embedding"].at[token].set(value)
    weights = {**weights, "embed_tokens": {"embedding": embedding}}
    return Generator(CONFIG, {"language_model": weights}, dtype=jnp.float32, image_token_id=None, known=known)


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
        CONFIG, {"language_model": {**weights, "lm_head": {"kernel": kernel}}}, dtype=jnp.float32, image_token_id=None
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
    free = Generator(CONFIG, params, dtype=jnp.float32, image_token_id=None)
    bound = Generator(CONFIG, params, dtype=jnp.float32, image_token_id=None, known=known)
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
    everything = Generator(CONFIG, params, dtype=jnp.float32, image_token_id=None, known=np.ones(VOCABULARY, bool))
    np.testing.assert_array_equal(everything.generate(ids, mask, None, gen)[0], free.generate(ids, mask, None, gen)[0])

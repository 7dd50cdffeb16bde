"""Inputs of Generator: what is refused, and how batches and images are padded."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.generation_cases import IMAGE, LLAMA, NO_END, padded, tokens_of

from internvl_jax.config import config_from_hf
from internvl_jax.inference.generation import generate, generator
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig

PER_IMAGE = 4
CONFIG = config_from_hf(LLAMA)
VOCABULARY, CONTEXT, PAD = LLAMA["vocab_size"], LLAMA["max_position_embeddings"], LLAMA["pad_token_id"]


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
    blind = Generator(bind_model(CONFIG, {"language_model": weights}, dtype=jnp.float32), image_token_id=None)
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


def test_padding_is_never_an_image(weights):
    """The image token may be token 0, with which padding would be filled: it must not take an image's features."""
    model = Generator(bind_model(CONFIG, {"language_model": weights}, dtype=jnp.float32), image_token_id=0)
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

"""Chat: questions that are refused before anything runs, and rows that have no answer."""

import jax
import numpy as np
import pytest
from support.chat_cases import (
    CHECKPOINT,
    PROMPTS,
    REFERENCE,
    asked,
    without_timings,
)
from support.golden import DATA
from support.tiny_checkpoint import tiny_config, write_checkpoint

import internvl_jax
from internvl_jax.inference.chat import AnswerError
from internvl_jax.processing.images import ImageError
from internvl_jax.processing.tokenizer import TokenizerError

pytest.importorskip("torch")  # the golden checkpoint is PyTorch's


HISTORY = [("<image>\nWhat is shown?", "A bird.")]


NUMBERS = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "the question is empty"),
        (" \n", {}, "the question is empty"),
        (None, {}, "a question is a string, not NoneType"),
        ("\udcff", {}, "not valid UTF-8"),
        ("Hi", {"max_tokens": 3}, "no such generation setting: max_tokens; there are max_new_tokens, "),
        ("Hi", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("Hi", {"max_new_tokens": -1}, "max_new_tokens must be at least 1"),
        ("Hi", {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ("Hi", {"temperature": -0.5}, "temperature must be 0"),
        ("Hi", {"top_p": 0}, "top_p must lie in"),
        ("Hi", {"num_beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ("Hi", {"seed": (1, 2), "temperature": 1.0}, "2 seeds for 1 rows"),
        ("Hi", {"eos_token_ids": (900,)}, "outside the vocabulary of 869"),
        ("Hi", {"max_new_tokens": 600}, r"row 0: \d+ prompt tokens \+ 600 new ones exceed the context of 512 tokens"),
        ("word " * 600, {}, "leaves no room for an answer in the context of 512: shorten the question"),
        ("Hi", {"images": ["nowhere.png"]}, "nowhere.png does not exist"),
        ("Hi", {"images": [DATA]}, "is a directory, not an image"),
        ("Hi", {"images": [CHECKPOINT / "config.json"]}, "is not an image in a format that can be read"),
        ("Hi", {"images": b"nothing"}, "the image of 7 bytes is not an image"),
        ("Hi", {"images": [3]}, "an image must be a path, bytes, a PIL image or an array, not int"),
        ("Hi", {"images": NUMBERS.astype(float)}, "an array must be uint8"),
        ("Hi", {"images": "https://example.com/a.png"}, "download it"),
        ("Hi", {"images": NUMBERS, "image_path": "fast"}, "there is no image path 'fast'; there are eval and native"),
        ("<image>\n<image>", {"images": NUMBERS}, "2 <image> placeholders for 1 image"),
        ("What is in <image>?", {}, "1 <image> placeholder.s., but no images are given"),
        ("Where?", {"history": HISTORY}, "images of earlier turns have to be given again"),
        (
            "Where?",
            {"history": [("Hello <image>", "Hi")], "images": []},
            "images of earlier turns have to be given again",
        ),
        ("<image>?", {"history": HISTORY, "images": NUMBERS}, "2 <image> placeholders for 1 image"),
        ("<image><image>", {"history": HISTORY, "images": [NUMBERS] * 2}, "3 <image> placeholders for 2 image"),
        ("<image><image>", {"history": HISTORY, "images": [NUMBERS] * 4}, "4 .* of which 1 belong to the history"),
        ("<IMG_CONTEXT>", {"parse_special": True}, "which only images may bring"),
        ("Hi", {"history": "Hello"}, "a history is a list of .question, answer. pairs"),
        ("Hi", {"history": [("a", "b", "c")]}, "a history is a list of .question, answer. pairs"),
        ("Hi", {"history": [("a", None)]}, "a history is a list of .question, answer. pairs"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("call", ["chat", "stream"])
def test_bad_questions(chat, question, options, message, call, monkeypatch):
    for name in ("encode", "prefill", "generate"):
        monkeypatch.setattr(chat.generator, name, lambda *_: pytest.fail("work has started"))
    with pytest.raises(ValueError, match=message):
        getattr(chat, call)(question, **options)


def test_bad_batches(chat, monkeypatch):
    for name in ("encode", "prefill", "generate"):
        monkeypatch.setattr(chat.generator, name, lambda *_: pytest.fail("work has started"))
    for arguments, message in (
        (([],), "at least one question"),
        (("Hello",), "takes a list"),
        ((["a", "b"], [[]]), "2 questions, 1 lists of images and 2 histories"),
        ((["a", "b"], None, [[]]), "2 questions, 2 lists of images and 1 histories"),
        ((["a", " "],), "question 2: the question is empty"),
        ((["a", "b"], [None, "nowhere.png"]), "question 2: nowhere.png does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.batch_chat(*arguments)
    with pytest.raises(ImageError):
        chat.batch_chat(["a", "b"], [None, "nowhere.png"])
    with pytest.raises(ValueError, match="beam search cannot be streamed: use chat"):
        chat.stream("Hello", num_beams=2)


def test_a_row_without_an_answer_leaves_the_others_theirs(chat, logged):
    """The embedding of one token is NaN: whoever writes it gets an error, by every way of asking; others an answer."""
    question, _, _ = asked(PROMPTS["text_only"])
    token = chat.tokenizer.token_to_id("<box>")
    params = jax.tree.map(lambda leaf: leaf, chat.params)
    embedding = params["language_model"]["embed_tokens"]["embedding"]
    params["language_model"]["embed_tokens"] = {"embedding": embedding.at[token].set(np.nan)}
    spoiled = chat.with_params(params)
    bad = f"{question} <box>"
    options = {"max_new_tokens": 6, "parse_special": True}
    for extra in ({}, {"num_beams": 2}, {"stop": "not in there"}, {"temperature": 1.0}):
        first, second, third = spoiled.batch_chat([question, bad, question], **options, **extra)
        assert (first.error, third.error) == (None, None)
        assert first.text == chat.chat(question, **options, **extra).text
        assert "not finite (NaN or Inf)" in second.error
        assert (second.text, second.finish_reason, second.history) == ("", "error", [])
        assert second.to_dict()["error"] == second.error
        assert "error" not in first.to_dict()
        assert logged[-1].startswith("question 2 of 3: no answer (the model's logits are not finite")
        with pytest.raises(AnswerError, match="not finite"):
            spoiled.chat(bad, **options, **extra)
    with pytest.raises(AnswerError, match="not finite"):
        list(spoiled.stream(bad, **options))
    with pytest.raises(AnswerError, match="row 1: the model's logits are not finite"):
        spoiled.generate([[5, 6], [5, token]], max_new_tokens=2)
    # Finite numbers whose squares overflow in the first norm.
    params["language_model"]["embed_tokens"] = {"embedding": embedding.at[token].set(1e30)}
    overflowing = chat.with_params(params)
    with pytest.raises(AnswerError, match="row 1: the model's logits are not finite"):
        overflowing.generate([[5, 6], [5, token]], max_new_tokens=2)


def test_one_undecodable_answer_loses_no_other(chat, monkeypatch):
    question = PROMPTS["text_only"]["question"]
    expected = chat.batch_chat([question] * 2, **REFERENCE, temperature=1.5, seed=(3, 4))
    decode, bad = chat.tokenizer.decode, expected[1].tokens[-1]
    assert bad not in expected[0].tokens

    def broken(ids, **options):
        if bad in ids:
            raise TokenizerError(f"token {bad} is outside the tokenizer's tokens")
        return decode(ids, **options)

    monkeypatch.setattr(chat.tokenizer, "decode", broken)
    for extra in ({}, {"stop": "not in there"}):
        first, second = chat.batch_chat([question] * 2, **REFERENCE, temperature=1.5, seed=(3, 4), **extra)
        assert without_timings(first) == without_timings(expected[0])
        assert f"the answer's tokens cannot be decoded (token {bad} is outside" in second.error


def test_rows_that_the_tokenizer_does_not_have_are_never_answered(tmp_path):
    """As of llava-1.5-13b-hf: 32064 rows of the vocabulary for 32002 tokens."""
    size = tiny_config().text.vocab_size
    directory, _ = write_checkpoint(tmp_path / "wide", tiny_config(vocab_size=2 * size, eos_token_ids=(2 * size - 1,)))
    chat = internvl_jax.load(directory)
    assert chat.tokenizer.known_ids(2 * size).sum() == size == chat.tokenizer.vocab_size
    options = {"max_new_tokens": 12, "eos_token_ids": ()}
    for extra in (
        {},
        {"temperature": 10.0},
        {"temperature": 10.0, "top_k": 50, "repetition_penalty": 1.5},
        {"temperature": 10.0, "top_p": 0.9},
        {"num_beams": 4},
    ):
        replies = chat.batch_chat(["What is this?", "And that?"] * 4, **options, **extra)
        assert all(token < size for reply in replies for token in reply.tokens)
        assert [reply.error for reply in replies] == [None] * 8
    # The checkpoint's end token ends an answer although the tokenizer lacks it: it is no part of the text.
    (first,) = chat.batch_chat(["What is this?"], max_new_tokens=12, eos_token_ids=())
    kernel = chat.params["language_model"]["lm_head"]["kernel"]
    chat.params["language_model"]["lm_head"] = {
        "kernel": kernel.at[:, 2 * size - 1].set(kernel[:, first.tokens[0]] * 2)
    }
    stream = chat.stream("What is this?")
    assert list(stream) == []
    for reply in (chat.chat("What is this?"), stream.reply):
        assert (reply.tokens, reply.text, reply.finish_reason) == ([2 * size - 1], "", "stop")

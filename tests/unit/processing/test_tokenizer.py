"""Tokenizers: golden ids, streams, arrays, and what may be imported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tokenizer_cases import BUNDLE, BYTES, CHECKPOINT, GOLDENS, SETTINGS, config, directory_of, random_ids

from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.processing import tokenizer as tokenizer_module
from internvl_jax.processing.conversation import place_images, prepare_prompt
from internvl_jax.processing.tokenizer import (
    SentencePieceTokenizer,
    StreamDecoder,
    TokenizerError,
    load_tokenizer,
    pad_left,
)

# Golden ids.


def test_golden_ids_of_texts(either):
    for case in GOLDENS["tokenizer_encode"]:
        assert either.encode(case["text"]) == case[SETTINGS[either.legacy]], case["text"]
        assert either.encode(case["text"], add_bos=False) == case[SETTINGS[either.legacy]][1:], case["text"]


def test_golden_texts_of_ids(either):
    for case in GOLDENS["tokenizer_decode"]:
        assert either.decode(case["ids"]) == case[f"{SETTINGS[either.legacy]}_skip"], case["ids"]
        kept = either.decode(case["ids"], skip_special_tokens=False)
        assert kept == case[f"{SETTINGS[either.legacy]}_keep"], case["ids"]


def test_golden_ids_of_prompts(either):
    for case in GOLDENS["prompts"]:
        assert either.encode(case["query"]) == case[f"input_ids_{SETTINGS[either.legacy]}"], case["id"]


def test_golden_responses_and_the_checkpoints_own_setting():
    tokenizer = load_tokenizer(CHECKPOINT)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.legacy is GOLDENS["config"]["legacy"]
    for case in GOLDENS["prompts"]:
        assert tokenizer.encode(case["query"]) == case["input_ids"]
        assert tokenizer.decode(case["generated_ids"]).strip() == case["response"]
    assert tokenizer.vocab_size == GOLDENS["config"]["tokenizer_len"]
    for token, index in GOLDENS["config"]["token_ids"].items():
        assert tokenizer.token_to_id(token) == index
    named = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id
    assert named == (1, 2, GOLDENS["config"]["pad_token_id"], 0)
    assert tokenizer.token_to_id("<no such token>") is None
    assert tokenizer.token_to_id("<unk>") == 0


def test_golden_batches_are_padded_on_the_left():
    tokenizer, arrays = load_tokenizer(CHECKPOINT), np.load(BUNDLE / "goldens.npz")
    for case in GOLDENS["batches"]:
        questions = [place_images(question, 1, False) for question in case["questions"]]
        prompts = [prepare_prompt(TEMPLATES["internvl_zh"], q, [], [16]) for q in questions]
        ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_id)
        np.testing.assert_array_equal(ids, arrays[f"batch/{case['id']}/input_ids"])
        np.testing.assert_array_equal(mask, arrays[f"batch/{case['id']}/attention_mask"])


def test_emoji_and_rare_characters_fall_back_to_bytes(either):
    for text in ("🐳", "👩‍👩‍👧", "é́", "\x00", "𠮷"):
        assert either.decode(either.encode(text)) == text
    assert either.encode("🐳", add_bos=False)[1:] == [BYTES + byte for byte in "🐳".encode()]


def test_special_tokens_that_are_typed_are_special(either):
    for token, index in {**GOLDENS["config"]["token_ids"], "<s>": 1, "</s>": 2, "<unk>": 0}.items():
        assert either.encode(f"a{token}b", add_bos=False).count(index) == 1
        assert either.decode([index], skip_special_tokens=False) == token
        assert either.decode([index]) == ""


def test_an_id_that_does_not_exist_is_refused(either):
    for index in (-1, either.vocab_size, 10**9):
        with pytest.raises(TokenizerError, match=f"token {index} is outside the tokenizer's 869 tokens"):
            either.decode([5, index])


def test_text_that_is_no_unicode_is_refused(either):
    with pytest.raises(TokenizerError, match="half of a surrogate pair at character 3"):
        either.encode("abc\ud83d")


# Streaming.


def check_streaming(tokenizer, sequences, rng):
    for ids in sequences:
        whole = tokenizer.decode(ids)
        for longest in (1, 4):  # tokens per push
            decoder, said, at = StreamDecoder(tokenizer), "", 0
            while at < len(ids):
                step = rng.randint(1, longest + 1)
                said += decoder.push(ids[at : at + step])
                at += step
                # What is out stays: it is a beginning of the text, whatever follows.
                assert whole.startswith(said), ids
            assert said + decoder.flush() == whole, ids
            assert decoder.flush() == ""


def test_pieces_of_a_stream_join_to_the_whole(either):
    rng = np.random.RandomState(2)
    check_streaming(either, random_ids(either, rng), rng)
    byte_tokens = [[BYTES + byte for byte in rng.permutation(list("🐳请é a".encode())).tolist()] for _ in range(60)]
    check_streaming(either, byte_tokens, rng)
    check_streaming(either, [case["ids"] for case in GOLDENS["tokenizer_decode"]], rng)
    check_streaming(either, [case["generated_ids"] for case in GOLDENS["prompts"]], rng)


def test_pieces_of_a_stream_from_a_tokenizer_json(fast):
    rng = np.random.RandomState(3)
    tokenizer = load_tokenizer(fast[0])
    check_streaming(tokenizer, random_ids(tokenizer, rng), rng)


def test_pieces_of_a_stream_that_is_tidied(tmp_path):
    rng = np.random.RandomState(4)
    files = {"tokenizer_config.json": config(clean_up_tokenization_spaces=True)}
    tokenizer = load_tokenizer(directory_of(tmp_path, files))
    check_streaming(tokenizer, random_ids(tokenizer, rng, ["it is n't , he 's . ! a ' b"]), rng)


def test_a_stream_says_what_is_certain_and_holds_back_what_is_not(either):
    decoder = StreamDecoder(either)
    assert decoder.push(either.encode("你好 world", add_bos=False)) == "你好 world"
    assert decoder.push(either.encode(" ", add_bos=False)[:1]) == ""  # a blank at the end may yet go
    assert decoder.push(either.encode("a", add_bos=False)).strip(" ") == "a"
    whale = [BYTES + byte for byte in "🐳".encode()]
    assert [decoder.push([token]) for token in whale] == ["", "", "", "🐳"]
    assert decoder.push(whale[:2]) == ""
    assert decoder.flush() == "\ufffd\ufffd"


def test_special_tokens_between_the_bytes_of_a_character(fast, either):
    for tokenizer in (load_tokenizer(fast[0]), either):
        character = tokenizer.encode("🐳", add_bos=False)
        ids = [i for token in character for i in (token, tokenizer.eos_id)]
        check_streaming(tokenizer, [ids, ids[:-4], ids * 2, [*ids, character[-1]]], np.random.RandomState(5))
        assert tokenizer.decode(ids) == "🐳"


def test_a_stream_of_characters_from_a_tokenizer_json(fast):
    tokenizer = load_tokenizer(fast[0])
    text = "the 请🐳"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


# Arrays, and what may be imported.


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8], [], np.array([9, 10])], pad_id=3)
    np.testing.assert_array_equal(ids, [[5, 6, 7], [3, 3, 8], [3, 3, 3], [3, 9, 10]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 1]])
    assert ids.dtype == mask.dtype == np.int32
    # A pad id in the text is text.
    np.testing.assert_array_equal(pad_left([[3, 3], [1]], pad_id=3)[1], [[1, 1], [0, 1]])
    assert pad_left([], pad_id=0)[0].shape == (0, 0)


def test_processing_never_imports_jax_or_torch():
    modules = sorted(path.stem for path in Path(tokenizer_module.__file__).parent.glob("[!_]*.py"))
    assert {"conversation", "images", "tokenizer"} <= set(modules)
    code = f"""
import sys
from importlib import import_module
for module in {modules}:
    import_module("internvl_jax.processing." + module)
from internvl_jax.processing.tokenizer import load_tokenizer
load_tokenizer({str(CHECKPOINT)!r}).encode("a")
heavy = sorted({{"jax", "jaxlib", "flax", "torch", "transformers", "orbax"}} & set(sys.modules))
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_known_ids(fast, either, tmp_path):
    assert either.known_ids(900).tolist() == [True] * 869 + [False] * 31
    assert either.known_ids(5).tolist() == [True] * 5
    tokenizer = load_tokenizer(fast[0])
    assert tokenizer.known_ids(tokenizer.vocab_size + 2).sum() == len(fast[1].get_vocab())
    values = config(additional_special_tokens=[])
    values["added_tokens_decoder"] = {"0": {"content": "<unk>"}, "1": {"content": "<s>"}, "2": {"content": "</s>"}}
    values["added_tokens_decoder"]["870"] = {"content": "<late>"}  # a hole before it
    (tmp_path / "hole").mkdir()
    holes = load_tokenizer(directory_of(tmp_path / "hole", {"tokenizer_config.json": values}))
    assert np.flatnonzero(~holes.known_ids(875)).tolist() == [*range(860, 870), 871, 872, 873, 874]

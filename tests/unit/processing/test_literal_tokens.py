"""Special tokens that people type are ordinary text where they are literal."""

import json

import pytest
from support.tokenizer_cases import (
    GOLDENS,
    TEXTS,
    config,
    directory_of,
    everything_literal,
)

from internvl_jax.processing.tokenizer import (
    load_tokenizer,
    special_tokens_in,
)


def test_special_tokens_that_are_typed_can_be_ordinary_text(either):
    special = {**GOLDENS["config"]["token_ids"], "<s>": 1, "</s>": 2, "<unk>": 0}
    assert either.special_tokens == set(special)
    for token, index in special.items():
        for text in (f"a{token}b", token, f" {token} {token}\n{token}", f"{token}<"):
            ids = either.encode(text, add_bos=False, literal_spans=everything_literal(text))
            assert not set(ids) & set(special.values()), text
            assert either.decode(ids, skip_special_tokens=True).strip() == text.strip()
        # Where it is not typed but written by a template, it is what it was.
        text = f"a{token}b{token}c"
        ids = either.encode(text, add_bos=False, literal_spans=[(len(text) - len(token) - 1, len(text))])
        assert ids.count(index) == 1
        first = either.encode(f"a{token}", add_bos=False)
        assert ids[: len(first)] == first
        # Side by side, each is what it is said to be.
        for text, start in ((f"{token}x{token}", len(token)), (f"{token}{token}x", len(token))):
            assert either.encode(text, add_bos=False, literal_spans=[(start, len(text))]).count(index) == 1
            assert either.encode(f"{token}x", add_bos=False, literal_spans=[(len(token), len(text))]).count(index) == 1
    for case in GOLDENS["tokenizer_encode"]:
        if not special_tokens_in(either, case["text"]):
            assert either.encode(case["text"], literal_spans=everything_literal(case["text"])) == either.encode(
                case["text"]
            )
    assert special_tokens_in(either, "a</s>b<img></img> <image>") == ["</s>", "<img>", "</img>"]


def test_tokens_that_are_added_as_ordinary_text_stay_tokens(tmp_path):
    values = config()
    values["added_tokens_decoder"]["869"] = {"content": "hello", "special": False}
    tokenizer = load_tokenizer(directory_of(tmp_path, {"tokenizer_config.json": values}))
    assert "hello" not in tokenizer.special_tokens
    assert 869 in tokenizer.encode("say hello </s>", literal_spans=[(0, 14)])
    assert 2 not in tokenizer.encode("say hello </s>", literal_spans=[(0, 14)])


def test_pieces_that_are_written_as_a_special_token_are_spelled(tmp_path):
    """Some sentencepiece models have the marker itself as a piece: it must not come back by that way."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat in the hat <img> b </img> img", "where there is the other"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<img>"],
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    index = 3
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {str(index): {"content": "<img>"}}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the <img> cat").count(index) == 1
    ids = tokenizer.encode("the <img> cat", literal_spans=[(0, 13)])
    assert index not in ids
    assert tokenizer.decode(ids) == "the <img> cat"


def test_typed_special_tokens_in_a_tokenizer_json(fast):
    path, library = fast
    tokenizer = load_tokenizer(path)
    special = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<img>", "</img>")}
    assert tokenizer.special_tokens == set(special)
    for text in ("the</s>cat", "</s>", " <img> the", "the <ref>hat</img><s>"):
        ids = tokenizer.encode(text, add_bos=False, literal_spans=everything_literal(text))
        assert not set(ids) & set(special.values())
        assert tokenizer.decode(ids, skip_special_tokens=False).strip() == text.strip()
        assert (tokenizer.token_to_id("<ref>") in ids) is ("<ref>" in text)  # an added word, not a special token
        # Template around it: the first three tokens and the last are read, the middle is text.
        whole = f"<s>the</s>{text}</s>"
        around = tokenizer.encode(whole, add_bos=False, literal_spans=[(10, 10 + len(text))])
        template = tokenizer.encode("<s>the</s>", add_bos=False)
        assert around[: len(template)] == template
        assert around[-1] == special["</s>"]
        assert sum(index in special.values() for index in around) == 3
    for text in TEXTS:
        if not special_tokens_in(tokenizer, text):
            assert tokenizer.encode(text, literal_spans=everything_literal(text)) == tokenizer.encode(text)
        # With nothing literal in reach, the renamed copy reads as the original does.
        other, renamed = tokenizer.rename_special_tokens(text, [])
        assert other.encode(renamed).ids == library.encode(text).ids

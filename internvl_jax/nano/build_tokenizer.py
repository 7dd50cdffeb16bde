"""Train nano's tokenizer: a LLaMA-style sentencepiece model with Chinese, in the published layout.

python -m internvl_jax.nano.build_tokenizer DIRECTORY
"""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path

import sentencepiece

from internvl_jax.nano.render import texts
from internvl_jax.utils import files

PIECES = 640
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
SAMPLES = 4000  # training samples whose questions and answers are the corpus


def build(directory: Path, pieces: int = PIECES, samples: int = SAMPLES) -> int:
    """Train the tokenizer; write tokenizer.model and the JSON files of a published tokenizer.

    Args:
        directory: Directory to write to.
        pieces: Vocabulary size without added tokens.
        samples: Number of training samples in the corpus.

    Returns:
        Vocabulary size with added tokens.

    Raises:
        ValueError: The directory has other files of these names; nothing is written then.
    """
    written = _tokenizer_files(_train_pieces(pieces, samples), pieces)
    directory = files.resolve(directory)
    with files.claim(directory):
        for name, data in written.items():
            path = directory / name
            if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
                raise ValueError(f"{path} belongs to another tokenizer: choose another directory")
        directory.mkdir(exist_ok=True)
        for name, data in written.items():
            files.write_bytes(directory / name, data)
    return pieces + len(ADDED)


def _train_pieces(pieces: int, samples: int) -> bytes:
    """Train the sentencepiece model on questions and answers of training samples."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"<human>: {line} <bot>: {line}" for line in texts(samples)),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more would make the result depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def _tokenizer_files(model: bytes, pieces: int) -> dict[str, bytes]:
    """The files of a tokenizer with this sentencepiece model, by name, in the order of writing."""
    ids = {token: pieces + number for number, token in enumerate(ADDED)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {
        str(number): {"content": token, **flags} for token, number in {"<unk>": 0, "<s>": 1, "</s>": 2, **ids}.items()
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(ADDED),
        "clean_up_tokenization_spaces": False,
        **named,
    }
    return {
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json({"additional_special_tokens": list(ADDED), **named}),
        "added_tokens.json": _json(ids),
        "tokenizer.model": model,  # last: if it exists, the others do
    }


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    try:
        print(build(parser.parse_args().directory))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")

"""Train nano's tokenizer: a LLaMA-style sentencepiece model with Chinese, in the published layout.

python -m internvl_jax.nano.build_tokenizer DIRECTORY
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from internvl_jax.nano.render import texts

PIECES = 640
ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
SAMPLES = 4000  # of the training split, whose questions and answers are the text


def build(directory: Path, pieces: int = PIECES, samples: int = SAMPLES) -> int:
    """Write tokenizer.model and the JSON files beside it; returns the vocabulary's size, added tokens included."""
    import sentencepiece

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
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
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
    _write(directory / "tokenizer_config.json", config)
    _write(directory / "special_tokens_map.json", {"additional_special_tokens": list(ADDED), **named})
    _write(directory / "added_tokens.json", ids)
    return pieces + len(ADDED)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

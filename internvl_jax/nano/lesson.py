"""Data for the tutorial of docs/training.md: a question that nano was not trained on, "What kind of picture is this?".

    python -m internvl_jax.nano.lesson DIR [--samples N]

    DIR/meta.json  DIR/train.jsonl  DIR/heldout.jsonl  DIR/images/

The output has the same bytes on every machine; other files in the directory are not changed. Held-out images come from
a random stream that training does not use (render.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.nano.dataset import check_text, put_text, save_image
from internvl_jax.nano.render import Sample, make_sample
from internvl_jax.utils import files

SAMPLES = 1200  # for training
HELDOUT = 150
QUESTIONS = ("What kind of picture is this?", "这是什么图片？")
# Only words that nano was trained to say: adapters do not change the head, whose other rows are untrained.
KINDS = (("words", "单词"), ("handwritten digits", "手写数字"), ("shapes", "形状"))


def answer(sample: Sample, language: int) -> str:
    """Return what kind of image it is. language: 0 for English, 1 for Chinese."""
    digit, word = sample.contents[18], sample.contents[20]
    return KINDS[0 if word else 1 if digit else 2][language]


def write(directory: Path, samples: int = SAMPLES, heldout: int = HELDOUT) -> None:
    """Write conversations of one turn, half of them in Chinese.

    Args:
        directory: Directory to write to.
        samples: Number of training samples.
        heldout: Number of held-out samples.

    Raises:
        ValueError: The directory has other files of the same names; nothing is written then.
    """
    directory = files.resolve(directory)
    images: dict[str, Image.Image] = {}
    texts: dict[str, str] = {}
    for split, count in (("train", samples), ("heldout", heldout)):
        lines: list[str] = []
        number = 0
        while len(lines) < count:
            sample = make_sample(split, number)
            if sample.image is not None:
                name = f"images/{split}/{number:06}.png"
                images[name] = Image.fromarray(sample.image)
                language = int(np.random.default_rng((2, number)).integers(2))
                turns = [
                    {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n{QUESTIONS[language]}"},
                    {"from": "gpt", "value": answer(sample, language)},
                ]
                entry = {"id": number, "image": name, "conversations": turns}
                lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
            number += 1
        texts[f"{split}.jsonl"] = "".join(lines)
    value = {"kinds": {"root": "", "annotation": "train.jsonl", "repeat_time": 1, "length": samples}}
    texts["meta.json"] = json.dumps(value, indent=2) + "\n"
    with files.claim(directory):
        for name, text in texts.items():
            check_text(directory / name, text)
        for write in (False, True):
            for name, image in images.items():
                save_image(image, directory / name, write=write)
        for name, text in texts.items():
            put_text(directory / name, text)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"for training ({SAMPLES:,})")
    args = parser.parse_args(argv)
    try:
        write(args.directory, args.samples)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(args.directory / "meta.json")


if __name__ == "__main__":
    main()

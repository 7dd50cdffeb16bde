"""Evaluate nano on held-out images, by kind of question and language.

    python -m internvl_jax.nano.evaluate [--checkpoint DIR] [--count N] [--json] [--images DIR]

The images come from random streams that training does not use, the handwritten digits from scans that it does not use
(render.py). An answer is correct if its text equals the expected one exactly. Decoding is greedy. The mean is over the
questions of render.py; three more rows are those questions in other words, descriptions of images, and questions
whether there is some shape (phrasings.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import internvl_jax
from internvl_jax.inference.chat import Chat, require_answers
from internvl_jax.nano.dataset import save_image
from internvl_jax.nano.phrasings import EXTRA_KINDS, LANGUAGES, heldout_phrased
from internvl_jax.nano.render import KINDS, heldout_questions, make_sample

BATCH = 50
IMAGES = {"shapes.png": 3, "digits.png": 0, "word.png": 10}  # held-out samples in the package


@dataclass(frozen=True)
class KindScore:
    """Correct answers to `count` questions of one kind and language; `chance` is the expected accuracy of guessing."""

    kind: str
    language: str
    count: int
    num_correct: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return self.num_correct / self.count

    @property
    def margin(self) -> float:
        """Half-width of the 95% confidence interval (Wilson, 1927)."""
        z, n, p = 1.96, self.count, self.accuracy
        return z / (1 + z**2 / n) * float(np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)))


def score(chat: Chat, kind: str, language: str, count: int) -> KindScore:
    """Ask `count` held-out questions of one kind in one language, in batches."""
    asked = (heldout_questions if kind in KINDS else heldout_phrased)(kind, language, count)
    num_correct = 0
    for start in range(0, count, BATCH):
        part = asked[start : start + BATCH]
        questions, images = [question.text for _, question in part], [image for image, _ in part]
        replies = require_answers(chat.batch_chat(questions, images, max_new_tokens=48))
        num_correct += sum(reply.text == question.answer for reply, (_, question) in zip(replies, part))
    return KindScore(kind, language, count, num_correct, float(np.mean([question.chance for _, question in asked])))


def evaluate(chat: Chat, count: int, progress: Callable[[Any], Any] = iter) -> list[KindScore]:
    """Evaluate all kinds of questions in both languages. `progress` wraps the list of pairs, for a progress bar."""
    cells = [(kind, language) for kind in (*KINDS, *EXTRA_KINDS) for language in LANGUAGES]
    return [score(chat, kind, language, count) for kind, language in progress(cells)]


def write_images(directory: Path) -> None:
    """Write the held-out images of the package. Raises ValueError if another file of such a name exists."""
    images: dict[str, Image.Image] = {}
    for name, index in IMAGES.items():
        pixels = make_sample("heldout", index).image
        assert pixels is not None  # IMAGES lists samples with an image
        images[name] = Image.fromarray(pixels)
    for write in (False, True):
        for name, image in images.items():
            save_image(image, directory / name, write=write)


def print_table(scores: list[KindScore], console: Console) -> None:
    """Print one row per kind of render.py, their mean, then the other rows."""
    table = Table(
        title=f"correct answers to held-out questions (exact match), {scores[0].count} per cell (95% interval)"
    )
    for column in ("question", "English", "Chinese", "chance"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for kind in (*KINDS, "mean", *EXTRA_KINDS):
        if kind == "mean":
            own = [s for s in scores if s.kind in KINDS]
            means = [np.mean([s.accuracy for s in own if s.language == language]) for language in LANGUAGES]
            table.add_row(kind, *(f"{mean:.1%}" for mean in means), f"{np.mean([s.chance for s in own]):.0%}")
            continue
        row = [s for s in scores if s.kind == kind]
        table.add_row(kind, *(f"{s.accuracy:.1%} ± {s.margin:.1%}" for s in row), f"{row[0].chance:.0%}")
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: the model in the package")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="questions per kind and language")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--images", type=Path, metavar="DIR", help="write the images of the package, and exit")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    if args.images:
        try:
            write_images(args.images)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        return
    chat = internvl_jax.load(args.checkpoint)
    quiet = Console(stderr=True)
    scores = evaluate(
        chat, args.count, lambda parts: track(parts, "asking", console=quiet, disable=not quiet.is_terminal)
    )
    if args.json:
        print(json.dumps({"dtype": chat.dtype.name, "scores": [{**asdict(s), "accuracy": s.accuracy} for s in scores]}))
        return
    print_table(scores, Console())
    print(f"{chat.name}, {chat.dtype.name}, {platform.machine()} with {os.cpu_count()} cores")


if __name__ == "__main__":
    main()

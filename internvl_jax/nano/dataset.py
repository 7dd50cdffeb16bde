"""Render nano's training data into a directory, in the documented format.

    python -m internvl_jax.nano.dataset DIR [--samples N]

    DIR/meta.json                InternVL's meta file
    DIR/train.jsonl              a conversation a line; "image_labels" says what is in the picture (render.CONTENTS)
    DIR/images/012/012345.png

The same bytes on every machine. What an interrupted run has rendered is not rendered again; meta.json comes last.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from internvl_jax.nano.render import Sample, make_sample
from internvl_jax.processing.conversation import IMAGE_PLACEHOLDER

SAMPLES = 120_000  # each is seen two or three times in train.py's stages
META, LINES = "meta.json", "train.jsonl"
PART = 1000  # samples that a process renders at once, and pictures of a directory


def entry(sample: Sample, number: int, image: str | None) -> dict[str, Any]:
    """A sample as a line of the annotation file."""
    turns: list[dict[str, str]] = []
    for question in sample.questions:
        first = image is not None and not turns
        asked = f"{IMAGE_PLACEHOLDER}\n{question.text}" if first else question.text
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": question.answer}]
    seen = {} if image is None else {"image": image, "image_labels": [list(sample.contents)]}
    return {"id": number, **seen, "conversations": turns}


def write(directory: Path, samples: int = SAMPLES, progress: Callable[[Any], Any] = iter) -> Path:
    """Write the first `samples` training samples; returns the meta file. progress: wraps the list of parts.

    Raises ValueError where the directory holds another number of them.
    """
    meta = directory / META
    if meta.exists():
        found = json.loads(meta.read_text(encoding="utf-8"))["nano"]["length"]
        if found != samples:
            raise ValueError(f"{directory} holds {found} samples, not {samples}: choose another directory")
        return meta
    directory.mkdir(parents=True, exist_ok=True)
    parts = [(directory, start, min(start + PART, samples)) for start in range(0, samples, PART)]
    lines = directory / f".{LINES}.tmp"
    with open(lines, "w", encoding="utf-8") as file:
        if len(parts) == 1:
            file.writelines(_render(parts[0]))
        else:
            # Not forked: jax's threads, where there are any, would not come along.
            with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                for part in progress([pool.submit(_render, part) for part in parts]):
                    file.writelines(part.result())
    lines.replace(directory / LINES)
    value = {"nano": {"root": "", "annotation": LINES, "repeat_time": 1, "data_augment": False, "length": samples}}
    temporary = meta.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(meta)
    return meta


def _render(part: tuple[Path, int, int]) -> list[str]:
    """The lines of some samples, their pictures written where they are missing."""
    directory, start, stop = part
    lines = []
    for number in range(start, stop):
        sample, name = make_sample("train", number), None
        if sample.image is not None:
            name = f"images/{number // PART:03}/{number:06}.png"
            save_picture(Image.fromarray(sample.image), directory / name)
        lines.append(json.dumps(entry(sample, number, name), ensure_ascii=False) + "\n")
    return lines


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; one that is there already stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    image.save(temporary, "PNG")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> None:
    """Parse arguments and render."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"how many ({SAMPLES:,})")
    args = parser.parse_args(argv)
    quiet = Console(stderr=True)
    meta = write(
        args.directory,
        args.samples,
        lambda parts: track(parts, "rendering", console=quiet, disable=not quiet.is_terminal),
    )
    print(meta)


if __name__ == "__main__":
    main()

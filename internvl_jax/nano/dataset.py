"""Render nano's training data into a directory, in the documented format.

    python -m internvl_jax.nano.dataset DIR [--samples N]

    DIR/meta.json                InternVL's meta file
    DIR/train.jsonl              a conversation a line; "image_labels" says what is in the picture (render.CONTENTS)
    DIR/images/012/012345.png

The same bytes on every machine. What an interrupted run has written stays; meta.json comes last. Another file that has
one of these names is never changed: the directory is refused.
"""

from __future__ import annotations

import argparse
import filecmp
import io
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
from internvl_jax.utils import files

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

    Raises ValueError where the directory holds another number of them, or other files of the same names.
    """
    directory = files.resolve(directory)
    meta = directory / META
    if _is_there(meta, samples):
        return meta
    with files.claim(directory):
        if _is_there(meta, samples):  # whoever held the claim wrote it
            return meta
        directory.mkdir(exist_ok=True)
        files.remove_leftovers(directory / LINES)
        _write_lines(directory, samples, progress)
        return files.write_text(meta, _meta(samples))


def _meta(samples: int) -> str:
    value = {"nano": {"root": "", "annotation": LINES, "repeat_time": 1, "data_augment": False, "length": samples}}
    return json.dumps(value, indent=2) + "\n"


def _is_there(meta: Path, samples: int) -> bool:
    """Whether `write` has written everything. Raises ValueError for other files, and for another number of samples."""
    if not os.path.lexists(meta):
        return False
    found = files.read_json(meta)
    try:
        length = found["nano"]["length"]
    except (KeyError, TypeError):
        length = None
    if not isinstance(length, int) or found != json.loads(_meta(length)):
        raise _other(meta)
    if length != samples:
        raise ValueError(f"{meta.parent} holds {length} samples, not {samples}: choose another directory")
    return True


def _write_lines(directory: Path, samples: int, progress: Callable[[Any], Any]) -> None:
    path = directory / LINES
    if path.exists():  # of an interrupted run, or not: seen before anything is rendered
        with open(path, "rb") as written:
            if written.readline() != _line(make_sample("train", 0), 0)[0].encode():
                raise _other(path)
    parts = [(directory, start, min(start + PART, samples)) for start in range(0, samples, PART)]
    with files.replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            if len(parts) == 1:
                file.writelines(_render(parts[0]))
            else:
                # Not forked: jax's threads, where there are any, would not come along.
                with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                    for part in progress([pool.submit(_render, part) for part in parts]):
                        file.writelines(part.result())
        if path.exists() and not filecmp.cmp(path, temporary, shallow=False):
            raise _other(path)


def _render(part: tuple[Path, int, int]) -> list[str]:
    """The lines of some samples, their pictures written where they are missing."""
    directory, start, stop = part
    for left in (directory / "images" / f"{start // PART:03}").glob(".*.png.tmp-*"):  # this part's alone
        files.remove_leftovers(left.with_name(left.name[1:].rpartition(".tmp-")[0]))
    lines = []
    for number in range(start, stop):
        sample = make_sample("train", number)
        line, name = _line(sample, number)
        if sample.image is not None:
            save_picture(Image.fromarray(sample.image), directory / name)
        lines.append(line)
    return lines


def _line(sample: Sample, number: int) -> tuple[str, str]:
    """A sample's line of the annotation file, and the name of its image."""
    name = f"images/{number // PART:03}/{number:06}.png"
    value = entry(sample, number, None if sample.image is None else name)
    return json.dumps(value, ensure_ascii=False) + "\n", name


def save_picture(image: Image.Image, path: Path, *, write: bool = True) -> None:
    """Write a PNG, whole or not at all; the same image stays. write=False: only look.

    Raises ValueError where another file is there.
    """
    if os.path.lexists(path):
        try:
            with Image.open(path) as found:
                same = found.mode == image.mode and found.size == image.size and found.tobytes() == image.tobytes()
        except (OSError, Image.DecompressionBombError):
            same = False
        if not same:
            raise _other(path)
        return
    if not write:
        return
    data = io.BytesIO()
    image.save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, data.getvalue())


def put_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; the same text stays. Raises ValueError where another file is there."""
    check_text(path, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def check_text(path: Path, text: str) -> None:
    """Raise ValueError where there is a file at `path` that is not `text`."""
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == text.encode("utf-8")):
        raise _other(path)


def _other(path: Path) -> ValueError:
    return ValueError(f"{path} is not what would be written there: name another directory")


def main(argv: list[str] | None = None) -> None:
    """Parse arguments and render."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help=f"how many ({SAMPLES:,})")
    args = parser.parse_args(argv)
    quiet = Console(stderr=True)
    try:
        meta = write(
            args.directory,
            args.samples,
            lambda parts: track(parts, "rendering", console=quiet, disable=not quiet.is_terminal),
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(meta)


if __name__ == "__main__":
    main()

"""Render nano's training data into a directory, in the documented format.

    python -m internvl_jax.nano.dataset DIR [--samples N]

    DIR/meta.json                InternVL's meta file
    DIR/train.jsonl              a conversation a line; "image_labels" has the labels of the image (render.CONTENTS)
    DIR/images/012/012345.png

The output has the same bytes on every machine. An interrupted run can be repeated; meta.json is written last. Other
files of the same names are never changed: they are an error.
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

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.nano.render import Sample, make_sample
from internvl_jax.utils import files

SAMPLES = 120_000  # each is used two or three times in the first stages of train.py
META, LINES = "meta.json", "train.jsonl"
PART = 1000  # samples per task of a process, and images per directory

MakeSample = Callable[[str, int], Sample]  # from split and index; a function of a module, for other processes


def entry(sample: Sample, number: int, image: str | None) -> dict[str, Any]:
    """Return a sample as a record of the annotation file."""
    turns: list[dict[str, str]] = []
    for question in sample.questions:
        first = image is not None and not turns
        asked = f"{IMAGE_PLACEHOLDER}\n{question.text}" if first else question.text
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": question.answer}]
    seen = {} if image is None else {"image": image, "image_labels": [list(sample.contents)]}
    return {"id": number, **seen, "conversations": turns}


def write(
    directory: Path,
    samples: int = SAMPLES,
    progress: Callable[[Any], Any] = iter,
    *,
    make: MakeSample = make_sample,
) -> Path:
    """Write the first `samples` training samples.

    Args:
        directory: Directory to write to.
        samples: Number of samples.
        progress: Wraps the list of parts, for a progress bar.
        make: Function that returns a sample, `render.make_sample` or `phrasings.phrased_sample`.

    Returns:
        Path of the meta file.

    Raises:
        ValueError: The directory has another number of samples, or other files of the same names.
    """
    directory = files.resolve(directory)
    meta = directory / META
    if _is_there(meta, samples):
        return meta
    with files.claim(directory):
        if _is_there(meta, samples):  # another process wrote it meanwhile
            return meta
        directory.mkdir(exist_ok=True)
        files.remove_leftovers(directory / LINES)
        _write_lines(directory, samples, progress, make)
        return files.write_text(meta, _meta(samples))


def _meta(samples: int) -> str:
    value = {"nano": {"root": "", "annotation": LINES, "repeat_time": 1, "data_augment": False, "length": samples}}
    return json.dumps(value, indent=2) + "\n"


def _is_there(meta: Path, samples: int) -> bool:
    """Whether `write` has finished. Raises ValueError for other files, and for another number of samples."""
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
        raise ValueError(f"{meta.parent} has {length} samples, not {samples}: choose another directory")
    return True


def _write_lines(directory: Path, samples: int, progress: Callable[[Any], Any], make: MakeSample) -> None:
    path = directory / LINES
    if path.exists():  # from an interrupted run or elsewhere: checked before rendering
        with open(path, "rb") as written:
            if written.readline() != _line(make("train", 0), 0)[0].encode():
                raise _other(path)
    parts = [(directory, start, min(start + PART, samples), make) for start in range(0, samples, PART)]
    with files.replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            if len(parts) == 1:
                file.writelines(_render(parts[0]))
            else:
                # Not forked: a fork does not copy jax's threads.
                with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
                    for part in progress([pool.submit(_render, part) for part in parts]):
                        file.writelines(part.result())
        if path.exists() and not filecmp.cmp(path, temporary, shallow=False):
            raise _other(path)


def _render(part: tuple[Path, int, int, MakeSample]) -> list[str]:
    """The lines of some samples; missing images are written."""
    directory, start, stop, make = part
    for left in (directory / "images" / f"{start // PART:03}").glob(".*.png.tmp-*"):  # of this part only
        files.remove_leftovers(left.with_name(left.name[1:].rpartition(".tmp-")[0]))
    lines = []
    for number in range(start, stop):
        sample = make("train", number)
        line, name = _line(sample, number)
        if sample.image is not None:
            save_image(Image.fromarray(sample.image), directory / name)
        lines.append(line)
    return lines


def _line(sample: Sample, number: int) -> tuple[str, str]:
    """A sample's line of the annotation file, and the name of its image."""
    name = f"images/{number // PART:03}/{number:06}.png"
    value = entry(sample, number, None if sample.image is None else name)
    return json.dumps(value, ensure_ascii=False) + "\n", name


def save_image(image: Image.Image, path: Path, *, write: bool = True) -> None:
    """Write a PNG atomically, unless the same image exists.

    Args:
        image: The image.
        path: File to write.
        write: False only checks for other files.

    Raises:
        ValueError: Another file of that name exists.
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
    """Write a text file atomically. Raises ValueError if another file of that name exists."""
    check_text(path, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def check_text(path: Path, text: str) -> None:
    """Raise ValueError if `path` exists and does not contain `text`."""
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == text.encode("utf-8")):
        raise _other(path)


def _other(path: Path) -> ValueError:
    return ValueError(f"{path} exists with other content: choose another directory")


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

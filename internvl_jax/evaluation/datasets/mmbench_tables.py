"""Reader of the tab-separated tables of MMBench and CCBench, which contain the images in base64."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import (
    Codebase,
    EvaluationError,
    Item,
    distinct,
)
from internvl_jax.evaluation.datasets.records import (
    collecting,
    raise_problems,
    read_text,
)
from internvl_jax.evaluation.scorers.choices import LETTERS

logger = logging.getLogger(__name__)
# What pandas, with which the reference reads tables, treats as a missing value.
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "NaN", "None", "n/a", "nan", "null")
)
_INDEX = re.compile("[0-9]{1,18}")
_NEEDED = ("index", "question", "A", "B", "image")


def multiple_choice(
    folder: DataFolder, codebase: Codebase, *, files: Sequence[str], server: bool = False
) -> list[Item]:
    """Read a table of MMBench or CCBench.

    As in the reference, options are left out of the prompt if pandas reads their text as a missing value ("None",
    "N/A", "nan", ...), even if one of them is the right answer; a warning names the rows. LLaVA's script stops at the
    first missing option of A to D, and compares "None" and "nan" regardless of case.

    Args:
        folder: The benchmark's files.
        codebase: Whose rules for missing options apply.
        files: Names of tables; the first that exists is read.
        server: Whether only a server has the answers.

    Raises:
        EvaluationError: Rows are malformed; all are listed.
    """
    path = folder.find(*files)
    rows = list(_table(path))
    images = {row["index"]: row["image"] for _, row in rows}
    items = []
    problems: list[str] = []
    hidden: list[str] = []
    for where, row in rows:
        with collecting(problems):
            if not _INDEX.fullmatch(row["index"]):
                raise EvaluationError(f"{where}: the index is {row['index']!r}, not a number")
            options = _cells(row, codebase)
            answer = row.get("answer", "")
            if not server and (answer not in tuple(LETTERS) or answer not in row):
                raise EvaluationError(f"{where}: the answer is {answer!r}, and the options are {', '.join(options)}")
            hint = row.get("hint", "")
            question = row["question"] if _missing(hint, codebase) else f"{hint}\n{row['question']}"
            image = _decode_image(images.get(row["image"], row["image"]), where)
            gold = () if server else (answer,)
            record = {name: value for name, value in row.items() if name != "image"}
            items.append(Item("", int(row["index"]), question, image, gold, row.get("category", ""), options, record))
            hidden += [
                f"{where}: {letter} is {row[letter]!r}" + (", the answer" if letter == answer else "")
                for letter in LETTERS
                if letter in row and letter not in options and (row[letter] or letter == answer)
            ]
    raise_problems(problems)
    if hidden:
        logger.warning(
            "options that the reference reads as missing values are left out of the prompts: %s",
            "; ".join(hidden[:5]) + (f"; and {len(hidden) - 5} more" if len(hidden) > 5 else ""),
        )
    duplicate = next((item.id for item in distinct(items) if "#" in item.id), None)
    if duplicate:
        raise EvaluationError(f"{path} has the index {duplicate.partition('#')[0]} more than once")
    return distinct(items)


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # images are long fields
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    number = 0
    try:
        columns = list(reader.fieldnames or ())
        lacking = [name for name in _NEEDED if name not in columns]
        if lacking:
            raise EvaluationError(f"{path} has no column {', '.join(lacking)}: it is not a table of MMBench")
        for number, row in enumerate(reader, 1):
            where = f"{path}, row {number}"
            present = [name for name in columns if row[name] is not None]
            # Editors remove trailing tabs, so last fields may be missing. A row ending in its image may be truncated.
            if None in row or set(_NEEDED) - set(present) or (present != columns and present[-1] == "image"):
                raise EvaluationError(f"{where} does not have as many fields as the header: is the file truncated?")
            yield where, {name: row[name] or "" for name in columns}
    except csv.Error as error:
        raise EvaluationError(f"{path}, row {number + 1} is malformed ({error})") from None
    if not number:
        raise EvaluationError(f"{path} is empty")


def is_missing(text: str) -> bool:
    """Return whether pandas, with which the reference reads tables, treats the text as a missing value."""
    return text in MISSING


def _missing(text: str, codebase: Codebase) -> bool:
    return is_missing(text) or (codebase == "llava" and text.lower() in ("nan", "none"))


def _cells(row: Mapping[str, str], codebase: Codebase) -> dict[str, str]:
    options = {}
    for letter in LETTERS[:4] if codebase == "llava" else LETTERS:
        if not _missing(row.get(letter, ""), codebase):
            options[letter] = row[letter]
        elif codebase == "llava":
            break
    return options


def _decode_image(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise EvaluationError(f"{where}: the image is not base64") from None

"""Reading JSON and JSONL records, with errors that name the file and the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.items import EvaluationError
from internvl_jax.utils import files

MAX_LISTED = 10  # problems listed in an error


def read_text(path: Path) -> str:
    """Return the text of a file, without its byte order mark.

    Raises:
        OSError: The file cannot be read.
        EvaluationError: The file is not text.
    """
    try:
        return files.read_text(path)
    except files.TextError as error:
        raise EvaluationError(str(error)) from None


def records(path: Path, text: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Read the records of a JSONL file or a JSON list.

    A JSON object may contain the list as "questions", "annotations" or "data", or be a mapping of ids to records, to
    which the id is then added as "id".

    Args:
        path: The file.
        text: Its text, if it has been read already.

    Returns:
        Pairs of the record's location ("FILE:LINE" or "FILE, record N") and the record.

    Raises:
        EvaluationError: Lines are malformed (all are listed), or the file is empty.
    """
    text = read_text(path) if text is None else text
    whole = None
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            pass  # POPE's labels are JSON lines under that name
    if isinstance(whole, (list, dict)):
        rows = list(_entries(path, whole))
    else:
        rows = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found, problems = [], []
    for where, row in rows:
        try:
            record = json.loads(row) if isinstance(row, str) else row
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({error})")
            continue
        if isinstance(record, dict):
            found.append((where, record))
        else:
            problems.append(f"{where}: not a JSON object, but {type(record).__name__}")
    raise_problems(problems)
    if not found:
        raise EvaluationError(f"{path} is empty")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        EvaluationError: The file is not JSON, or contains something else.
    """
    try:
        whole = json.loads(read_text(path))
    except EvaluationError:
        raise
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is not JSON ({error})") from None
    if not isinstance(whole, dict):
        raise EvaluationError(f"{path} must contain an object, not {type(whole).__name__}")
    return whole


def _entries(path: Path, whole: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(whole, dict):
        inner = next((whole[name] for name in ("questions", "annotations", "data") if name in whole), None)
        if inner is None and all(isinstance(value, dict) for value in whole.values()):
            yield from ((f"{path}, {key!r}", {"id": key, **value}) for key, value in whole.items())
            return
        whole = [whole] if inner is None else inner
    if not isinstance(whole, list):
        raise EvaluationError(f"{path} must contain a list of records, not {type(whole).__name__}")
    for number, row in enumerate(whole, 1):
        if isinstance(row, str):  # which would be parsed as a line
            raise EvaluationError(f"{path}, record {number} is a string, not an object")
        yield f"{path}, record {number}", row


def need(record: Mapping[str, Any], where: str, *names: str, kind: type | tuple[type, ...] = str) -> Any:
    """Return the first of these fields that the record has.

    Args:
        record: The record.
        where: Its location, for error messages.
        *names: Names of fields.
        kind: Required type or types; bool does not count as int.

    Raises:
        EvaluationError: There is none, or it has another type.
    """
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        raise EvaluationError(f"{where} has no {' or '.join(map(repr, names))}")
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise EvaluationError(f"{where}: {name!r} must be {wanted}, not {record[name]!r:.80}")
    return record[name]


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Collect an EvaluationError of the block in `problems`, so that all errors are reported at once."""
    try:
        yield
    except EvaluationError as error:
        problems.append(str(error))


def raise_problems(problems: Sequence[str]) -> None:
    """Raise an EvaluationError that lists the problems, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        listed = (
            problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems[:MAX_LISTED])
        )
        raise EvaluationError(listed + more)


ID = (int, str)


SOURCE_IDS = ("question_id", "questionId", "id")


def image_field(record: Mapping[str, Any], where: str, *names: str) -> str | None:
    """Return the image path in the first of these fields that is not empty; EvaluationError if it is not a string."""
    name = next((name for name in names if record.get(name)), None)
    return None if name is None else need(record, where, name)


def accepted_answers(answers: Any, where: str) -> tuple[str, ...]:
    """Return accepted answers as strings; files may contain numbers, or records with an "answer"."""
    given = answers if isinstance(answers, list) else [answers]
    values = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    wrong = next((value for value in values if not _is_answer(value)), None) if values else "an empty list"
    if wrong is not None or None in values:
        raise EvaluationError(f"{where}: the answers must be strings, or records with an 'answer', not {wrong!r:.80}")
    return tuple(map(str, values))


def _is_answer(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)

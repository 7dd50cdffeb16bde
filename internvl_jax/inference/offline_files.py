"""The two files of a batch: questions, and the answers that there are. What is in them is checked before any work."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from internvl_jax.inference.sampling import GenerationConfig
from internvl_jax.parallel import distributed
from internvl_jax.processing.conversation import Turn, as_turn, expand_images, place_images
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

GENERATION = tuple(one.name for one in fields(GenerationConfig))
FIELDS = ("id", "question", "image", "images", "history", "system", *GENERATION)
_SHOWN = 20  # problems in one message


class BatchError(ValueError):
    """Files of questions or answers that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Question:
    """One line of the questions."""

    id: str | int
    question: str
    images: tuple[Path, ...]
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)  # settings of GenerationConfig, for this one only
    line: int = 1  # in its file, from 1
    where: str = ""  # FILE:LINE
    error: str | None = None  # why it cannot be asked


@dataclass(frozen=True)
class Found:
    """What a file of answers holds."""

    pending: list[int]  # questions without an answer
    models: list[str]  # that gave the answers
    content: bytes | None  # what must be in the file before answers are appended; None: what is in it
    state: tuple[int, int] | None  # of the file when it was read; None: there was none


def read_questions(path: Path, images: Path) -> list[Question]:
    """The lines of a questions file. Raises BatchError with every line that is wrong, as FILE:LINE.

    A question that no UTF-8 file can hold, with lone surrogates, is kept with its `error`.
    """
    rows: list[Question] = []
    problems: list[str] = []
    lines: dict[str | int, int] = {}
    ignored: dict[str, list[int]] = {}
    for number, line in _lines(path, "questions"):
        try:
            record = _object(line)
            row = _question(record, number, f"{path}:{number}", images)
            if row.id in lines:
                raise ValueError(f"the id {row.id!r} is that of line {lines[row.id]} too")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        for name in record.keys() - set(FIELDS):
            ignored.setdefault(name, []).append(number)
        lines[row.id] = number
        rows.append(row)
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BatchError("nothing was started:\n  " + "\n  ".join(problems[:_SHOWN]) + more)
    if not rows:
        raise BatchError(f"{path} has no questions")
    if ignored and distributed.is_process_0():
        named = (
            f"{name!r} (line {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})"
            for name, where in sorted(ignored.items())
        )
        logger.warning("%s: fields that are not read: %s", path, ", ".join(list(named)[:_SHOWN]))
    return rows


def _lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers, without byte order marks."""
    if path.is_dir():
        raise BatchError(f"{path} is a directory: name the file of {what}")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise BatchError(f"{path} is not a text file in UTF-8, but in UTF-16: save it as UTF-8")
            try:
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BatchError(f"{path}:{number}: not a text file in UTF-8 ({error}): save it as UTF-8") from None
            if line.strip():
                yield number, line


def _object(line: str | bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return record

    try:
        record = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object, but {type(record).__name__}")
    return record


def _question(record: dict[str, Any], number: int, where: str, images: Path) -> Question:
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"question" must be a text that is not empty')
    paths = _images(record, images)
    row_id = record.get("id", number)
    if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
        raise ValueError('"id" must be a text or a whole number')
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError('"system" must be a text')
    history = _history(record.get("history"))
    if not history:
        expand_images(place_images(text, len(paths), False), 1, len(paths))  # refuses what does not agree
    generation = {name: record[name] for name in GENERATION if record.get(name) is not None}
    if isinstance(generation.get("seed"), list):
        raise ValueError("seed must be a whole number")
    try:
        GenerationConfig(**generation)
    except TypeError as error:
        raise ValueError(f"the settings of the answer are not understood ({error})") from None
    stop = generation.get("stop", ())
    texts = (text, system or "", *sum(history, ()), *([stop] if isinstance(stop, str) else stop))
    reason = None
    if isinstance(row_id, str) and not _encodable(row_id):
        reason = "the id has a lone surrogate (half a character), which no UTF-8 file can hold: write it anew"
    elif not all(map(_encodable, texts)):
        reason = "the text has a lone surrogate (half a character), which no UTF-8 file can hold: write it anew"
    return Question(row_id, text, paths, history, system, generation, number, where, reason)


def _images(record: dict[str, Any], directory: Path) -> tuple[Path, ...]:
    given = [name for name in ("image", "images") if record.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise ValueError('"image" and "images" are both there: write one of them')
    value = record[given[0]] if given else []
    names = [value] if given == ["image"] and isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"{given[0]}" must be a {"path or a " if given[0] == "image" else ""}list of paths')
    paths = tuple(_image(directory, name) for name in names)
    missing = [str(path) for path in paths if not _is_file(path)]
    if missing:
        raise ValueError(f"no such image: {', '.join(missing)}")
    return paths


def _image(directory: Path, name: str) -> Path:
    path = directory / name
    return files.resolve(name) if name.startswith("~/") and not _is_file(path) else path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def _history(value: Any) -> tuple[Turn, ...]:
    turns = [] if value is None else value
    try:
        if not isinstance(turns, list):
            raise ValueError
        return tuple(as_turn(turn) for turn in turns)
    except ValueError:
        raise ValueError('"history" must be a list of pairs [question, answer]') from None


def _encodable(text: Any) -> bool:
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


# Answers.


def read_answers(out: Path, rows: Sequence[Question]) -> Found:
    """What `out` holds, which need not exist. Questions with an error in place of an answer are pending.

    Nothing is written: `Found.content` is what has to be there, without those errors and without a last line that a
    killed run left half-written.
    Raises BatchError for a file that holds anything else.
    """
    if out.is_dir():
        raise BatchError(f"{out} is a directory: name a file for the answers")
    if out.exists() and not out.is_file():
        raise BatchError(f"{out} is not a file: answers are read again by the next run")
    if not out.exists():
        return Found(list(range(len(rows))), [], None, None)
    state = file_state(out)
    numbers = {row.id: number for number, row in enumerate(rows)}
    answered: set[int] = set()
    models: set[str] = set()
    kept: list[bytes] = []
    changed = False
    with open(out, "rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = _answer(raw)
                row = answered_row(record, numbers, rows)
            except ValueError as error:
                if not raw.endswith(b"\n") and _is_begun(raw, rows, bool(kept)):
                    logger.warning("%s:%d: the last line was not finished: its question is asked again", out, number)
                    changed = True
                    break
                raise BatchError(f"{out}:{number}: {error}: nothing was changed there; use another file") from None
            if "error" in record:
                changed = True
                continue
            changed = changed or not raw.endswith(b"\n")
            kept.append(raw if raw.endswith(b"\n") else raw + b"\n")
            answered.add(row)
            models.add(str(record.get("model", "")))
    pending = [number for number in range(len(rows)) if number not in answered]
    return Found(pending, sorted(models), b"".join(kept) if changed else None, state)


def answered_row(record: Mapping[str, Any], numbers: Mapping[Any, int], rows: Sequence[Question]) -> int:
    """The number of the question that a line of answers belongs to. Raises ValueError where there is none."""
    row_id = record.get("id")
    number = numbers.get(row_id) if isinstance(row_id, (str, int)) and not isinstance(row_id, bool) else None
    if number is None or rows[number].question != record.get("question"):
        raise ValueError(f"answers no question of this file (id {row_id!r})")
    if not isinstance(record.get("answer"), str) and not isinstance(record.get("error"), str):
        raise ValueError(f"is no answer (id {row_id!r})")
    return number


def in_order(out: Path, rows: Sequence[Question]) -> bytes | None:
    """The content of `out` in the order of the questions; None where it is in order."""
    numbers = {row.id: number for number, row in enumerate(rows)}
    lines = [raw for raw in out.read_bytes().splitlines(keepends=True) if raw.strip()]
    order = [answered_row(_answer(raw), numbers, rows) for raw in lines]
    if order == sorted(order):
        return None
    return b"".join(lines[place] for place in sorted(range(len(lines)), key=order.__getitem__))


def file_state(path: Path) -> tuple[int, int] | None:
    """By which a change of a file is noticed; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _answer(raw: bytes) -> dict[str, Any]:
    try:
        return _object(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None


def _is_begun(raw: bytes, rows: Sequence[Question], ours: bool) -> bool:
    """Whether a last line is the beginning of an answer to one of the questions. ours: other lines are answers."""
    if len(raw) < len('{"id": ') and not ours:
        return False
    for row in rows:
        head = files.to_json({"id": row.id, "question": row.question})[:-1].encode() + b", "
        if head.startswith(raw) or raw.startswith(head):
            return True
    return False

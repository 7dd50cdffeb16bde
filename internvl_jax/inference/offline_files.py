"""The files of a batch job: questions, and answers of earlier runs. Both are validated before any work."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.parallel import distributed
from internvl_jax.processing.conversation import Turn, as_turn, expand_images, place_images
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

GENERATION = tuple(one.name for one in fields(GenerationConfig))
FIELDS = ("id", "question", "image", "images", "history", "system", *GENERATION)
MAX_PROBLEMS = 20  # listed in one message


class BatchError(ValueError):
    """A file of questions or answers cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Question:
    """One line of the questions.

    Attributes:
        id: unique in its file.
        question: the text.
        images: files of the whole conversation's images, those of the history first.
        history: earlier (question, answer) turns.
        system: system message; None: the run's.
        generation: fields of GenerationConfig for this question.
        line: line number, from 1.
        where: FILE:LINE.
        error: why the question cannot be asked; None if it can.
    """

    id: str | int
    question: str
    images: tuple[Path, ...]
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    line: int = 1
    where: str = ""
    error: str | None = None


@dataclass(frozen=True)
class PreviousAnswers:
    """What an output file holds when a run starts.

    Attributes:
        pending: indices of the questions without an answer.
        models: names of the models that gave the answers.
        content: what the file must hold before answers are appended; None: what it holds.
        version: `file_version` of the file; None: there is no file.
    """

    pending: list[int]
    models: list[str]
    content: bytes | None = None
    version: tuple[int, int] | None = None


def read_questions(path: Path, root: Path) -> list[Question]:
    """Read a JSONL file of questions.

    A question with lone surrogates, which no UTF-8 file can hold, is returned with its `error`.

    Args:
        path: the file.
        root: directory that relative image paths start from.

    Raises:
        BatchError: lines are malformed; the message lists them as FILE:LINE.
    """
    questions: list[Question] = []
    problems: list[str] = []
    lines: dict[str | int, int] = {}
    ignored: dict[str, list[int]] = {}
    for number, line in _lines(path):
        try:
            record = _parse_object(line)
            question = _parse_question(record, number, f"{path}:{number}", root)
            if question.id in lines:
                raise ValueError(f"id {question.id!r} is already used on line {lines[question.id]}")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        for name in record.keys() - set(FIELDS):
            ignored.setdefault(name, []).append(number)
        lines[question.id] = number
        questions.append(question)
    if problems:
        raise BatchError(list_problems(problems))
    if not questions:
        raise BatchError(f"{path} has no questions")
    if ignored and distributed.is_process_0():
        named = [
            f"{name!r} (line {where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})"
            for name, where in sorted(ignored.items())
        ]
        logger.warning("%s: ignored fields: %s", path, ", ".join(named[:MAX_PROBLEMS]))
    return questions


def list_problems(problems: Sequence[str]) -> str:
    """A message that lists the first problems and counts the others."""
    more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    return "nothing was started:\n  " + "\n  ".join(problems[:MAX_PROBLEMS]) + more


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines with their numbers, without byte order marks."""
    if path.is_dir():
        raise BatchError(f"{path} is a directory: name the file of questions")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise BatchError(f"{path} is UTF-16, not UTF-8: save it as UTF-8")
            try:
                line = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BatchError(f"{path}:{number}: not UTF-8 ({error}): save it as UTF-8") from None
            if line.strip():
                yield number, line


def _parse_object(line: str | bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
        return record

    try:
        record = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("not readable as JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object, but {type(record).__name__}")
    return record


def _parse_question(record: dict[str, Any], number: int, where: str, root: Path) -> Question:
    text = record.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"question" must be a non-empty string')
    paths = _parse_images(record, root)
    question_id = record.get("id", number)
    if not isinstance(question_id, (str, int)) or isinstance(question_id, bool):
        raise ValueError('"id" must be a string or an integer')
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError('"system" must be a string')
    history = _parse_history(record.get("history"))
    if not history:
        expand_images(place_images(text, len(paths), False), 1, len(paths))  # raises if placeholders and images differ
    generation = {name: record[name] for name in GENERATION if record.get(name) is not None}
    if isinstance(generation.get("seed"), list):
        raise ValueError("seed must be an integer")
    try:
        GenerationConfig(**generation)
    except TypeError as error:
        raise ValueError(f"a generation setting has the wrong type ({error})") from None
    stop = generation.get("stop", ())
    texts = (text, system or "", *sum(history, ()), *([stop] if isinstance(stop, str) else stop))
    surrogate = None
    if isinstance(question_id, str) and not _is_encodable(question_id):
        surrogate = "id"
    elif not all(map(_is_encodable, texts)):
        surrogate = "text"
    reason = surrogate and f"the {surrogate} has a lone surrogate (half a character), which UTF-8 cannot encode"
    return Question(question_id, text, paths, history, system, generation, number, where, reason)


def _parse_images(record: dict[str, Any], root: Path) -> tuple[Path, ...]:
    given = [name for name in ("image", "images") if record.get(name) not in (None, "", [])]
    if len(given) > 1:
        raise ValueError('there are both "image" and "images": leave one out')
    value = record[given[0]] if given else []
    names = [value] if given == ["image"] and isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'"{given[0]}" must be a {"path or a " if given[0] == "image" else ""}list of paths')
    paths = tuple(_image_path(root, name) for name in names)
    missing = [str(path) for path in paths if not _is_file(path)]
    if missing:
        raise ValueError(f"no such image: {', '.join(missing)}")
    return paths


def _image_path(root: Path, name: str) -> Path:
    path = root / name
    return files.resolve(name) if name.startswith("~/") and not _is_file(path) else path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long or contains a NUL
        return False


def _parse_history(value: Any) -> tuple[Turn, ...]:
    turns = [] if value is None else value
    try:
        if not isinstance(turns, list):
            raise ValueError
        return tuple(as_turn(turn) for turn in turns)
    except ValueError:
        raise ValueError('"history" must be a list of pairs [question, answer]') from None


def _is_encodable(text: Any) -> bool:
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


# Answers.


def read_answers(output: Path, questions: Sequence[Question]) -> PreviousAnswers:
    """Read an output file, which need not exist. Nothing is written.

    Questions whose line has an error are pending. `PreviousAnswers.content` leaves out these lines, and an incomplete
    last line of a killed run.

    Raises:
        BatchError: the file holds anything but answers to these questions.
    """
    if output.is_dir():
        raise BatchError(f"{output} is a directory: name a file for the answers")
    if output.exists() and not output.is_file():
        raise BatchError(f"{output} is not a regular file: the next run reads the answers again")
    if not output.exists():
        return PreviousAnswers(list(range(len(questions))), [])
    version = file_version(output)
    indices = {question.id: index for index, question in enumerate(questions)}
    answered: set[int] = set()
    models: set[str] = set()
    kept: list[bytes] = []
    changed = False
    with open(output, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = _parse_answer(line)
                index = question_index(record, indices, questions)
            except ValueError as error:
                if not line.endswith(b"\n") and _is_truncated_answer(line, questions, bool(kept)):
                    logger.warning("%s:%d: the last line is incomplete: its question is asked again", output, number)
                    changed = True
                    break
                raise BatchError(f"{output}:{number}: {error}: nothing was changed there; name another file") from None
            if "error" in record:
                changed = True
                continue
            changed = changed or not line.endswith(b"\n")
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            answered.add(index)
            models.add(str(record.get("model", "")))
    pending = [index for index in range(len(questions)) if index not in answered]
    return PreviousAnswers(pending, sorted(models), b"".join(kept) if changed else None, version)


def question_index(record: Mapping[str, Any], indices: Mapping[Any, int], questions: Sequence[Question]) -> int:
    """The index of the question that a line of output answers.

    Args:
        record: the line.
        indices: the index of each question by its id.
        questions: the questions.

    Raises:
        ValueError: there is no such question, or the line has neither answer nor error.
    """
    key = record.get("id")
    index = indices.get(key) if isinstance(key, (str, int)) and not isinstance(key, bool) else None
    if index is None or questions[index].question != record.get("question"):
        raise ValueError(f"answers no question of this file (id {key!r})")
    if not isinstance(record.get("answer"), str) and not isinstance(record.get("error"), str):
        raise ValueError(f"has neither answer nor error (id {key!r})")
    return index


def sorted_answers(output: Path, questions: Sequence[Question]) -> bytes | None:
    """The content of an output file in the order of the questions; None if it is in that order."""
    indices = {question.id: index for index, question in enumerate(questions)}
    lines = [line for line in output.read_bytes().splitlines(keepends=True) if line.strip()]
    order = [question_index(_parse_answer(line), indices, questions) for line in lines]
    if order == sorted(order):
        return None
    return b"".join(lines[position] for position in sorted(range(len(lines)), key=order.__getitem__))


def file_version(path: Path) -> tuple[int, int] | None:
    """Size and modification time of a file, which change when it is written; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _parse_answer(line: bytes) -> dict[str, Any]:
    try:
        return _parse_object(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None


def _is_truncated_answer(line: bytes, questions: Sequence[Question], has_answers: bool) -> bool:
    """Whether a last line is the beginning of an answer to one of the questions.

    has_answers: whether other lines of the file are answers, so that the file is known to be an output.
    """
    if len(line) < len('{"id": ') and not has_answers:
        return False
    for question in questions:
        head = files.to_json({"id": question.id, "question": question.question})[:-1].encode() + b", "
        if head.startswith(line) or line.startswith(head):
            return True
    return False

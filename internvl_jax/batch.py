"""Questions from a JSONL file, answers into another: resumable, and shared out among the processes of a pod.

A question is a line {"question": "...", "images": ["a.jpg"], "id": 7}; images and id may be left out (the id is then
the line's number), other fields are ignored. An answer is a line with the same id, in the order of the questions.

The mesh decides how processes share the work. One that a process's own devices can hold is made on every process: each
has a whole model and answers its own share of every round. A larger one spans all processes, which then compute every
answer together. Either way process 0 writes the one file of answers, round by round: no other process needs to see it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from internvl_jax import distributed, sharding
from internvl_jax.chat import Chat
from internvl_jax.processing.conversation import expand_images, place_images

Progress = Callable[[int, int, str], None]

SIZE = 8  # questions per batch


class BatchError(ValueError):
    """Files of questions or answers that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Question:
    """One line of the questions."""

    id: str | int
    question: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Work:
    """What is to be done, the same on every process."""

    questions: Sequence[Question]
    pending: Sequence[int]  # those without an answer, in order
    out: Path
    mesh: Mesh | None
    replicas: int  # models: one per process, or one over all
    models: frozenset[str]  # that gave the answers found


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    answered: int
    found: int  # answers that were there already
    failed: int  # of the answered ones: lines with an error in place of an answer
    new_tokens: int
    seconds: float


def prepare(questions: Path, out: Path, mesh: str | None = None, *, images: Path | None = None) -> Work:
    """Read the questions and the answers that there are. Nothing is loaded or written, but for an unfinished last line
    of `out`, which is removed.

    mesh: as sharding.make_mesh reads it, "tensor=4"; None: one device per process.
    images: where relative image paths start; None: at the questions' own directory.
    Raises BatchError for malformed lines, all listed, and for answers to other questions; MeshError for a mesh that
    neither one process nor all of them together can hold. All processes must call it.
    """
    with distributed.all_or_none():
        devices, replicas = _devices(mesh)
        rows = read_questions(questions, images or questions.parent)
    with distributed.all_or_none():
        digests = distributed.exchange(hashlib.sha256(repr([(row.id, row.question) for row in rows]).encode()).digest())
        if len(set(digests)) > 1:
            raise BatchError(f"{questions} differs between the processes: copy the same file to every host")
    found: dict[str, Any] = {}
    with distributed.all_or_none():
        if distributed.is_first():
            found = _found(out, rows)
    found = json.loads(distributed.from_first(json.dumps(found).encode()))
    made = None if mesh is None else sharding.make_mesh(mesh, devices)
    return Work(rows, found["pending"], out, made, replicas, frozenset(found["models"]))


def run(chat: Chat, work: Work, *, size: int = SIZE, progress: Progress | None = None, **generation: Any) -> Summary:
    """Answer what is pending, `size` questions at once on every model, and append the answers to `work.out`.

    A question that cannot be answered (an image that does not decode, a prompt beyond the context) gets a line with
    "error" in place of "answer". generation: settings of GenerationConfig, as for Chat.chat.
    progress: called as progress(done, total, "answering") with numbers of questions.
    Raises BatchError where `work.out` has answers of another model. All processes must call it.
    """
    others = work.models - {chat.name}
    if others:
        raise BatchError(f"{work.out} has answers of {', '.join(sorted(others))}, not {chat.name}: use another file")
    if size < 1:
        raise BatchError(f"a batch has at least one question, not {size}")
    start = time.perf_counter()
    place = jax.process_index() if work.replicas > 1 else 0
    done, failed, tokens = len(work.questions) - len(work.pending), 0, 0
    for first in range(0, len(work.pending), size * work.replicas):
        mine = work.pending[first + place * size : first + (place + 1) * size]
        with distributed.all_or_none():
            answers = _answer(chat, [work.questions[number] for number in mine], size, generation)
        if work.replicas > 1:
            parts = distributed.exchange(json.dumps(answers).encode())
            answers = [answer for part in parts for answer in json.loads(part)]
        with distributed.all_or_none():
            if distributed.is_first():
                _append(work.out, answers)
        done += len(answers)
        failed += sum("error" in answer for answer in answers)
        tokens += sum(answer.get("new_tokens", 0) for answer in answers)
        if progress is not None:
            progress(done, len(work.questions), "answering")
    found = len(work.questions) - len(work.pending)
    return Summary(len(work.pending), found, failed, tokens, time.perf_counter() - start)


def read_questions(path: Path, images: Path) -> list[Question]:
    """The lines of a questions file. Raises BatchError with every line that is wrong, as FILE:LINE."""
    rows: list[Question] = []
    problems: list[str] = []
    lines: dict[str | int, int] = {}
    for number, line in _lines(path):
        try:
            row = _question(line, number, images)
            if row.id in lines:
                raise ValueError(f"the id {row.id!r} is that of line {lines[row.id]} too")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        lines[row.id] = number
        rows.append(row)
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise BatchError("nothing was started:\n  " + "\n  ".join(problems[:20]) + more)
    if not rows:
        raise BatchError(f"{path} has no questions")
    return rows


def _devices(mesh: str | None) -> tuple[list[jax.Device], int]:
    """The devices that one model may use, and how many models there are."""
    own, everywhere = jax.local_devices(), jax.devices()
    needed = 1 if mesh is None else math.prod(sharding.parse_mesh(mesh).values())
    if needed <= len(own):  # with -1 too: the rest of this process's devices
        return own, jax.process_count()
    if needed != len(everywhere):
        choices = f"at most {len(own)} (a model on every process) or all {len(everywhere)}"
        raise sharding.MeshError(
            f"the mesh {mesh} needs {needed} devices: use {choices if len(everywhere) > len(own) else f'{len(own)}'}"
        )
    return everywhere, 1


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise BatchError(f"{path} is not a text file in UTF-8 ({error})") from None


def _question(line: str, number: int, images: Path) -> Question:
    fields = _object(line)
    text = fields.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"question" must be a text that is not empty')
    if "image" in fields:
        raise ValueError('"image" is not read: write "images": ["..."]')
    names = fields.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('"images" must be a list of paths')
    paths = tuple(images / name for name in names)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"no such image: {', '.join(missing)}")
    row_id = fields.get("id", number)
    if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
        raise ValueError('"id" must be a text or a whole number')
    expand_images(place_images(text, len(paths), False), 1, len(paths))  # refuses what does not agree
    return Question(row_id, text, paths)


def _object(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object, but {type(fields).__name__}")
    return fields


def _found(out: Path, rows: Sequence[Question]) -> dict[str, Any]:
    """Questions without an answer in `out`, and the models that gave the answers."""
    if out.is_dir():
        raise BatchError(f"{out} is a directory: name a file for the answers")
    out.parent.mkdir(parents=True, exist_ok=True)
    _drop_unfinished(out)
    questions = {row.id: row.question for row in rows}
    answered, models = set(), set()
    for number, line in _lines(out):
        try:
            fields = _object(line)
            if questions.get(fields.get("id")) != fields.get("question"):
                raise ValueError(f"answers no question of this file (id {fields.get('id')!r}): use another file")
        except (ValueError, TypeError) as error:
            raise BatchError(f"{out}:{number}: {error}") from None
        answered.add(fields["id"])
        models.add(fields.get("model", ""))
    return {"pending": [i for i, row in enumerate(rows) if row.id not in answered], "models": sorted(models)}


def _drop_unfinished(out: Path) -> None:
    """Cut a last line that a killed run left half-written. Makes the file where there is none."""
    with open(out, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        size = end
        while size > 0:
            step = min(size, 1 << 16)
            file.seek(size - step)
            position = file.read(step).rfind(b"\n")
            if position >= 0:
                size += position + 1 - step
                break
            size -= step
        if size < end:
            file.truncate(size)


def _append(out: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    with open(out, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # an answer that is reported is on disk


def _answer(chat: Chat, rows: Sequence[Question], size: int, generation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers to at most `size` questions. A shorter batch is filled up, so that it does not compile again."""
    if not rows:
        return []
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    try:
        replies = chat.batch_chat([row.question for row in filled], [list(row.images) for row in filled], **generation)
    except ValueError as error:
        if len(rows) > 1:
            return [answer for row in rows for answer in _answer(chat, [row], size, generation)]
        return [{"id": rows[0].id, "question": rows[0].question, "error": str(error), "model": chat.name}]
    return [
        {
            "id": row.id,
            "question": row.question,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": len(reply.tokens),
            "model": chat.name,
        }
        for row, reply in zip(rows, replies)
    ]

"""Questions from a JSONL file, answers into another: resumable, and shared out among the processes of a pod.

A question is a line {"question": "...", "images": ["a.jpg"], "id": 7}; images (or "image") and id may be left out (the
id is then the line's number). It may bring a "history" of [question, answer] pairs, a "system" message, and settings of
GenerationConfig ("max_new_tokens", "temperature", ...) of its own; fields that are not read are named. An answer is a
line with the same id. A question that could not be answered gets a line with "error" in place of "answer", and the next
run asks it again. When a run ends, the lines are in the order of the questions; a file that a stopped run left has the
answers to questions that were asked again at its end.

The mesh decides how processes share the work. One that a process's own devices can hold is made on every process: each
has a whole model and answers its own share of every round. A larger one spans all processes, which then compute every
answer together. Either way process 0 writes the one file of answers, round by round: no other process needs to see it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from internvl_jax.inference.chat import Chat, Reply
from internvl_jax.inference.offline_files import (
    GENERATION,
    BatchError,
    Question,
    file_state,
    in_order,
    read_answers,
    read_questions,
)
from internvl_jax.inference.sampling import SAMPLING, GenerationConfig
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.utils import files

__all__ = ["BatchError", "Question", "Summary", "Work", "opened", "prepare", "read_questions", "run"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

SIZE = 8  # questions per batch
_TOLD = 20  # errors that are told one by one; all of them are in the file of answers


@dataclass(frozen=True)
class Work:
    """What is to be done, the same on every process."""

    questions: Sequence[Question]
    pending: Sequence[int]  # those without an answer, in order
    out: Path
    mesh: Mesh | None
    replicas: int  # models: one per process, or one over all
    models: frozenset[str]  # that gave the answers found
    content: bytes | None = None  # of `out`, before answers are appended; None: what is there (process 0 only)
    state: tuple[int, int] | None = None  # of `out` when it was read (process 0 only)
    claimed: bool = False  # whether the caller holds the claim of `out`
    ordered: bool = True  # whether the answers are to be put in the order of the questions at the end


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    answered: int
    found: int  # answers that were there already
    failed: int  # of the answered ones: lines with an error in place of an answer
    new_tokens: int
    seconds: float


@contextmanager
def opened(questions: Path, out: Path, mesh: str | None = None, *, images: Path | None = None) -> Iterator[Work]:
    """As `prepare`, and `out` belongs to this run until the block ends.

    Raises files.OutputInUseError where another run writes it, naming that run.
    """
    rows, devices, replicas = _asked(questions, mesh, images)
    out = _target(out)
    with _claimed(out):
        yield replace(_work(rows, questions, out, mesh, devices, replicas), claimed=True)


def prepare(questions: Path, out: Path, mesh: str | None = None, *, images: Path | None = None) -> Work:
    """Read the questions and the answers that there are. Nothing is loaded or written.

    mesh: as mesh.make_mesh reads it, "tensor=4"; None: one device per process.
    images: where relative image paths start; None: at the questions' own directory.
    Raises BatchError for malformed lines, all listed, and for a file `out` that holds anything but answers to these
    questions; MeshError for a mesh that neither one process nor all of them together can hold. All processes must call
    it.
    """
    rows, devices, replicas = _asked(questions, mesh, images)
    return _work(rows, questions, _target(out), mesh, devices, replicas)


def run(chat: Chat, work: Work, *, size: int = SIZE, progress: Progress | None = None, **generation: Any) -> Summary:
    """Answer what is pending, `size` questions at once on every model, and append the answers to `work.out`.

    A question that cannot be answered (an image that does not decode, a prompt beyond the context) gets a line with
    "error" in place of "answer". An error of the machine (a full disk, a device without memory) ends the run.
    generation: settings of GenerationConfig, as for Chat.chat; a question's own come first. Sampled, the question on
    line n gets the answer that it gets alone with seed + n - 1, in whatever batch it is.
    progress: called as progress(done, total, "answering") with numbers of questions.
    Raises BatchError where `work.out` has answers of another model or has changed since `prepare`, and
    files.OutputInUseError where another run writes it. All processes must call it.
    """
    others = work.models - {chat.name}
    if others:
        raise BatchError(f"{work.out} has answers of {', '.join(sorted(others))}, not {chat.name}: use another file")
    if size < 1:
        raise BatchError(f"a batch has at least one question, not {size}")
    _check_generation(work, generation)
    start = time.perf_counter()
    place = jax.process_index() if work.replicas > 1 else 0
    done, failed, tokens = len(work.questions) - len(work.pending), 0, 0
    # Where one model spans the processes, what fails on one of them alone cannot be a question's error.
    mine_alone = work.replicas > 1 or not distributed.is_multi_process()
    with ExitStack() as held:
        if not work.claimed:
            held.enter_context(_claimed(work.out))
        with distributed.barrier():
            if distributed.is_process_0():
                _begin(work)
        for first in range(0, len(work.pending), size * work.replicas):
            mine = work.pending[first + place * size : first + (place + 1) * size]
            with distributed.barrier():
                answers = _answer(chat, [work.questions[number] for number in mine], size, generation, mine_alone)
            if work.replicas > 1:
                parts = distributed.all_gather(json.dumps(answers).encode())
                answers = [answer for part in parts for answer in json.loads(part)]
            with distributed.barrier():
                if distributed.is_process_0():
                    _append(work.out, answers)
            done += len(answers)
            for answer in answers:
                failed += "error" in answer
                if "error" in answer and failed <= _TOLD and distributed.is_process_0():
                    logger.warning("%s", answer["error"])
            tokens += sum(answer.get("new_tokens", 0) for answer in answers)
            if progress is not None:
                progress(done, len(work.questions), "answering")
        with distributed.barrier():
            if (
                distributed.is_process_0()
                and work.ordered
                and (content := in_order(work.out, work.questions)) is not None
            ):
                files.write_bytes(work.out, content)
    if failed > _TOLD and distributed.is_process_0():
        logger.warning("%d more errors are in %s", failed - _TOLD, work.out)
    found = len(work.questions) - len(work.pending)
    return Summary(len(work.pending), found, failed, tokens, time.perf_counter() - start)


def _asked(questions: Path, mesh: str | None, images: Path | None) -> tuple[list[Question], list[jax.Device], int]:
    questions = files.resolve(questions)
    with distributed.barrier():
        devices, replicas = _devices(mesh)
        rows = read_questions(questions, questions.parent if images is None else files.resolve(images))
    with distributed.barrier():
        asked = repr([(row.id, row.question, row.history, row.system, dict(row.generation)) for row in rows])
        if len(set(distributed.all_gather(hashlib.sha256(asked.encode()).digest()))) > 1:
            raise BatchError(f"{questions} differs between the processes: copy the same file to every host")
    return rows, devices, replicas


def _work(
    rows: Sequence[Question],
    questions: Path,
    out: Path,
    mesh: str | None,
    devices: Sequence[jax.Device],
    replicas: int,
) -> Work:
    known: dict[str, Any] = {}
    content = state = None
    with distributed.barrier():
        if distributed.is_process_0():
            if out.exists() and questions.exists() and out.samefile(questions):
                raise BatchError(f"{out} is the file of questions: name another one for the answers")
            found = read_answers(out, rows)
            known = {"pending": found.pending, "models": found.models}
            content, state = found.content, found.state
    known = json.loads(distributed.broadcast_from_process_0(json.dumps(known).encode()))
    made = None if mesh is None else mesh_lib.make_mesh(mesh, devices)
    return Work(rows, known["pending"], out, made, replicas, frozenset(known["models"]), content, state)


def _target(out: Path) -> Path:
    """The file itself, where a symbolic link is named: it is replaced, the link is not."""
    return Path(os.path.realpath(files.resolve(out)))


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    with ExitStack() as held:
        with distributed.barrier():
            if distributed.is_process_0():
                held.enter_context(files.claim(out))
                files.remove_leftovers(out)
        yield


def _begin(work: Work) -> None:
    """Make the file of answers, or take from it what is not an answer."""
    if file_state(work.out) != work.state:
        raise BatchError(f"{work.out} has changed since it was read: another run has written it; start again")
    if work.content is not None:
        files.write_bytes(work.out, work.content)
    else:
        files.append_text(work.out, "")


def _append(out: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    files.append_text(out, "".join(files.to_json(answer) + "\n" for answer in answers))


def _check_generation(work: Work, generation: Mapping[str, Any]) -> None:
    """Refuse settings of the run that do not go with those of a question, before any is asked."""
    common = {name: value for name, value in generation.items() if name in GENERATION and value is not None}
    GenerationConfig(**common)
    problems, idle = [], []
    for number in work.pending:
        row = work.questions[number]
        if not row.generation:
            continue
        try:
            made = GenerationConfig(**{**common, **row.generation})
        except ValueError as error:
            problems.append(f"{row.where}: {error}")
            continue
        if made.temperature == 0 and row.generation.keys() & set(SAMPLING):
            idle.append(row)
    if idle and distributed.is_process_0():
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        logger.warning(
            "%s%s: %s are without effect, because nothing is sampled at temperature 0",
            idle[0].where,
            more,
            ", ".join(SAMPLING),
        )
    if problems:
        more = f"\n  and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise BatchError("nothing was started:\n  " + "\n  ".join(problems[:_TOLD]) + more)


def _devices(mesh: str | None) -> tuple[list[jax.Device], int]:
    """The devices that one model may use, and how many models there are."""
    own, everywhere = jax.local_devices(), jax.devices()
    needed = 1 if mesh is None else math.prod(mesh_lib.parse_mesh(mesh).values())
    if needed <= len(own):  # with -1 too: the rest of this process's devices
        return own, jax.process_count()
    if needed != len(everywhere):
        choices = f"at most {len(own)} (a model on every process) or all {len(everywhere)}"
        raise mesh_lib.MeshError(
            f"the mesh {mesh} needs {needed} devices: use {choices if len(everywhere) > len(own) else f'{len(own)}'}"
        )
    return everywhere, 1


def _answer(
    chat: Chat, rows: Sequence[Question], size: int, generation: Mapping[str, Any], alone: bool
) -> list[dict[str, Any]]:
    """Answers to at most `size` questions, those with the same settings at once."""
    together: dict[str, list[int]] = {}
    answers: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if row.error is not None:
            answers[number] = _failed(row, row.error, chat.name)
            continue
        own = {name: value for name, value in row.generation.items() if name != "seed"}
        together.setdefault(json.dumps([row.system, own], sort_keys=True), []).append(number)
    for numbers in together.values():
        answers.update(zip(numbers, _ask(chat, [rows[n] for n in numbers], size, generation, alone)))
    return [answers[number] for number in range(len(rows))]


def _ask(
    chat: Chat, rows: Sequence[Question], size: int, generation: Mapping[str, Any], alone: bool
) -> list[dict[str, Any]]:
    """Answers to questions of the same settings. A shorter batch is filled up, so that it does not compile again."""
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    options = {**generation, **rows[0].generation}
    if rows[0].system is not None:
        options["system"] = rows[0].system
    seed = generation.get("seed", 0)
    options.pop("seed", None)
    if options.get("temperature") and not isinstance(seed, (tuple, list)):
        options["seed"] = tuple(row.generation.get("seed", (seed or 0) + row.line - 1) % 2**31 for row in filled)
    elif "seed" in generation:
        options["seed"] = seed
    if any(row.history for row in rows):
        options["histories"] = [row.history for row in filled]
    try:
        replies = chat.batch_chat([row.question for row in filled], [list(row.images) for row in filled], **options)
    except Exception as error:
        if _of_the_machine(error) or not (alone or isinstance(error, ValueError)):
            raise
        if len(rows) > 1:
            return [answer for row in rows for answer in _ask(chat, [row], size, generation, alone)]
        return [_failed(rows[0], _reason(error), chat.name)]
    return [_answered(row, reply, chat.name) for row, reply in zip(rows, replies)]


def _answered(row: Question, reply: Reply, model: str) -> dict[str, Any]:
    error = getattr(reply, "error", None)
    if error is not None:
        return _failed(row, error, model)
    return {
        "id": row.id,
        "question": row.question,
        "answer": reply.text,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "new_tokens": len(reply.tokens),
        "model": model,
    }


def _failed(row: Question, reason: str, model: str) -> dict[str, Any]:
    return {"id": row.id, "question": row.question, "error": f"{row.where}: {reason}", "model": model}


def _reason(error: Exception) -> str:
    """What a question's line says about an error of its own."""
    if isinstance(error, MemoryError):
        return "takes more memory than there is"
    if isinstance(error, ValueError):
        return re.sub(r"^(question 1|row 0): ", "", str(error))  # of a batch filled up with this one
    return f"{type(error).__name__}: {error}"


def _of_the_machine(error: Exception) -> bool:
    """Whether the next question would meet this error too: no memory on the device, a full disk, a missing package."""
    if isinstance(error, OSError):
        return files.is_full(error) or error.errno in (errno.EROFS, errno.EMFILE, errno.ENFILE)
    return isinstance(error, (jax.errors.JaxRuntimeError, ImportError)) or "RESOURCE_EXHAUSTED" in str(error)

"""Batch inference over a JSONL file: resumable, and shared among the processes of a pod.

A question is a line {"question": "...", "images": ["a.jpg"], "id": 7}. "images" (or "image") and "id" are optional; the
default id is the line number. "history" ([question, answer] pairs), "system" and settings of GenerationConfig
("max_new_tokens", "temperature", ...) apply to their own line only. Each question gets one line of output with the same
id, which has "error" instead of "answer" if the question failed; the next run retries those. When a run ends, the lines
are in the order of the questions.

The mesh decides how processes share the work. If it fits on the devices of one process, every process runs a replica of
the model and answers its share of every round. Otherwise one model spans all processes, which compute every answer
together. In both cases process 0 writes the output, round by round; other processes need not see that file.
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
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from internvl_jax.inference.generation.sampling import SAMPLING, GenerationConfig
from internvl_jax.inference.offline_files import (
    GENERATION,
    BatchError,
    PreviousAnswers,
    Question,
    file_version,
    list_problems,
    read_answers,
    read_questions,
    sorted_answers,
)
from internvl_jax.inference.replies import Reply
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.utils import files

__all__ = ["BatchError", "BatchJob", "Question", "Summary", "claim", "prepare", "read_questions", "run"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

BATCH_SIZE = 8  # questions per batch and replica
MAX_LOGGED_ERRORS = 20  # all errors are in the output


class Answerer(Protocol):
    """What `run` needs of a Chat."""

    name: str

    def batch_chat(self, questions: Sequence[str], images: Sequence[Sequence[Path]], **options: Any) -> list[Reply]:
        """Answer a batch of questions, as `Chat.batch_chat` does."""


@dataclass(frozen=True)
class BatchJob:
    """Questions, and which of them need an answer; the same on every process.

    Attributes:
        questions: all questions.
        pending: indices of the questions without an answer, in the order in which they are asked.
        output: the file of answers.
        mesh: the mesh of one model; None: one device per process.
        replicas: number of models: one per process, or 1 if one model spans all processes.
        previous: what `output` holds; on process 0 only.
        models: names of the models that gave the answers in `output`.
        claimed: whether the caller has claimed `output`.
        sort_output: whether `run` sorts the answers by question at the end.
    """

    questions: Sequence[Question]
    pending: Sequence[int]
    output: Path
    mesh: Mesh | None = None
    replicas: int = 1
    previous: PreviousAnswers | None = None
    models: frozenset[str] = frozenset()
    claimed: bool = False
    sort_output: bool = True

    @property
    def num_answered(self) -> int:
        """Number of questions that had an answer before the run."""
        return len(self.questions) - len(self.pending)

    def own_batches(self, batch_size: int) -> list[list[Question]]:
        """The questions that this process asks in each round. The last batch may be shorter, or empty."""
        replica = jax.process_index() if self.replicas > 1 else 0
        rounds = range(0, len(self.pending), batch_size * self.replicas)
        starts = (first + replica * batch_size for first in rounds)
        return [[self.questions[index] for index in self.pending[start : start + batch_size]] for start in starts]


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        answered: questions asked by this run, failed ones included.
        resumed: questions that had been answered before.
        failed: questions that failed.
        new_tokens: tokens generated.
        seconds: wall time.
    """

    answered: int
    resumed: int
    failed: int
    new_tokens: int
    seconds: float


@contextmanager
def claim(questions: Path, output: Path, mesh: str | None = None, *, root: Path | None = None) -> Iterator[BatchJob]:
    """`prepare` a job and keep other runs from writing `output` until the block ends.

    Raises:
        OutputInUseError: another run writes `output`; the message names that run.
    """
    asked, devices, replicas = _read_shared(questions, mesh, root)
    output = _resolve_output(output)
    with _claimed(output):
        job = _make_job(asked, questions, output, mesh, devices, replicas)
        yield replace(job, claimed=True)


def prepare(questions: Path, output: Path, mesh: str | None = None, *, root: Path | None = None) -> BatchJob:
    """Read the questions and the existing answers. Loads no model, writes nothing. All processes must call it.

    Args:
        questions: JSONL file of questions.
        output: file of answers, which need not exist.
        mesh: a mesh specification such as "tensor=4"; None: one device per process.
        root: directory that relative image paths start from; None: that of `questions`.

    Raises:
        BatchError: lines are malformed (all are listed), or `output` holds anything but answers to these questions.
        MeshError: the mesh fits neither on one process nor on all of them together.
    """
    asked, devices, replicas = _read_shared(questions, mesh, root)
    return _make_job(asked, questions, _resolve_output(output), mesh, devices, replicas)


def run(
    chat: Answerer, job: BatchJob, *, batch_size: int = BATCH_SIZE, progress: Progress | None = None, **generation: Any
) -> Summary:
    """Answer the pending questions and append the answers to the job's output. All processes must call it.

    A question that cannot be answered (an unreadable image, a prompt beyond the context) gets a line with "error". A
    system error (a full disk, a device out of memory) ends the run.

    Args:
        chat: the model.
        job: from `prepare` or `claim`.
        batch_size: questions per batch and replica.
        progress: called as progress(done, total, "answering"), in questions.
        **generation: options of `Chat.chat`; those of a question take precedence. When sampling, the question on line n
            gets the answer that it gets alone with seed + n - 1, in whatever batch it is.

    Raises:
        BatchError: `output` has answers of another model, or has changed since `prepare`.
        OutputInUseError: another run writes `output`.
    """
    others = job.models - {chat.name}
    if others:
        raise BatchError(
            f"{job.output} has answers of {', '.join(sorted(others))}, not {chat.name}: name another output file"
        )
    if batch_size < 1:
        raise BatchError(f"the batch size must be at least 1, not {batch_size}")
    _check_generation(job, generation)
    start = time.perf_counter()
    done, failed, new_tokens = job.num_answered, 0, 0
    with ExitStack() as held:
        if not job.claimed:
            held.enter_context(_claimed(job.output))
        with distributed.barrier():
            if distributed.is_process_0():
                _start_output(job)
        asker = _Asker(chat, batch_size, generation, can_fail=job.replicas > 1 or not distributed.is_multi_process())
        for batch in job.own_batches(batch_size):
            answers = _answer_round(asker, batch, job.replicas)
            with distributed.barrier():
                if distributed.is_process_0():
                    append_answers(job.output, answers)
            errors = [answer["error"] for answer in answers if "error" in answer]
            if distributed.is_process_0():
                for error in errors[: max(0, MAX_LOGGED_ERRORS - failed)]:
                    logger.warning("%s", error)
            done, failed = done + len(answers), failed + len(errors)
            new_tokens += sum(answer.get("new_tokens", 0) for answer in answers)
            if progress is not None:
                progress(done, len(job.questions), "answering")
        with distributed.barrier():
            if distributed.is_process_0() and job.sort_output:
                content = sorted_answers(job.output, job.questions)
                if content is not None:
                    files.write_bytes(job.output, content)
    if failed > MAX_LOGGED_ERRORS and distributed.is_process_0():
        logger.warning("%d more errors are in %s", failed - MAX_LOGGED_ERRORS, job.output)
    return Summary(len(job.pending), job.num_answered, failed, new_tokens, time.perf_counter() - start)


# Preparing a job.


def _read_shared(questions: Path, mesh: str | None, root: Path | None) -> tuple[list[Question], list[jax.Device], int]:
    """The questions, which must be the same on every process; the devices of a model; and the number of replicas."""
    questions = files.resolve(questions)
    with distributed.barrier():
        devices, replicas = model_devices(mesh)
        asked = read_questions(questions, questions.parent if root is None else files.resolve(root))
    with distributed.barrier():
        text = repr([(one.id, one.question, one.history, one.system, dict(one.generation)) for one in asked])
        if len(set(distributed.all_gather(hashlib.sha256(text.encode()).digest()))) > 1:
            raise BatchError(f"{questions} differs between the processes: copy the same file to every host")
    return asked, devices, replicas


def _make_job(
    asked: Sequence[Question],
    questions: Path,
    output: Path,
    mesh: str | None,
    devices: Sequence[jax.Device],
    replicas: int,
) -> BatchJob:
    """Find the pending questions. Process 0 broadcasts them to the others."""
    known: dict[str, Any] = {}
    previous = None
    with distributed.barrier():
        if distributed.is_process_0():
            if output.exists() and questions.exists() and output.samefile(questions):
                raise BatchError(f"{output} is the file of questions: name another file for the answers")
            previous = read_answers(output, asked)
            known = {"pending": previous.pending, "models": previous.models}
    known = json.loads(distributed.broadcast_from_process_0(json.dumps(known).encode()))
    device_mesh = None if mesh is None else mesh_lib.make_mesh(mesh, devices)
    return BatchJob(asked, known["pending"], output, device_mesh, replicas, previous, frozenset(known["models"]))


def model_devices(mesh: str | None) -> tuple[list[jax.Device], int]:
    """The devices that one model may use, and the number of replicas.

    Raises:
        MeshError: the mesh needs more devices than a process has, and not all of them.
    """
    own, everywhere = jax.local_devices(), jax.devices()
    needed = 1 if mesh is None else math.prod(mesh_lib.parse_mesh(mesh).values())
    if needed <= len(own):  # also with -1, which stands for the remaining devices of this process
        return own, jax.process_count()
    if needed != len(everywhere):
        choices = f"at most {len(own)} (a model on every process) or all {len(everywhere)}"
        raise mesh_lib.MeshError(
            f"the mesh {mesh} needs {needed} devices: use {choices if len(everywhere) > len(own) else f'{len(own)}'}"
        )
    return everywhere, 1


def _resolve_output(output: Path) -> Path:
    """The target of a symbolic link: the target is replaced, and the link stays."""
    return Path(os.path.realpath(files.resolve(output)))


# Writing the output.


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    with ExitStack() as held:
        with distributed.barrier():
            if distributed.is_process_0():
                held.enter_context(files.claim(output))
                files.remove_leftovers(output)
        yield


def _start_output(job: BatchJob) -> None:
    """Create the output, or remove from it what is not an answer."""
    previous = job.previous
    if file_version(job.output) != (None if previous is None else previous.version):
        raise BatchError(f"{job.output} has changed since it was read: another run wrote to it; start again")
    if previous is not None and previous.content is not None:
        files.write_bytes(job.output, previous.content)
    else:
        files.append_text(job.output, "")


def append_answers(output: Path, answers: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to the output and sync it to disk."""
    files.append_text(output, "".join(files.to_json(answer) + "\n" for answer in answers))


# Asking.


def _check_generation(job: BatchJob, generation: Mapping[str, Any]) -> None:
    """Check the settings of the run together with those of each pending question.

    Raises:
        BatchError: some questions have settings that contradict those of the run; all of them are listed.
    """
    common = {name: value for name, value in generation.items() if name in GENERATION and value is not None}
    GenerationConfig(**common)
    problems, ineffective = [], []
    for index in job.pending:
        question = job.questions[index]
        if not question.generation:
            continue
        try:
            gen = GenerationConfig(**{**common, **question.generation})
        except ValueError as error:
            problems.append(f"{question.where}: {error}")
            continue
        if gen.temperature == 0 and question.generation.keys() & set(SAMPLING):
            ineffective.append(question)
    if ineffective and distributed.is_process_0():
        more = f" and {len(ineffective) - 1} more" if len(ineffective) > 1 else ""
        names = ", ".join(SAMPLING)
        logger.warning("%s%s: %s are ignored at temperature 0", ineffective[0].where, more, names)
    if problems:
        raise BatchError(list_problems(problems))


def _answer_round(asker: _Asker, batch: Sequence[Question], replicas: int) -> list[dict[str, Any]]:
    """The lines of a round: the answers of this process, and those of the other replicas."""
    with distributed.barrier():
        answers = asker.answer(batch)
    if replicas == 1:
        return answers
    parts = distributed.all_gather(json.dumps(answers).encode())
    return [answer for part in parts for answer in json.loads(part)]


@dataclass(frozen=True)
class _Asker:
    """Asks a model batches of questions.

    Attributes:
        chat: the model.
        batch_size: questions per batch.
        generation: settings of the run.
        can_fail: whether a question may fail with any error. Where one model spans all processes, an error that is not
            a ValueError may have occurred on this process alone, and must end the run.
    """

    chat: Answerer
    batch_size: int
    generation: Mapping[str, Any]
    can_fail: bool

    def answer(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """The lines of at most `batch_size` questions. Questions with the same settings are asked together."""
        groups: dict[str, list[int]] = {}
        answers: dict[int, dict[str, Any]] = {}
        for index, question in enumerate(questions):
            if question.error is not None:
                answers[index] = self._error_line(question, question.error)
                continue
            settings = {name: value for name, value in question.generation.items() if name != "seed"}
            groups.setdefault(json.dumps([question.system, settings], sort_keys=True), []).append(index)
        for indices in groups.values():
            answers.update(zip(indices, self._ask([questions[index] for index in indices])))
        return [answers[index] for index in range(len(questions))]

    def _ask(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Ask questions that have the same settings. If the batch fails, each of them is asked alone."""
        # A shorter batch is filled up, so that it needs no compilation of its own.
        filled = [*questions, *[questions[-1]] * (self.batch_size - len(questions))]
        texts, images = [one.question for one in filled], [list(one.images) for one in filled]
        try:
            replies = self.chat.batch_chat(texts, images, **self._options(filled))
        except Exception as error:
            if _is_system_error(error) or not (self.can_fail or isinstance(error, ValueError)):
                raise
            if len(questions) > 1:
                return [answer for question in questions for answer in self._ask([question])]
            return [self._error_line(questions[0], _describe(error))]
        return [self._line(question, reply) for question, reply in zip(questions, replies)]

    def _options(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Keyword arguments of `batch_chat` for questions that have the same settings."""
        first = questions[0]
        options = {**self.generation, **first.generation}
        if first.system is not None:
            options["system"] = first.system
        seed = self.generation.get("seed", 0)
        options.pop("seed", None)
        if options.get("temperature") and not isinstance(seed, (tuple, list)):
            options["seed"] = tuple(one.generation.get("seed", (seed or 0) + one.line - 1) % 2**31 for one in questions)
        elif "seed" in self.generation:
            options["seed"] = seed
        if any(one.history for one in questions):
            options["histories"] = [one.history for one in questions]
        return options

    def _line(self, question: Question, reply: Reply) -> dict[str, Any]:
        if reply.error is not None:
            return self._error_line(question, reply.error)
        return {
            "id": question.id,
            "question": question.question,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": len(reply.tokens),
            "model": self.chat.name,
        }

    def _error_line(self, question: Question, reason: str) -> dict[str, Any]:
        error = f"{question.where}: {reason}"
        return {"id": question.id, "question": question.question, "error": error, "model": self.chat.name}


def _describe(error: Exception) -> str:
    """The error of a single question, for its line."""
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, ValueError):
        return re.sub(r"^(question 1|row 0): ", "", str(error))  # the position in a batch filled with this question
    return f"{type(error).__name__}: {error}"


def _is_system_error(error: Exception) -> bool:
    """Whether every question would meet this error: device out of memory, disk full, package missing."""
    if isinstance(error, OSError):
        return files.is_full(error) or error.errno in (errno.EROFS, errno.EMFILE, errno.ENFILE)
    return isinstance(error, (jax.errors.JaxRuntimeError, ImportError)) or "RESOURCE_EXHAUSTED" in str(error)

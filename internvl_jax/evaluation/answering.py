"""One benchmark through one model: answers as they come, batched and shared among processes by batch.py; a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from internvl_jax.evaluation.benchmark_run import Plan, read_answers
from internvl_jax.evaluation.prefetch import Ahead
from internvl_jax.evaluation.run_report import Timing, write_report
from internvl_jax.inference import offline
from internvl_jax.inference.chat import Chat
from internvl_jax.parallel import distributed
from internvl_jax.quantize import scheme_of

Progress = Callable[..., None]

# What the reference's scripts do where `Chat.chat` does otherwise by default.
REFERENCE = {"honour_exif": False, "parse_special": True}
RUNNING = 20.0  # seconds between looks at the score so far, at least
SHARE = 0.02  # of the time, at most, that these looks take


def prepare(made: Plan, mesh: str | None = None) -> offline.Work:
    """What is left to answer, longest prompts first: rows of one batch are then about equally long, and a prompt that
    does not fit shows at once. Arguments and errors as batch.prepare."""
    work = offline.prepare(made.out / "questions.jsonl", made.out / "predictions.jsonl", mesh)
    lengths = [len(question.question) for question in work.questions]
    return replace(work, pending=sorted(work.pending, key=lambda number: -lengths[number]), ordered=False)


def answer(
    chat: Chat, made: Plan, work: offline.Work, *, size: int, progress: Progress | None = None
) -> offline.Summary:
    """Answer what is left and write the report. All processes must call it; the first one writes.

    progress: called as progress(done, total, "answering", note) with the score so far as note.
    """
    if made.codebase == "llava" and chat.processor is not None:
        chat.processor = replace(chat.processor, pad_to_square=made.benchmark.pad)
    running = _Running(made)

    def report(done: int, total: int, what: str) -> None:
        if progress is not None:  # the last line has no score: the report's comes next
            progress(done, total, what, running.note() if done < total else "")

    with Ahead(chat, work, size) as ahead:
        done = offline.run(ahead, work, size=size, progress=report, **REFERENCE, **made.generation)  # type: ignore[arg-type]
    if distributed.is_process_0():
        timing = Timing(done.answered, done.seconds, done.new_tokens, size)
        write_report(made, chat.name, _numbers(chat), read_answers(made), timing)
    return done


def _numbers(chat: Chat) -> str:
    """What the model computes with, in words."""
    scheme, cache = scheme_of(chat.params), chat.generator.cache_dtype.name
    weights = f", {scheme.name} weights" if scheme else ""
    return chat.dtype.name + weights + (f", {cache} cache" if cache != chat.dtype.name else "")


class _Running:
    """The score of the answers so far, computed now and then."""

    def __init__(self, made: Plan):
        self._made, self._next, self._note = made, time.monotonic() + RUNNING, ""

    def note(self) -> str:
        score = self._made.benchmark.score
        if score is not None and distributed.is_process_0() and time.monotonic() > self._next:
            started = time.monotonic()
            with suppress(OSError):  # a note is not worth the run
                answers = {key: text for key, text in read_answers(self._made).items() if text is not None}
                items = [item for item in self._made.items if item.id in answers]
                if items:
                    so_far = score(items, answers, self._made.codebase)
                    self._note = f"{so_far.name} {so_far.value:.1f} so far"
            ended = time.monotonic()
            self._next = ended + max(RUNNING, (ended - started) / SHARE)
        return self._note

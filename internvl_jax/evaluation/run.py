"""One benchmark through one model: answers as they come, batched and shared among processes by batch.py; a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from internvl_jax import batch, distributed
from internvl_jax.chat import Chat
from internvl_jax.evaluation.ahead import Ahead
from internvl_jax.evaluation.plan import Plan, read_answers
from internvl_jax.evaluation.report import Timing, write_report

Progress = Callable[..., None]

RUNNING = 20.0  # seconds between looks at the score so far: scoring 100,000 answers takes about one


def prepare(made: Plan, mesh: str | None = None) -> batch.Work:
    """What is left to answer, longest prompts first: rows of one batch are then about equally long, and a prompt that
    does not fit shows at once. Arguments and errors as batch.prepare."""
    work = batch.prepare(made.out / "questions.jsonl", made.out / "predictions.jsonl", mesh)
    lengths = [len(question.question) for question in work.questions]
    return replace(work, pending=sorted(work.pending, key=lambda number: -lengths[number]))


def answer(chat: Chat, made: Plan, work: batch.Work, *, size: int, progress: Progress | None = None) -> batch.Summary:
    """Answer what is left and write the report. All processes must call it; the first one writes.

    progress: called as progress(done, total, "answering", note) with the score so far as note.
    """
    if made.codebase == "llava" and chat.processor is not None:
        chat.processor = replace(chat.processor, pad_to_square=made.benchmark.pad)
    running = _Running(made)

    def report(done: int, total: int, what: str) -> None:
        if progress is not None:
            progress(done, total, what, running.note())

    with Ahead(chat, work, size) as ahead:
        done = batch.run(ahead, work, size=size, progress=report, honour_exif=False, **made.generation)  # type: ignore[arg-type]
    if distributed.is_first():
        timing = Timing(done.answered, done.seconds, done.new_tokens, size)
        write_report(made, chat.name, chat.dtype.name, read_answers(made), timing)
    return done


class _Running:
    """The score of the answers so far, computed now and then."""

    def __init__(self, made: Plan):
        self._made, self._last, self._note = made, time.monotonic(), ""

    def note(self) -> str:
        score = self._made.benchmark.score
        if score is not None and distributed.is_first() and time.monotonic() - self._last > RUNNING:
            answers = {key: text for key, text in read_answers(self._made).items() if text is not None}
            items = [item for item in self._made.items if item.id in answers]
            if items:
                so_far = score(items, answers, self._made.codebase)
                self._note = f"{so_far.name} {so_far.value:.1f} so far"
            self._last = time.monotonic()
        return self._note

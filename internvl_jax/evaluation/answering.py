"""Running a benchmark: every question is answered by a model, then the report is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from internvl_jax.evaluation.benchmark_run import BenchmarkRun, read_answers
from internvl_jax.evaluation.prefetch import PrefetchingChat
from internvl_jax.evaluation.run_report import Timing, write_report
from internvl_jax.inference import offline
from internvl_jax.inference.chat import Chat
from internvl_jax.parallel import distributed
from internvl_jax.quantize import scheme_of

# Settings of `Chat.chat` in which the reference's scripts differ from the defaults.
REFERENCE = {"honor_exif": False, "parse_special": True}
SCORE_INTERVAL = 20.0  # minimum seconds between scores of the answers so far
SCORE_SHARE = 0.02  # maximum share of the time that is spent on these scores


def pending_job(run: BenchmarkRun, mesh: str | None = None) -> offline.BatchJob:
    """Find the questions that have no answer yet, longest prompts first.

    Sorted by length, the rows of a batch need little padding, and a prompt that does not fit fails at once. Arguments
    and errors are those of `offline.prepare`.
    """
    job = offline.prepare(run.output / "questions.jsonl", run.output / "predictions.jsonl", mesh)
    lengths = [len(question.question) for question in job.questions]
    return replace(job, pending=sorted(job.pending, key=lambda index: -lengths[index]), sort_output=False)


def answer_benchmark(
    chat: Chat,
    run: BenchmarkRun,
    job: offline.BatchJob,
    *,
    batch_size: int,
    progress: Callable[..., None] | None = None,
) -> offline.Summary:
    """Answer the pending questions and write the report. All processes must call it; process 0 writes.

    Args:
        chat: The model.
        run: The benchmark run.
        job: Its pending questions.
        batch_size: Questions per batch and replica.
        progress: Called as progress(done, total, "answering", note), where note is the score of the answers so far.
    """
    if run.codebase == "llava" and chat.processor is not None:
        chat = chat.with_processor(replace(chat.processor, pad_to_square=run.benchmark.pad))
    partial_score = PartialScore(run)

    def report(done: int, total: int, what: str) -> None:
        if progress is not None:  # at the end the report prints the score
            progress(done, total, what, partial_score.note() if done < total else "")

    with PrefetchingChat(chat, job, batch_size) as prefetching:
        options = {**REFERENCE, **run.generation}
        done = offline.run(prefetching, job, batch_size=batch_size, progress=report, **options)
    if distributed.is_process_0():
        timing = Timing(done.answered, done.seconds, done.new_tokens, batch_size)
        write_report(run, chat.name, _describe_precision(chat), read_answers(run), timing)
    return done


def _describe_precision(chat: Chat) -> str:
    """The model's dtypes, for example "bfloat16, int8 weights"."""
    scheme, cache = scheme_of(chat.params), chat.generator.cache_dtype.name
    weights = f", {scheme.name} weights" if scheme else ""
    return chat.dtype.name + weights + (f", {cache} cache" if cache != chat.dtype.name else "")


class PartialScore:
    """The score of the answers so far, computed at intervals."""

    def __init__(self, run: BenchmarkRun):
        self._run, self._next, self._note = run, time.monotonic() + SCORE_INTERVAL, ""

    def note(self) -> str:
        """Return the latest score as text, for example "accuracy 71.3 so far"; "" before the first one."""
        score = self._run.benchmark.score
        if score is not None and distributed.is_process_0() and time.monotonic() > self._next:
            started = time.monotonic()
            with suppress(OSError):  # the note is not essential
                answers = {key: text for key, text in read_answers(self._run).items() if text is not None}
                items = [item for item in self._run.items if item.id in answers]
                if items:
                    so_far = score(items, answers, self._run.codebase)
                    self._note = f"{so_far.name} {so_far.value:.1f} so far"
            ended = time.monotonic()
            self._next = ended + max(SCORE_INTERVAL, (ended - started) / SCORE_SHARE)
        return self._note

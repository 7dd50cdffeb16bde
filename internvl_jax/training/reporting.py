"""The numbers of a run as people see them: a bar or lines on stderr, and TensorBoard."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internvl_jax.data.samples import Problem
from internvl_jax.parallel import distributed
from internvl_jax.training.heldout import Answered
from internvl_jax.utils.progress import err

logger = logging.getLogger(__name__)

QUIET = 30.0  # seconds between lines where there is no terminal
LISTED = 20  # samples that cannot be used which are named; all are counted


class Reporter:
    """Shows metrics: a bar that moves with every step and a line for every `every`-th; without a terminal, lines alone,
    and seldom. Made by `reporting`."""

    def __init__(self, steps: int, every: int, bar: Progress, board: Path | None = None):
        self._steps, self._every, self._bar, self._board = steps, every, bar, board
        self._writer: Any = None  # made when there is something to write: the run claims its directory first
        self._task = bar.add_task("training", total=steps, figures="")
        self._started: tuple[float, int] | None = None
        self._last_line = float("-inf")

    def progress(self, done: int, total: int, what: str) -> None:
        """What is done before the first step, in the bar's place."""
        self._bar.update(self._task, figures=f"{what} {done / max(1, total):.0%}")

    def log(self, entry: dict[str, Any]) -> None:
        """The metrics of a step, or of an evaluation."""
        step = entry["step"]
        if self._board is not None and ("eval_loss" in entry or step % self._every == 0 or step == 1):
            if self._writer is None:
                self._writer = _open_board(self._board)
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
        if "eval_loss" in entry:
            logger.info(
                f"step {step}: held-out loss {entry['eval_loss']:.4f}, {entry['eval_accuracy']:.1%} of "
                f"{entry['eval_tokens']:,.0f} tokens right"
            )
            return
        shown = figures(entry)
        self._bar.update(self._task, completed=step, figures=shown)
        now = time.monotonic()
        if self._started is None:  # the first step compiles: what is left is reckoned from its end
            self._started = now, step
        due = step % self._every == 0 or step == self._steps
        if due and (err.is_terminal or now - self._last_line > QUIET or step == self._steps):
            seconds = (now - self._started[0]) / max(1, step - self._started[1])
            left = f", {_duration((self._steps - step) * seconds)} left" if 1 < step < self._steps else ""
            logger.info(f"step {step}/{self._steps}: {shown}{'' if err.is_terminal else left}")
            self._last_line = now

    def close(self) -> None:
        """Write what TensorBoard's writer still holds."""
        if self._writer is not None:
            self._writer.close()

    def answer(self, answered: Answered) -> None:
        """A held-out question with what was expected and what was said."""
        right = "✓" if answered.answer == answered.expected else "✗"
        question = " ".join(answered.question.split())
        logger.info(f"  {right} {question[:100]} → {answered.answer[:200]!r} (expected {answered.expected[:200]!r})")


class Skipped:
    """Names the first samples that cannot be used, and counts all. Called with each once."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()

    def __call__(self, problem: Problem) -> None:
        self._kinds[problem.kind] += 1
        if self._kinds.total() <= LISTED:
            logger.warning("skipped %s: %s", problem.location, problem.message)
        elif self._kinds.total() == LISTED + 1:
            logger.warning("more are skipped and counted, and not named any more")

    def lines(self) -> list[str]:
        """How many there were, if any."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        return [f"{self._kinds.total()} conversations could not be used: {kinds}"] if kinds else []


def figures(entry: dict[str, Any]) -> str:
    """What a line says of a step."""
    parts = [
        f"loss {entry['loss']:.4f}",
        f"{entry['accuracy']:.1%} right",
        f"grad {entry['grad_norm']:.2g}",
        f"{entry['tokens_per_second']:,.0f} tokens/s",
        f"{entry['images_per_second']:,.1f} images/s",
    ]
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.1%}")
    if entry["data_wait"] > 0.1 * entry["seconds"]:
        parts.append(f"{entry['data_wait'] / entry['seconds']:.0%} of the time waiting for data")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def require_board() -> None:
    """Raise ImportError where TensorBoard's files cannot be written."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'internvl-jax[train]'")


def _open_board(directory: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory))


@contextmanager
def reporting(steps: int, every: int, board: Path | None) -> Iterator[Reporter]:
    """A Reporter while a run goes on; process 0 alone shows something."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=err,
        disable=not err.is_terminal or not distributed.is_process_0(),
        transient=True,
    )
    reporter = Reporter(steps, every, bar, board)
    try:
        with bar:
            yield reporter
    finally:
        reporter.close()

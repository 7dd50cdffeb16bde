"""Shows the metrics of a run: a progress bar or lines on stderr, and TensorBoard."""

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
from internvl_jax.training.heldout import HeldOutAnswer
from internvl_jax.utils import formats
from internvl_jax.utils.progress import err

logger = logging.getLogger(__name__)

LINE_INTERVAL = 30.0  # seconds between lines without a terminal
MAX_LISTED = 20  # invalid samples that are listed; all are counted


class Reporter:
    """Shows metrics: a bar that moves with every step and a line for every `every`-th. Made by `reporting`.

    Without a terminal there are only lines, at most one per LINE_INTERVAL.
    """

    def __init__(self, steps: int, every: int, bar: Progress, board: Path | None = None):
        """Make a reporter.

        Args:
            steps: Steps of the run.
            every: Steps between lines.
            bar: Progress bar with a field "figures".
            board: Directory for TensorBoard. None for no TensorBoard.
        """
        self._steps, self._every, self._bar, self._board = steps, every, bar, board
        self._writer: Any = None  # made at the first write, after the run has locked its directory
        self._task = bar.add_task("training", total=steps, figures="")
        self._started: tuple[float, int] | None = None
        self._last_line = float("-inf")

    def progress(self, done: int, total: int, what: str) -> None:
        """Show what happens before the first step, such as reading the checkpoint."""
        self._bar.update(self._task, figures=f"{what} {done / max(1, total):.1%}")

    def log(self, entry: dict[str, Any]) -> None:
        """Show the metrics of a step or of an evaluation."""
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
                f"{entry['eval_tokens']:,.0f} tokens correct"
            )
            return
        shown = format_metrics(entry)
        self._bar.update(self._task, completed=step, figures=shown)
        now = time.monotonic()
        if self._started is None:  # the first step compiles, so the remaining time is estimated from its end
            self._started = now, step
        due = step % self._every == 0 or step == self._steps
        if due and (err.is_terminal or now - self._last_line > LINE_INTERVAL or step == self._steps):
            seconds = (now - self._started[0]) / max(1, step - self._started[1])
            left = f", {formats.duration((self._steps - step) * seconds)} left" if 1 < step < self._steps else ""
            logger.info(f"step {step}/{self._steps}: {shown}{'' if err.is_terminal else left}")
            self._last_line = now

    def close(self) -> None:
        """Flush TensorBoard's files."""
        if self._writer is not None:
            self._writer.close()

    def answer(self, answer: HeldOutAnswer) -> None:
        """Show a held-out question with the expected answer and the model's."""
        mark = "✓" if answer.answer == answer.expected else "✗"
        question = " ".join(answer.question.split())
        logger.info(f"  {mark} {question[:100]} → {answer.answer[:200]!r} (expected {answer.expected[:200]!r})")


class Skipped:
    """Lists the first invalid samples, and counts all. Called once with each."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()

    def __call__(self, problem: Problem) -> None:
        self._kinds[problem.kind] += 1
        if self._kinds.total() <= MAX_LISTED:
            logger.warning("skipped %s: %s", problem.location, problem.message)
        elif self._kinds.total() == MAX_LISTED + 1:
            logger.warning("further skipped samples are counted, but not listed")

    def lines(self) -> list[str]:
        """Return a line with the counts, if any sample was skipped."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._kinds.most_common())
        return [f"{self._kinds.total():,} conversations were invalid and skipped: {kinds}"] if kinds else []


def format_metrics(entry: dict[str, Any]) -> str:
    """Return the metrics of a step as text."""
    parts = [
        f"loss {entry['loss']:.4f}",
        f"{entry['accuracy']:.1%} correct",
        f"grad {formats.number(entry['grad_norm'])}",
        f"{formats.number(entry['tokens_per_second'])} tokens/s",
        f"{formats.number(entry['images_per_second'])} images/s",
    ]
    if "mfu" in entry:
        parts.append(f"MFU {entry['mfu']:.1%}")
    if entry["data_wait"] > 0.1 * entry["seconds"]:
        parts.append(f"{entry['data_wait'] / entry['seconds']:.1%} of the time waiting for data")
    return ", ".join(parts)


def require_board() -> None:
    """Raise ImportError if TensorBoard's files cannot be written."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'internvl-jax[train]'")


def _open_board(directory: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory))


@contextmanager
def reporting(steps: int, every: int, board: Path | None) -> Iterator[Reporter]:
    """Yield a reporter for a run; only process 0 shows anything. Arguments are those of `Reporter`."""
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

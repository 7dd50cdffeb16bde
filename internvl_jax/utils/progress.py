"""Bars, counters and spinners on stderr, which stay quiet where it is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# Messages are printed as they are: no markup, no emoji codes, no line breaks inside a path.
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one line of JSON on stdout: readable, or escaped where stdout's encoding does not hold it."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


@contextmanager
def counting() -> Iterator[Callable[..., None]]:
    """As `progress_bar`, for things that are counted; progress(done, total, what, note) shows a note beside them.

    Where stderr is no terminal, a line every half minute.
    """
    columns = ("[progress.description]{task.description}", "{task.completed}/{task.total}", "{task.fields[rate]}")
    first, last, counted = None, time.monotonic(), ""
    with Progress(
        *map(TextColumn, columns),
        BarColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None, rate="")

        def report(done: int, total: int, what: str, note: str = "") -> None:
            nonlocal first, last, counted
            now = time.monotonic()
            if what != counted:
                first, counted = (now, done), what
            rate = (done - first[1]) / max(now - first[0], 1e-9)
            shown = (f"{rate:.2f}/s" if rate else "") + (note and f" {note}")
            bar.update(task, completed=done, total=total, description=what, rate=shown)
            if not err.is_terminal and (now - last > 30 or done == total):
                left = f", {(total - done) / rate / 60:.0f} min left" if rate and done < total else ""
                err.print(f"{what}: {done}/{total} {shown}{left}")
                last = now

        yield report


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr for `progress(done_bytes, total_bytes, what)`; silent where stderr is no terminal."""
    columns = ("[progress.description]{task.description}", BarColumn())
    with Progress(
        *(TextColumn(c) if isinstance(c, str) else c for c in columns),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None)

        def report(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield report


@contextmanager
def status(what: str) -> Iterator[Any]:
    """A spinner on stderr while the first token is awaited (the first call of a shape also compiles)."""
    spinner = err.status(f"{what} (the first time also compiles)")
    if err.is_terminal:
        spinner.start()
    try:
        yield spinner
    finally:
        spinner.stop()

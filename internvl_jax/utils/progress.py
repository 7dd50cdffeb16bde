"""Terminal output: progress on stderr, silent where that is not a terminal, and safe text on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from internvl_jax.utils import formats

PIPE_WIDTH = 10_000  # columns of tables that are not printed to a terminal
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and newline, DEL and C1

# Messages are printed as they are: no markup, no emoji codes, no line breaks inside a path.
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def stdout_console() -> Console:
    """A console for tables on stdout: as wide as the terminal, unlimited in a file or a pipe. No markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def printable(text: str) -> str:
    """Text whose control characters are escaped (`\\x1b`), except newlines and tabs: safe for a terminal."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_json(value: Any) -> None:
    """Print one line of JSON on stdout; non-ASCII characters are escaped only if stdout's encoding lacks them."""
    # json escapes the C0 characters; DEL and the C1 characters can only occur inside strings.
    text = CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


@contextmanager
def counting() -> Iterator[Callable[..., None]]:
    """A progress bar on stderr for things that are counted: `progress(done, total, what, note="")`.

    Where stderr is not a terminal, a line is printed every half minute.
    """
    columns = ("[progress.description]{task.description}", "{task.fields[count]}", "{task.fields[rate]}")
    last = time.monotonic()
    first, counted = (last, 0), ""  # when the current kind of work began, and how much was done
    with Progress(
        *map(TextColumn, columns),
        BarColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None, count="", rate="")

        def report(done: int, total: int, what: str, note: str = "") -> None:
            nonlocal first, last, counted
            now = time.monotonic()
            if what != counted:
                first, counted = (now, done), what
            rate = (done - first[1]) / max(now - first[0], 1e-9)
            shown = (f"{formats.number(rate)}/s" if rate else "") + (note and f" {note}")
            count = f"{done:,}/{total:,}"
            bar.update(task, completed=done, total=total, description=what, count=count, rate=shown)
            if not err.is_terminal and (now - last > 30 or done == total):
                left = f", {formats.duration((total - done) / rate)} left" if rate and done < total else ""
                err.print(f"{what}: {count} {shown}{left}")
                last = now

        yield report


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr for `progress(done_bytes, total_bytes, what)`; silent if stderr is not a terminal."""
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
    """A spinner on stderr; silent if stderr is not a terminal."""
    spinner = err.status(what)
    if err.is_terminal:
        spinner.start()
    try:
        yield spinner
    finally:
        spinner.stop()


def in_background(work: Callable[[], int], what: str) -> int:
    """Run `work` in a thread with a spinner, so that Ctrl-C ends the process at once.

    A compilation cannot be interrupted in the main thread. On Ctrl-C the process is killed, so the work must not write
    files.

    Args:
        work: returns an exit code.
        what: what the spinner says.

    Returns:
        The exit code of `work`.
    """
    outcome: Future[int] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=target, daemon=True)
    try:
        with status(what):
            thread.start()
            while not outcome.done():
                with suppress(TimeoutError):
                    outcome.result(timeout=0.2)
    except KeyboardInterrupt as stopped:
        if outcome.done():
            raise
        number = getattr(stopped, "number", None)  # of the signal, where it is runner.Terminated
        err.print("interrupted" if number is None else f"ended by {stopped}")
        sys.stdout.flush()
        os._exit(130 if number is None else 128 + number)
    return outcome.result()

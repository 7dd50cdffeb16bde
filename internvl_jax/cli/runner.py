"""Runs a command: handles signals and closed streams, and reports errors in one line. Imports no jax."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from internvl_jax.utils import logs
from internvl_jax.utils.progress import err, printable

MEMORY_ADVICE = "try --dtype bfloat16, --quantize int8, more devices (--mesh), a lower --max-new-tokens or fewer beams"

# Modules whose distribution has another name.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "libtpu": "jax", "orbax": "orbax-checkpoint", "PIL": "pillow"}


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: cleans up as Ctrl-C does, and ends the process even where Ctrl-C only stops an answer."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_command(command: Callable[[], int]) -> int:
    """Run a command and turn its errors into one line on stderr.

    Args:
        command: Returns its exit code.

    Returns:
        The command's exit code; 2 for an error that the user can fix, 130 after Ctrl-C, 128 + the signal's number after
        SIGTERM or SIGHUP.
    """
    _replace_closed_streams()
    stdout = _Stdout.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Chinese shows "?" instead of a traceback
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # text that is not UTF-8 is rejected where it is used
    with logs.to_terminal(), _termination():
        try:
            try:
                return command()
            finally:  # also after SystemExit, which argparse raises when it has printed help
                sys.stdout.flush()
                if stdout is not None and stdout.failure is not None:
                    raise stdout.failure
        except Terminated as ended:
            err.print(f"ended by {ended}")
            return 128 + ended.number
        except KeyboardInterrupt:
            err.print("interrupted")
            return 130
        except BrokenPipeError:  # the reader has closed the pipe
            _discard_stdout()
            return 0
        except ModuleNotFoundError as error:
            return print_error(
                f"this command needs a package that is not installed: {error.name}{install_hint(error.name)}"
            )
        except (ValueError, OSError, ImportError) as error:
            # The project's own errors are ValueErrors that say what to do; a traceback would bury them.
            if stdout is not None and error is stdout.failure:
                _discard_stdout()
                return print_error(f"standard output cannot be written ({stdout.failure.strerror})")
            return print_error(str(error) or type(error).__name__)
        except (RuntimeError, MemoryError, AssertionError) as error:
            message = _platform_problem(error) or _memory_problem(error)
            if message is None:
                raise
            return print_error(message)


def print_error(message: str) -> int:
    """Print an error to stderr and return its exit code, 2."""
    with suppress(OSError):
        err.print("error:", style="bold red", end=" ")
        err.print(printable(message))
    return 2


def install_hint(module: str | None) -> str:
    """How to install what `import module` needs, by this project's own metadata; "" if it does not list it."""
    name = (module or "").partition(".")[0]
    package = DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
    try:
        requirements = importlib.metadata.requires("internvl-jax") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return ""
    extras = []
    for requirement in requirements:
        required = re.match(r"[\w.-]+", requirement)
        if required is None or required[0].lower() != package or (name == "libtpu" and "[tpu]" not in requirement):
            continue
        extra = re.search(r"""extra == ['"](\w+)['"]""", requirement)
        extras.append(extra[1] if extra else "")
    if not extras:
        return ""
    return f"; pip install {'internvl-jax' if '' in extras else repr(f'internvl-jax[{extras[0]}]')}"


@contextmanager
def _termination() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP, unless they are ignored (nohup), into Terminated in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        for other in before:  # a second signal must not interrupt the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _replace_closed_streams() -> None:
    """Occupy the descriptors of streams that the shell closed (`>&-`), so that no file is opened under their numbers.

    Reading from or writing to such a stream then fails with an OSError.
    """
    for name, number, unusable, mode in (
        ("stdin", 0, os.O_WRONLY, "r"),
        ("stdout", 1, os.O_RDONLY, "w"),
        ("stderr", 2, os.O_RDWR, "w"),
    ):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, unusable)
        if opened != number:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(opened, number)
                os.close(opened)
                opened = number
        setattr(sys, name, open(opened, mode, encoding="utf-8", closefd=False))


class _Stdout(io.FileIO):
    """The file behind sys.stdout. It remembers a failed write, which argparse would swallow."""

    failure: OSError | None = None

    @classmethod
    def install(cls) -> _Stdout | None:
        """Put one behind sys.stdout if that is a file, a pipe or a terminal."""
        old = sys.stdout
        below = getattr(old, "buffer", None)
        if not isinstance(old, io.TextIOWrapper) or not isinstance(getattr(below, "raw", below), io.FileIO):
            return None
        old.flush()
        raw = cls(old.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            raw if isinstance(below, io.FileIO) else io.BufferedWriter(raw),  # PYTHONUNBUFFERED, or not
            old.encoding,
            old.errors,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )
        return raw

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _discard_stdout() -> None:
    """Redirect stdout to /dev/null; otherwise Python reports the error again when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _platform_problem(error: BaseException) -> str | None:
    """A message if jax could not start its devices: none found, no plugin, or in use by another process."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_code.co_filename.endswith("xla_bridge.py"):
        return None
    asked = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    reason = re.sub(r" \((set JAX_PLATFORMS|you may need).*", "", str(error).partition("\n")[0]) or "no such device"
    return (
        f"{f'JAX_PLATFORMS={asked}' if asked else 'the devices'} cannot be used here ({reason}): is the device there, "
        "its jax plugin installed, and no other process using it? JAX_PLATFORMS=cpu computes without it"
    )


def _memory_problem(error: BaseException) -> str | None:
    """A message if the device or the process ran out of memory."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).partition("\n")[0] or "out of memory"
        return f"the device has too little memory ({first}); {MEMORY_ADVICE}"
    return None

"""Files that users name: resolved paths, text, outputs that appear whole and belong to one process. Imports no jax."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

logger = logging.getLogger(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # json.loads makes them of escapes; no UTF-8 file can hold them
_MAX_NAME_BYTES = 160  # of a name that is extended; file systems allow 255


class OutputInUseError(ValueError):
    """Another process is writing the same output; the message says which."""


class TextError(ValueError):
    """A file that is not UTF-8 text, or not JSON; the message says which and where."""


def resolve(path: str | Path) -> Path:
    """The absolute path of what a user named, with `~`, `..` and symbolic links to directories resolved.

    The last component keeps its name even where it is a symbolic link, because a file's suffix matters. Call it once,
    where a path enters.

    Raises:
        ValueError: the path holds a NUL character or names the home directory of an unknown user.
    """
    try:
        path = Path(path).expanduser()
        if path.name in ("", ".."):
            return path.resolve()
        return path.parent.resolve() / path.name
    except RuntimeError as error:
        raise ValueError(f"{path} is not a path ({error})") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that Windows tools put in front.

    Raises:
        OSError: the file cannot be read.
        TextError: it is not UTF-8.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(data: bytes, where: str | Path) -> str:
    """`data` as UTF-8 text without a byte order mark. Raises TextError that names `where`."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextError(f"{where} is UTF-16 text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"{where}:{line}: not UTF-8 text ({error}): save the file as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """The JSON value in a UTF-8 file, with or without a byte order mark. Raises OSError, and TextError for bad JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not readable JSON ({error})") from None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON text that any UTF-8 file can hold: only lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def replace_surrogates(text: str) -> str:
    """`text` for people to read, with U+FFFD for each lone surrogate."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file under a temporary name, then rename it: the old content or the new, never a part."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """As `write_text`, for bytes. An error names the file."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def append_text(path: str | Path, text: str) -> None:
    """Append to a UTF-8 file, which is on disk afterwards. A failure leaves it as it was; the error names the file."""
    data = text.encode("utf-8")
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, before)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` when the block ends well and is removed when it does not.

    Raises OSError with the name of `path`, whichever file the system complained about.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path, number: int | str | None = None) -> Path:
    """Where `path` is written until it is whole: beside it, named after it and after process `number` (this one)."""
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid() if number is None else number}")


def _temporary_prefix(path: Path) -> str:
    return f".{_short(path.name)}.tmp-"


def _short(name: str) -> str:
    """`name`, cut and told apart by a digest where a suffix would make it too long for a file system."""
    data = os.fsencode(name)
    if len(data) <= _MAX_NAME_BYTES:
        return name
    return os.fsdecode(data[:_MAX_NAME_BYTES].decode("utf-8", "ignore").encode()) + hashlib.sha256(data).hexdigest()[:8]


def remove_leftovers(path: Path) -> None:
    """Remove, and name in the log, what killed processes left of writing `path`. Only for the holder of its claim."""
    prefix = _temporary_prefix(path)
    with suppress(FileNotFoundError):
        for found in sorted(path.parent.iterdir()):
            if not found.name.startswith(prefix) or found == temporary_path(path):
                continue
            logger.warning("removing %s, which an interrupted process left", found)
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


@contextmanager
def claim(output: str | Path) -> Iterator[None]:
    """Hold `output`, a file or a directory, for this process alone.

    The operating system releases the lock of a process that dies, so nothing stale has to be removed by hand. Of
    several processes that write one output together, only process 0 claims it. The directory that `output` lies in is
    made.

    Raises:
        OutputInUseError: another process holds it; the message names that process.
    """
    output = resolve(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{_short(output.name)}.lock")
    holder = path.with_name(path.name + ".holder")  # apart: opening a lock's own file empties it
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        with suppress(OSError):
            other = holder.read_text(encoding="utf-8")
            raise OutputInUseError(
                f"{output} is being written by {other}: wait for it, or name another output"
            ) from None
        raise OutputInUseError(f"{output} is being written by another process: wait for it, or name another") from None
    try:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        holder.write_text(
            f"process {os.getpid()} on {socket.gethostname()} ({command}, since {time.strftime('%Y-%m-%d %H:%M:%S')})",
            encoding="utf-8",
            errors="replace",
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        lock.release()

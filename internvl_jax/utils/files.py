"""Files and directories: paths, text, JSON, and outputs that are written atomically by one process. Imports no jax."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from internvl_jax.utils import formats
from internvl_jax.utils.logs import warn_once

logger = logging.getLogger(__name__)

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # json.loads makes them from escapes; UTF-8 cannot encode them
_MAX_NAME_BYTES = 160  # of a name that is extended; file systems allow 255
_SPARE = 16 * 2**20  # bytes left free beside what a new directory needs, for small files and metadata


class OutputError(ValueError):
    """An output cannot be written to its path; the message says why and what to do."""


class OutputInUseError(OutputError):
    """Another process is writing the same output; the message says which."""


class TextError(ValueError):
    """A file is not UTF-8 text, or not JSON; the message says which and where."""


def resolve(path: str | Path) -> Path:
    """Make a path absolute, with `~`, `..` and symbolic links to directories resolved.

    The last component is kept even if it is a symbolic link, because a file's suffix matters. Call it once, where a
    path enters the program.

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


def quoted(path: str | Path) -> str:
    """Quote a path for a shell, for commands in messages."""
    return shlex.quote(str(path))


def not_a_file(path: Path) -> str:
    """Why `path` cannot be read as a file; the end of a message that begins with the path."""
    return "is a directory: name the file" if path.is_dir() else "does not exist"


def not_a_directory(path: Path) -> str:
    """Why `path` is not a directory; the end of a message that begins with the path."""
    return "is a file: name the directory" if path.exists() else "does not exist"


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, without the byte order mark that Windows tools write.

    Raises:
        OSError: the file cannot be read.
        TextError: it is not UTF-8.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(data: bytes, where: str | Path) -> str:
    """Decode UTF-8 text without a byte order mark. Raises TextError with the name `where`."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TextError(f"{where} is UTF-16 text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"{where}:{line}: not UTF-8 text ({error}): save the file as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON value from a UTF-8 file, with or without a byte order mark. Raises OSError or TextError."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path} is not readable JSON ({error})") from None


def read_json_object(path: Path, error: type[ValueError] = TextError) -> dict[str, Any]:
    """Read a file of a checkpoint that must hold a JSON object.

    Args:
        path: the file.
        error: the exception type to raise.

    Raises:
        error: the file is missing, is not JSON, or holds another JSON value.
    """
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise error(f"{path} does not exist; a checkpoint directory needs its {path.name}") from None
    except TextError as reason:
        raise error(wrong_download(path) or f"{reason}; download it again") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Write JSON that can be encoded in UTF-8: only lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD, for people to read."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def wrong_download(path: Path) -> str | None:
    """Describe a file that was downloaded in place of the real one, and what to do; None if there is no such problem.

    Git LFS pointers and web pages (which a server sends to those who may not download) are recognized.
    """
    with path.open("rb") as file:
        return wrong_download_in(file.read(512), path)


def wrong_download_in(head: bytes, name: str | Path) -> str | None:
    """As `wrong_download`, for the first 512 bytes of a file called `name`."""
    if head.startswith(b"version https://git-lfs"):
        return f"{name} is a git-lfs pointer, not the file itself: run 'git lfs pull' where it was cloned"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{name} is a web page, not the file itself (perhaps one to log in with): download it again"
    return None


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file atomically: under a temporary name, which is then renamed."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """As `write_text`, for bytes. Errors name the file."""
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def append_text(path: str | Path, text: str, *, sync: bool = True) -> None:
    """Append to a UTF-8 file. If that fails, the file is truncated to its old length; the error names the file.

    Args:
        path: the file.
        text: what to append.
        sync: wait until it is on disk. Otherwise a crash of the machine may lose the text.

    Raises:
        OSError: the text cannot be written.
    """
    data = text.encode("utf-8")
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                if sync:
                    os.fsync(file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file, before)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def cache_directory(name: str) -> Path | None:
    """Create $XDG_CACHE_HOME/internvl_jax/NAME (~/.cache by default); None, with a warning, if that fails."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "internvl_jax" / name
    try:
        path = resolve(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:  # a full disk still makes empty files
            file.write(bytes(4096))
    except (OSError, ValueError) as error:
        warn_of_cache(path, error)
        return None
    return path


def warn_of_cache(path: Path, error: Exception) -> None:
    """Warn, once per reason, that the cache cannot be used."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    warn_once(
        f"the cache {path.parent} cannot be used ({reason}): compiled programs and indexes of annotations are made "
        "anew by every process; set XDG_CACHE_HOME to a directory that can be written"
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write; it replaces `path` if the block succeeds and is removed otherwise.

    Raises:
        OSError: with the name of `path`, whichever file failed.
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
    """The temporary name under which process `number` (None: this one) writes `path`, in the same directory."""
    return path.with_name(f"{_temporary_prefix(path)}{os.getpid() if number is None else number}")


def _temporary_prefix(path: Path) -> str:
    return f".{_short(path.name)}.tmp-"


def _short(name: str) -> str:
    """Shorten a name, with a digest, if a suffix would make it too long for a file system."""
    data = os.fsencode(name)
    if len(data) <= _MAX_NAME_BYTES:
        return name
    return os.fsdecode(data[:_MAX_NAME_BYTES].decode("utf-8", "ignore").encode()) + hashlib.sha256(data).hexdigest()[:8]


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` that killed processes left, with a warning. Only for the holder of its claim."""
    prefix = _temporary_prefix(path)
    with suppress(FileNotFoundError, NotADirectoryError):
        for found in sorted(path.parent.iterdir()):
            if found.name.startswith(prefix) and found != temporary_path(path):
                _remove_leftover(found)


def _remove_leftover(found: Path) -> None:
    logger.warning("removing %s, which an interrupted process left", found)
    if found.is_dir() and not found.is_symlink():
        shutil.rmtree(found, ignore_errors=True)
    else:
        found.unlink(missing_ok=True)


@contextmanager
def claim(output: str | Path) -> Iterator[None]:
    """Lock `output`, a file or a directory, for this process.

    The operating system releases the lock of a process that dies, so stale locks need no cleaning up. Of several
    processes that write one output together, only process 0 claims it. The parent directory of `output` is created.

    Raises:
        OutputInUseError: another process holds it; the message names that process.
    """
    output = resolve(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{_short(output.name)}.lock")
    if output.is_dir() and not os.access(output.parent, os.W_OK):  # a mounted disk, for example
        path = output / ".lock"
    holder = path.with_name(path.name + ".holder")  # a file of its own: opening the lock file truncates it
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except NotImplementedError:
        logger.warning("%s: this file system has no locks; make sure that no other process writes there", output)
        yield
        return
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


@contextmanager
def new_directory(
    destination: str | Path,
    needed: int | None = None,
    *,
    replace: bool = False,
    error: type[ValueError] = OutputError,
) -> Iterator[Path]:
    """Yield a temporary directory to fill; it becomes `destination` if the block succeeds and is removed otherwise.

    This process holds the claim of `destination` meanwhile. Leftovers of killed processes are removed with a warning.
    Parent directories are created, and removed again if the block fails.

    Args:
        destination: the directory; it must not exist.
        needed: the bytes that will be written, for which the disk must have room; None: not checked.
        replace: replace an existing destination at the end.
        error: the exception type for the errors below, except OutputInUseError.

    Raises:
        OutputError: destination exists, or its disk has too little room.
        OutputInUseError: another process writes it.
        OSError: destination cannot be written.
    """
    destination = resolve(destination)
    temporary = temporary_path(destination)
    existing = next(parent for parent in destination.parents if parent.exists())
    made = [parent for parent in destination.parents if not parent.exists()]

    def refuse_existing() -> None:
        if not replace and os.path.lexists(destination):
            raise error(f"{destination} exists already: remove it, or name another directory")

    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        refuse_existing()
        with _named(destination):
            stack.enter_context(claim(destination))
            refuse_existing()  # the previous holder of the claim may have created it
            remove_leftovers(destination)
            for older in sorted(existing.glob(f"{glob.escape(destination.name)}.tmp-[0-9]*")):
                logger.warning("%s looks like what an interrupted run of an earlier version left: remove it", older)
            if os.path.lexists(temporary):  # of another process with this id, as happens in containers
                _remove_leftover(temporary)
            free = shutil.disk_usage(existing).free
        if needed is not None and free < needed + _SPARE:
            raise error(
                f"{destination} needs {formats.disk(needed + _SPARE)}, {existing} has {formats.disk(free)} left: free "
                "some space, or name a directory on another disk"
            )
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        try:
            with _named(destination):
                temporary.mkdir()
            yield temporary
            with _named(destination):
                _put_in_place(temporary, destination, replace=replace)
        except Exception as caught:
            if is_full(caught):
                raise error(
                    f"the disk of {existing} is full, nothing was kept: free some space, or name a directory elsewhere"
                ) from caught
            raise


def _put_in_place(temporary: Path, destination: Path, *, replace: bool) -> None:
    if not (replace and os.path.lexists(destination)):
        temporary.rename(destination)
        return
    old = temporary_path(destination, f"{os.getpid()}-old")
    destination.rename(old)
    temporary.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(directories: list[Path]) -> None:
    """Remove those of `directories`, innermost first, that are empty."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make OSErrors of the block name `path`, which the user knows, not a temporary file."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that a disk or a quota is full."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    while error is not None:
        # TensorStore reports the system's message in an error of its own.
        if getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers):
            return True
        error = error.__cause__
    return False

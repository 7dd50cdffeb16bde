"""What converting and exporting share: a directory that appears whole or not at all, the small files, the report."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.mapping import ConversionError
from internvl_jax.config import read_json, tower_directory

# Configuration, tokenizer, model card and the like; neither weights nor their index.
_SIDE_FILES = (".json", ".jinja", ".md", ".model", ".py", ".txt")
_SPARE = 16 * 2**20  # for these and for metadata


@dataclass(frozen=True)
class ConversionReport:
    """What was written, and what it cost."""

    destination: Path
    tensors: int
    bytes: int
    seconds: float
    peak_rss: int  # bytes, of this process since it started

    def summary(self) -> str:
        return (
            f"{self.destination}: {self.tensors} tensors, {self.bytes / 1e9:.2f} GB, in {self.seconds:.0f} s; "
            f"peak memory {self.peak_rss / 1e9:.2f} GB"
        )


def make_report(destination: Path, tensors: int, size: int, started: float) -> ConversionReport:
    """started: time.perf_counter() at the beginning; size: bytes of the tensors."""
    return ConversionReport(destination, tensors, size, time.perf_counter() - started, peak_rss())


def peak_rss() -> int:
    """The most memory that this process has held since it started, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def new_directory(destination: str | Path, needed: int) -> Iterator[Path]:
    """A directory to fill, which becomes `destination` when the block ends well and is removed when it does not.

    needed: bytes that will be written; raises ConversionError where they do not fit, and where destination exists.
    """
    destination = Path(os.path.abspath(destination))
    if os.path.lexists(destination):
        raise ConversionError(f"{destination} exists already: remove it, or name another directory")
    existing = next(parent for parent in destination.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE:
        left = sorted(path.name for path in existing.glob(f"{destination.name}.tmp-*"))
        hint = f"; {', '.join(left)} there is left from an interrupted run, remove it" if left else ""
        raise ConversionError(
            f"{destination} needs {(needed + _SPARE) / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB left: free some "
            f"space, or name a directory on another disk{hint}"
        )
    temporary = destination.with_name(f"{destination.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(destination)
    except Exception as error:
        if _is_full(error):
            raise ConversionError(
                f"the disk of {existing} is full, nothing was kept: free some space, or name a directory elsewhere"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_all_side_files(source: Path, destination: Path, *, skip: tuple[str, ...] = ()) -> None:
    """`copy_side_files`, and those of a vision tower that has a directory of its own, into one of its name."""
    copy_side_files(source, destination, skip=skip)
    tower = tower_directory(source, read_json(source / "config.json"))
    if tower is not None:
        (destination / tower.name).mkdir(exist_ok=True)
        copy_side_files(tower, destination / tower.name)


def copy_side_files(source: Path, destination: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy config.json, tokenizer, preprocessor and other small files as they are, but no weights and no index."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _SIDE_FILES or path.name.startswith(("LICENSE", "LICENCE"))
        if wanted and path.is_file() and not path.name.endswith(".index.json") and path.name not in skip:
            shutil.copyfile(path, destination / path.name)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # TensorStore reports the system's message in an error of its own.
    return os.strerror(errno.ENOSPC) in str(error) or os.strerror(errno.EDQUOT) in str(error)

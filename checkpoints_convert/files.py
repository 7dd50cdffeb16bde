"""What converting and exporting share: the small files, the report."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from internvl_jax.config import read_json, tower_directory, tower_name

# Configuration, tokenizer, model card and the like; neither weights nor their index.
_SIDE_FILES = (".json", ".jinja", ".md", ".model", ".py", ".txt")


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


def copy_all_side_files(
    source: Path, destination: Path, vision_tower: str | Path | None = None, *, skip: tuple[str, ...] = ()
) -> None:
    """`copy_side_files`, and those of a vision tower that has a directory of its own, into one of its published name.

    vision_tower: where the tower lies, as for config.tower_directory.
    """
    copy_side_files(source, destination, skip=skip)
    config = read_json(source / "config.json")
    tower = tower_directory(source, config, vision_tower)
    if tower is not None:
        inside = destination / tower_name(config)
        inside.mkdir(exist_ok=True)
        copy_side_files(tower, inside)


def copy_side_files(source: Path, destination: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy config.json, tokenizer, preprocessor and other small files as they are, but no weights and no index."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _SIDE_FILES or path.name.startswith(("LICENSE", "LICENCE"))
        if wanted and path.is_file() and not path.name.endswith(".index.json") and path.name not in skip:
            shutil.copyfile(path, destination / path.name)

"""What converting and exporting share: the small files, the report."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.mapping import ConversionError
from internvl_jax.config import ConfigError, find_vision_tower, vision_tower_name
from internvl_jax.utils.files import read_json_object, wrong_download

# Configuration, tokenizer, model card and the like; neither weights nor their index.
_SIDE_FILES = (".json", ".jinja", ".md", ".model", ".py", ".txt")
_WHOLE = (".json", ".model")  # of these, those that cannot be empty


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

    vision_tower: where the tower lies, as for config.find_vision_tower.
    """
    copy_side_files(source, destination, skip=skip)
    config = read_json_object(source / "config.json", ConfigError)
    tower = find_vision_tower(source, config, vision_tower)
    if tower is not None:
        inside = destination / vision_tower_name(config)
        inside.mkdir(exist_ok=True)
        copy_side_files(tower, inside)


def check_side_files(source: Path, vision_tower: str | Path | None = None) -> None:
    """Raise ConversionError, all listed, where what would be copied is a git-lfs pointer, a web page or empty."""
    tower = find_vision_tower(source, read_json_object(source / "config.json", ConfigError), vision_tower)
    problems = []
    for path in [*_side_files(source), *(() if tower is None else _side_files(tower))]:
        problem = wrong_download(path)
        if path.suffix in _WHOLE and path.stat().st_size == 0:
            problem = f"{path} is empty: download it again"
        if problem is not None and (path.suffix in _WHOLE or "git-lfs" in problem):
            problems.append(problem)
    if problems:
        raise ConversionError("\n  ".join(problems))


def copy_side_files(source: Path, destination: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy config.json, tokenizer, preprocessor and other small files as they are, but no weights and no index."""
    for path in _side_files(source):
        if path.name not in skip:
            shutil.copyfile(path, destination / path.name)


def _side_files(source: Path) -> list[Path]:
    return [
        path
        for path in sorted(source.iterdir())
        if (path.suffix in _SIDE_FILES or path.name.startswith(("LICENSE", "LICENCE")))
        and path.is_file()
        and not path.name.endswith(".index.json")
    ]

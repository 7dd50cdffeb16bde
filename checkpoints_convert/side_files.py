"""The small files beside the weights: configuration, tokenizer, model card and the like."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoints_convert.mapping import ConversionError
from internvl_jax.config import ConfigError, find_vision_tower, vision_tower_name
from internvl_jax.utils.files import read_json_object, wrong_download

_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".txt")
_NEVER_EMPTY = (".json", ".model")


def copy_all_side_files(
    source: Path, destination: Path, vision_tower: str | Path | None = None, *, skip: tuple[str, ...] = ()
) -> None:
    """Copy the side files of a checkpoint, and those of a vision tower that is in a directory of its own.

    Args:
        source: the checkpoint's directory.
        destination: the directory to copy to. The tower's files go into a subdirectory with the tower's published name.
        vision_tower: the tower's directory, as for `config.find_vision_tower`.
        skip: names of files that are left out.
    """
    copy_side_files(source, destination, skip=skip)
    config = read_json_object(source / "config.json", ConfigError)
    tower, name = find_vision_tower(source, config, vision_tower), vision_tower_name(config)
    if tower is not None and name is not None:
        inside = destination / name
        inside.mkdir(exist_ok=True)
        copy_side_files(tower, inside)


def check_side_files(source: Path, vision_tower: str | Path | None = None) -> None:
    """Check the files that would be copied.

    Raises:
        ConversionError: some are Git LFS pointers, web pages or empty; all are listed.
    """
    tower = find_vision_tower(source, read_json_object(source / "config.json", ConfigError), vision_tower)
    problems = []
    for path in [*_side_files(source), *(() if tower is None else _side_files(tower))]:
        problem = wrong_download(path)
        if path.suffix in _NEVER_EMPTY and path.stat().st_size == 0:
            problem = f"{path} is empty: download it again"
        if problem is not None and (path.suffix in _NEVER_EMPTY or "git-lfs" in problem):
            problems.append(problem)
    if problems:
        raise ConversionError("\n  ".join(problems))


def copy_side_files(source: Path, destination: Path, *, skip: tuple[str, ...] = ()) -> None:
    """Copy config.json, tokenizer, preprocessor and other small files unchanged, but no weights and no index."""
    for path in _side_files(source):
        if path.name not in skip:
            shutil.copyfile(path, destination / path.name)


def _side_files(source: Path) -> list[Path]:
    return [
        path
        for path in sorted(source.iterdir())
        if (path.suffix in _SUFFIXES or path.name.startswith(("LICENSE", "LICENCE")))
        and path.is_file()
        and not path.name.endswith(".index.json")
    ]

"""Locating a benchmark's files and images."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.items import EvaluationError


@dataclass(frozen=True)
class DataFolder:
    """A benchmark's files: in `root`, or in its subfolder `name`, as in the reference's data folder."""

    root: Path
    name: str

    def find(self, *names: str) -> Path:
        """Return the first of these files that exists.

        Raises:
            EvaluationError: None of them exists; the message names all of them.
        """
        found = self.find_optional(*names)
        if found is None:
            raise EvaluationError(
                f"neither {self.root} nor its subfolder {self.name} has {' or '.join(names)}: docs/evaluation.md says "
                "where to get it"
            )
        return found

    def find_optional(self, *names: str) -> Path | None:
        """Return the first of these files that exists, or None.

        Raises:
            EvaluationError: `root` is not a directory.
        """
        if not _has_kind(self.root, stat.S_ISDIR):
            raise EvaluationError(f"{self.root} is not a directory: --data names the one with the benchmark's files")
        paths = (*(self.root / self.name / name for name in names), *(self.root / name for name in names))
        return next((path for path in paths if is_file(path)), None)

    def find_image(self, name: str, folders: Sequence[str]) -> Path | None:
        """Return an image's path, or None where there is none.

        Args:
            name: Path in the data file, relative to the data folder or to the folder above it.
            folders: Folders in which an image of that file name may also be.
        """
        inside = name.removeprefix("data/")
        roots = (self.root, self.root / self.name, self.root.parent)
        paths = [root / part for part in (name, inside) for root in roots]
        paths += [root / folder / part for folder in folders for part in (inside, Path(name).name) for root in roots]
        return next((path for path in paths if is_file(path)), None)


def is_file(path: Path) -> bool:
    """Return whether a regular file of that name exists.

    Raises:
        OSError: The file system does not say, in which case Path.is_file returns False.
    """
    return _has_kind(path, stat.S_ISREG)


def _has_kind(path: Path, kind: Any) -> bool:
    try:
        return bool(kind(os.stat(path).st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        return False
    except ValueError:  # a NUL or a surrogate, which no file name contains
        return False

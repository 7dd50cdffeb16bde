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
    """Where a benchmark's files lie: in `root`, or in its subfolder `name`, as in the reference's data folder."""

    root: Path
    name: str

    def find(self, *names: str) -> Path:
        """The first of these files that is there. Raises EvaluationError naming all places looked at."""
        found = self.look(*names)
        if found is None:
            raise EvaluationError(
                f"{self.root} has no {' or '.join(names)}, neither itself nor in its subfolder {self.name}: "
                "docs/evaluation.md says where to get it"
            )
        return found

    def look(self, *names: str) -> Path | None:
        """As `find`, None where none is there."""
        if not _has_kind(self.root, stat.S_ISDIR):
            raise EvaluationError(f"{self.root} is not a directory: --data names the one with the benchmark's files")
        places = (self.root / self.name / name for name in names)
        return next((path for path in (*places, *(self.root / name for name in names)) if is_file(path)), None)

    def picture(self, name: str, folders: Sequence[str]) -> Path | None:
        """A picture by its path in the data file (from the data folder or above it), or by its name in `folders`."""
        inside = name.removeprefix("data/")
        roots = (self.root, self.root / self.name, self.root.parent)
        paths = [root / part for part in (name, inside) for root in roots]
        paths += [root / folder / part for folder in folders for part in (inside, Path(name).name) for root in roots]
        return next((path for path in paths if is_file(path)), None)


def is_file(path: Path) -> bool:
    """Whether there is a file of that name. Raises OSError where the system does not say; Path.is_file says no then."""
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
    except ValueError:  # a NUL, or a surrogate, which no name on disk has
        return False

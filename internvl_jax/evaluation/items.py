"""A benchmark's questions as they are asked, scored and handed in, and the files that they are read from."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from internvl_jax.utils import files

# Whose prompts and rules: V1-1's own scripts, or LLaVA's, with which V1-0 and LLaVA-1.5 were evaluated.
Codebase = Literal["internvl", "llava"]

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_NO = "Please answer yes or no."

SHOWN = 10  # problems listed in an error


class EvaluationError(ValueError):
    """Data, predictions or runs that cannot be used; the message names the file and the item."""


@dataclass(frozen=True)
class Item:
    """One question of a data set."""

    id: str  # unique in the data set
    source_id: str | int  # as its file has it, which need not be unique
    question: str  # without the instruction that a prompt adds
    image: str | bytes | None  # a path as the file has it, or the picture itself
    gold: tuple[str, ...] = ()  # accepted answers, ten people's, a letter or a label; () where only a server knows
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # what else its file says
    aliases: tuple[str, ...] = ()  # other ids by which files of predictions name it


@dataclass(frozen=True)
class Folder:
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


def read_text(path: Path) -> str:
    """The text of a file with or without a byte order mark. Raises OSError, and EvaluationError where it is no text."""
    try:
        return files.read_text(path)
    except files.TextError as error:
        raise EvaluationError(str(error)) from None


def records(path: Path, text: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """("FILE:LINE" or "FILE, record N", record) of a JSONL file or a JSON list.

    A JSON object may hold the list as "questions", "annotations" or "data", or be a mapping of ids to records, which
    then get theirs as "id". text: of the file, where it was read already.
    Raises EvaluationError listing every line that is malformed.
    """
    text = read_text(path) if text is None else text
    whole = None
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            pass  # POPE's labels are JSON lines under that name
    if isinstance(whole, (list, dict)):
        rows = list(_entries(path, whole))
    else:
        rows = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found, problems = [], []
    for where, row in rows:
        try:
            record = json.loads(row) if isinstance(row, str) else row
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: not JSON ({error})")
            continue
        if isinstance(record, dict):
            found.append((where, record))
        else:
            problems.append(f"{where}: not a JSON object, but {type(record).__name__}")
    refuse(problems)
    if not found:
        raise EvaluationError(f"{path} is empty")
    return found


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises EvaluationError where it is something else."""
    try:
        whole = json.loads(read_text(path))
    except EvaluationError:
        raise
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is not JSON ({error})") from None
    if not isinstance(whole, dict):
        raise EvaluationError(f"{path} should hold an object, not {type(whole).__name__}")
    return whole


def _entries(path: Path, whole: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(whole, dict):
        inner = next((whole[name] for name in ("questions", "annotations", "data") if name in whole), None)
        if inner is None and all(isinstance(value, dict) for value in whole.values()):
            yield from ((f"{path}, {key!r}", {"id": key, **value}) for key, value in whole.items())
            return
        whole = [whole] if inner is None else inner
    if not isinstance(whole, list):
        raise EvaluationError(f"{path} should hold a list of records, not {type(whole).__name__}")
    for number, row in enumerate(whole, 1):
        if isinstance(row, str):  # which would be parsed as a line
            raise EvaluationError(f"{path}, record {number} is a text where an object is needed")
        yield f"{path}, record {number}", row


def need(record: Mapping[str, Any], where: str, *names: str, kind: type | tuple[type, ...] = str) -> Any:
    """The first of these fields that the record has. Raises EvaluationError where there is none of that kind."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        raise EvaluationError(f"{where} has no {' or '.join(map(repr, names))}")
    if not isinstance(record[name], kind) or isinstance(record[name], bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise EvaluationError(f"{where}: {name!r} must be {wanted}, not {record[name]!r:.80}")
    return record[name]


@contextmanager
def noting(problems: list[str]) -> Iterator[None]:
    """Add an EvaluationError of the block to `problems`, so that all of them can be told at once."""
    try:
        yield
    except EvaluationError as error:
        problems.append(str(error))


def refuse(problems: Sequence[str]) -> None:
    """Raise an EvaluationError that lists the problems, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems[:SHOWN])
        raise EvaluationError(listed + more)


def distinct(items: Iterable[Item]) -> list[Item]:
    """Items with unique ids: their source's where it is unique, else numbered "7#1", "7#2"."""
    items = list(items)
    counts = Counter(str(item.source_id) for item in items)
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        name = str(item.source_id)
        seen[name] += 1
        named.append(replace(item, id=name if counts[name] == 1 else f"{name}#{seen[name]}"))
    return named

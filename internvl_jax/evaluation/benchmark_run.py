"""What a run over a benchmark is to do: its questions and pictures, checked and written before a model is loaded.

A run's directory holds settings.json, questions.jsonl, predictions.jsonl (appended batch by batch), the pictures that
the data file brings in itself, and at the end report.json, report.md, wrong.html and what is to be handed in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmark_table import BENCHMARKS, Benchmark
from internvl_jax.evaluation.datasets.data_folder import DataFolder, is_file
from internvl_jax.evaluation.datasets.items import Codebase, EvaluationError, Item
from internvl_jax.evaluation.datasets.records import json_object, read_text, records, refuse
from internvl_jax.evaluation.submissions import import_openpyxl
from internvl_jax.inference.sampling import GenerationConfig
from internvl_jax.utils import files

# All that a run, or the grading of one, writes beside its images.
WRITTEN = (
    *("settings.json", "questions.jsonl", "predictions.jsonl", "report.json", "report.md", "wrong.html"),
    *("submission.json", "submission_normalized.json", "submission.xlsx", "grades.jsonl"),
)


@dataclass(frozen=True)
class Plan:
    """What a run is to do."""

    name: str
    codebase: Codebase
    folder: DataFolder
    items: Sequence[Item]
    out: Path
    generation: dict[str, Any]
    limit: int | None
    model: str
    precision: dict[str, str | None]  # dtype, quantize and cache_dtype as asked for; None: the checkpoint's own

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

    @property
    def settings(self) -> dict[str, Any]:
        """What must not change within a run."""
        digest = hashlib.sha256(repr([(item.id, item.question) for item in self.items]).encode()).hexdigest()
        return {
            "benchmark": self.name,
            "codebase": self.codebase,
            "model": self.model,
            "limit": self.limit,
            "generation": self.generation,
            "questions": digest,
            **self.precision,
        }


def plan(
    name: str,
    codebase: Codebase,
    data: Path,
    out: Path,
    *,
    limit: int | None = None,
    resume: bool = False,
    num_beams: int | None = None,
    max_new_tokens: int | None = None,
    model: str = "nano",
    precision: dict[str, str | None] | None = None,
    first: bool = True,
) -> Plan:
    """Read the data and write the run's questions; nothing is answered yet.

    num_beams, max_new_tokens: in place of those of the published figures. limit: only the first questions.
    model: its name. precision: as asked of `loading.load`.
    first: whether this is process 0, which holds the claim of `out` and says whether the run may go on there.
    Raises EvaluationError for data that cannot be used, pictures that are missing (all listed), a directory that holds
    answers already and is not to be resumed, or that was made with other settings, or that is no run's.
    """
    benchmark = BENCHMARKS[name]
    if limit is not None and limit < 1:
        raise EvaluationError(f"--limit must be at least 1, not {limit}")
    data, out = files.resolve(data), files.resolve(out)
    folder = DataFolder(data, benchmark.folder)
    items = benchmark.read(folder, codebase)[:limit]
    if not items:
        raise EvaluationError(f"{data} has no questions of {benchmark.title}")
    generation: dict[str, Any] = dict(benchmark.generation(codebase, num_beams))
    if max_new_tokens is not None:
        generation["max_new_tokens"] = max_new_tokens
    GenerationConfig(**generation)  # refuses what makes no sense before anything is written
    made = Plan(name, codebase, folder, items, out, generation, limit, model, precision or {})
    if benchmark.needs_xlsx:
        import_openpyxl()
    if first:
        _prepare_directory(made, resume)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(out / "settings.json", json.dumps(made.settings, indent=2))
    _write_questions(made)
    return made


def _prepare_directory(made: Plan, resume: bool) -> None:
    out = made.out
    if out.exists() and not out.is_dir():
        raise EvaluationError(f"{out} is a file: --output names a directory")
    for name in WRITTEN:
        files.remove_leftovers(out / name)
    for picture in sorted((out / "pictures").glob("*.*")):
        if _UNFINISHED_PICTURE.fullmatch(picture.name):
            picture.unlink()
    there = [out / name for name in WRITTEN if is_file(out / name)]
    if not there:
        return
    before = json_object(out / "settings.json") if out / "settings.json" in there else {}
    if "benchmark" not in before:
        raise EvaluationError(f"{there[0]} is not from a run of `eval`: --output DIR names another directory")
    answers = out / "predictions.jsonl"
    if answers not in there or not answers.stat().st_size:
        return
    if not resume:
        raise EvaluationError(f"{answers} has answers already: --resume goes on with them, --output DIR names another")
    changed = _differences(before, made.settings)
    if changed:
        raise EvaluationError(
            f"{out} was begun with other settings ({'; '.join(changed)}): give the same ones, or another --output DIR"
        )
    _drop_errors(answers)


_UNFINISHED_PICTURE = re.compile(r"\.[0-9a-f]{24}\.(png|jpg)\.tmp-[0-9]+")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that are not as they were, with both values, in words."""
    names = [name for name in now if name in before and before[name] != now[name]]
    told = []
    for name in names:
        old, new = before[name], now[name]
        if name == "questions":  # a digest
            told += [] if "limit" in names or "benchmark" in names else ["the data files had other questions"]
        elif isinstance(old, dict) and isinstance(new, dict):
            told += _differences(dict.fromkeys(new) | old, dict.fromkeys(old) | new)
        else:
            told.append(f"{name}: {_shown(old)} then, {_shown(new)} now")
    return told


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def _drop_errors(answers: Path) -> None:
    """Questions that could not be answered are asked again: the image may have been mended."""
    lines = read_text(answers).split("\n")
    kept = [line for line in lines if not _is_error(line)]
    if len(kept) < len(lines):
        files.write_text(answers, "\n".join(kept))


def _is_error(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # the last line, cut off
        return False
    return isinstance(row, dict) and "error" in row


def _write_questions(made: Plan) -> None:
    rows, problems = [], []
    for item in made.items:
        path = _picture(made, item)
        if isinstance(item.image, str) and path is None:
            problems.append(f"{item.id!r}: no picture {item.image} in {made.folder.root} or its folders")
            continue
        images = [] if path is None else [str(path)]
        rows.append({"id": item.id, "question": made.benchmark.prompt(item, made.codebase), "images": images})
    refuse(problems)
    files.write_text(made.out / "questions.jsonl", "".join(files.to_json(row) + "\n" for row in rows))


def _picture(made: Plan, item: Item) -> Path | None:
    if item.image is None:
        return None
    if isinstance(item.image, str):
        return made.folder.picture(item.image, made.benchmark.images)
    suffix = "png" if item.image.startswith(b"\x89PNG") else "jpg"
    path = made.out / "pictures" / f"{hashlib.sha256(item.image).hexdigest()[:24]}.{suffix}"
    if not path.exists():  # rotations of a question share theirs
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, item.image)
    return path


def read_answers(made: Plan) -> dict[str, str | None]:
    """Item's id -> answer; None where the model could not answer."""
    answers: dict[str, str | None] = {}
    for _, row in records(made.out / "predictions.jsonl"):
        answers[row["id"]] = row.get("answer")
    return answers

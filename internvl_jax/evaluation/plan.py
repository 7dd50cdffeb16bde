"""What a run over a benchmark is to do: its questions and pictures, checked and written before a model is loaded.

A run's directory holds settings.json, questions.jsonl, predictions.jsonl (appended batch by batch), the pictures that
the data file brings in itself, and at the end report.json, report.md, wrong.html and what is to be handed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.benchmarks import BENCHMARKS, Benchmark
from internvl_jax.evaluation.items import Codebase, EvaluationError, Folder, Item, json_object, refuse
from internvl_jax.evaluation.submissions import import_openpyxl, write_text


@dataclass(frozen=True)
class Plan:
    """What a run is to do."""

    name: str
    codebase: Codebase
    folder: Folder
    items: Sequence[Item]
    out: Path
    generation: dict[str, int]
    limit: int | None

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
            "limit": self.limit,
            "generation": self.generation,
            "questions": digest,
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
) -> Plan:
    """Read the data and write the run's questions; nothing is answered yet.

    num_beams, max_new_tokens: in place of those of the published figures. limit: only the first questions.
    Raises EvaluationError for data that cannot be used, pictures that are missing (all listed), a directory that holds
    answers already and is not to be resumed, or that was made with other settings.
    """
    benchmark = BENCHMARKS[name]
    if limit is not None and limit < 1:
        raise EvaluationError(f"--limit must be at least 1, not {limit}")
    folder = Folder(data, benchmark.folder)
    items = benchmark.read(folder, codebase)[:limit]
    generation = benchmark.generation(codebase, num_beams)
    if max_new_tokens is not None:
        generation["max_new_tokens"] = max_new_tokens
    made = Plan(name, codebase, folder, items, out, generation, limit)
    if benchmark.needs_xlsx:
        import_openpyxl()
    answers = out / "predictions.jsonl"
    if answers.exists() and answers.stat().st_size:
        if not resume:
            raise EvaluationError(f"{answers} has answers already: --resume goes on with them, --out DIR names another")
        before = json_object(out / "settings.json")
        changed = [key for key, value in made.settings.items() if before.get(key) != value]
        if changed:
            raise EvaluationError(
                f"{out} was begun with another {', '.join(changed)}: --out DIR names another directory"
            )
    out.mkdir(parents=True, exist_ok=True)
    _write_questions(made)
    write_text(out / "settings.json", json.dumps(made.settings, indent=2))
    return made


def _write_questions(made: Plan) -> None:
    rows, problems = [], []
    for item in made.items:
        path = _picture(made, item)
        if isinstance(item.image, str) and path is None:
            problems.append(f"{item.id!r}: no picture {item.image} in {made.folder.root} or its folders")
            continue
        images = [] if path is None else [str(path.absolute())]
        rows.append({"id": item.id, "question": made.benchmark.prompt(item, made.codebase), "images": images})
    refuse(problems)
    write_text(made.out / "questions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _picture(made: Plan, item: Item) -> Path | None:
    if item.image is None:
        return None
    if isinstance(item.image, str):
        return made.folder.picture(item.image, made.benchmark.images)
    suffix = "png" if item.image.startswith(b"\x89PNG") else "jpg"
    path = made.out / "pictures" / f"{hashlib.sha256(item.image).hexdigest()[:24]}.{suffix}"
    if not path.exists():  # rotations of a question share theirs
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(item.image)
        part.replace(path)
    return path


def read_answers(made: Plan) -> dict[str, str | None]:
    """Item's id -> answer; None where the model could not answer."""
    answers: dict[str, str | None] = {}
    for line in (made.out / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[row["id"]] = row.get("answer")
    return answers

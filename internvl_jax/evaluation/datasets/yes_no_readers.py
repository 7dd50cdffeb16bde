"""Readers of the yes-or-no benchmarks POPE and MME."""

from __future__ import annotations

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import (
    Codebase,
    EvaluationError,
    Item,
    distinct,
)
from internvl_jax.evaluation.datasets.records import (
    ID,
    collecting,
    need,
    raise_problems,
    read_text,
    records,
)
from internvl_jax.evaluation.scorers.yes_no import COGNITION, PERCEPTION

POPE = ("adversarial", "random", "popular")  # in the order of the question file


def pope(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read llava_pope_test.jsonl and the labels of each category, matched by position, since ids differ between files.

    Raises:
        EvaluationError: The labels are not those of the questions.
    """
    rows = records(folder.find("llava_pope_test.jsonl", "pope_questions.jsonl"))
    items = []
    problems: list[str] = []
    for name in POPE:
        path = folder.find(f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
        labels, asked = records(path), [row for row in rows if row[1].get("category") == name]
        if len(labels) != len(asked):
            raise EvaluationError(
                f"{path} has {len(labels)} labels for {len(asked)} questions: use the labels of POPE's revision "
                "e3e39262, whose random part has 2,910"
            )
        for (where, record), (place, label) in zip(asked, labels):
            with collecting(problems):
                text, image = need(record, where, "text"), need(record, where, "image")
                if label.get("image", image) != image or str(label.get("text", "")) not in text:
                    raise EvaluationError(f"{place} is about another question than {where}: {label.get('text')!r}")
                answer = need(label, place, "label")
                if answer not in ("yes", "no"):
                    raise EvaluationError(f"{place}: the label is {answer!r}, neither yes nor no")
                items.append(Item("", need(record, where, "question_id", kind=ID), text, image, (answer,), name))
    raise_problems(problems)
    return distinct(items)


def mme(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read one text file per task: image, question and Yes or No separated by tabs, two lines per image."""
    items = []
    problems: list[str] = []
    for task in PERCEPTION + COGNITION:
        path = folder.find(*(f"{place}{task}.txt" for place in ("", "MME_Benchmark_release_version/", "Your_Results/")))
        lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
        rows = [(f"{path}:{number}", line.split("\t")) for number, line in enumerate(lines, 1)]
        for number, (where, row) in enumerate(rows):
            with collecting(problems):
                if len(row) < 3 or row[2].strip().lower() not in ("yes", "no"):
                    raise EvaluationError(f"{where} is not an image, a question and Yes or No, separated by tabs")
                if len(rows) % 2 or row[0] != rows[number // 2 * 2][1][0]:
                    raise EvaluationError(f"{where}: each image needs two consecutive lines")
                image, question, label = row[0], row[1], row[2].strip().lower()
                record = {"pair": number // 2, "image": image}
                items.append(Item("", f"{task}/{image}", question, f"{task}/{image}", (label,), task, record=record))
    raise_problems(problems)
    return distinct(items)

"""The files that servers and judges score, as the reference's scripts write them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.gqa import gqa_answer
from internvl_jax.evaluation.items import Codebase, EvaluationError, Folder, Item, records
from internvl_jax.evaluation.readers import is_missing
from internvl_jax.evaluation.scoring import Answers, choice_cell, mmmu_answer
from internvl_jax.evaluation.vqa import normalize_m4c

# (items, answers, codebase, data folder, directory to write to) -> the files written
Submit = Callable[[Sequence[Item], Answers, Codebase, Folder, Path], list[Path]]

_TABLE_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")


def write_text(path: Path, text: str) -> Path:
    """Write a file under a temporary name, then rename it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def _json(path: Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, ensure_ascii=False))


def _said(item: Item, answers: Answers, codebase: Codebase) -> str:
    """LLaVA's scripts hand in cleaned answers, V1-1's hand them in as they are."""
    return normalize_m4c(answers[item.id]) if codebase == "llava" else answers[item.id]


def vqav2(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """[{question_id, answer}], for EvalAI's challenge 830; also with all answers cleaned, which can only score higher.

    The server wants every question of test2015: those without an answer are filled up with empty ones where the data
    folder has a file that lists them.
    """
    said = {int(item.source_id): _said(item, answers, codebase) for item in items}
    clean = {int(item.source_id): normalize_m4c(answers[item.id]) for item in items}
    path = folder.look("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl")
    every = list(said) if path is None else [int(record["question_id"]) for _, record in records(path)]
    unknown = said.keys() - set(every)
    if unknown:
        raise EvaluationError(f"{path} has no question {min(unknown)}, which was answered")
    return [
        _json(out / name, [{"question_id": number, "answer": texts.get(number, "")} for number in every])
        for name, texts in (("submission.json", said), ("submission_normalized.json", clean))
    ]


def vizwiz(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """[{image, answer}], for EvalAI's challenge 2185."""
    rows = [{"image": _vizwiz_name(item), "answer": _said(item, answers, codebase)} for item in items]
    return [_json(out / "submission.json", rows)]


def _vizwiz_name(item: Item) -> str:
    """V1-1's file has the picture's path as id; LLaVA's has a number, and the name as picture."""
    path = item.source_id if isinstance(item.source_id, str) else item.image
    return Path(str(path)).name


def gqa(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """[{questionId, prediction}], which GQA's own script reads."""
    rows = [{"questionId": item.id, "prediction": gqa_answer(answers[item.id])} for item in items]
    return [_json(out / "submission.json", rows)]


def documents(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """[{questionId, answer}], for the Robust Reading Competition."""
    rows = [{"questionId": item.source_id, "answer": answers[item.id]} for item in items]
    return [_json(out / "submission.json", rows)]


def by_id(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """{id: answer}: MM-Vet's result file; MMMU's, in which a multiple choice is a letter."""
    return [_json(out / "submission.json", {item.id: mmmu_answer(item, answers[item.id]) for item in items})]


def mmbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """A table for OpenCompass: the columns that are not dropped, with the prediction as the seventh."""
    return [_table(items, answers, codebase, out, _TABLE_DROPPED, 6)]


def ccbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: Folder, out: Path) -> list[Path]:
    """As MMBench's, with the prediction as the ninth column."""
    return [_table(items, answers, codebase, out, ("category", "image"), 8)]


def _table(
    items: Sequence[Item], answers: Answers, codebase: Codebase, out: Path, dropped: Sequence[str], place: int
) -> Path:
    openpyxl = import_openpyxl()
    columns = [name for name in items[0].record if name not in dropped]
    columns.insert(place, "prediction")
    book = openpyxl.Workbook(write_only=False)
    sheet = book.active
    sheet.append(columns)
    for number, item in enumerate(items, 2):
        cells = _cells(item, choice_cell(item, answers[item.id], codebase))
        for column, name in enumerate(columns, 1):
            value = cells.get(name)
            if isinstance(value, str):
                value = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", value)
            cell = sheet.cell(number, column, value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with "=" is no formula
    path = out / "submission.xlsx"
    part = out / f"submission.{os.getpid()}.part.xlsx"
    book.save(part)
    part.replace(path)
    return path


def _cells(item: Item, prediction: str) -> Mapping[str, Any]:
    """What pandas writes back of a row: it has read the texts that spell a missing value as empty cells."""
    cells: dict[str, Any] = {name: None if is_missing(text) else text for name, text in item.record.items()}
    return cells | {"index": int(item.source_id), "prediction": prediction}


def import_openpyxl() -> Any:
    """openpyxl, or an ImportError that says how to get it."""
    try:
        import openpyxl
    except ImportError:
        raise ImportError("tables to hand in need openpyxl: pip install 'internvl-jax[eval]'") from None
    return openpyxl

"""The files that servers and judges score, as the reference's scripts write them."""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import Codebase, EvaluationError, Item
from internvl_jax.evaluation.datasets.mmbench_tables import is_missing
from internvl_jax.evaluation.datasets.records import need, records
from internvl_jax.evaluation.scorers.gqa import gqa_answer
from internvl_jax.evaluation.scorers.vqa import normalize_m4c
from internvl_jax.evaluation.scoring import Answers, choice_cell, mmmu_answer
from internvl_jax.utils import files

# (items, answers, codebase, data folder, directory to write to) -> the files written
Submit = Callable[[Sequence[Item], Answers, Codebase, DataFolder, Path], list[Path]]

_NOT_IN_XML = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\ud800-\\udfff\\ufffe\\uffff]")
_TABLE_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")


def write_apart(
    submit: Submit, items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path
) -> list[Path]:
    """Write what is to be handed in into a directory that may hold other files; returns the files.

    Raises EvaluationError where one of them is there already with other content: nothing is replaced.
    """
    out = files.resolve(out).resolve()  # two names of one directory have one claim
    with files.claim(out):
        files.remove_leftovers(out)
        made = files.temporary_path(out)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        try:
            written = submit(items, answers, codebase, folder, made)
            for path in written:
                if _content(out / path.name) not in (None, path.read_bytes()):
                    raise EvaluationError(
                        f"{out / path.name} is there already, with other answers: --output DIR names another directory"
                    )
            out.mkdir(exist_ok=True)
            return [path.replace(out / path.name) for path in written]
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _json(path: Path, value: Any) -> Path:
    return files.write_text(path, files.to_json(value))


def _said(item: Item, answers: Answers, codebase: Codebase) -> str:
    """LLaVA's scripts hand in cleaned answers, V1-1's hand them in as they are."""
    return normalize_m4c(answers[item.id]) if codebase == "llava" else answers[item.id]


def vqav2(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """[{question_id, answer}], for EvalAI's challenge 830; also with all answers cleaned, which can only score higher.

    The server wants every question of test2015: those without an answer are filled up with empty ones where the data
    folder has a file that lists them.
    """
    said = {_number(item.source_id, item.id): _said(item, answers, codebase) for item in items}
    clean = {int(item.source_id): normalize_m4c(answers[item.id]) for item in items}
    path = folder.look("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl")
    listed = [] if path is None else records(path)
    every = [_number(need(record, where, "question_id", kind=(int, str)), where) for where, record in listed]
    every = every or list(said)
    unknown = said.keys() - set(every)
    if unknown:
        raise EvaluationError(f"{path} has no question {min(unknown)}, which was answered")
    return [
        _json(out / name, [{"question_id": number, "answer": texts.get(number, "")} for number in every])
        for name, texts in (("submission.json", said), ("submission_normalized.json", clean))
    ]


def _number(text: str | int, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise EvaluationError(f"{where}: the question's id is {text!r}, and the server wants a number") from None


def vizwiz(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """[{image, answer}], for EvalAI's challenge 2185."""
    rows = [{"image": _vizwiz_name(item), "answer": _said(item, answers, codebase)} for item in items]
    return [_json(out / "submission.json", rows)]


def _vizwiz_name(item: Item) -> str:
    """V1-1's file has the picture's path as id; LLaVA's has a number, and the name as picture."""
    path = item.source_id if isinstance(item.source_id, str) else item.image
    return Path(str(path)).name


def gqa(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """[{questionId, prediction}], which GQA's own script reads."""
    rows = [{"questionId": item.id, "prediction": gqa_answer(answers[item.id])} for item in items]
    return [_json(out / "submission.json", rows)]


def documents(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """[{questionId, answer}], for the Robust Reading Competition."""
    rows = [{"questionId": item.source_id, "answer": answers[item.id]} for item in items]
    return [_json(out / "submission.json", rows)]


def by_id(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """{id: answer}: MM-Vet's result file; MMMU's, in which a multiple choice is a letter."""
    return [_json(out / "submission.json", {item.id: mmmu_answer(item, answers[item.id]) for item in items})]


def mmbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """A table for OpenCompass: the columns that are not dropped, with the prediction as the seventh."""
    return [_table(items, answers, codebase, out, _TABLE_DROPPED, 6)]


def ccbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
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
                value = _NOT_IN_XML.sub("", value)
            cell = sheet.cell(number, column, value)
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with "=" is no formula
    file = io.BytesIO()
    book.save(file)
    return files.write_bytes(out / "submission.xlsx", _without_dates(file))


def _without_dates(file: io.BytesIO) -> bytes:
    """A workbook without the time at which it was written: the same answers make the same file."""
    made = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"1980-01-01T00:00:00Z", content)
            new.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


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

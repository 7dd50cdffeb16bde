"""Submissions: the files that servers and judges score, as the reference's scripts write them."""

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
    """Write a submission into a directory that may contain other files; no file is replaced.

    Args:
        submit: Writes the submission.
        items: The benchmark's items.
        answers: Item id -> answer.
        codebase: Whose rules apply.
        folder: The benchmark's files.
        out: Directory to write to.

    Returns:
        The files.

    Raises:
        EvaluationError: One of the files exists with other content.
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
                        f"{out / path.name} already exists with other answers: --output DIR names another directory"
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
    """LLaVA's scripts submit normalized answers, V1-1's the answers as they are."""
    return normalize_m4c(answers[item.id]) if codebase == "llava" else answers[item.id]


def vqav2(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write [{question_id, answer}] for EvalAI's challenge 830, with answers as they are and normalized.

    Normalized answers never score lower. The server expects every question of test2015: if the data folder has a file
    that lists them, the others get empty answers.
    """
    said = {_number(item.source_id, item.id): _said(item, answers, codebase) for item in items}
    clean = {int(item.source_id): normalize_m4c(answers[item.id]) for item in items}
    path = folder.find_optional("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl")
    listed = [] if path is None else records(path)
    every = [_number(need(record, where, "question_id", kind=(int, str)), where) for where, record in listed]
    every = every or list(said)
    unknown = said.keys() - set(every)
    if unknown:
        raise EvaluationError(f"{path} has no question {min(unknown)}, for which there is an answer")
    return [
        _json(out / name, [{"question_id": number, "answer": texts.get(number, "")} for number in every])
        for name, texts in (("submission.json", said), ("submission_normalized.json", clean))
    ]


def _number(text: str | int, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise EvaluationError(f"{where}: the question's id is {text!r}, but the server expects a number") from None


def vizwiz(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write [{image, answer}] for EvalAI's challenge 2185."""
    rows = [{"image": _vizwiz_name(item), "answer": _said(item, answers, codebase)} for item in items]
    return [_json(out / "submission.json", rows)]


def _vizwiz_name(item: Item) -> str:
    """The id in V1-1's file is the image's path; LLaVA's file has a number as id, and the image's name."""
    path = item.source_id if isinstance(item.source_id, str) else item.image
    return Path(str(path)).name


def gqa(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write [{questionId, prediction}] for GQA's own script."""
    rows = [{"questionId": item.id, "prediction": gqa_answer(answers[item.id])} for item in items]
    return [_json(out / "submission.json", rows)]


def documents(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write [{questionId, answer}] for the Robust Reading Competition."""
    rows = [{"questionId": item.source_id, "answer": answers[item.id]} for item in items]
    return [_json(out / "submission.json", rows)]


def by_id(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write {id: answer}: the result file of MM-Vet, and of MMMU, where multiple-choice answers are letters."""
    return [_json(out / "submission.json", {item.id: mmmu_answer(item, answers[item.id]) for item in items})]


def mmbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write a table for OpenCompass, with the prediction as the seventh column."""
    return [_table(items, answers, codebase, out, _TABLE_DROPPED, 6)]


def ccbench(items: Sequence[Item], answers: Answers, codebase: Codebase, folder: DataFolder, out: Path) -> list[Path]:
    """Write a table for OpenCompass, with the prediction as the ninth column."""
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
                cell.data_type = "s"  # an answer that begins with "=" is not a formula
    file = io.BytesIO()
    book.save(file)
    return files.write_bytes(out / "submission.xlsx", _without_dates(file))


def _without_dates(file: io.BytesIO) -> bytes:
    """A workbook without time stamps, so that the same answers give the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"1980-01-01T00:00:00Z", content)
            new.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def _cells(item: Item, prediction: str) -> Mapping[str, Any]:
    """The cells as pandas writes them, with texts that it reads as missing values left empty."""
    cells: dict[str, Any] = {name: None if is_missing(text) else text for name, text in item.record.items()}
    return cells | {"index": int(item.source_id), "prediction": prediction}


def import_openpyxl() -> Any:
    """Import openpyxl.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        import openpyxl
    except ImportError:
        raise ImportError(".xlsx submissions need openpyxl: pip install 'internvl-jax[eval]'") from None
    return openpyxl

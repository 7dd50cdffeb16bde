"""Prediction files, matched with a benchmark's items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.items import SHORT, YES_NO, EvaluationError, Item
from internvl_jax.evaluation.datasets.records import need, raise_problems, read_text, records

IDS = ("id", "question_id", "questionId", "index", "image")
TEXTS = ("answer", "text", "prediction")
QUESTIONS = ("question", "prompt")


def read_predictions(path: Path, items: Sequence[Item]) -> dict[str, str]:
    """Read a file of predictions.

    The file contains JSON lines or a JSON list of records with an id ("id", "question_id", "questionId", "index" or
    "image") and an answer ("answer", "text" or "prediction"), or one JSON object {id: answer}. Where several items
    share an id, the record's "question" or "prompt" distinguishes them.

    Args:
        path: The file.
        items: The benchmark's items.

    Returns:
        Item id -> answer.

    Raises:
        EvaluationError: Records are malformed, unknown, duplicate or missing; all are listed.
    """
    by_id: dict[str, list[Item]] = {}
    by_alias: dict[str, list[Item]] = {}
    for item in items:
        for name in {item.id, str(item.source_id)}:
            by_id.setdefault(name, []).append(item)
        for name in item.aliases:
            by_alias.setdefault(name, []).append(item)
    by_id = by_alias | by_id
    answers: dict[str, str] = {}
    first: dict[str, str] = {}
    problems = []
    for where, record in _rows(path):
        try:
            item, answer = _match(record, where, by_id)
        except EvaluationError as error:
            problems.append(str(error))
            continue
        if item.id in answers:
            problems.append(f"{where} answers {item.id!r}, which {first[item.id]} also answers")
        answers[item.id], first[item.id] = answer, where
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        problems.insert(0, f"{path} has no answer to {len(missing)} of {len(items)} questions: {shown}")
    raise_problems(problems)
    return answers


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist: --predictions names a file of answers") from None
    except IsADirectoryError:
        inside = "its predictions.jsonl" if (path / "predictions.jsonl").exists() else "a file of answers"
        raise EvaluationError(f"{path} is a directory: --predictions names {inside}") from None
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if isinstance(whole, dict) and whole and all(isinstance(value, str) for value in whole.values()):
            return [(f"{path}, {key!r}", {"id": key, "answer": value}) for key, value in whole.items()]
    return records(path, text)


def _match(record: dict[str, Any], where: str, by_id: dict[str, list[Item]]) -> tuple[Item, str]:
    name = str(need(record, where, *IDS, kind=(str, int)))
    if isinstance(record.get("error"), str):
        raise EvaluationError(f"{where}: {name!r} has an error in place of an answer: {record['error']}")
    answer = need(record, where, *TEXTS)
    found = by_id.get(name) or by_id.get(name.replace("/images/", "/"), [])  # LLaVA's MME: the image's whole path
    if len(found) > 1:
        asked = _question(need(record, where, *QUESTIONS))
        found = [item for item in found if _question(item.question) == asked]
        if len(found) > 1:
            raise EvaluationError(f"{where}: several items have the id {name!r} and this question")
    if not found:
        raise EvaluationError(f"{where}: {name!r} is not a question of the benchmark")
    return found[0], answer


def _question(text: str) -> str:
    """The normalized question: its first line, in lower case, without the instructions that prompts add."""
    line = text.partition("\n")[0].replace(SHORT, "").replace(YES_NO, "")
    return " ".join(line.split()).lower()

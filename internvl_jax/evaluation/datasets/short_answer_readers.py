"""Readers of benchmarks with short or free-form answers, from their official files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import (
    SHORT,
    UNANSWERABLE,
    Codebase,
    EvaluationError,
    Item,
    distinct,
)
from internvl_jax.evaluation.datasets.records import (
    ID,
    SOURCE_IDS,
    accepted_answers,
    collecting,
    image_field,
    need,
    raise_problems,
    records,
)
from internvl_jax.evaluation.scorers.vqa import PEOPLE


def short_answers(
    folder: DataFolder,
    codebase: Codebase,
    *,
    questions: Sequence[str],
    annotations: Sequence[str] = (),
    coco: str = "",
    people: bool = False,
    server: bool = False,
) -> list[Item]:
    """Read questions with a short answer from V1-1's, LLaVA's or the official file, whichever exists.

    Args:
        folder: The benchmark's files.
        codebase: Not used.
        questions: Names of files with questions; the first that exists is read.
        annotations: Names of files with the accepted answers, if the questions' file has none.
        coco: COCO split, for example "val2014", where official files identify images by number.
        people: Whether ten annotators' answers are required.
        server: Whether only a server has the answers.

    Raises:
        EvaluationError: Records are malformed; all are listed.
    """
    path = folder.find(*questions)
    known = _annotations(folder.find(*annotations)) if annotations and not server else {}
    items = []
    problems: list[str] = []
    for where, record in records(path):
        with collecting(problems):
            question = _bare(need(record, where, "text", "question"))
            image = image_field(record, where, "image_local_name", "image") or _image_name(record, where, coco)
            given = any(record.get(name) is not None for name in SOURCE_IDS)
            source_id = need(record, where, *SOURCE_IDS, kind=ID) if given else image
            gold, category = ((), "") if server else _gold(record, source_id, question, known, where)
            if people and len(gold) != PEOPLE:
                raise EvaluationError(
                    f"{where}: question {source_id!r} has {len(gold)} annotators' answers, not {PEOPLE}"
                )
            aliases = (Path(image).name,)
            items.append(Item("", source_id, question, image, gold, category, record=record, aliases=aliases))
    raise_problems(problems)
    return distinct(items)


def _bare(text: str) -> str:
    """Remove the instruction from a prompt of LLaVA's files; the benchmark's prompt function adds it again."""
    return text.removesuffix(f"\n{SHORT}").removesuffix(f"\n{UNANSWERABLE}")


def _image_name(record: Mapping[str, Any], where: str, coco: str) -> str:
    number = need(record, where, "image_id", kind=ID)
    return f"COCO_{coco}_{number:012d}.jpg" if isinstance(number, int) else f"{number}.jpg"


Known = dict[Any, tuple[tuple[str, ...], str]]


def _annotations(path: Path) -> Known:
    """(accepted answers, category) by question id, and by (image id, lower-case question) if the file has both."""
    known: Known = {}
    problems: list[str] = []
    for where, record in records(path):
        with collecting(problems):
            answers = accepted_answers(need(record, where, "answers", "answer", kind=(list, str, int, float)), where)
            value = answers, str(record.get("answer_type", ""))
            known[_id(record, where)] = value
            if "image_id" in record and "question" in record:
                known[str(record["image_id"]), str(record["question"]).lower()] = value
    raise_problems(problems)
    return known


def _id(record: Mapping[str, Any], where: str) -> str:
    names = (*SOURCE_IDS, "image")
    if all(record.get(name) is None for name in names) and record.get("image_id") is not None:
        return str(record["image_id"])
    return str(need(record, where, *names, kind=ID))


def _gold(
    record: Mapping[str, Any], source_id: Any, question: str, known: Known, where: str
) -> tuple[tuple[str, ...], str]:
    key = str(source_id)
    found = known.get((key, question.partition("\n")[0].lower())) or known.get(key)
    if found is not None:
        return found
    given = record.get("answers", record.get("answer"))
    if given is None or known:
        raise EvaluationError(f"{where}: question {source_id!r} has no answer in the annotations")
    return accepted_answers(given, where), ""


def gqa(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read the balanced questions of testdev_balanced_questions.json; the category is the structural type."""
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("testdev_balanced_questions.json", "testdev_balanced_all_questions.json")):
        if not record.get("isBalanced", True):
            continue
        with collecting(problems):
            types = need(record, where, "types", kind=dict)
            answer, image = need(record, where, "answer"), need(record, where, "imageId")
            question, structural = need(record, where, "question"), need(types, where, "structural")
            source_id = need(record, where, "id", kind=ID)
            items.append(Item("", source_id, question, f"{image}.jpg", (answer,), structural, record=record))
    raise_problems(problems)
    return distinct(items)


def chartqa(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read both halves of ChartQA's test set; the category is the name of the half."""
    items = []
    problems: list[str] = []
    for half in ("human", "augmented"):
        for where, record in records(folder.find(f"test_{half}.jsonl")):
            with collecting(problems):
                answers = accepted_answers(need(record, where, "answer", kind=(list, str, int, float)), where)
                number = need(record, where, "question_id", kind=ID)
                question, image = need(record, where, "question"), need(record, where, "image")
                items.append(Item("", f"{half}/{number}", question, image, answers, half, aliases=(str(number),)))
    raise_problems(problems)
    return distinct(items)


def mmvet(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read llava-mm-vet.jsonl. Answers and capabilities, which the judge needs, are in mm-vet.json."""
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("llava-mm-vet.jsonl")):
        with collecting(problems):
            number = need(record, where, "question_id", kind=int)
            question, image = need(record, where, "text"), need(record, where, "image")
            items.append(Item("", f"v1_{number}", question, image, aliases=(str(number),)))
    raise_problems(problems)
    return distinct(items)

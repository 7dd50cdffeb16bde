"""Readers of multiple-choice benchmarks from JSON and parquet files: ScienceQA, SEED-Bench and MMMU."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.evaluation.datasets.data_folder import DataFolder
from internvl_jax.evaluation.datasets.items import (
    LETTER,
    Codebase,
    EvaluationError,
    Item,
    distinct,
)
from internvl_jax.evaluation.datasets.records import (
    ID,
    collecting,
    image_field,
    json_object,
    need,
    raise_problems,
    records,
)
from internvl_jax.evaluation.scorers.choices import LETTERS

SEED_IMAGE_TYPES = 9  # of twelve; the others are about videos


def scienceqa(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read scienceqa_test_img.jsonl or, for LLaVA's prompts, llava_test_CQM-A.json with answers from problems.json.

    LLaVA's file also has questions without an image.
    """
    if codebase == "llava":
        return _scienceqa_llava(folder)
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("scienceqa_test_img.jsonl")):
        with collecting(problems):
            texts, right = need(record, where, "choices", kind=list), need(record, where, "answer", kind=int)
            options = _options(texts, right, where)
            hint = f"{record['hint']}\n" if record.get("hint") else ""
            question = hint + need(record, where, "question")
            image = need(record, where, "image")
            source_id = image if record.get("id") is None else need(record, where, "id", kind=ID)
            items.append(Item("", source_id, question, image, (LETTERS[right],), options=options))
    raise_problems(problems)
    return distinct(items)


def _scienceqa_llava(folder: DataFolder) -> list[Item]:
    known = records(folder.find("problems.json"))
    problems = {str(need(record, where, "id", kind=ID)): (where, record) for where, record in known}
    items = []
    wrong: list[str] = []
    for where, record in records(folder.find("llava_test_CQM-A.json")):
        with collecting(wrong):
            source_id = str(need(record, where, "id", kind=ID))
            if source_id not in problems:
                raise EvaluationError(f"{where}: problems.json has no question {source_id!r}")
            place, problem = problems[source_id]
            right = need(problem, place, "answer", kind=int)
            options = _options(need(problem, place, "choices", kind=list), right, place)
            turns = need(record, where, "conversations", kind=list)
            turn = turns[0] if turns and isinstance(turns[0], dict) else {}
            question = need(turn, where, "value").replace("<image>", "").strip()
            image = image_field(record, where, "image")
            kind = "image" if image else "text"
            items.append(Item("", source_id, question, image, (LETTERS[right],), kind, options))
    raise_problems(wrong)
    return distinct(items)


def _options(texts: Sequence[Any], right: int, where: str) -> dict[str, str]:
    if not 0 <= right < len(texts) <= len(LETTERS):
        raise EvaluationError(f"{where}: answer {right} of {len(texts)} choices (there may be {len(LETTERS)})")
    return dict(zip(LETTERS, map(str, texts)))


def seed(folder: DataFolder, codebase: Codebase) -> list[Item]:
    """Read the questions about images of seed.jsonl, with types and answers from SEED-Bench.json."""
    path = folder.find("SEED-Bench.json")
    whole = json_object(path)
    types = {str(number): name for name, number in need(whole, str(path), "question_type", kind=dict).items()}
    known = {str(need(record, where, "question_id", kind=ID)): (where, record) for where, record in records(path)}
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("seed.jsonl", "llava-seed-bench.jsonl")):
        with collecting(problems):
            source_id = need(record, where, "question_id", kind=ID)
            if str(source_id) not in known:
                raise EvaluationError(f"{where}: SEED-Bench.json has no question {source_id!r}")
            place, truth = known[str(source_id)]
            number = need(truth, place, "question_type_id", kind=int)
            if number <= SEED_IMAGE_TYPES:
                category, answer = types.get(str(number), str(number)), need(truth, place, "answer")
                image = need(record, where, "image")
                items.append(Item("", source_id, need(record, where, "text", "question"), image, (answer,), category))
    raise_problems(problems)
    return distinct(items)


def mmmu(folder: DataFolder, codebase: Codebase, *, split: str) -> list[Item]:
    """Read the parquet files of MMMU/MMMU, one per subject. Only the first image is used, as in the reference.

    Raises:
        ImportError: pyarrow is not installed.
        EvaluationError: There are no files, or rows are malformed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError("MMMU's parquet files need pyarrow: pip install 'internvl-jax[eval]'") from None
    pattern = f"*/{split}-*.parquet"
    places = [folder.root / folder.name, folder.root]
    paths = next((found for place in places if (found := sorted(place.glob(pattern)))), [])
    if not paths:
        raise EvaluationError(
            f"{folder.root} has no {pattern} (one per subject): docs/evaluation.md says where to get it"
        )
    items = []
    problems: list[str] = []
    for path in paths:
        try:
            rows = parquet.read_table(path).to_pylist()
        except ValueError as error:  # ArrowInvalid, which does not say where
            raise EvaluationError(f"{path} is not a readable parquet file ({error})") from None
        for number, record in enumerate(rows, 1):
            with collecting(problems):
                items.append(_mmmu_item(record, f"{path}, row {number}", path.parent.name, split))
    raise_problems(problems)
    return distinct(items)


def _mmmu_item(record: Mapping[str, Any], where: str, subject: str, split: str) -> Item:
    image = need(need(record, where, "image_1", kind=dict), f"{where}, image_1", "bytes", kind=bytes)
    options = {}
    if record.get("question_type") == "multiple-choice":
        texts = _literal(need(record, where, "options"))
        if not texts:
            raise EvaluationError(f"{where}: {record['options']!r:.80} is not a list of options")
        options = dict(zip("ABCDEFGHIJ", map(str, texts)))
    answer = record.get("answer") or ""
    if split == "validation":  # without one, every answer to an open question would match
        answer = need({"answer": answer or None}, where, "answer")
    several = _literal(answer) if answer.startswith("[") else None
    gold = tuple(map(str, several)) if several else (answer,)
    source_id, question = need(record, where, "id"), need(record, where, "question")
    return Item("", source_id, question, image, gold, subject, options)


def _literal(text: str) -> list[Any] | None:
    """The list that a Python literal contains, or None."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return list(values) if isinstance(values, (list, tuple)) else None


def lettered(item: Item, instruction: str = LETTER) -> str:
    """Return the prompt of a multiple-choice question: question, options and instruction, one per line."""
    return "\n".join((item.question, *(f"{letter}. {text}" for letter, text in item.options.items()), instruction))

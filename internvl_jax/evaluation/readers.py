"""Items from the official files of each benchmark, as they are downloaded. Every reader takes (folder, codebase)."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.evaluation.items import (
    LETTER,
    SHORT,
    UNANSWERABLE,
    Codebase,
    EvaluationError,
    Folder,
    Item,
    distinct,
    json_object,
    need,
    noting,
    read_text,
    records,
    refuse,
)
from internvl_jax.evaluation.scorers.choices import LETTERS
from internvl_jax.evaluation.scorers.vqa import PEOPLE
from internvl_jax.evaluation.scorers.yes_no import COGNITION, PERCEPTION

logger = logging.getLogger(__name__)

ID = (int, str)
SOURCE_IDS = ("question_id", "questionId", "id")
POPE = ("adversarial", "random", "popular")  # in the order of the questions' file
SEED_IMAGE_TYPES = 9  # the first of twelve; the others are about videos

# What pandas, with which the reference reads tables, takes for a missing value.
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
    + ("NULL", "NaN", "None", "n/a", "nan", "null")
)


def short_answers(
    folder: Folder,
    codebase: Codebase,
    *,
    questions: Sequence[str],
    annotations: Sequence[str] = (),
    coco: str = "",
    people: bool = False,
    server: bool = False,
) -> list[Item]:
    """Questions with a short answer: records of V1-1's, LLaVA's or the official file, whichever is there.

    annotations: files with the accepted answers, where the questions do not bring them.
    coco: "val2014" where official files have numbers for pictures. people: ten answers are needed. server: none are.
    """
    path = folder.find(*questions)
    known = _annotations(folder.find(*annotations)) if annotations and not server else {}
    items = []
    problems: list[str] = []
    for where, record in records(path):
        with noting(problems):
            question = _bare(need(record, where, "text", "question"))
            image = _image(record, where, "image_local_name", "image") or _image_name(record, where, coco)
            given = any(record.get(name) is not None for name in SOURCE_IDS)
            source_id = need(record, where, *SOURCE_IDS, kind=ID) if given else image
            gold, category = ((), "") if server else _gold(record, source_id, question, known, where)
            if people and len(gold) != PEOPLE:
                raise EvaluationError(
                    f"{where}: question {source_id!r} has {len(gold)} answers by people, not {PEOPLE}"
                )
            aliases = (Path(image).name,)
            items.append(Item("", source_id, question, image, gold, category, record=record, aliases=aliases))
    refuse(problems)
    return distinct(items)


def _bare(text: str) -> str:
    """LLaVA's files hold whole prompts; the instruction is put back when the prompt is made."""
    return text.removesuffix(f"\n{SHORT}").removesuffix(f"\n{UNANSWERABLE}")


def _image(record: Mapping[str, Any], where: str, *names: str) -> str | None:
    """The path in the first of these fields that has one. Raises EvaluationError where it is no text."""
    name = next((name for name in names if record.get(name)), None)
    return None if name is None else need(record, where, name)


def _image_name(record: Mapping[str, Any], where: str, coco: str) -> str:
    number = need(record, where, "image_id", kind=ID)
    return f"COCO_{coco}_{number:012d}.jpg" if isinstance(number, int) else f"{number}.jpg"


Known = dict[Any, tuple[tuple[str, ...], str]]


def _annotations(path: Path) -> Known:
    """(accepted answers, category) by question id, and by (picture's id, lower-case question) where files have both."""
    known: Known = {}
    problems: list[str] = []
    for where, record in records(path):
        with noting(problems):
            answers = _texts(need(record, where, "answers", "answer", kind=(list, str, int, float)), where)
            value = answers, str(record.get("answer_type", ""))
            known[_id(record, where)] = value
            if "image_id" in record and "question" in record:
                known[str(record["image_id"]), str(record["question"]).lower()] = value
    refuse(problems)
    return known


def _id(record: Mapping[str, Any], where: str) -> str:
    names = (*SOURCE_IDS, "image")
    if all(record.get(name) is None for name in names) and record.get("image_id") is not None:
        return str(record["image_id"])
    return str(need(record, where, *names, kind=ID))


def _texts(answers: Any, where: str) -> tuple[str, ...]:
    """Accepted answers, of which a file may have some as numbers."""
    given = answers if isinstance(answers, list) else [answers]
    values = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    wrong = next((value for value in values if not _is_answer(value)), None) if values else "an empty list"
    if wrong is not None or None in values:
        raise EvaluationError(f"{where}: the answers must be texts, or records with an 'answer', not {wrong!r:.80}")
    return tuple(map(str, values))


def _is_answer(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int)) and not isinstance(value, bool)


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
    return _texts(given, where), ""


def gqa(folder: Folder, codebase: Codebase) -> list[Item]:
    """testdev_balanced_questions.json: the balanced questions, with their structural type as category."""
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("testdev_balanced_questions.json", "testdev_balanced_all_questions.json")):
        if not record.get("isBalanced", True):
            continue
        with noting(problems):
            types = need(record, where, "types", kind=dict)
            answer, image = need(record, where, "answer"), need(record, where, "imageId")
            question, structural = need(record, where, "question"), need(types, where, "structural")
            source_id = need(record, where, "id", kind=ID)
            items.append(Item("", source_id, question, f"{image}.jpg", (answer,), structural, record=record))
    refuse(problems)
    return distinct(items)


def chartqa(folder: Folder, codebase: Codebase) -> list[Item]:
    """Both halves, whose names are the categories."""
    items = []
    problems: list[str] = []
    for half in ("human", "augmented"):
        for where, record in records(folder.find(f"test_{half}.jsonl")):
            with noting(problems):
                answers = _texts(need(record, where, "answer", kind=(list, str, int, float)), where)
                number = need(record, where, "question_id", kind=ID)
                question, image = need(record, where, "question"), need(record, where, "image")
                items.append(Item("", f"{half}/{number}", question, image, answers, half, aliases=(str(number),)))
    refuse(problems)
    return distinct(items)


def scienceqa(folder: Folder, codebase: Codebase) -> list[Item]:
    """Internvl: scienceqa_test_img.jsonl. LLaVA: all questions of llava_test_CQM-A.json, of which some have no picture;
    problems.json has their answers."""
    if codebase == "llava":
        return _scienceqa_llava(folder)
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("scienceqa_test_img.jsonl")):
        with noting(problems):
            texts, right = need(record, where, "choices", kind=list), need(record, where, "answer", kind=int)
            options = _options(texts, right, where)
            hint = f"{record['hint']}\n" if record.get("hint") else ""
            question = hint + need(record, where, "question")
            image = need(record, where, "image")
            source_id = image if record.get("id") is None else need(record, where, "id", kind=ID)
            items.append(Item("", source_id, question, image, (LETTERS[right],), options=options))
    refuse(problems)
    return distinct(items)


def _scienceqa_llava(folder: Folder) -> list[Item]:
    known = records(folder.find("problems.json"))
    problems = {str(need(record, where, "id", kind=ID)): (where, record) for where, record in known}
    items = []
    wrong: list[str] = []
    for where, record in records(folder.find("llava_test_CQM-A.json")):
        with noting(wrong):
            source_id = str(need(record, where, "id", kind=ID))
            if source_id not in problems:
                raise EvaluationError(f"{where}: problems.json has no question {source_id!r}")
            place, problem = problems[source_id]
            right = need(problem, place, "answer", kind=int)
            options = _options(need(problem, place, "choices", kind=list), right, place)
            turns = need(record, where, "conversations", kind=list)
            turn = turns[0] if turns and isinstance(turns[0], dict) else {}
            question = need(turn, where, "value").replace("<image>", "").strip()
            image = _image(record, where, "image")
            kind = "image" if image else "text"
            items.append(Item("", source_id, question, image, (LETTERS[right],), kind, options))
    refuse(wrong)
    return distinct(items)


def _options(texts: Sequence[Any], right: int, where: str) -> dict[str, str]:
    if not 0 <= right < len(texts) <= len(LETTERS):
        raise EvaluationError(f"{where}: answer {right} of {len(texts)} choices (there may be {len(LETTERS)})")
    return dict(zip(LETTERS, map(str, texts)))


def pope(folder: Folder, codebase: Codebase) -> list[Item]:
    """llava_pope_test.jsonl, with labels by position in each category: ids differ between the files."""
    rows = records(folder.find("llava_pope_test.jsonl", "pope_questions.jsonl"))
    items = []
    problems: list[str] = []
    for name in POPE:
        path = folder.find(f"coco/coco_pope_{name}.json", f"coco_pope_{name}.json")
        labels, asked = records(path), [row for row in rows if row[1].get("category") == name]
        if len(labels) != len(asked):
            raise EvaluationError(
                f"{path} has {len(labels)} labels for {len(asked)} questions: the questions go with the labels of "
                "POPE's revision e3e39262, whose random part has 2,910"
            )
        for (where, record), (place, label) in zip(asked, labels):
            with noting(problems):
                text, image = need(record, where, "text"), need(record, where, "image")
                if label.get("image", image) != image or str(label.get("text", "")) not in text:
                    raise EvaluationError(f"{place} is about another question than {where}: {label.get('text')!r}")
                answer = need(label, place, "label")
                if answer not in ("yes", "no"):
                    raise EvaluationError(f"{place}: the label is {answer!r}, neither yes nor no")
                items.append(Item("", need(record, where, "question_id", kind=ID), text, image, (answer,), name))
    refuse(problems)
    return distinct(items)


def mme(folder: Folder, codebase: Codebase) -> list[Item]:
    """One text file per task: picture, question and Yes or No between tabs, two lines for each picture."""
    items = []
    problems: list[str] = []
    for task in PERCEPTION + COGNITION:
        path = folder.find(*(f"{place}{task}.txt" for place in ("", "MME_Benchmark_release_version/", "Your_Results/")))
        lines = [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
        rows = [(f"{path}:{number}", line.split("\t")) for number, line in enumerate(lines, 1)]
        for number, (where, row) in enumerate(rows):
            with noting(problems):
                if len(row) < 3 or row[2].strip().lower() not in ("yes", "no"):
                    raise EvaluationError(f"{where} is not an image, a question and Yes or No between tabs")
                if len(rows) % 2 or row[0] != rows[number // 2 * 2][1][0]:
                    raise EvaluationError(f"{where}: two lines in a row are needed for each image")
                image, question, label = row[0], row[1], row[2].strip().lower()
                record = {"pair": number // 2, "image": image}
                items.append(Item("", f"{task}/{image}", question, f"{task}/{image}", (label,), task, record=record))
    refuse(problems)
    return distinct(items)


def multiple_choice(folder: Folder, codebase: Codebase, *, files: Sequence[str], server: bool = False) -> list[Item]:
    """A table of MMBench's or CCBench's, whose images are in base64.

    Options that are missing, or whose text pandas takes for a missing value ("None", "N/A", "nan", ...), are not shown,
    as in the reference, which asks such a row nevertheless, even where that option is the right one. LLaVA's script
    stops at the first one that is missing, of A to D, and also takes "None" in any case for missing.
    """
    path = folder.find(*files)
    rows = list(_table(path))
    images = {row["index"]: row["image"] for _, row in rows}
    items = []
    problems: list[str] = []
    hidden: list[str] = []
    for where, row in rows:
        with noting(problems):
            if not _INDEX.fullmatch(row["index"]):
                raise EvaluationError(f"{where}: the index is {row['index']!r}, not a number")
            options = _cells(row, codebase)
            answer = row.get("answer", "")
            if not server and (answer not in tuple(LETTERS) or answer not in row):
                raise EvaluationError(f"{where}: the answer is {answer!r}, and the options are {', '.join(options)}")
            hint = row.get("hint", "")
            question = row["question"] if _missing(hint, codebase) else f"{hint}\n{row['question']}"
            image = _picture(images.get(row["image"], row["image"]), where)
            gold = () if server else (answer,)
            record = {name: value for name, value in row.items() if name != "image"}
            items.append(Item("", int(row["index"]), question, image, gold, row.get("category", ""), options, record))
            hidden += [
                f"{where}: {letter} is {row[letter]!r}" + (", the answer" if letter == answer else "")
                for letter in LETTERS
                if letter in row and letter not in options and (row[letter] or letter == answer)
            ]
    refuse(problems)
    if hidden:
        logger.warning(
            "options that the reference reads as missing are not shown: %s",
            "; ".join(hidden[:5]) + (f"; and {len(hidden) - 5} more" if len(hidden) > 5 else ""),
        )
    duplicate = next((item.id for item in distinct(items) if "#" in item.id), None)
    if duplicate:
        raise EvaluationError(f"{path} has the index {duplicate.partition('#')[0]} more than once")
    return distinct(items)


_INDEX = re.compile("[0-9]{1,18}")
_NEEDED = ("index", "question", "A", "B", "image")


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # images are long fields
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    number = 0
    try:
        columns = list(reader.fieldnames or ())
        lacking = [name for name in _NEEDED if name not in columns]
        if lacking:
            raise EvaluationError(f"{path} has no column {', '.join(lacking)}: it is not one of MMBench's tables")
        for number, row in enumerate(reader, 1):
            where = f"{path}, row {number}"
            present = [name for name in columns if row[name] is not None]
            # Editors drop the tabs of empty fields at a line's end; a row that ends in its image may be cut off there.
            if None in row or set(_NEEDED) - set(present) or (present != columns and present[-1] == "image"):
                raise EvaluationError(f"{where} has more or fewer fields than the head of the table: is it cut off?")
            yield where, {name: row[name] or "" for name in columns}
    except csv.Error as error:
        raise EvaluationError(f"{path}, row {number + 1} is not a row of a table ({error})") from None
    if not number:
        raise EvaluationError(f"{path} is empty")


def is_missing(text: str) -> bool:
    """Whether pandas, with which the reference reads tables, takes the text of a cell for a missing value."""
    return text in MISSING


def _missing(text: str, codebase: Codebase) -> bool:
    return is_missing(text) or (codebase == "llava" and text.lower() in ("nan", "none"))


def _cells(row: Mapping[str, str], codebase: Codebase) -> dict[str, str]:
    options = {}
    for letter in LETTERS[:4] if codebase == "llava" else LETTERS:
        if not _missing(row.get(letter, ""), codebase):
            options[letter] = row[letter]
        elif codebase == "llava":
            break
    return options


def _picture(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise EvaluationError(f"{where}: the image is not base64") from None


def mmvet(folder: Folder, codebase: Codebase) -> list[Item]:
    """llava-mm-vet.jsonl; the judge's answers and capabilities are in mm-vet.json (`judge`)."""
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("llava-mm-vet.jsonl")):
        with noting(problems):
            number = need(record, where, "question_id", kind=int)
            question, image = need(record, where, "text"), need(record, where, "image")
            items.append(Item("", f"v1_{number}", question, image, aliases=(str(number),)))
    refuse(problems)
    return distinct(items)


def seed(folder: Folder, codebase: Codebase) -> list[Item]:
    """seed.jsonl, the questions about images; SEED-Bench.json has their types and answers."""
    path = folder.find("SEED-Bench.json")
    whole = json_object(path)
    types = {str(number): name for name, number in need(whole, str(path), "question_type", kind=dict).items()}
    known = {str(need(record, where, "question_id", kind=ID)): (where, record) for where, record in records(path)}
    items = []
    problems: list[str] = []
    for where, record in records(folder.find("seed.jsonl", "llava-seed-bench.jsonl")):
        with noting(problems):
            source_id = need(record, where, "question_id", kind=ID)
            if str(source_id) not in known:
                raise EvaluationError(f"{where}: SEED-Bench.json has no question {source_id!r}")
            place, truth = known[str(source_id)]
            number = need(truth, place, "question_type_id", kind=int)
            if number <= SEED_IMAGE_TYPES:
                category, answer = types.get(str(number), str(number)), need(truth, place, "answer")
                image = need(record, where, "image")
                items.append(Item("", source_id, need(record, where, "text", "question"), image, (answer,), category))
    refuse(problems)
    return distinct(items)


def mmmu(folder: Folder, codebase: Codebase, *, split: str) -> list[Item]:
    """The parquet files of MMMU/MMMU, one per subject; only the first picture is shown, as in the reference."""
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
            with noting(problems):
                items.append(_mmmu_item(record, f"{path}, row {number}", path.parent.name, split))
    refuse(problems)
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
    """The list that a text writes out as Python does, None where it is something else."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return list(values) if isinstance(values, (list, tuple)) else None


def lettered(item: Item, instruction: str = LETTER) -> str:
    """Question, options and instruction on lines of their own."""
    return "\n".join((item.question, *(f"{letter}. {text}" for letter, text in item.options.items()), instruction))

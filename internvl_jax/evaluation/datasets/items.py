"""Benchmark items: what a question of a benchmark consists of, and the fixed instructions of the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Whose prompts and rules: V1-1's evaluation scripts, or LLaVA's, with which V1-0 and LLaVA-1.5 were evaluated.
Codebase = Literal["internvl", "llava"]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_NO = "Please answer yes or no."


class EvaluationError(ValueError):
    """Data, predictions or a run cannot be used; the message names the file and the item."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: Id, unique in the data set.
        source_id: Id in the data file, which need not be unique.
        question: Question without the instruction that the prompt adds.
        image: Path as in the data file, or the encoded image itself; None for a question without an image.
        gold: Accepted answers: ten annotators' answers, a letter or a label; () where only a server has them.
        category: Category or task, "" if there is none.
        options: Letter -> text of the options of a multiple-choice question, in order.
        record: Further fields of the data file.
        aliases: Other ids that prediction files use.
    """

    id: str
    source_id: str | int
    question: str
    image: str | bytes | None
    gold: tuple[str, ...] = ()
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def distinct(items: Iterable[Item]) -> list[Item]:
    """Return the items with unique ids: the source id where it is unique, else numbered, "7#1", "7#2"."""
    items = list(items)
    counts = Counter(str(item.source_id) for item in items)
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        name = str(item.source_id)
        seen[name] += 1
        named.append(replace(item, id=name if counts[name] == 1 else f"{name}#{seen[name]}"))
    return named

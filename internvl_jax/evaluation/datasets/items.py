"""Benchmark items: what a question of a benchmark consists of, and the fixed instructions of the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Whose prompts and rules: V1-1's own scripts, or LLaVA's, with which V1-0 and LLaVA-1.5 were evaluated.
Codebase = Literal["internvl", "llava"]
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_NO = "Please answer yes or no."


class EvaluationError(ValueError):
    """Data, predictions or runs that cannot be used; the message names the file and the item."""


@dataclass(frozen=True)
class Item:
    """One question of a data set."""

    id: str  # unique in the data set
    source_id: str | int  # as its file has it, which need not be unique
    question: str  # without the instruction that a prompt adds
    image: str | bytes | None  # a path as the file has it, or the picture itself
    gold: tuple[str, ...] = ()  # accepted answers, ten people's, a letter or a label; () where only a server knows
    category: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # what else its file says
    aliases: tuple[str, ...] = ()  # other ids by which files of predictions name it


def distinct(items: Iterable[Item]) -> list[Item]:
    """Items with unique ids: their source's where it is unique, else numbered "7#1", "7#2"."""
    items = list(items)
    counts = Counter(str(item.source_id) for item in items)
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        name = str(item.source_id)
        seen[name] += 1
        named.append(replace(item, id=name if counts[name] == 1 else f"{name}#{seen[name]}"))
    return named

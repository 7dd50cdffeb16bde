"""Benchmarks of yes and no: POPE's F1 and MME's points."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(text: str) -> str:
    """ "yes" or "no", as POPE's script hears an answer (Li et al., 2023).

    The words before the first full stop decide: "No", "no" or "not" among them is no, anything else is yes, an empty
    answer too.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


@dataclass(frozen=True)
class PopeCounts:
    """Answers of one category; "yes" is the positive class. Quotients without a denominator are 0."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.tn + self.fn)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.tp + self.fp, self.tp + self.fp + self.tn + self.fn)


def pope_counts(answers: Iterable[tuple[str, str]]) -> PopeCounts:
    """From pairs of a parsed answer and its label, both "yes" or "no"."""
    seen = Counter(answers)
    return PopeCounts(seen["yes", "yes"], seen["yes", "no"], seen["no", "no"], seen["no", "yes"])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def mme_clean(text: str) -> str:
    """An answer as V1-1's script writes it down: Chinese yes and no in English, other Chinese characters dropped."""
    text = text.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No").lower()
    return re.sub(r"[\u4e00-\u9fa5]", "", text.replace("true", "yes").replace("false", "no"))


def mme_answer(text: str) -> str:
    """ "yes", "no" or "other" of a written answer: of what is neither word, the first four characters are looked at."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


@dataclass(frozen=True)
class MmeTask:
    """Shares of questions, and of pictures with both questions, answered rightly."""

    accuracy: float
    accuracy_plus: float
    other: int  # answers that are neither yes nor no

    @property
    def points(self) -> float:
        """Of 200 (Fu et al., 2023)."""
        return 100 * self.accuracy + 100 * self.accuracy_plus


def mme_task(answers: Sequence[tuple[str, str]]) -> MmeTask:
    """From pairs of a parsed answer and its label; two that follow one another are about the same picture.

    Raises ValueError for an odd number.
    """
    if not answers or len(answers) % 2:
        raise ValueError(f"{len(answers)} answers, where every picture needs two")
    right = [answer == label for answer, label in answers]
    both = [first and second for first, second in zip(right[::2], right[1::2])]
    return MmeTask(sum(right) / len(right), sum(both) / len(both), sum(answer == "other" for answer, _ in answers))

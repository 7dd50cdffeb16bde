"""Yes-or-no benchmarks: POPE's F1 and MME's points."""

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
    """Parse an answer as POPE's script does (Li et al., 2023).

    Returns:
        "no" if one of the words before the first full stop is "No", "no" or "not"; otherwise "yes", also for an empty
        answer.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


@dataclass(frozen=True)
class PopeCounts:
    """Counts of the answers of one category; "yes" is the positive class. Ratios with a zero denominator are 0."""

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
    """Count pairs of a parsed answer and its label, both "yes" or "no"."""
    seen = Counter(answers)
    return PopeCounts(seen["yes", "yes"], seen["yes", "no"], seen["no", "no"], seen["no", "yes"])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def mme_clean(text: str) -> str:
    """Normalize an answer as V1-1's script does: Chinese yes and no in English, without other Chinese characters."""
    text = text.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No").lower()
    return re.sub(r"[\u4e00-\u9fa5]", "", text.replace("true", "yes").replace("false", "no"))


def mme_answer(text: str) -> str:
    """Parse an answer as MME's script does (Fu et al., 2023).

    Returns:
        "yes" or "no" if the answer is that word, or has it within its first four characters; else "other".
    """
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


@dataclass(frozen=True)
class MmeTask:
    """Accuracy over questions, and accuracy_plus over images whose two questions are both answered correctly."""

    accuracy: float
    accuracy_plus: float
    other: int  # number of answers that are neither yes nor no

    @property
    def points(self) -> float:
        """Points, at most 200 (Fu et al., 2023)."""
        return 100 * self.accuracy + 100 * self.accuracy_plus


def mme_task(answers: Sequence[tuple[str, str]]) -> MmeTask:
    """Score pairs of a parsed answer and its label; each two consecutive pairs are about the same image.

    Raises:
        ValueError: The number of pairs is odd or zero.
    """
    if not answers or len(answers) % 2:
        raise ValueError(f"{len(answers)} answers, where every image needs two")
    right = [answer == label for answer, label in answers]
    both = [first and second for first, second in zip(right[::2], right[1::2])]
    return MmeTask(sum(right) / len(right), sum(both) / len(both), sum(answer == "other" for answer, _ in answers))

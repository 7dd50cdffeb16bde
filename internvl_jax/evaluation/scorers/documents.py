"""Scorers for documents, charts and diagrams: ANLS (DocVQA, InfographicsVQA), relaxed accuracy (ChartQA), equality."""

from __future__ import annotations

from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity of one answer, from 0 to 1 (ANLS; Biten et al., 2019).

    It is the best over `accepted`, and 0 below 0.5. As in the challenge's script, the distance ignores case and
    repeated spaces, but is divided by the longer length of the upper-cased original texts.
    """
    best = 0.0
    for text in accepted:
        length = max(len(answer.upper()), len(text.upper()))
        distance = levenshtein(_plain(answer), _plain(text))
        best = max(best, 1 - distance / length if length else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def levenshtein(one: str, other: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and substitutions between two strings."""
    row = list(range(len(other) + 1))
    for line, left in enumerate(one, 1):
        before, row[0] = row[0], line
        for column, right in enumerate(other, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (left != right))
    return row[-1]


def relaxed_match(answer: str, accepted: Sequence[str]) -> bool:
    """Return whether an answer is within 5% of an accepted number, or equal text (ChartQA; Masry et al., 2022).

    As in the reference, which computed V1-1's published score, the two arguments are swapped: the difference is divided
    by the model's answer, and a model's "0" is compared as text.
    """
    return any(_within(answer.strip(), text) for text in accepted)


def _within(target: str, prediction: str) -> bool:
    number, reference = _number(prediction), _number(target)
    if number is not None and reference:
        return abs(number - reference) / abs(reference) <= RELAXED_TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    """Return whether texts are equal up to case and surrounding whitespace. Letters are not parsed: "B." is not "B"."""
    return any(answer.strip().lower() == text.strip().lower() for text in accepted)

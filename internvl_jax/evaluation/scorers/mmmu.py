"""MMMU's rules for open questions (Yue et al., 2023): strings and numbers found in the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
SUBJECTS = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects.split()}

CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
LONE_MARKS = frozenset((":", ",", ".", "!", "?", ";", "'"))
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # plain
)

Value = str | float


def subject_of(item: str) -> str:
    """Return the subject of an id such as "validation_Art_Theory_12"."""
    return item.partition("_")[2].rpartition("_")[0]


def open_match(answer: str, accepted: Sequence[str]) -> bool:
    """Return whether a candidate of the answer contains an accepted text or equals an accepted number.

    Numbers are compared with their sign; text matches anywhere within a candidate.
    """
    gold = [value for text in accepted for value in _normalize(text)]
    for candidate in candidate_answers(answer):
        for value in gold:
            if isinstance(candidate, str):
                if isinstance(value, str) and value in candidate:
                    return True
            elif candidate == value:
                return True
    return False


def candidate_answers(answer: str) -> list[Value]:
    """Return the candidates for the answer: texts after cue words such as "therefore", and all numbers in them."""
    answer = answer.strip().strip(".").lower()
    pieces = answer.split("\n")
    tails = []
    for index, piece in enumerate(pieces):
        cues = (*CUES, "=") if index == len(pieces) - 1 else CUES
        found = [piece.split(cue)[-1].strip() for cue in cues if cue in piece]
        shortest = min(found, key=len, default="")
        if shortest and shortest not in LONE_MARKS:
            tails.append(shortest)
    texts = tails or [answer]
    numbers = [number for text in texts for pattern in NUMBERS for number in re.findall(pattern, text)]
    return [value for text in [*texts, *numbers] for value in _normalize(text)]


def _normalize(text: str) -> list[Value]:
    """A number rounded to two decimals, or lower-case text; a single character only next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]

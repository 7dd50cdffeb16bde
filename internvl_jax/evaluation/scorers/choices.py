"""Option letters parsed from answers: the rules of both codebases, of ScienceQA, SEED-Bench and MMBench."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LETTERS = "ABCDE"
CIRCULAR = 1_000_000  # MMBench: index offset between rows that ask the same question with rotated options
FAILED = "FAILED"  # what LLaVA's ScienceQA script returns if it finds no letter

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"


def first_letter(answer: str, options: Mapping[str, str]) -> str:
    """Parse an option letter as V1-1's scripts do.

    A single character is returned as it is. Otherwise a first character that is an option's letter is returned
    ("Answer: B" is A), otherwise the letter of the first option whose text the answer contains.

    Args:
        answer: The model's answer.
        options: Letter -> text, in order.

    Returns:
        The letter, or the stripped answer if no rule applies.
    """
    answer = answer.strip()
    if len(answer) < 2:
        return answer
    if answer[0] in options:
        return answer[0]
    return next((letter for letter, text in options.items() if text in answer), answer)


def science_letter(answer: str, options: Mapping[str, str]) -> str:
    """Parse a letter as V1-1's ScienceQA script does: `first_letter`, then "X." and "(X)" for any character X."""
    answer = first_letter(answer, options)
    if answer[1:2] == ".":
        answer = answer[0]
    if answer[:1] == "(" and answer[2:3] == ")":
        answer = answer[1]
    return answer


def science_letter_llava(answer: str) -> str:
    """Parse a letter as LLaVA's ScienceQA script does: "B", "B. ..." or one "The answer is B."; else FAILED.

    In the sentence any capital letter is accepted; the caller compares it with the options.
    """
    if answer in LETTERS and len(answer) == 1:
        return answer
    if answer[1:3] == ". " and answer[0] in LETTERS:
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else FAILED


def seed_letter(answer: str) -> str:
    """Return the first character, which SEED-Bench's script compares (Li et al., 2023)."""
    return answer[:1]


def rule_match(answer: str, options: Mapping[str, str]) -> str | None:
    """Parse a letter by VLMEvalKit's rules of early 2024 without a judge, which approximate MMBench's server.

    Args:
        answer: The model's answer.
        options: Letter -> text of the row's options.

    Returns:
        A letter, "Z" for a refusal, or None where the rules do not decide.
    """
    if API_FAILURE in answer:
        return None
    if any(phrase in answer for phrase in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    quoted = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return quoted[0] if len(quoted) == 1 else None


def circular(rows: Iterable[tuple[int, bool]]) -> dict[int, bool]:
    """Evaluate rotations together (CircularEval; Liu et al., 2023).

    Args:
        rows: Pairs of a row's index and whether it was answered correctly.

    Returns:
        Question -> whether all its rotations were answered correctly.
    """
    groups: dict[int, bool] = {}
    for index, correct in rows:
        groups[index % CIRCULAR] = groups.get(index % CIRCULAR, True) and correct
    return groups

"""Which option an answer means: the letter rules of the two codebases, ScienceQA, SEED and MMBench."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LETTERS = "ABCDE"
CIRCULAR = 1_000_000  # MMBench: rows whose index differs by multiples of it ask the same with the options rotated
FAILED = "FAILED"  # ScienceQA by LLaVA's rules: no letter was found

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
API_FAILURE = "Failed to obtain answer via API"


def first_letter(answer: str, options: Mapping[str, str]) -> str:
    """The letter that V1-1's scripts take from an answer, or the answer itself, stripped, where they find none.

    options: letter -> text, in order. A single character is taken as it is; then a first character that is an option's
    letter ("Answer: B" is A); then the first option whose text stands in the answer.
    """
    answer = answer.strip()
    if len(answer) < 2:
        return answer
    if answer[0] in options:
        return answer[0]
    return next((letter for letter, text in options.items() if text in answer), answer)


def science_letter(answer: str, options: Mapping[str, str]) -> str:
    """`first_letter`, then "X." and "(X)" for an X that is no option, as V1-1's ScienceQA script has it."""
    answer = first_letter(answer, options)
    if answer[1:2] == ".":
        answer = answer[0]
    if answer[:1] == "(" and answer[2:3] == ")":
        answer = answer[1]
    return answer


def science_letter_llava(answer: str) -> str:
    """The letter by LLaVA's ScienceQA script: "B", "B. ..." or one "The answer is B."; else FAILED.

    The sentence's letter may be any capital; the caller compares it with the options that there are.
    """
    if answer in LETTERS and len(answer) == 1:
        return answer
    if answer[1:3] == ". " and answer[0] in LETTERS:
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else FAILED


def seed_letter(answer: str) -> str:
    """SEED-Bench's script compares the first character."""
    return answer[:1]


def rule_match(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's rules of early 2024 without a judge, the public stand-in for MMBench's server.

    options: those that the row has. Returns a letter, "Z" for a refusal, None where the rules do not decide.
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
    """Question -> whether every rotation of it was answered rightly (Liu et al., 2023), from (index, right) of rows."""
    groups: dict[int, bool] = {}
    for index, right in rows:
        groups[index % CIRCULAR] = groups.get(index % CIRCULAR, True) and right
    return groups

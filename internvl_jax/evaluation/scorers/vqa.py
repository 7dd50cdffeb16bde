"""Soft accuracy of short answers against ten people's: VQAv2, OKVQA, TextVQA and VizWiz.

Two variants are in use, and differ on messy text. "m4c" is Eval-AI's cleaner, which the reference's local rows use;
"official" is the toolkit behind the VQA challenge's server (Antol et al., 2015).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE = 10  # answers to every question

ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
STOPS_REMOVED = 32  # the toolkit passes a regex flag of that value where the count belongs

_PLAIN = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
_DOUBLE = (
    "couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
)
_IRREGULAR = {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}
_IRREGULAR |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
_IRREGULAR |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")


def _without_one(word: str) -> list[str]:
    """The spellings that miss exactly one apostrophe."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# How people write contractions -> how the toolkit does. Words are lower-cased before, so keys with a capital never
# match: kept, because the table is the toolkit's.
CONTRACTIONS = (
    {word.replace("'", ""): word for word in _PLAIN.split()}
    | {spelling: word for word in _DOUBLE.split() for spelling in _without_one(word)}
    | _IRREGULAR
)


def normalize_m4c(text: str) -> str:
    """An answer as Eval-AI's cleaner leaves it: lower case, no punctuation or articles, number words as digits."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _clean(text.replace("\n", " ").replace("\t", " ").strip())


def soft_accuracy_m4c(answer: str, people: Sequence[str]) -> float:
    """Between 0 and 1: min(1, matches / 3), averaged over leaving out each of the ten people's answers.

    Raises ValueError where there are not ten. An answer that is cleaned to nothing matches theirs of the kind.
    """
    _check(people)
    return _leave_one_out(normalize_m4c(answer), [normalize_m4c(given) for given in people])


def soft_accuracy_official(answer: str, people: Sequence[str]) -> float:
    """As `soft_accuracy_m4c` by the challenge's rules: where all ten agree, nothing is cleaned, case matters."""
    _check(people)
    answer, given = _one_line(answer), [_one_line(text) for text in people]
    if len(set(people)) > 1:
        answer, given = _clean(answer), [_clean(text) for text in given]
    return _leave_one_out(answer, given)


def _check(people: Sequence[str]) -> None:
    if len(people) != PEOPLE:
        raise ValueError(f"{len(people)} answers by people, where {PEOPLE} are needed")


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, people: Sequence[str]) -> float:
    matches = [answer == given for given in people]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(people)


def _clean(text: str) -> str:
    """Punctuation, full stops, then words. Each mark is judged on the text as it came, whatever went before it."""
    cleaned = text
    comma_in_number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        removed = comma_in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if removed else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=STOPS_REMOVED)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

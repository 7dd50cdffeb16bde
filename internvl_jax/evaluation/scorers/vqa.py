"""Soft accuracy of short answers against those of ten annotators: VQAv2, OKVQA, TextVQA and VizWiz.

There are two variants, which differ in how they normalize text. "m4c" is EvalAI's answer processor, which the reference
uses for scores that it computes locally; "official" is the toolkit of the VQA challenge's server (Antol et al., 2015).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PEOPLE = 10  # annotators per question

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
    """The spellings that lack exactly one apostrophe."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# Spelling without apostrophe -> the toolkit's spelling. Words are lower-cased first, so keys with a capital never
# match; they are kept because the table is the toolkit's.
CONTRACTIONS = (
    {word.replace("'", ""): word for word in _PLAIN.split()}
    | {spelling: word for word in _DOUBLE.split() for spelling in _without_one(word)}
    | _IRREGULAR
)


def normalize_m4c(text: str) -> str:
    """Normalize an answer as EvalAI's answer processor does.

    The result is in lower case, without punctuation and articles, and with number words as digits.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _clean(text.replace("\n", " ").replace("\t", " ").strip())


def soft_accuracy_m4c(answer: str, people: Sequence[str]) -> float:
    """Return the soft accuracy of a normalized answer (Antol et al., 2015; normalization of M4C, Hu et al., 2020).

    Args:
        answer: The model's answer.
        people: The ten annotators' answers.

    Returns:
        min(1, matches / 3), averaged over leaving out each annotator; from 0 to 1. An answer that is normalized to the
        empty string matches annotators' answers that are too.

    Raises:
        ValueError: There are not ten annotators' answers.
    """
    _check(people)
    return _leave_one_out(normalize_m4c(answer), [normalize_m4c(given) for given in people])


def soft_accuracy_official(answer: str, people: Sequence[str]) -> float:
    """Return the soft accuracy by the rules of the VQA challenge's toolkit (Antol et al., 2015).

    Arguments and result are those of `soft_accuracy_m4c`. Where all ten annotators agree, answers are not normalized
    and case matters.
    """
    _check(people)
    answer, given = _one_line(answer), [_one_line(text) for text in people]
    if len(set(people)) > 1:
        answer, given = _clean(answer), [_clean(text) for text in given]
    return _leave_one_out(answer, given)


def _check(people: Sequence[str]) -> None:
    if len(people) != PEOPLE:
        raise ValueError(f"{len(people)} annotators' answers, where {PEOPLE} are needed")


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, people: Sequence[str]) -> float:
    matches = [answer == given for given in people]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(people)


def _clean(text: str) -> str:
    """Remove punctuation, full stops and articles; whether a mark is removed depends on the original text only."""
    cleaned = text
    comma_in_number = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        removed = comma_in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if removed else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=STOPS_REMOVED)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

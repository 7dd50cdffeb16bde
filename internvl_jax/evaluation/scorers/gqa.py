"""GQA's accuracy: the same string or not (Hudson and Manning, 2019)."""

from __future__ import annotations


def gqa_answer(text: str) -> str:
    """An answer as it is handed to GQA's script: no full stops at its end, lower case, and nothing else."""
    return text.rstrip(".").lower()


def is_open(structural: str) -> bool:
    """Whether a question of that structural type has open answers; the others (verify, choose, ...) are "binary"."""
    return structural == "query"

"""GQA's accuracy: exact string match (Hudson and Manning, 2019)."""

from __future__ import annotations


def gqa_answer(text: str) -> str:
    """Return an answer as the reference submits it to GQA's script: in lower case, without trailing full stops."""
    return text.rstrip(".").lower()


def is_open(structural: str) -> bool:
    """Return whether questions of a structural type have open answers; others (verify, choose, ...) are binary."""
    return structural == "query"

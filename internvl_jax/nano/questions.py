"""The questions that nano can answer. It was trained on these forms alone, in English and Chinese."""

from __future__ import annotations

import re
from collections.abc import Iterable

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.nano.phrasings import FORMS, LANGUAGES, PUNCTUATION, Form, template_pattern

EXAMPLES = (
    ("What is in this picture?", "图中有什么？"),
    ("How many shapes are there?", "图中有几个图形？"),
    ("How many circles are there?", "图中有几个圆形？"),
    ("What color is the star?", "星形是什么颜色？"),
    ("What shape is red?", "什么形状是红色的？"),
    ("Where is the blue square?", "蓝色的正方形在哪里？"),
    ("Is there a green triangle?", "图中有绿色的三角形吗？"),
    ("What number is written here?", "图中写的数字是多少？"),
    ("What word is written here?", "图中写的是什么单词？"),
)
GREETING_EXAMPLES = ("Who are you?", "你是谁？")


def _pattern(forms: Iterable[Form]) -> re.Pattern[str]:
    """Matches the questions of the forms, as they are or in lower case, whatever ends the sentence."""
    patterns = []
    for form in forms:
        for language in LANGUAGES:
            for template in form.templates(language):
                text = template.rstrip(PUNCTUATION)
                patterns += [template_pattern(spelled, language) for spelled in (text, text.lower())]
    return re.compile(f"(?:{'|'.join(patterns)})[{PUNCTUATION}]?")


QUESTIONS = _pattern(FORMS)
GREETINGS = _pattern(form for form in FORMS if form.kind == "greeting")


def answerable(question: str) -> bool:
    """Whether nano was trained on a question of this form."""
    return QUESTIONS.fullmatch(question.replace(IMAGE_PLACEHOLDER, "").strip()) is not None


def is_greeting(question: str) -> bool:
    """Whether nano answers this question without an image."""
    return GREETINGS.fullmatch(question.strip()) is not None


def advice(question: str, images: int) -> str | None:
    """A note for the user, None where nano can answer.

    Args:
        question: The question; "" asks for the list alone.
        images: Number of images in the conversation.
    """
    if not question:
        return f"nano answers questions about images of shapes, words and digits:\n{listed()}"
    if not answerable(question):
        return f"nano was not trained on this question, so its answer means nothing. It can answer:\n{listed()}"
    if not images and not is_greeting(question):
        return "nano needs an image for this question: /image FILE in a session, --image FILE on the command line"
    return None


def listed() -> str:
    """The questions that nano can answer, one form per line."""
    pairs = [f"  {english:<30} {chinese}" for english, chinese in EXAMPLES]
    return "\n".join([*pairs, f"  {GREETING_EXAMPLES[0]:<30} {GREETING_EXAMPLES[1]}"])

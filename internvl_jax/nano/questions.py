"""The questions that nano can answer. It was trained on these forms alone, in English and Chinese."""

from __future__ import annotations

import re

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.nano.render import COLOURS, GREETINGS, SHAPES

EXAMPLES = (
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


def _forms() -> re.Pattern[str]:
    colors, colors_zh = "|".join(COLOURS), "|".join(zh for _, zh in COLOURS.values())
    shapes, shapes_zh = "|".join(SHAPES), "|".join(SHAPES.values())
    forms = (
        r"How many shapes are there\?",
        rf"How many (?:{shapes})s are there\?",
        rf"What color is the (?:{shapes})\?",
        rf"What shape is (?:{colors})\?",
        rf"Where is the (?:{colors}) (?:{shapes})\?",
        rf"Is there a (?:{colors}) (?:{shapes})\?",
        r"What number is written here\?",
        r"What word is written here\?",
        "图中有几个图形？",
        rf"图中有几个(?:{shapes_zh})？",
        rf"(?:{shapes_zh})是什么颜色？",
        rf"什么形状是(?:{colors_zh})的？",
        rf"(?:{colors_zh})的(?:{shapes_zh})在哪里？",
        rf"图中有(?:{colors_zh})的(?:{shapes_zh})吗？",
        "图中写的数字是多少？",
        "图中写的是什么单词？",
    )
    return re.compile("|".join(forms))


FORMS = _forms()


def answerable(question: str) -> bool:
    """Whether nano was trained on a question of this form."""
    text = question.replace(IMAGE_PLACEHOLDER, "").strip()
    return FORMS.fullmatch(text) is not None or is_greeting(text)


def is_greeting(question: str) -> bool:
    """Whether nano answers this question without an image."""
    return question.strip() in {text for text, _ in GREETINGS}


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

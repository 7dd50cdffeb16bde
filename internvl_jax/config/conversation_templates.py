"""The conversation templates that the models were trained with, and the prompts that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_PLACEHOLDER = "<image>"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Template:
    """The format of a conversation: system message, then user + question + user_end + assistant + answer per turn."""

    system: str
    system_end: str  # follows the system message
    user: str
    user_end: str
    assistant: str
    before_answer: str  # between the assistant's tag and a given answer; not written before an answer to generate
    answer_end: str
    image: tuple[str, str, str] = (
        IMG_START,
        IMG_CONTEXT,
        IMG_END,
    )  # before the image tokens, each image token, after them


# As in the reference's conversation.py at the release of the checkpoint.
TEMPLATES = {
    # The only separator is the space at the start of the prompt; there is none between turns.
    "internvl_zh": Template(
        system="",
        system_end=" ",
        user="<human>: ",
        user_end=" ",
        assistant="<bot>:",
        before_answer=" ",
        answer_end="</s>",
    ),
    # Vicuna v1.1 and later, as LLaVA-1.5 and InternVL-Chat-V1-0 were trained.
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_end=" ",
        user="USER: ",
        user_end=" ",
        assistant="ASSISTANT:",
        before_answer=" ",
        answer_end="</s>",
        image=("", IMAGE_PLACEHOLDER, ""),
    ),
}


def build_prompt(template: Template, history: Turns, question: str, system: str | None = None) -> str:
    """Return the prompt for `question` after the turns of `history`; image placeholders are kept.

    Args:
        template: the conversation format.
        history: (question, answer) pairs.
        question: the new question.
        system: the system message; None: the template's.
    """
    prompt = (template.system if system is None else system) + template.system_end
    for asked, answered in history:
        prompt += template.user + asked + template.user_end
        prompt += template.assistant + template.before_answer + answered + template.answer_end
    return prompt + template.user + question + template.user_end + template.assistant

"""The conversation templates that the models were trained with, and the prompts that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_PLACEHOLDER = "<image>"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Template:
    """The format of a conversation: system message, then user + question + user_end + assistant + answer per turn.

    `stop` is the token at which a chat ends an answer, where it is another than the checkpoint's end token.
    """

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
    system_start: str = ""  # before the system message
    stop: str | None = None


def _chatml(system: str, end: str) -> Template:
    """ChatML; `end` follows each message."""
    return Template(
        system=system,
        system_end=end,
        user="<|im_start|>user\n",
        user_end=end,
        assistant="<|im_start|>assistant\n",
        before_answer="",
        answer_end=end,
        system_start="<|im_start|>system\n",
        stop="<|im_end|>",
    )


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
    # InternVL-Chat-V1-2; for later models see `default_system`.
    "Hermes-2": _chatml("Answer the questions.", "<|im_end|>"),
    # InternVL-Chat-V1-5 and InternVL2 on InternLM2.
    "internlm2-chat": _chatml(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        "<|im_end|>",
    ),
    # InternVL2.5, InternVL3 and InternVL3.5.
    "internvl2_5": _chatml(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        "<|im_end|>\n",
    ),
}


def default_system(template: str, tiled: bool) -> str:
    """The system message of a template, where neither the caller nor the checkpoint has one.

    Hermes-2's was replaced by internlm2-chat's in July 2024, between InternVL-Chat-V1-2, whose images are not cut into
    tiles, and InternVL2.
    """
    return TEMPLATES["internlm2-chat" if template == "Hermes-2" and tiled else template].system


def build_prompt(template: Template, history: Turns, question: str, system: str | None = None) -> str:
    """Return the prompt for `question` after the turns of `history`; image placeholders are kept.

    Args:
        template: the conversation format.
        history: (question, answer) pairs.
        question: the new question.
        system: the system message; None: the template's.
    """
    prompt = template.system_start + (template.system if system is None else system) + template.system_end
    for asked, answered in history:
        prompt += template.user + asked + template.user_end
        prompt += template.assistant + template.before_answer + answered + template.answer_end
    return prompt + template.user + question + template.user_end + template.assistant

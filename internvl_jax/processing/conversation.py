"""From questions, answers and pictures to the prompt text that a model was trained on, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGE_PLACEHOLDER = "<image>"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Template:
    """How turns are written: the system message, then for each turn user + question + user_end + assistant + answer."""

    system: str
    system_end: str  # between a system message that is not empty and the first turn
    user: str
    user_end: str
    assistant: str
    before_answer: str  # between the assistant's tag and an answer that is known (none is written before one to come)
    answer_end: str
    image: tuple[str, str, str] = (IMG_START, IMG_CONTEXT, IMG_END)  # before an image's tokens, each of them, after


# Each is the reference's conversation.py as it stood when the checkpoint was released.
TEMPLATES = {
    # Its only separator before the first turn is the blank that starts the prompt; later turns have none.
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
    """The prompt that asks `question` after the turns of `history`, image placeholders left as they are.

    system: a message in the place where the reference puts its template's own; None takes the template's.
    """
    prompt = (template.system if system is None else system) + template.system_end
    for asked, answered in history:
        prompt += template.user + asked + template.user_end
        prompt += template.assistant + template.before_answer + answered + template.answer_end
    return prompt + template.user + question + template.user_end + template.assistant


def place_images(question: str, num_images: int, has_history: bool) -> str:
    """Put the image placeholder in front of a first question that has images and does not place them itself."""
    if num_images and not has_history and IMAGE_PLACEHOLDER not in question:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    return question


def expand_images(
    prompt: str,
    tokens_per_image: int,
    num_images: int,
    image: tuple[str, str, str] = (IMG_START, IMG_CONTEXT, IMG_END),
) -> str:
    """Replace image placeholders by image tokens and what stands around them, <img> and </img> if not said otherwise.

    One placeholder per image, or one for all of them together (the reference's combined form, all tokens in one pair
    of brackets). Raises ValueError when neither fits.
    """
    placeholders = prompt.count(IMAGE_PLACEHOLDER)
    if placeholders == num_images:
        share = 1
    elif placeholders == 1 and num_images > 1:
        share = num_images
    elif num_images == 0:
        raise ValueError(
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholder(s), but no images are given; images of "
            "earlier turns have to be given again"
        )
    elif placeholders == 0:
        raise ValueError(
            f"{num_images} image(s) are given, but neither the question nor its history has an {IMAGE_PLACEHOLDER} "
            "placeholder: put it where the images belong, or start a new conversation"
        )
    else:
        raise ValueError(
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {num_images} image(s): write one for "
            "each, or a single one for all"
        )
    start, token, end = image
    return prompt.replace(IMAGE_PLACEHOLDER, start + token * (tokens_per_image * share) + end)


def prepare_prompt(
    template: Template,
    question: str,
    history: Turns,
    num_images: int,
    tokens_per_image: int,
    system: str | None = None,
) -> str:
    """The whole way for one row: check the texts, build the prompt, expand its images.

    question as `place_images` returns it; history is (question, answer) pairs, of which the first usually holds the
    images. Raises ValueError for texts that hold image tokens, and for placeholders and images that do not agree.
    """
    token = template.image[1]
    for text in (question, system or "", *(part for turn in history for part in turn)):
        # Typed out, it would be read as an image's place, and every later image would move by one.
        if token != IMAGE_PLACEHOLDER and token in text:
            raise ValueError(f"the text contains {token}, which only images may bring; write it differently")
    prompt = build_prompt(template, history, question, system)
    return expand_images(prompt, tokens_per_image, num_images, template.image)

"""From questions, answers and images to the prompt text that a model was trained on, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from internvl_jax.config.conversation_templates import (
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    Template,
    Turns,
    build_prompt,
)


class Turn(tuple[str, str]):
    """A (question, answer) of a history, and how many images it has.

    images: their number; None: as many as its question has placeholders, which is a guess where one stands for several.
    An answer has no images: there, <image> is text that the model wrote.
    """

    images: int
    stated: bool

    def __new__(cls, texts: Iterable[str], images: int | None = None) -> Turn:
        turn: Turn = super().__new__(cls, texts)  # type: ignore[type-var]
        turn.images = count_placeholders(turn[0]) if images is None else images
        turn.stated = images is not None
        return turn


def as_turn(turn: Any) -> Turn:
    """A Turn of a pair of texts, or of texts and a number of images. Raises ValueError for anything else."""
    if isinstance(turn, Turn):
        return turn
    parts = list(turn) if isinstance(turn, (tuple, list)) else []
    images = parts.pop() if len(parts) == 3 else None
    counted = images is None or (isinstance(images, int) and not isinstance(images, bool) and images >= 0)
    if len(parts) != 2 or not counted or not all(isinstance(text, str) for text in parts):
        raise ValueError(f"not a turn of a conversation, (question, answer): {turn!r}")
    return Turn(parts, images)


def count_placeholders(*texts: str) -> int:
    """How many image placeholders the texts have."""
    return sum(text.count(IMAGE_PLACEHOLDER) for text in texts)


def images_of(history: Turns) -> int:
    """How many images the turns of a history have: one per placeholder, where they do not know it themselves."""
    return sum(as_turn(turn).images for turn in history)


def ambiguous(history: Turns) -> bool:
    """Whether images beyond the history's placeholders may be the history's: its only one may stand for several."""
    turns = [as_turn(turn) for turn in history]
    with_images = [turn for turn in turns if count_placeholders(turn[0])]
    return sum(count_placeholders(turn[0]) for turn in with_images) == 1 and not with_images[0].stated


def place_images(question: str, num_images: int, has_history: bool) -> str:
    """Put the image placeholder in front of a first question that has images and does not place them itself.

    Of a later question: with num_images those that it brings, and has_history False.
    """
    if num_images > 0 and not has_history and IMAGE_PLACEHOLDER not in question:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    return question


def combine_images(history: Turns, num_images: int) -> list[Turn]:
    """The reference's combined form: where the history has one placeholder, it stands for all images."""
    turns = [as_turn(turn) for turn in history]
    if sum(count_placeholders(turn[0]) for turn in turns) == 1:
        turns = [Turn(turn, num_images) if count_placeholders(turn[0]) else turn for turn in turns]
    return turns


def literally(text: str, mark: str) -> str:
    """Put a mark around what was typed, but for image placeholders: `encode_prompt` reads no special tokens there."""
    return mark + text.replace(IMAGE_PLACEHOLDER, mark + IMAGE_PLACEHOLDER + mark) + mark


def unused_character(*texts: str) -> str:
    """A character for private use that none of the texts has."""
    used = set("".join(texts))
    return next(mark for mark in map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))) if mark not in used)


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
    placeholders = count_placeholders(prompt)
    if not _agree(placeholders, num_images):
        raise ValueError(_disagreement(placeholders, num_images))
    start, token, end = image
    share = num_images // placeholders if placeholders else 0
    return prompt.replace(IMAGE_PLACEHOLDER, start + token * (tokens_per_image * share) + end)


def _agree(placeholders: int, num_images: int) -> bool:
    return placeholders == num_images or (placeholders == 1 and num_images > 1)


def _disagreement(placeholders: int, num_images: int) -> str:
    if num_images == 0:
        return (
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholder(s), but no images are given; images of "
            "earlier turns have to be given again"
        )
    if placeholders == 0:
        return (
            f"{num_images} image(s) are given, but neither the question nor its history has an {IMAGE_PLACEHOLDER} "
            "placeholder: put it where the images belong, or start a new conversation"
        )
    return (
        f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholders for {num_images} image(s): write one for "
        "each, or a single one for all"
    )


def prepare_prompt(
    template: Template,
    question: str,
    history: Turns,
    num_images: int,
    tokens_per_image: int,
    system: str | None = None,
    literal: str | None = None,
) -> str:
    """The whole way for one row: check the texts, build the prompt, expand its images.

    question as `place_images` returns it; history is (question, answer) pairs, or Turns where one placeholder stands
    for several images. Each turn has its own images: those of the history first, the others are the question's.
    literal: a mark that none of the texts has, put around each of them; their special tokens are then ordinary text.
    Raises ValueError for texts that hold image tokens, and for placeholders and images that do not agree.
    """
    start, token, end = template.image
    turns = [as_turn(turn) for turn in history]
    asked = [question, system or "", *(turn[0] for turn in turns)]
    for text in (*(text.replace(IMAGE_PLACEHOLDER, " ") for text in asked), *(turn[1] for turn in turns)):
        # Typed out, it would be read as an image's place, and every later image would move by one.
        if literal is None and token in text:
            raise ValueError(f"the text contains {token}, which only images may bring; write it differently")
    own, in_system = count_placeholders(question), count_placeholders(system or "")
    earlier = in_system + images_of(turns)
    if not _agree(own, num_images - earlier):
        placeholders = in_system + own + sum(count_placeholders(turn[0]) for turn in turns)
        if earlier and placeholders <= num_images:
            raise ValueError(
                f"{num_images} image(s) are given, of which {earlier} belong to the history, and the question has "
                f"{own} {IMAGE_PLACEHOLDER} placeholders: write one for each new image, or a single one for all of "
                "them (combine=True puts all images into the history's place)"
            )
        raise ValueError(_disagreement(placeholders, num_images))

    def fill(text: str, placeholders: int, images: int) -> str:
        share = images // placeholders if placeholders else 0
        text = text if literal is None else literally(text, literal)
        return text.replace(IMAGE_PLACEHOLDER, start + token * (tokens_per_image * share) + end)

    filled = []
    for turn in turns:
        count, images = count_placeholders(turn[0]), turn.images
        filled.append((fill(turn[0], count, images), f"{literal or ''}{turn[1]}{literal or ''}"))
    question = fill(question, own, num_images - earlier)
    return build_prompt(template, filled, question, None if system is None else fill(system, in_system, in_system))

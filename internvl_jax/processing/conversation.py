"""From questions, answers and images to the prompt text that a model was trained on, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice
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
    """The question and the answer of an earlier turn, and how many images the question has.

    An answer has no images: <image> in it is text that the model wrote.

    Attributes:
        images: the number of images.
        images_stated: whether that number was given. If not, it is the number of placeholders in the question, which is
            a guess where one placeholder stands for several images.
    """

    images: int
    images_stated: bool

    def __new__(cls, texts: Iterable[str], images: int | None = None) -> Turn:
        turn: Turn = super().__new__(cls, texts)  # type: ignore[type-var]
        turn.images = count_placeholders(turn[0]) if images is None else images
        turn.images_stated = images is not None
        return turn


def as_turn(turn: Any) -> Turn:
    """Convert (question, answer) or (question, answer, number of images) to a Turn.

    Raises:
        ValueError: `turn` is anything else.
    """
    if isinstance(turn, Turn):
        return turn
    parts = list(turn) if isinstance(turn, (tuple, list)) else []
    images = parts.pop() if len(parts) == 3 else None
    is_count = images is None or (isinstance(images, int) and not isinstance(images, bool) and images >= 0)
    if len(parts) != 2 or not is_count or not all(isinstance(text, str) for text in parts):
        raise ValueError(f"not a turn of a conversation, (question, answer): {turn!r}")
    return Turn(parts, images)


def count_placeholders(*texts: str) -> int:
    """The number of image placeholders in the texts."""
    return sum(text.count(IMAGE_PLACEHOLDER) for text in texts)


def count_images(history: Turns) -> int:
    """The number of images of a history's turns: one per placeholder, unless a Turn states another number."""
    return sum(as_turn(turn).images for turn in history)


def has_ambiguous_images(history: Turns) -> bool:
    """Whether further images may belong to the history, because its only placeholder may stand for several."""
    turns = [as_turn(turn) for turn in history]
    with_images = [turn for turn in turns if count_placeholders(turn[0])]
    return sum(count_placeholders(turn[0]) for turn in with_images) == 1 and not with_images[0].images_stated


def place_images(question: str, num_images: int, has_history: bool) -> str:
    """Put the image placeholder in front of a first question that has images and does not place them itself.

    Args:
        question: the question.
        num_images: the number of images that come with it.
        has_history: whether earlier turns exist. Pass False for a later question that brings images of its own.

    Returns:
        The question with its placeholders.
    """
    if num_images > 0 and not has_history and IMAGE_PLACEHOLDER not in question:
        return f"{IMAGE_PLACEHOLDER}\n{question}"
    return question


def combine_images(history: Turns, num_images: int) -> list[Turn]:
    """The reference's combined form: a history's only placeholder stands for all `num_images` images."""
    turns = [as_turn(turn) for turn in history]
    if sum(count_placeholders(turn[0]) for turn in turns) == 1:
        turns = [Turn(turn, num_images) if count_placeholders(turn[0]) else turn for turn in turns]
    return turns


def mark_literal(text: str, mark: str) -> str:
    """Put `mark` around typed text, except its image placeholders. `encode_prompt` reads no special tokens there."""
    return mark + text.replace(IMAGE_PLACEHOLDER, mark + IMAGE_PLACEHOLDER + mark) + mark


def escape_placeholders(text: str, image_mark: str, literal_mark: str) -> str:
    """Typed text whose images have a mark of their own, with placeholders in their place.

    A placeholder that was typed is broken up by two literal marks, between which nothing stands: it is ordinary text.
    """
    typed = IMAGE_PLACEHOLDER[0] + literal_mark * 2 + IMAGE_PLACEHOLDER[1:]
    return text.replace(IMAGE_PLACEHOLDER, typed).replace(image_mark, IMAGE_PLACEHOLDER)


def unused_character(*texts: str) -> str:
    """A private-use character that occurs in none of the texts."""
    used = set("".join(texts))
    return next(mark for mark in map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))) if mark not in used)


def expand_images(
    prompt: str,
    tokens_per_image: int,
    num_images: int,
    image: tuple[str, str, str] = (IMG_START, IMG_CONTEXT, IMG_END),
) -> str:
    """Replace image placeholders by image tokens.

    There is one placeholder per image, or one for all of them together (the reference's combined form: all tokens in
    one pair of brackets).

    Args:
        prompt: text with placeholders.
        tokens_per_image: the number of visual tokens of an image.
        num_images: the number of images.
        image: what stands before the image tokens, the token, and what stands behind.

    Returns:
        The expanded text.

    Raises:
        ValueError: the number of placeholders does not fit the number of images.
    """
    placeholders = count_placeholders(prompt)
    if not _placeholders_fit(placeholders, num_images):
        raise ValueError(_mismatch(placeholders, num_images))
    start, token, end = image
    share = num_images // placeholders if placeholders else 0
    return prompt.replace(IMAGE_PLACEHOLDER, start + token * (tokens_per_image * share) + end)


def _placeholders_fit(placeholders: int, num_images: int) -> bool:
    return placeholders == num_images or (placeholders == 1 and num_images > 1)


def _mismatch(placeholders: int, num_images: int) -> str:
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


def image_token_index(is_image: Any) -> Any:
    """Number the image tokens of a batch, for the gather that puts visual tokens in their place.

    Args:
        is_image: [B,T] bool, a numpy or JAX array: where image tokens stand. Padding is False.

    Returns:
        [B,T] int32: 0, 1, 2, ... for the image tokens in prompt order over all rows, -1 elsewhere.
    """
    return is_image.reshape(-1).cumsum(dtype="int32").reshape(is_image.shape) * is_image - 1


def prepare_prompt(
    template: Template,
    question: str,
    history: Turns,
    image_tokens: Sequence[int],
    system: str | None = None,
    literal_mark: str | None = None,
) -> str:
    """Build the prompt of one row: check the texts, apply the template, expand the images.

    Args:
        template: the conversation template.
        question: the question, as `place_images` returns it.
        history: (question, answer) pairs, or Turns where one placeholder stands for several images.
        image_tokens: the number of visual tokens of each image of all turns. Those of the history come first, the
            others are the question's.
        system: the system message; None: the template's.
        literal_mark: a mark that occurs in none of the texts, put around each of them (`mark_literal`) so that special
            tokens in them are ordinary text.

    Returns:
        The prompt's text.

    Raises:
        ValueError: a text contains the image token, or placeholders and images do not fit together.
    """
    turns, num_images = [as_turn(turn) for turn in history], len(image_tokens)
    if literal_mark is None:
        _refuse_image_tokens(template.image[1], [question, system or "", *(turn[0] for turn in turns)], turns)
    own, in_system = count_placeholders(question), count_placeholders(system or "")
    earlier = in_system + count_images(turns)
    if not _placeholders_fit(own, num_images - earlier):
        placeholders = in_system + own + sum(count_placeholders(turn[0]) for turn in turns)
        if earlier and placeholders <= num_images:
            raise ValueError(
                f"{num_images} image(s) are given, of which {earlier} belong to the history, and the question has "
                f"{own} {IMAGE_PLACEHOLDER} placeholders: write one for each new image, or a single one for all of "
                "them (combine=True puts all images at the history's placeholder)"
            )
        raise ValueError(_mismatch(placeholders, num_images))
    start, token, end = template.image
    remaining = iter(image_tokens)

    def fill(text: str, placeholders: int, images: int) -> str:
        share = images // placeholders if placeholders else 0
        text = text if literal_mark is None else mark_literal(text, literal_mark)
        first, *others = text.split(IMAGE_PLACEHOLDER)
        shown = (start + token * sum(islice(remaining, share)) + end for _ in others)
        return first + "".join(map(str.__add__, shown, others))

    mark = literal_mark or ""
    system = None if system is None else fill(system, in_system, in_system)  # in the order of the prompt
    filled = [(fill(turn[0], count_placeholders(turn[0]), turn.images), f"{mark}{turn[1]}{mark}") for turn in turns]
    return build_prompt(template, filled, fill(question, own, num_images - earlier), system)


def _refuse_image_tokens(token: str, asked: Iterable[str], turns: Iterable[Turn]) -> None:
    """Raise ValueError for an image token in a text: it would take an image's place and shift all later ones."""
    for text in (*(text.replace(IMAGE_PLACEHOLDER, " ") for text in asked), *(turn[1] for turn in turns)):
        if token in text:
            raise ValueError(f"the text contains {token}, which only images may bring; write it differently")

"""From a conversation to token ids and labels.

Answers and their end tokens are supervised. The labels are those of the reference code at its release; later revisions
changed the template and thereby masked every token. Token counts are not subtracted as in the reference: the tokens of
an answer are those that follow the tokens of the prompt that a chat would send at this point.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER, IMG_CONTEXT, Template, Turns
from internvl_jax.data.batch import IGNORED
from internvl_jax.processing.conversation import expand_images
from internvl_jax.processing.tokenizer import Tokenizer, encode_prompt


class SampleError(ValueError):
    """A conversation cannot be used for training.

    Attributes:
        kind: a short name, by which such samples are counted.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_turns(conversations: Any) -> list[tuple[str, str]]:
    """Read questions and answers from [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...].

    A first turn that is not the human's is dropped, as in the reference code.

    Args:
        conversations: the value under "conversations" of an entry.

    Returns:
        Pairs of question and answer.

    Raises:
        SampleError: it has another form.
    """
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        raise SampleError("conversation", '"conversations" must be a list of {"from": ..., "value": ...}')
    for number, turn in enumerate(conversations, 1):
        if turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            raise SampleError("conversation", f'turn {number} must have "from", human or gpt, and a text as "value"')
    turns = conversations[1:] if conversations and conversations[0]["from"] == "gpt" else conversations
    for number, turn in enumerate(turns):
        if turn["from"] != ("gpt" if number % 2 else "human"):
            raise SampleError("conversation", f"two turns of {turn['from']} in a row")
    if not turns:
        raise SampleError("conversation", "the conversation has no question")
    if len(turns) % 2:
        raise SampleError("conversation", "the last question has no answer")
    return [(asked["value"], answered["value"]) for asked, answered in zip(turns[::2], turns[1::2])]


def place_training_images(turns: Turns, num_images: int, *, first: bool = False) -> list[tuple[str, str]]:
    """Return turns that have one image placeholder per image, all in questions.

    A single image without a placeholder gets one in front of the first question.

    Args:
        turns: pairs of question and answer.
        num_images: number of images.
        first: move placeholders to the front of their question, as LLaVA does.

    Raises:
        SampleError: the numbers of placeholders and images differ, or an answer has a placeholder.
    """
    if any(IMG_CONTEXT in text for turn in turns for text in turn):
        raise SampleError("conversation", f"the text contains {IMG_CONTEXT}, which only images may bring")
    if any(IMAGE_PLACEHOLDER in answer for _, answer in turns):
        raise SampleError("placeholders", f"an answer contains {IMAGE_PLACEHOLDER}, which belongs in questions")
    placed = [(question, answer) for question, answer in turns]
    count = sum(question.count(IMAGE_PLACEHOLDER) for question, _ in placed)
    if num_images == 1 and count == 0:
        placed[0] = (f"{IMAGE_PLACEHOLDER}\n{placed[0][0]}", placed[0][1])
        count = 1
    if count != num_images:
        raise SampleError("placeholders", f"{count} {IMAGE_PLACEHOLDER} placeholder(s) for {num_images} image(s)")
    return [(_to_front(question), answer) for question, answer in placed] if first else placed


def _to_front(question: str) -> str:
    count = question.count(IMAGE_PLACEHOLDER)
    rest = question.replace(IMAGE_PLACEHOLDER, "").strip()
    return (f"{IMAGE_PLACEHOLDER}\n" * count + rest).strip() if count else question


def plain(template: Template) -> Template:
    """LLaVA's template `plain` for pretraining a projector: an image, its caption, a line break.

    The image tokens are the model's own. The turns are those of `captions`.
    """
    return Template("", "", "", "", "", "", "\n", image=template.image)


def captions(turns: Turns) -> list[tuple[str, str]]:
    """Reduce a conversation to an image and its caption, as `plain` takes it: the question's text is dropped.

    Raises:
        SampleError: there is more than one turn, or no image.
    """
    if len(turns) != 1 or IMAGE_PLACEHOLDER not in turns[0][0]:
        raise SampleError("conversation", f"{len(turns)} turns: a caption is one answer to one question with an image")
    question, answer = turns[0]
    return [(IMAGE_PLACEHOLDER * question.count(IMAGE_PLACEHOLDER), answer)]


def build(
    turns: Turns,
    template: Template,
    tokenizer: Tokenizer,
    tokens_per_image: int,
    image_token_id: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a conversation and label it.

    The ids are those of the whole text tokenized at once (or, if the image token is not in the vocabulary, in the
    pieces of `encode_prompt`).

    Args:
        turns: as `place_training_images` returns them.
        template: the conversation template.
        tokenizer: the tokenizer.
        tokens_per_image: visual tokens of an image.
        image_token_id: the token of images; None for the tokenizer's own.

    Returns:
        Ids [T] int32 and labels [T] int32, IGNORED except on answers and their end tokens.

    Raises:
        SampleError: tokens of an answer merge with those of its prompt, so that no prompt could lead to them.
    """
    image_token = template.image[1]
    if image_token_id is None:
        image_token_id = tokenizer.token_to_id(image_token)
    encode = partial(encode_prompt, tokenizer, image_token=image_token, image_token_id=image_token_id)
    ids: list[int] = []
    supervised: list[bool] = []
    text = template.system + template.system_end
    # Text after a special token is tokenized independently of the text before: start at the last one.
    end = tokenizer.token_to_id(template.answer_end)
    for question, answer in turns:
        anchored = bool(ids) and end is not None
        start, known = (template.answer_end, [end]) if anchored else (text, ids)
        question = _expand(question, tokens_per_image, template)
        prompt = start + template.user + question + template.user_end + template.assistant
        whole = prompt + template.before_answer + answer + template.answer_end
        add_bos = False if anchored else None
        prompt_ids, whole_ids = encode(prompt, add_bos=add_bos), encode(whole, add_bos=add_bos)
        if whole_ids[: len(prompt_ids)] != prompt_ids or prompt_ids[: len(known)] != known:
            raise SampleError("tokens", f"the tokens before the answer {answer[:40]!r} depend on what follows them")
        supervised += [False] * (len(prompt_ids) - len(known)) + [True] * (len(whole_ids) - len(prompt_ids))
        ids = ids + whole_ids[len(known) :]
        text = whole
    array = np.asarray(ids, np.int32)
    return array, np.where(supervised, array, np.int32(IGNORED))


def _expand(question: str, tokens_per_image: int, template: Template) -> str:
    return expand_images(question, tokens_per_image, question.count(IMAGE_PLACEHOLDER), template.image)


def truncate(
    ids: np.ndarray, labels: np.ndarray, length: int, image_token_id: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Truncate on the right to `length` tokens, as the reference code does.

    Args:
        ids: [T] int32.
        labels: [T] int32.
        length: the maximum length.
        image_token_id: the token of images.

    Returns:
        Ids and labels [<=length], and whether they were truncated.

    Raises:
        SampleError: image tokens would be lost, or no supervised token is left.
    """
    truncated = len(ids) > length
    if truncated and np.any(ids[length:] == image_token_id):
        raise SampleError(
            "truncated image", f"truncating {len(ids)} tokens to {length} would cut off image tokens: use longer rows"
        )
    labels = labels[:length]
    # The first token is never predicted.
    if not np.any(labels[1:] != IGNORED):
        where = f"within the first {length} of {len(ids)} tokens" if truncated else "in it"
        raise SampleError("no supervised token", f"there is no answer {where}")
    return ids[:length], labels, truncated

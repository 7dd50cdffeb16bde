"""A conversation as token ids and labels: what the model reads, and which of it it learns to say.

Supervised are the answers and the token that ends each. The labels are those of the reference's release; its later
revisions changed the template and, with it, masked every token. No count of tokens or blanks is subtracted here: an
answer's tokens are the ones that follow the tokens of the prompt that a chat would send to have it said.
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
    """A sample that cannot be learned from. kind: a short name, by which such samples are counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_turns(conversations: Any) -> list[tuple[str, str]]:
    """Questions and answers of the documented form, [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...].

    A first turn that is not the human's is dropped, as in the reference. Raises SampleError for any other form.
    """
    if not isinstance(conversations, list) or not all(isinstance(turn, dict) for turn in conversations):
        raise SampleError("conversation", '"conversations" must be a list of {"from": ..., "value": ...}')
    for number, turn in enumerate(conversations, 1):
        if turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            raise SampleError("conversation", f'turn {number} must have "from", human or gpt, and a text as "value"')
    turns = conversations[1:] if conversations and conversations[0]["from"] == "gpt" else conversations
    for number, turn in enumerate(turns):
        if turn["from"] != ("gpt" if number % 2 else "human"):
            raise SampleError("conversation", f"two turns of {turn['from']} stand behind one another")
    if not turns:
        raise SampleError("conversation", "the conversation has no question")
    if len(turns) % 2:
        raise SampleError("conversation", "the last question has no answer")
    return [(asked["value"], answered["value"]) for asked, answered in zip(turns[::2], turns[1::2])]


def place_training_images(turns: Turns, num_images: int, *, first: bool = False) -> list[tuple[str, str]]:
    """The turns with as many image placeholders as images, all in questions.

    A single image without a placeholder gets it in front of the first question. first: placeholders move to the front
    of their question, as LLaVA has them. Raises SampleError where placeholders and images do not agree.
    """
    if any(IMG_CONTEXT in text for turn in turns for text in turn):
        raise SampleError("conversation", f"the text contains {IMG_CONTEXT}, which only images may bring")
    if any(IMAGE_PLACEHOLDER in answer for _, answer in turns):
        raise SampleError("placeholders", f"an answer contains {IMAGE_PLACEHOLDER}, which belongs into questions")
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
    """LLaVA's template for pretraining a projector (its `plain`), with the image tokens of the model's own: an image,
    its caption, a line break. Its turns are those of `captions`."""
    return Template("", "", "", "", "", "", "\n", image=template.image)


def captions(turns: Turns) -> list[tuple[str, str]]:
    """A conversation as `plain` has it: what is asked is not read, only its image.

    Raises SampleError for more than one turn, and for one without an image.
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
    """Ids [T] int32 of a conversation and its labels [T] int32, IGNORED except on answers and their end tokens.

    turns: as `place_training_images` returns them. image_token_id: None for the tokenizer's own.
    The ids are those of the whole text in one piece (or, where images are no tokens of the vocabulary, in the pieces
    of `encode_prompt`). Raises SampleError where an answer's tokens would merge with the prompt's, so that no prompt
    could ever lead to them.
    """
    image_token = template.image[1]
    if image_token_id is None:
        image_token_id = tokenizer.token_to_id(image_token)
    encode = partial(encode_prompt, tokenizer, image_token=image_token, image_token_id=image_token_id)
    ids: list[int] = []
    supervised: list[bool] = []
    text = template.system + template.system_end
    # What stands behind a special token does not depend on what stands before it: no need to begin at the beginning.
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
    """Cut on the right to `length` tokens, as the reference does; True where something was cut.

    Raises SampleError where the cut takes image tokens, and where no supervised token is left.
    """
    kept, cut = ids[:length], len(ids) > length
    if cut and np.any(ids[length:] == image_token_id):
        raise SampleError(
            "truncated image", f"{len(ids)} tokens are cut to {length}, and image tokens with them: use longer rows"
        )
    labels = labels[:length]
    # The first token is never predicted.
    if not np.any(labels[1:] != IGNORED):
        why = f"within the first {length} of {len(ids)} tokens" if cut else "in it"
        raise SampleError("no supervised token", f"there is no answer {why}")
    return kept, labels, cut

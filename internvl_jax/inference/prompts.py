"""From questions and images to arrays: what `Chat` does before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER, TEMPLATES
from internvl_jax.processing.conversation import (
    Turn,
    as_turn,
    combine_images,
    count_images,
    count_placeholders,
    has_ambiguous_images,
    place_images,
    prepare_prompt,
    unused_character,
)
from internvl_jax.processing.images import ImageProcessor, load_image
from internvl_jax.processing.tokenizer import Tokenizer, encode_prompt, pad_left, special_tokens_in

ImageSource = str | Path | bytes | Image.Image | np.ndarray
History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class AskOptions:
    """How a question is turned into a prompt.

    Attributes:
        system: system message in front of the conversation; None: the template's own, if any.
        honour_exif: rotate images by their EXIF orientation. The reference does not; evaluation passes False.
        image_path: "eval" (convert to RGB, then resize) or "native" (resize in the file's mode, as on the model card).
        parse_special: parse special tokens in the texts ("</s>", "<img>"), as the reference's tokenizer does. By
            default they are ordinary text, so that typed text can neither end a turn nor insert an image.
        combine: put all images, later ones too, at the history's one placeholder: the reference's combined form, which
            shows an image before the answer that was given without it.
    """

    system: str | None = None
    honour_exif: bool = True
    image_path: str = "eval"
    parse_special: bool = False
    combine: bool = False


@dataclass(frozen=True)
class QuestionBatch:
    """Questions as arrays.

    Attributes:
        input_ids: [B,T] int32, padded on the left.
        attention_mask: [B,T] int32, 0 on padding.
        pixel_values: [M,3,H,W] float32, in prompt order over the batch; None without images.
        questions: each question with its image placeholders, and how many images it adds.
        histories: the turns before each question.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    pixel_values: np.ndarray | None
    questions: list[tuple[str, int]]
    histories: list[list[Turn]]


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of one model. `name` is the model's, for error messages."""

    config: ChatConfig
    tokenizer: Tokenizer | None
    processor: ImageProcessor | None
    image_token_id: int | None
    name: str

    def build(
        self,
        questions: Sequence[str],
        images: Sequence[Any] | None = None,
        histories: Sequence[History] | None = None,
        options: AskOptions | None = None,
    ) -> QuestionBatch:
        """Tokenize questions and preprocess their images. Arguments as for `Chat.batch_chat`.

        Raises:
            ValueError: a question or its images cannot be used; in a batch the message names the question.
        """
        options = options or AskOptions()
        if isinstance(questions, str) or not len(questions):
            raise ValueError("batch_chat takes a list of at least one question; chat() takes a single one")
        image_rows = [_as_list(row) for row in images] if images is not None else [[] for _ in questions]
        turns = [_turns(history) for history in histories] if histories is not None else [[] for _ in questions]
        if not len(questions) == len(image_rows) == len(turns):
            raise ValueError(
                f"{len(questions)} questions, {len(image_rows)} lists of images and {len(turns)} histories: give "
                "one of each per row"
            )
        placed, rows, pixels = [], [], []
        turns = [combine_images(row, len(own)) if options.combine else row for row, own in zip(turns, image_rows)]
        for number, (question, row_images, history) in enumerate(zip(questions, image_rows, turns)):
            where = f"question {number + 1}: " if len(questions) > 1 else ""
            try:
                if not isinstance(question, str):
                    raise ValueError(f"a question is a text, not {type(question).__name__}")
                if not question.strip():
                    raise ValueError("the question is empty")
                if row_images:
                    self._check_sees()
                earlier = count_images(history) + count_placeholders(options.system or "")
                if not has_ambiguous_images(history):
                    question = place_images(question, len(row_images) - earlier, has_history=False)
                rows.append(self._encode_text(question, history, len(row_images), options))
                for source in row_images:
                    image = load_image(source, honour_exif=options.honour_exif)
                    pixels.append(self.processor(image, path=options.image_path))
            except ValueError as error:
                raise type(error)(f"{where}{error}") from None
            placed.append((question, len(row_images) - earlier))
        input_ids, mask = pad_left(rows, self.tokenizer.pad_id or 0)
        return QuestionBatch(input_ids, mask, np.stack(pixels) if pixels else None, placed, turns)

    def _encode_text(self, question: str, history: Sequence[Turn], num_images: int, options: AskOptions) -> list[int]:
        """Token ids of a row's prompt. What people typed holds no special tokens, unless they ask for it."""
        typed = (question, options.system or "", *(text for turn in history for text in turn))
        literal = None
        if not options.parse_special:
            without = (_unicode(text).replace(IMAGE_PLACEHOLDER, " ") for text in typed)
            answers = (answer for _, answer in history)
            if any(special_tokens_in(self.tokenizer, text) for text in without) or count_placeholders(*answers):
                literal = unused_character(*typed)
        template = TEMPLATES[self.config.template]
        tokens = self.config.tokens_per_image if num_images else 0
        prompt = prepare_prompt(template, question, history, num_images, tokens, options.system, literal)
        return encode_prompt(
            self.tokenizer, _unicode(prompt), template.image[1], self.image_token_id, literal_mark=literal
        )

    def _check_sees(self) -> None:
        if self.config.vision is None:
            raise ValueError(f"{self.name} is a language model without a vision tower: ask without images")
        if self.processor is None:
            raise ValueError(
                f"{self.name} has no preprocessor_config.json: put it beside its config.json, or pass pixel_values to "
                "generate()"
            )


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds bytes that are no UTF-8 (lone surrogates): type or decode it anew") from None
    return text


def _turns(history: Any) -> list[Turn]:
    try:
        if isinstance(history, str):
            raise ValueError
        return [as_turn(turn) for turn in history or ()]
    except ValueError:
        raise ValueError("a history is a list of (question, answer) texts, as a reply's `history`") from None


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return [images] if isinstance(images, (str, Path, bytes, Image.Image, np.ndarray)) else list(images)

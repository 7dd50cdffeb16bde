"""From questions and images to arrays, before the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER, TEMPLATES, default_system
from internvl_jax.processing.conversation import (
    Turn,
    as_turn,
    combine_images,
    count_images,
    count_placeholders,
    escape_placeholders,
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
        honor_exif: rotate images by their EXIF orientation. The reference does not; evaluation passes False.
        image_path: "eval" (convert to RGB, then resize) or "native" (resize in the file's mode, as on the model card).
        parse_special: parse special tokens in the texts ("</s>", "<img>"), as the reference's tokenizer does. By
            default they are ordinary text, so that typed text can neither end a turn nor insert an image.
        max_tiles: most tiles of an image's grid, where images are cut into tiles, or one limit per question; None: as
            the checkpoint says.
        combine: put all images, later ones too, at the history's one placeholder: the reference's combined form, which
            shows an image before the answer that was given without it.
        image_mark: a character that stands for an image in questions and system message; "<image>" is then ordinary
            text. None: "<image>" stands for an image.
    """

    system: str | None = None
    honor_exif: bool = True
    image_path: str = "eval"
    parse_special: bool = False
    combine: bool = False
    image_mark: str | None = None
    max_tiles: int | Sequence[int] | None = None


@dataclass(frozen=True)
class QuestionBatch:
    """Questions as arrays.

    Attributes:
        input_ids: [B,T] int32, padded on the left.
        attention_mask: [B,T] int32, 0 on padding.
        pixel_values: [M,3,H,W] float32, images or their tiles in prompt order over the batch; None without images.
        questions: each question with its image placeholders, and how many images it adds.
        histories: the turns before each question.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    pixel_values: np.ndarray | None
    questions: list[tuple[str, int]]
    histories: list[list[Turn]]

    def history_with(self, row: int, answer: str) -> list[tuple[str, str]]:
        """The history of a row after its answer; each turn has its number of images."""
        question, images = self.questions[row]
        turns: list[tuple[str, str]] = [Turn(turn, turn.images) for turn in self.histories[row]]
        return [*turns, Turn((question, answer), images + count_placeholders(answer))]


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of one model.

    Attributes:
        config: configuration of the model.
        tokenizer: its tokenizer; None if the checkpoint has none.
        processor: its preprocessing of images; None if the checkpoint has none.
        image_token_id: token that image features replace; None for text-only models.
        name: the model's name, for error messages.
    """

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
        if isinstance(options.max_tiles, Sequence) and len(options.max_tiles) != len(questions):
            raise ValueError(
                f"{len(options.max_tiles)} limits of tiles for {len(questions)} questions: give one per row"
            )
        if options.combine:
            turns = [combine_images(row, len(own)) for row, own in zip(turns, image_rows)]
        tokenizer = self._required_tokenizer()
        asked: list[tuple[str, int]] = []
        rows: list[list[int]] = []
        pixels: list[np.ndarray] = []
        for index, (question, sources, history) in enumerate(zip(questions, image_rows, turns)):
            row_options, literal = options, None
            try:
                if options.image_mark is not None:
                    question, history, row_options, literal = _with_placeholders(question, history, options)
                earlier = count_images(history) + count_placeholders(row_options.system or "")
                question = self._place_images(question, history, len(sources) - earlier)
                limit = options.max_tiles
                row_options = replace(row_options, max_tiles=limit[index] if isinstance(limit, Sequence) else limit)
                ids, tiles = self._encode_row(question, history, sources, row_options, literal)
                rows.append(ids)
                pixels += tiles
            except ValueError as error:
                where = f"question {index + 1}: " if len(questions) > 1 else ""
                raise type(error)(f"{where}{error}") from None
            asked.append((question, len(sources) - earlier))
        input_ids, mask = pad_left(rows, tokenizer.pad_id or 0)
        return QuestionBatch(input_ids, mask, np.concatenate(pixels) if pixels else None, asked, turns)

    def _encode_row(
        self,
        question: str,
        history: Sequence[Turn],
        sources: Sequence[ImageSource],
        options: AskOptions,
        literal: str | None,
    ) -> tuple[list[int], list[np.ndarray]]:
        """The token ids of a row, and the pixel values [T,3,H,W] of each of its images."""
        processor = self._required_processor() if sources else None

        def load() -> list[np.ndarray]:
            if processor is None:
                return []
            images = (load_image(source, honor_exif=options.honor_exif) for source in sources)
            limit = options.max_tiles if isinstance(options.max_tiles, int) else None
            return [processor.tiles(image, options.image_path, limit) for image in images]

        if processor is None or processor.tiling is None:  # the text is checked before images are read
            tokens = [self.config.tokens_per_image if processor is not None else 0] * len(sources)
            return self._encode_text(question, history, tokens, options, literal), load()
        tiles = load()
        tokens = [len(image) * self.config.tokens_per_image for image in tiles]
        return self._encode_text(question, history, tokens, options, literal), tiles

    def _place_images(self, question: Any, history: Sequence[Turn], num_images: int) -> str:
        """The question with a placeholder for each of its images."""
        if not isinstance(question, str):
            raise ValueError(f"a question is a string, not {type(question).__name__}")
        if not question.strip():
            raise ValueError("the question is empty")
        return question if has_ambiguous_images(history) else place_images(question, num_images, has_history=False)

    def _required_processor(self) -> ImageProcessor:
        if self.config.vision is None:
            raise ValueError(f"{self.name} is a language model without a vision tower: ask without images")
        if self.processor is None:
            raise ValueError(
                f"{self.name} has no preprocessor_config.json: put it beside its config.json, or pass pixel_values to "
                "generate()"
            )
        return self.processor

    def _required_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files: put them beside its config.json, or use generate()")
        return self.tokenizer

    def _encode_text(
        self,
        question: str,
        history: Sequence[Turn],
        image_tokens: Sequence[int],
        options: AskOptions,
        literal: str | None,
    ) -> list[int]:
        """Token ids of a row's prompt. Special tokens in the texts are ordinary text unless `parse_special` is set.

        Args:
            question: the question with its placeholders.
            history: the turns before it.
            image_tokens: visual tokens of each image of the row.
            options: as given.
            literal: the mark around typed text, where one is in use already.
        """
        tokenizer, template = self._required_tokenizer(), TEMPLATES[self.config.template or ""]
        system = self.config.system_message if options.system is None else options.system
        if system is None:
            system = default_system(self.config.template or "", self.config.dynamic_image_size)
        typed = (question, options.system or "", *(text for turn in history for text in turn))
        if literal is None and not options.parse_special:
            without = (_unicode(text).replace(IMAGE_PLACEHOLDER, " ") for text in typed)
            answers = (answer for _, answer in history)
            if any(special_tokens_in(tokenizer, text) for text in without) or count_placeholders(*answers):
                literal = unused_character(*typed)
        prompt = prepare_prompt(template, question, history, image_tokens, system, literal)
        return encode_prompt(tokenizer, _unicode(prompt), template.image[1], self.image_token_id, literal_mark=literal)


def _with_placeholders(
    question: str, history: Sequence[Turn], options: AskOptions
) -> tuple[str, list[Turn], AskOptions, str | None]:
    """A row whose images have marks, with placeholders; and the mark around typed text, if it is needed."""
    mark, system = options.image_mark or "", options.system
    typed = (question, system or "", *(text for turn in history for text in turn))
    if not count_placeholders(*typed):
        literal = None
    elif options.parse_special:
        raise ValueError(f"{IMAGE_PLACEHOLDER} cannot be text where special tokens are parsed")
    else:
        literal = unused_character(mark, *typed)

    def placed(text: str) -> str:
        return escape_placeholders(text, mark, literal or "")

    turns = [Turn((placed(asked), answer), turn.images) for turn in history for asked, answer in [turn]]
    return placed(question), turns, replace(options, system=None if system is None else placed(system)), literal


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid UTF-8 (it has lone surrogates): decode it again") from None
    return text


def _turns(history: Any) -> list[Turn]:
    try:
        if isinstance(history, str):
            raise ValueError
        return [as_turn(turn) for turn in history or ()]
    except ValueError:
        raise ValueError("a history is a list of (question, answer) pairs, such as a reply's `history`") from None


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return [images] if isinstance(images, (str, Path, bytes, Image.Image, np.ndarray)) else list(images)

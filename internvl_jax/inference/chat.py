"""Chat, the user-facing API: answers questions about images. `internvl_jax.load` creates one."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.inference.answer_text import AnswerDecoder, AnswerStream, cut_at_stop
from internvl_jax.inference.generation.generate import DecodeState
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.input_checks import check_pixels, check_settings, complete_settings, features_shape
from internvl_jax.inference.prompts import AskOptions, History, ImageSource, PromptBuilder, QuestionBatch
from internvl_jax.inference.replies import NOT_FINITE, AnswerError, Reply, Stream, require_answers
from internvl_jax.models.layers import Params
from internvl_jax.processing.boxes import Box, parse_boxes
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import Tokenizer
from internvl_jax.quantize import scheme_of
from internvl_jax.utils import formats

__all__ = ["AnswerError", "Chat", "Reply", "Stream", "require_answers"]

STREAM_CHUNK = 4  # tokens per piece of a streamed answer
STOP_CHUNK = 16  # tokens between searches for a stop string

logger = logging.getLogger(__name__)


class Chat:
    """A model with its tokenizer and image processor. Created by `load`.

    There are three levels: `chat`, `batch_chat` and `stream` take questions and images; `generate`, `logits` and
    `encode` take numpy arrays; `params` and `config` are for `internvl_jax.models`.

    Args:
        generator: runs the model.
        tokenizer: None: only arrays can be used.
        processor: preprocessing of images; None: no images in questions.
        eos_token_ids: default end tokens; None: those of the configuration.
        name: the model's name in messages and reports.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer | None = None,
        processor: ImageProcessor | None = None,
        *,
        eos_token_ids: tuple[int, ...] | None = None,
        name: str = "model",
    ):
        self.generator = generator
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.name = name
        self.prompts = PromptBuilder(self.config, tokenizer, processor, generator.image_token_id, name)
        self._answer_decoder: AnswerDecoder | None = None
        if tokenizer is not None and self.config.text is not None:
            self._answer_decoder = AnswerDecoder(tokenizer, tokenizer.known_ids(self.config.text.vocab_size))

    @property
    def config(self) -> ChatConfig:
        """Configuration of the model."""
        return self.generator.config

    @property
    def image_token_id(self) -> int | None:
        """The token that image features replace; None for text-only models."""
        return self.generator.image_token_id

    @property
    def params(self) -> Params:
        """Parameters of the model."""
        return self.generator.params

    @property
    def dtype(self) -> np.dtype:
        """Compute dtype."""
        return self.generator.dtype

    @property
    def processor(self) -> ImageProcessor | None:
        """Preprocessing of images; None if the checkpoint has no preprocessor_config.json."""
        return self.prompts.processor

    def boxes(self, reply: Reply, width: int, height: int) -> list[Box]:
        """The boxes of an answer about one image; its text leaves out the `<ref>` and `<box>` tokens.

        Args:
            reply: the answer.
            width: of the image, in pixels; of the upright one if its EXIF orientation was applied.
            height: of the image.

        Raises:
            ValueError: the model has no tokenizer.
            TokenizerError: the tokens cannot be decoded.
        """
        if self._answer_decoder is None:
            raise ValueError(f"{self.name} has no tokenizer: its answers have no text to read boxes from")
        return parse_boxes(self._answer_decoder.text(reply.tokens, skip_special_tokens=False), width, height)

    def with_processor(self, processor: ImageProcessor) -> Chat:
        """The same chat with another preprocessing of images."""
        other = copy.copy(self)
        other.prompts = replace(self.prompts, processor=processor)
        return other

    def with_params(self, params: Params, adapters: Params | None = None) -> Chat:
        """The same chat with other parameters. Nothing is compiled again if their shapes and dtypes are the same.

        Args:
            params: parameters of the model.
            adapters: the collection "lora" of adapters (`lora.attach`); None: none.
        """
        other = copy.copy(self)
        other.generator = self.generator.with_params(params, adapters)
        return other

    def __repr__(self) -> str:
        size = sum(int(leaf.size) for leaf in jax.tree.leaves(self.params))
        parts = [self.name, f"{formats.parameters(size)} parameters", self.dtype.name]
        scheme = scheme_of(self.params)
        if scheme is not None:
            parts.append(f"{scheme.name} weights")
        if self.generator.cache_dtype != self.dtype:
            parts.append(f"{self.generator.cache_dtype.name} KV cache")
        mesh = self.generator.mesh
        if mesh is not None:
            axes = [f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1]
            parts.append(f"mesh {','.join(axes) or 'of one device'}")
        return f"Chat({', '.join(parts)})"

    # Questions and images.

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource = (),
        history: History = (),
        **options: Any,
    ) -> Reply:
        """Answer one question.

        Args:
            question: the text. "<image>" marks the place of an image; unmarked images stand before the text.
            images: all images of the conversation, those of the history first, then those of the question: paths,
                bytes, PIL images or arrays.
            history: earlier turns: a previous reply's `history`, or (question, answer) pairs. Such pairs have one image
                per "<image>", unless a third element gives the number; if a single "<image>" may stand for several
                images, the new question must place its own.
            **options: fields of `AskOptions` (system, honor_exif, ...) and of `GenerationConfig` (max_new_tokens,
                temperature, num_beams, stop, ...). The default of max_new_tokens is 1024, or what the context has room
                for.

        Raises:
            ValueError: an image is unreadable, placeholders and images do not match, the question is empty, or prompt
                and answer exceed the context.
            AnswerError: the logits are not finite.
        """
        (reply,) = require_answers(self._answer([question], [images], [history], options))
        return reply

    def batch_chat(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[ImageSource] | ImageSource] | None = None,
        histories: Sequence[History] | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Answer several questions in one batch. Each answer is the same as when its question is asked alone.

        Args:
            questions: one per row.
            images: images of each row, as for `chat`; None: no images.
            histories: history of each row, as for `chat`; None: no histories.
            **options: as for `chat`. When sampling, row i gets the answer that it gets alone with seed + i; `seed` may
                also be a tuple with one seed per row.

        Returns:
            One Reply per question. A row whose logits are not finite, or whose tokens cannot be decoded, gets a Reply
            with `error`; the other rows are not affected.

        Raises:
            ValueError: as for `chat`.
        """
        replies = self._answer(questions, images, histories, options)
        failed = [number for number, reply in enumerate(replies, 1) if reply.error is not None]
        if failed:
            names = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
            logger.warning("question %s of %d: no answer (%s)", names, len(replies), replies[failed[0] - 1].error)
        return replies

    def stream(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource = (),
        history: History = (),
        **options: Any,
    ) -> Stream:
        """Answer one question and stream the answer. The joined pieces are the reply's text. Arguments as for `chat`.

        Raises:
            ValueError: as for `chat`, before the first piece; also for beam search, which cannot be streamed.
            AnswerError: the logits are not finite; raised while iterating.
        """
        batch, gen = self._prepare([question], [images], [history], options)
        if gen.num_beams > 1:
            raise ValueError("beam search cannot be streamed: use chat(), or num_beams=1")
        return Stream(self._stream(batch, gen))

    # Arrays.

    def generate(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        **generation: Any,
    ) -> np.ndarray:
        """Generate tokens for prompts that are already tokens.

        Args:
            input_ids: [B,T] or [T] integers, with image tokens in place.
            pixel_values: [M,3,H,W] float, normalized, in prompt order over the batch; None: no images.
            attention_mask: [B,T] of 0 and 1, 0 on padding, on either side; None: no padding.
            **generation: fields of GenerationConfig except `stop`.

        Returns:
            New tokens [B,<=max_new_tokens] int32, end tokens included, padded with the pad token.

        Raises:
            ValueError: an input or a setting cannot be used.
            AnswerError: the logits of some rows, which the message names, are not finite.
        """
        check_settings(self.config, generation, self.name)
        input_ids, mask = _rows(input_ids), None if attention_mask is None else _rows(attention_mask)
        lengths = np.ones_like(input_ids) if mask is None else mask
        gen = complete_settings(self.config, generation, lengths, self.eos_token_ids)
        if gen.stop:
            raise ValueError("stop strings need text: use chat(), or eos_token_ids here")
        features = self._features(input_ids, mask, pixel_values, gen)
        tokens, reasons = self.generator.generate(input_ids, mask, features, gen)
        failed = [str(row) for row, reason in enumerate(reasons) if reason == "error"]
        if failed:
            raise AnswerError(f"row {', '.join(failed)}: {NOT_FINITE}")
        return tokens

    def logits(
        self,
        input_ids: np.ndarray,
        pixel_values: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits at every position, [B,T,V] float32, undefined on padding. Arguments as for `generate`."""
        check_settings(self.config, {}, self.name)
        input_ids, mask = _rows(input_ids), None if attention_mask is None else _rows(attention_mask)
        return self.generator.logits(input_ids, mask, self._features(input_ids, mask, pixel_values, None))

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Encode images.

        Args:
            pixel_values: [M,3,H,W], or [3,H,W] for one image; float, normalized.

        Returns:
            Image features [M,P,D] float32; of a vision tower alone its last hidden state [M,1+P,D].
        """
        pixels = check_pixels(self.config, pixel_values, self.name)
        return np.asarray(self.generator.encode(pixels), np.float32)

    def check_ready(self) -> None:
        """Check that the model can answer questions at all.

        Raises:
            ValueError: there is no language model, no tokenizer or no known conversation template.
        """
        check_settings(self.config, {}, self.name)
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files: put them beside its config.json, or use generate()")
        if self.config.template not in TEMPLATES:
            raise ValueError(
                f"{self.name} was trained with the conversation template {self.config.template!r}, and the known ones "
                f"are {', '.join(sorted(TEMPLATES))}: set `template` in its config.json, load(template=...) or "
                "--template if it is one of them, or write the prompt yourself and use generate()"
            )

    # Implementation.

    def _prepare(
        self,
        questions: Sequence[str],
        images: Sequence[Any] | None,
        histories: Sequence[History] | None,
        options: dict[str, Any],
    ) -> tuple[QuestionBatch, GenerationConfig]:
        """Turn text and images into arrays. All inputs are validated here, before the model runs."""
        ask = {name: options[name] for name in options.keys() & AskOptions.__dataclass_fields__.keys()}
        settings = {name: value for name, value in options.items() if name not in ask}
        self.check_ready()
        check_settings(self.config, settings, self.name)
        batch = self.prompts.build(questions, images, histories, AskOptions(**ask))
        gen = complete_settings(self.config, settings, batch.attention_mask, self.eos_token_ids)
        pixels = batch.pixel_values
        features = None if pixels is None else features_shape(self.config, pixels, self.dtype)
        self.generator.check(batch.input_ids, batch.attention_mask, features, gen)
        return batch, gen

    def _features(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        pixel_values: np.ndarray | None,
        gen: GenerationConfig | None,
    ) -> jax.Array | None:
        """Validate the inputs of `generate` or `logits`, then encode the images."""
        if pixel_values is None:
            self.generator.check(input_ids, attention_mask, None, gen)
            return None
        pixels = check_pixels(self.config, pixel_values, self.name)
        shape = features_shape(self.config, pixels, self.dtype)
        self.generator.check(input_ids, attention_mask, shape, gen)
        return self.generator.encode(pixels)

    def _answer(
        self,
        questions: Sequence[str],
        images: Sequence[Any] | None,
        histories: Sequence[History] | None,
        options: dict[str, Any],
    ) -> list[Reply]:
        batch, gen = self._prepare(questions, images, histories, options)
        timer = _Timer()
        features = self._encode_batch(batch, timer)
        if gen.num_beams > 1:
            rows, reasons = self.generator.beam_search(batch.input_ids, batch.attention_mask, features, gen)
        else:
            rows, reasons = self._decode(self._prefill(batch, features, gen, timer), gen)
        timer.lap("decode")
        return [self._reply(batch, row, tokens, reasons[row], gen, timer) for row, tokens in enumerate(rows)]

    def _encode_batch(self, batch: QuestionBatch, timer: _Timer) -> jax.Array | None:
        if batch.pixel_values is None:
            return None
        features = jax.block_until_ready(self.generator.encode(batch.pixel_values))
        timer.lap("encode")
        return features

    def _prefill(
        self, batch: QuestionBatch, features: jax.Array | None, gen: GenerationConfig, timer: _Timer
    ) -> DecodeState:
        state = self.generator.prefill(batch.input_ids, batch.attention_mask, features, gen)
        jax.block_until_ready(state.done)
        timer.lap("prefill")
        return state

    def _decode(self, state: DecodeState, gen: GenerationConfig) -> tuple[list[list[int]], list[str]]:
        """Decode every row to its end. With stop strings, the host looks for them between chunks and ends rows."""
        decoder = self.answer_decoder
        chunk = STOP_CHUNK if gen.stop else gen.max_new_tokens
        while True:
            rows, reasons, running = self.generator.read(state)
            if gen.stop:
                for row in np.flatnonzero(running):
                    with contextlib.suppress(ValueError):  # `_reply` reports tokens that cannot be decoded
                        if cut_at_stop(decoder.text(rows[row]), gen.stop) is not None:
                            reasons[row], running[row] = "stop", False
                state = self.generator.end_rows(state, ~running)
            if not running.any():
                return rows, reasons
            state = self.generator.decode(state, chunk)

    def _stream(self, batch: QuestionBatch, gen: GenerationConfig) -> Iterator[str | Reply]:
        timer = _Timer()
        state = self._prefill(batch, self._encode_batch(batch, timer), gen, timer)
        answer = AnswerStream(self.answer_decoder, gen.stop)
        while True:
            (tokens,), (reason,), running = self.generator.read(state)
            if reason == "error":
                raise AnswerError(NOT_FINITE)
            piece = answer.push(tokens, last=not running[0])
            if piece:
                yield piece
            if answer.finished:
                timer.lap("decode")
                yield self._reply(batch, 0, tokens, "stop" if answer.stopped else reason, gen, timer)
                return
            state = self.generator.decode(state, STREAM_CHUNK)

    def _reply(
        self, batch: QuestionBatch, row: int, tokens: list[int], reason: str, gen: GenerationConfig, timer: _Timer
    ) -> Reply:
        """The Reply of a row; one with `error` if the row has no answer."""
        prompt_tokens, seconds = int(batch.attention_mask[row].sum()), timer.seconds()
        error = NOT_FINITE
        if reason != "error":
            try:
                text, tokens, reason = self.answer_decoder.finish(tokens, reason, gen.stop)
                return Reply(text, tokens, reason, batch.history_with(row, text), prompt_tokens, seconds)
            except ValueError as problem:
                error = f"the answer's tokens cannot be decoded ({problem})"
        return Reply("", tokens, "error", list(batch.histories[row]), prompt_tokens, seconds, error)

    @property
    def answer_decoder(self) -> AnswerDecoder:
        """Turns generated tokens into the text of an answer. Raises ValueError if there is no tokenizer."""
        if self._answer_decoder is None:
            raise ValueError(f"{self.name} has no tokenizer")
        return self._answer_decoder


class _Timer:
    """Wall time by phase, in seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self._laps[phase] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "total": self._last - self._start}


def _rows(array: Any) -> np.ndarray:
    """[B,T] from [B,T] or a single row [T]."""
    return np.atleast_2d(np.asarray(array))

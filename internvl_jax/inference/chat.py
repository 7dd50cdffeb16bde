"""The object that people hold: a Chat answers questions about images. `internvl_jax.load` makes one."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from internvl_jax.config import ChatConfig
from internvl_jax.inference.generate import DecodeState, GenerationConfig, Generator
from internvl_jax.models.layers import Params
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.conversation import (
    IMAGE_PLACEHOLDER,
    IMG_CONTEXT,
    TEMPLATES,
    Turn,
    ambiguous,
    as_turn,
    combine_images,
    count_placeholders,
    images_of,
    place_images,
    prepare_prompt,
    unused_character,
)
from internvl_jax.processing.images import ImageProcessor, load_image
from internvl_jax.processing.tokenizer import StreamDecoder, Tokenizer, encode_prompt, pad_left, special_tokens_in

ImageSource = str | Path | bytes | Image.Image | np.ndarray
History = Sequence[tuple[str, str]]

DEFAULT_NEW_TOKENS = 1024  # the longest answer where the caller sets no limit and the context has room
STREAM_CHUNK = 4  # tokens between looks at a streamed answer: small enough to feel live
STOP_CHUNK = 16  # tokens between looks for a stop string


logger = logging.getLogger(__name__)

NOT_FINITE = (
    "the model's logits are not finite (NaN or Inf): its weights are damaged or diverged, or overflow in this dtype"
)


class AnswerError(ValueError):
    """A question that was asked and got no answer: the model's numbers are not finite, or its tokens are no text."""


@dataclass(frozen=True)
class Reply:
    """An answer and what it took. With `error` there is no answer: text is empty."""

    text: str
    tokens: list[int]  # new token ids, with the end token, or what completes the stop string, where there was one
    finish_reason: str  # "stop" (end token or stop string), "length" or "error"
    history: list[tuple[str, str]]  # for the next call's `history`
    prompt_tokens: int
    timings: dict[str, float]  # seconds: encode, prefill, decode, total (of the whole batch)
    error: str | None = None  # why there is no answer; history then lacks this turn

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with `text` under the name `answer`; `error` where there is one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["history"] = [list(turn) for turn in self.history]
        if self.error is None:
            del values["error"]
        return {"answer": values.pop("text"), **values}


def answered(replies: Sequence[Reply]) -> Sequence[Reply]:
    """The replies as they are. Raises AnswerError at the first that is none."""
    for reply in replies:
        if reply.error is not None:
            raise AnswerError(reply.error)
    return replies


class Stream:
    """An answer as it comes: iterate over its pieces of text; `reply` is the whole once they are used up."""

    def __init__(self, pieces: Iterator[str | Reply]):
        self._pieces = pieces
        self._reply: Reply | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, Reply):
                self._reply = piece
            else:
                yield piece

    @property
    def reply(self) -> Reply:
        """The whole answer. Raises RuntimeError before the pieces are used up."""
        if self._reply is None:
            raise RuntimeError("the answer is not finished: iterate over the stream first")
        return self._reply


class Chat:
    """A model with its tokenizer and image processor. Made by `load`.

    Three levels: `chat`, `batch_chat` and `stream` take questions and pictures; `generate`, `logits` and `encode` take
    numpy arrays; `params` and `config` go with the pure functions of `internvl_jax.models`.
    """

    def __init__(
        self,
        config: ChatConfig,
        params: Params,
        *,
        dtype: Any,
        cache_dtype: Any = None,
        tokenizer: Tokenizer | None = None,
        processor: ImageProcessor | None = None,
        eos_token_ids: tuple[int, ...] | None = None,
        name: str = "model",
        mesh: jax.sharding.Mesh | None = None,
        image_axes: tuple[str, ...] = BATCH,
    ):
        self.config = config
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.eos_token_ids = eos_token_ids
        self.image_token_id = config.image_token_id
        if self.image_token_id is None and tokenizer is not None:
            self.image_token_id = tokenizer.token_to_id(IMG_CONTEXT)
        # A model may have rows for more tokens than its tokenizer has: those are never generated.
        self._known = None
        if tokenizer is not None and config.text is not None:
            self._known = tokenizer.known(config.text.vocab_size)
        self.generator = Generator(
            config,
            params,
            dtype=self.dtype,
            cache_dtype=cache_dtype,
            image_token_id=self.image_token_id,
            mesh=mesh,
            image_axes=image_axes,
            known=self._known,
        )

    # Questions and pictures.

    def chat(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource = (),
        history: History = (),
        *,
        system: str | None = None,
        honour_exif: bool = True,
        image_path: str = "eval",
        parse_special: bool = False,
        combine: bool = False,
        **generation: Any,
    ) -> Reply:
        """Answer one question.

        question: may place each of its images with "<image>"; otherwise they stand in front of it.
        images: all images of the conversation, those of its history first: paths, bytes, PIL images or arrays. Those
            beyond the history's are the question's.
        history: (question, answer) pairs, as the previous reply's `history` gives them, which also knows how many
            images each has. Of pairs from elsewhere (JSON) it is one per placeholder, unless a third element says it;
            where the only placeholder of such pairs may stand for several, the question has to place a later image.
        honour_exif: turn images as their EXIF orientation says. The reference does not; evaluation passes False.
        image_path: "eval" (convert to RGB, then resize) or "native" (the quick-start page's resize in the file's mode).
        parse_special: read special tokens that the texts spell ("</s>", "<img>") as such, as the reference's tokenizer
            does. By default they are ordinary text, so that nobody can end a turn or forge an image by typing.
        combine: put all images where the history's one placeholder is, later ones too: the reference's combined form,
            which shows an image before the answer that was given without it.
        generation: fields of GenerationConfig (max_new_tokens, temperature, num_beams, stop, ...); without
            max_new_tokens an answer may take 1024 tokens or what the context has room for.
        Raises ValueError for what cannot be answered: unreadable images, placeholders and images that do not agree, an
        empty question, prompt and answer beyond the context; AnswerError (one, too) where the logits are not finite.
        """
        asking = _Asking(system, honour_exif, image_path, parse_special, combine)
        (reply,) = answered(self._replies([question], [images], [history], asking, generation))
        return reply

    def batch_chat(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[ImageSource] | ImageSource] | None = None,
        histories: Sequence[History] | None = None,
        *,
        system: str | None = None,
        honour_exif: bool = True,
        image_path: str = "eval",
        parse_special: bool = False,
        combine: bool = False,
        **generation: Any,
    ) -> list[Reply]:
        """Answer several questions at once; each gets the answer that it gets alone. Arguments as for `chat`.

        Sampled, row i gets the answer that it gets alone with seed + i; `seed` may also be a tuple, one per row.
        A row whose logits are not finite, or whose tokens are no text, gets a Reply with `error`; the others' answers
        are not touched by it.
        """
        asking = _Asking(system, honour_exif, image_path, parse_special, combine)
        replies = self._replies(questions, images, histories, asking, generation)
        failed = [number for number, reply in enumerate(replies, 1) if reply.error is not None]
        if failed:
            names = ", ".join(map(str, failed[:10])) + (", ..." if len(failed) > 10 else "")
            logger.warning("question %s of %d: no answer (%s)", names, len(replies), replies[failed[0] - 1].error)
        return replies

    def _replies(
        self,
        questions: Sequence[str],
        images: Sequence[Any] | None,
        histories: Sequence[History] | None,
        asking: _Asking,
        generation: dict[str, Any],
    ) -> list[Reply]:
        batch, gen = self._prepare(questions, images, histories, asking, generation)
        timer = _Timer()
        features = self._encode_batch(batch, timer)
        if gen.num_beams > 1:
            tokens, reasons = self.generator.generate(batch.input_ids, batch.attention_mask, features, gen)
            timer.lap("decode")
            rows = [
                [] if reason == "error" else _trim(row, reason, self._ends(gen)) for row, reason in zip(tokens, reasons)
            ]
        else:
            state = self.generator.prefill(batch.input_ids, batch.attention_mask, features, gen)
            jax.block_until_ready(state.done)
            timer.lap("prefill")
            rows, reasons = self._decode(state, gen)
            timer.lap("decode")
        return [
            self._reply(row, reason, gen, question, history, prompt_tokens, timer)
            for row, reason, question, history, prompt_tokens in zip(
                rows, reasons, batch.questions, batch.histories, batch.attention_mask.sum(axis=1)
            )
        ]

    def stream(
        self,
        question: str,
        images: Sequence[ImageSource] | ImageSource = (),
        history: History = (),
        *,
        system: str | None = None,
        honour_exif: bool = True,
        image_path: str = "eval",
        parse_special: bool = False,
        combine: bool = False,
        **generation: Any,
    ) -> Stream:
        """Answer one question piece by piece; the pieces joined are the reply's text. Arguments as for `chat`.

        Bad input raises here, before the first piece; AnswerError comes while iterating. Beam search decides at the
        end, so it cannot be streamed.
        """
        asking = _Asking(system, honour_exif, image_path, parse_special, combine)
        batch, gen = self._prepare([question], [images], [history], asking, generation)
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
        """New token ids [B, <=max_new_tokens] int32 for prompts that are already tokens.

        input_ids [B,T] (or [T]) with image tokens in place; pixel_values [images,3,H,W] float, normalised, in prompt
        order over the batch; attention_mask [B,T], 0 on padding, on either side. The end token is kept, rows that end
        early are filled with the pad id. `generation`: fields of GenerationConfig, `stop` excepted.
        Raises AnswerError, naming the rows, where logits are not finite.
        """
        self._check_generation(generation)
        input_ids, attention_mask = _rows(input_ids), _rows(attention_mask)
        gen = self._generation_config(generation, np.ones_like(input_ids) if attention_mask is None else attention_mask)
        if gen.stop:
            raise ValueError("stop strings need text: use chat(), or eos_token_ids here")
        features = self._features(input_ids, attention_mask, pixel_values, gen)
        tokens, reasons = self.generator.generate(input_ids, attention_mask, features, gen)
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
        """Logits at every position, [B,T,V] float32; arguments as for `generate`. Rows of padding mean nothing."""
        self._check_generation({})
        input_ids, attention_mask = _rows(input_ids), _rows(attention_mask)
        features = self._features(input_ids, attention_mask, pixel_values, None)
        return self.generator.logits(input_ids, attention_mask, features)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """Visual tokens [M,P,D] float32 of pixel_values [M,3,H,W]; of a bare InternViT its last state [M,1+P,D]."""
        return np.asarray(self.generator.encode(self._check_pixels(pixel_values)), np.float32)

    # What is behind them.

    def check_ready(self) -> None:
        """Raise the ValueError that every question would meet: no language model, no tokenizer, no known template."""
        self._check_generation({})
        if self.tokenizer is None:
            raise ValueError(f"{self.name} has no tokenizer files: put them beside its config.json, or use generate()")
        if self.config.template not in TEMPLATES:
            raise ValueError(
                f"{self.name} was trained with the conversation template {self.config.template!r}, and the known ones "
                f"are {', '.join(sorted(TEMPLATES))}: set `template` in its config.json, load(template=...) or "
                "--template if it is one of them, or write the prompt yourself and use generate()"
            )

    def _check_generation(self, values: dict[str, Any]) -> None:
        if self.config.text is None:
            raise ValueError(f"{self.name} is a vision tower without a language model: it can only `encode`")
        unknown = set(values) - set(GenerationConfig.__dataclass_fields__)
        if unknown:
            known = ", ".join(GenerationConfig.__dataclass_fields__)
            raise ValueError(f"no such generation setting: {', '.join(sorted(unknown))}; there are {known}")
        GenerationConfig(**{name: value for name, value in values.items() if value is not None})

    def _generation_config(self, values: dict[str, Any], attention_mask: np.ndarray) -> GenerationConfig:
        """The caller's settings with this checkpoint's defaults. Without max_new_tokens the context sets the limit."""
        values = {name: value for name, value in values.items() if value is not None}
        longest = int(np.asarray(attention_mask).sum(axis=-1).max(initial=0))
        context = self.config.text.max_position_embeddings
        if "max_new_tokens" not in values:
            if longest >= context:
                raise ValueError(
                    f"the prompt has {longest} tokens, which leaves no room for an answer in the context of {context}: "
                    "shorten the question or its history, or show fewer images"
                )
            values["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, context - longest)
        values.setdefault("eos_token_ids", self.eos_token_ids)
        return GenerationConfig(**values)

    def _check_pixels(self, pixel_values: np.ndarray) -> np.ndarray:
        if self.config.vision is None:
            raise ValueError(f"{self.name} is a language model without a vision tower: it reads no images")
        given = np.asarray(pixel_values)
        pixels = given[None] if given.ndim == 3 else given
        vision = self.config.vision
        if pixels.ndim != 4 or pixels.shape[1] != vision.num_channels:
            raise ValueError(f"pixel_values must be [images, 3, height, width], not {list(given.shape)}")
        if not pixels.shape[0]:
            raise ValueError("pixel_values holds no images: leave it out for prompts without images")
        if not jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(
                f"pixel_values must be normalised numbers, not {given.dtype}: use chat.processor(picture), or scale to "
                "0...1, subtract the mean and divide by the standard deviation of preprocessor_config.json"
            )
        ratio = 1 if self.config.projector is None else self.config.unshuffle
        grid = [side // vision.patch_size for side in pixels.shape[2:]]
        if not all(grid) or any(side % ratio for side in grid):
            raise ValueError(
                f"pixel_values of {pixels.shape[2]} x {pixels.shape[3]} pixels have {grid[0]} x {grid[1]} patches: "
                f"whole multiples of {ratio * vision.patch_size} pixels are needed, best {self.config.image_size}"
            )
        return pixels.astype(np.float32, copy=False)

    def _features(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None,
        pixel_values: np.ndarray | None,
        gen: GenerationConfig | None,
    ) -> jax.Array | None:
        """Visual tokens of a call's images; first everything that can be refused is."""
        if pixel_values is None:
            self.generator.check(input_ids, attention_mask, None, gen)
            return None
        pixels = self._check_pixels(pixel_values)
        self.generator.check(input_ids, attention_mask, self._features_like(pixels), gen)
        return self.generator.encode(pixels)

    def _features_like(self, pixels: np.ndarray) -> jax.ShapeDtypeStruct:
        """The shape of what `Generator.encode` makes of checked pixels."""
        tokens = math.prod(side // self.config.vision.patch_size // self.config.unshuffle for side in pixels.shape[2:])
        return jax.ShapeDtypeStruct((len(pixels), tokens, self.config.text.hidden_size), self.dtype)

    def _prepare(
        self,
        questions: Sequence[str],
        images: Sequence[Any] | None,
        histories: Sequence[History] | None,
        asking: _Asking,
        generation: dict[str, Any],
    ) -> tuple[_Batch, GenerationConfig]:
        """Text and images to arrays; everything that can be refused is refused here."""
        self.check_ready()
        self._check_generation(generation)
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
        turns = [combine_images(row, len(own)) if asking.combine else row for row, own in zip(turns, image_rows)]
        for number, (question, row_images, history) in enumerate(zip(questions, image_rows, turns)):
            where = f"question {number + 1}: " if len(questions) > 1 else ""
            try:
                if not isinstance(question, str):
                    raise ValueError(f"a question is a text, not {type(question).__name__}")
                if not question.strip():
                    raise ValueError("the question is empty")
                if row_images:
                    self._check_sees()
                earlier = images_of(history) + count_placeholders(asking.system or "")
                if not ambiguous(history):
                    question = place_images(question, len(row_images) - earlier, has_history=False)
                rows.append(self._encode_text(question, history, len(row_images), asking))
                for source in row_images:
                    image = load_image(source, honour_exif=asking.honour_exif)
                    pixels.append(self.processor(image, path=asking.image_path))
            except ValueError as error:
                raise type(error)(f"{where}{error}") from None
            placed.append((question, len(row_images) - earlier))
        input_ids, mask = pad_left(rows, self.tokenizer.pad_id or 0)
        batch = _Batch(input_ids, mask, np.stack(pixels) if pixels else None, placed, turns)
        gen = self._generation_config(generation, mask)
        self.generator.check(input_ids, mask, None if not pixels else self._features_like(batch.pixel_values), gen)
        return batch, gen

    def _encode_text(self, question: str, history: Sequence[Turn], num_images: int, asking: _Asking) -> list[int]:
        """Token ids of a row's prompt. What people typed holds no special tokens, unless they ask for it."""
        typed = (question, asking.system or "", *(text for turn in history for text in turn))
        literal = None
        if not asking.parse_special:
            without = (_unicode(text).replace(IMAGE_PLACEHOLDER, " ") for text in typed)
            answers = (answer for _, answer in history)
            if any(special_tokens_in(self.tokenizer, text) for text in without) or count_placeholders(*answers):
                literal = unused_character(*typed)
        template = TEMPLATES[self.config.template]
        tokens = self.config.tokens_per_image if num_images else 0
        prompt = prepare_prompt(template, question, history, num_images, tokens, asking.system, literal)
        return encode_prompt(self.tokenizer, _unicode(prompt), template.image[1], self.image_token_id, literal=literal)

    def _check_sees(self) -> None:
        if self.config.vision is None:
            raise ValueError(f"{self.name} is a language model without a vision tower: ask without images")
        if self.processor is None:
            raise ValueError(
                f"{self.name} has no preprocessor_config.json: put it beside its config.json, or pass pixel_values to "
                "generate()"
            )

    def _encode_batch(self, batch: _Batch, timer: _Timer) -> jax.Array | None:
        if batch.pixel_values is None:
            return None
        features = jax.block_until_ready(self.generator.encode(batch.pixel_values))
        timer.lap("encode")
        return features

    def _decode(self, state: DecodeState, gen: GenerationConfig) -> tuple[list[list[int]], list[str]]:
        """Decode every row to its end; with stop strings the host looks between chunks and ends rows itself."""
        chunk = STOP_CHUNK if gen.stop else gen.max_new_tokens
        while True:
            rows, reasons, running = self.generator.read(state)
            if gen.stop:
                for number in np.flatnonzero(running):
                    with contextlib.suppress(ValueError):  # a row without a text is `_reply`'s to report
                        if self._cut_at_stop(self._text(rows[number]), gen.stop) is not None:
                            reasons[number], running[number] = "stop", False
                state = self.generator.end_rows(state, ~running)
            if not running.any():
                return rows, reasons
            state = self.generator.decode(state, chunk)

    def _stream(self, batch: _Batch, gen: GenerationConfig) -> Iterator[str | Reply]:
        timer = _Timer()
        features = self._encode_batch(batch, timer)
        state = self.generator.prefill(batch.input_ids, batch.attention_mask, features, gen)
        jax.block_until_ready(state.done)
        timer.lap("prefill")
        decoder, seen, given, text = StreamDecoder(self.tokenizer), 0, "", ""
        while True:
            (row,), (reason,), running = self.generator.read(state)
            if reason == "error":
                raise AnswerError(NOT_FINITE)
            text += decoder.push(self._decodable(row[seen:]))
            seen = len(row)
            finished = not running[0]
            if finished:
                text += decoder.flush()
            cut = self._cut_at_stop(text, gen.stop)
            if cut is not None:
                text, reason, finished = cut, "stop", True
            # Leading and trailing blanks are not part of the answer, nor may the beginning of a stop string be shown.
            visible = text.strip() if finished else _held_back(text.lstrip().rstrip(), gen.stop)
            if len(visible) > len(given):
                yield visible[len(given) :]
                given = visible
            if finished:
                timer.lap("decode")
                prompt_tokens = batch.attention_mask[0].sum()
                yield self._reply(row, reason, gen, batch.questions[0], batch.histories[0], prompt_tokens, timer)
                return
            state = self.generator.decode(state, STREAM_CHUNK)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(self._decodable(tokens), skip_special_tokens=True)

    def _decodable(self, tokens: Sequence[int]) -> list[int]:
        """Without an end token that the tokenizer does not have: no other such token is ever generated."""
        return [token for token in tokens if self._known[token]]

    @staticmethod
    def _cut_at_stop(text: str, stops: Sequence[str]) -> str | None:
        """The text before the first stop string, None where there is none."""
        found = [text.find(stop) for stop in stops if stop in text]
        return text[: min(found)] if found else None

    def _ends(self, gen: GenerationConfig) -> tuple[int, ...]:
        return gen.eos_token_ids if gen.eos_token_ids is not None else self.config.text.eos_token_ids

    def _reply(
        self,
        tokens: list[int],
        reason: str,
        gen: GenerationConfig,
        question: tuple[str, int],
        history: list[Turn],
        prompt_tokens: int,
        timer: _Timer,
    ) -> Reply:
        """The Reply of a row; one with `error` where the row has no answer."""
        error = NOT_FINITE if reason == "error" else None
        if error is None:
            try:
                return self._answer(tokens, reason, gen, question, history, prompt_tokens, timer)
            except ValueError as problem:
                error = f"the answer's tokens are no text ({problem})"
        return Reply("", tokens, "error", list(history), int(prompt_tokens), timer.seconds(), error)

    def _answer(
        self,
        tokens: list[int],
        reason: str,
        gen: GenerationConfig,
        question: tuple[str, int],
        history: list[Turn],
        prompt_tokens: int,
        timer: _Timer,
    ) -> Reply:
        text = self._text(tokens)
        cut = self._cut_at_stop(text, gen.stop)
        if cut is not None:
            text, reason = cut, "stop"
            # The host looks for stop strings now and then only: what was generated in between is not the answer's.
            complete = bisect_left(
                range(len(tokens)),
                True,
                key=lambda count: self._cut_at_stop(self._text(tokens[:count]), gen.stop) is not None,
            )
            tokens = tokens[:complete]
        text = text.strip()
        asked, images = question
        turns: list[tuple[str, str]] = [
            *(Turn(turn, turn.images) for turn in history),
            Turn((asked, text), images + count_placeholders(text)),
        ]
        return Reply(text, [int(t) for t in tokens], reason, turns, int(prompt_tokens), timer.seconds())


@dataclass(frozen=True)
class _Batch:
    input_ids: np.ndarray  # [B,T] int32, left-padded
    attention_mask: np.ndarray  # [B,T] int32
    pixel_values: np.ndarray | None  # [M,3,H,W] float32
    questions: list[tuple[str, int]]  # with their image placeholders, and how many images they bring
    histories: list[list[Turn]]


@dataclass(frozen=True)
class _Asking:
    """How questions are asked: `Chat.chat`'s arguments of these names."""

    system: str | None = None
    honour_exif: bool = True
    image_path: str = "eval"
    parse_special: bool = False
    combine: bool = False


class _Timer:
    """Wall time by phase."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "total": self._last - self._start}


def _rows(array: Any) -> np.ndarray | None:
    """An array of one row or several as several."""
    return None if array is None else np.atleast_2d(np.asarray(array))


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


def _held_back(text: str, stops: Sequence[str]) -> str:
    """`text` without an ending that may turn out to be the beginning of a stop string."""
    longest = max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - longest]


def _trim(row: np.ndarray, reason: str, ends: tuple[int, ...]) -> list[int]:
    """A padded row of tokens up to its end token."""
    tokens = [int(token) for token in row]
    hits = [index for index, token in enumerate(tokens) if token in ends]
    return tokens[: hits[0] + 1] if reason == "stop" and hits else tokens

"""Chat, the user-facing API: answers questions about images. `internvl_jax.load` creates one."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMG_CONTEXT, TEMPLATES
from internvl_jax.inference.generate import DecodeState
from internvl_jax.inference.generator import Generator
from internvl_jax.inference.prompts import AskOptions, History, ImageSource, PromptBuilder, QuestionBatch
from internvl_jax.inference.sampling import GenerationConfig
from internvl_jax.models.layers import Params
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.conversation import Turn, count_placeholders
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import StreamDecoder, Tokenizer
from internvl_jax.quantize import scheme_of

DEFAULT_NEW_TOKENS = 1024  # the longest answer where the caller sets no limit and the context has room
STREAM_CHUNK = 4  # tokens per piece of a streamed answer
STOP_CHUNK = 16  # tokens between searches for a stop string


logger = logging.getLogger(__name__)

NOT_FINITE = (
    "the model's logits are not finite (NaN or Inf): its weights are damaged or diverged, or overflow in this dtype"
)


class AnswerError(ValueError):
    """The model gave no answer: its logits are not finite, or its tokens cannot be decoded."""


@dataclass(frozen=True)
class Reply:
    """An answer. With `error` there is none: text is empty."""

    text: str
    tokens: list[int]  # new token ids, with the end token, or what completes the stop string, where there was one
    finish_reason: str  # "stop" (end token or stop string), "length" or "error"
    history: list[tuple[str, str]]  # for the next call's `history`
    prompt_tokens: int
    timings: dict[str, float]  # seconds: encode, prefill, decode, total (of the whole batch)
    error: str | None = None  # why there is no answer; history then lacks this turn

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Reply(error={self.error!r})"
        return f"Reply({self.text!r}, {len(self.tokens)} tokens, finish_reason={self.finish_reason!r})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with `text` under the name `answer`; `error` where there is one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["history"] = [list(turn) for turn in self.history]
        if self.error is None:
            del values["error"]
        return {"answer": values.pop("text"), **values}


def answered(replies: Sequence[Reply]) -> Sequence[Reply]:
    """Return the replies. Raises AnswerError if one has an error."""
    for reply in replies:
        if reply.error is not None:
            raise AnswerError(reply.error)
    return replies


class Stream:
    """A streamed answer: iterate over its pieces of text; afterwards `reply` is the whole answer."""

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
    """A model with its tokenizer and image processor. Created by `load`.

    There are three levels: `chat`, `batch_chat` and `stream` take questions and images; `generate`, `logits` and
    `encode` take numpy arrays; `params` and `config` are for `internvl_jax.models`.
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
        adapters: Params | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.name = name
        self.eos_token_ids = eos_token_ids
        self.image_token_id = config.image_token_id
        if self.image_token_id is None and tokenizer is not None:
            self.image_token_id = tokenizer.token_to_id(IMG_CONTEXT)
        self.prompts = PromptBuilder(config, tokenizer, processor, self.image_token_id, name)
        # A model may have rows for more tokens than its tokenizer has: those are never generated.
        self._known = None
        if tokenizer is not None and config.text is not None:
            self._known = tokenizer.known_ids(config.text.vocab_size)
        self.generator = Generator(
            config,
            params,
            dtype=dtype,
            cache_dtype=cache_dtype,
            image_token_id=self.image_token_id,
            mesh=mesh,
            image_axes=image_axes,
            adapters=adapters,
            known=self._known,
        )

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

    @processor.setter
    def processor(self, processor: ImageProcessor | None) -> None:
        self.prompts = replace(self.prompts, processor=processor)

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
        parameters = sum(int(leaf.size) for leaf in jax.tree.leaves(self.params))
        parts = [self.name, f"{parameters / 1e9:.3f}B parameters", self.dtype.name]
        scheme = scheme_of(self.params)
        if scheme is not None:
            parts.append(f"{scheme.name} weights")
        if self.generator.cache_dtype != self.dtype:
            parts.append(f"{self.generator.cache_dtype.name} KV cache")
        mesh = self.generator.mesh
        if mesh is not None:
            parts.append("mesh " + ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1))
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
            question: its text, which may place each of its images with "<image>"; by default they precede the text.
            images: all images of the conversation, those of its history first: paths, bytes, PIL images or arrays.
                Those beyond the history's are the question's.
            history: (question, answer) pairs. A previous reply's `history` also knows how many images each question
                has. In pairs from elsewhere (JSON) it is one per placeholder, unless a third element gives the number;
                where the only placeholder of such pairs may stand for several images, the question has to place a later
                image.
            **options: fields of `AskOptions` (system, honour_exif, ...) and of `GenerationConfig` (max_new_tokens,
                temperature, num_beams, stop, ...). Without max_new_tokens an answer may take 1024 tokens or what the
                context has room for.

        Raises:
            ValueError: an image is unreadable, placeholders and images do not match, the question is empty, or prompt
                and answer exceed the context.
            AnswerError: the logits are not finite.
        """
        (reply,) = answered(self._replies([question], [images], [history], options))
        return reply

    def batch_chat(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[ImageSource] | ImageSource] | None = None,
        histories: Sequence[History] | None = None,
        **options: Any,
    ) -> list[Reply]:
        """Answer several questions in one batch; each gets the answer that it gets alone. Arguments as for `chat`.

        When sampling, row i gets the answer that it gets alone with seed + i; `seed` may also be a tuple, one per row.

        Returns:
            One Reply per question. A row whose logits are not finite, or whose tokens cannot be decoded, gets a Reply
            with `error`; the other rows are not affected.

        Raises:
            ValueError: as for `chat`.
        """
        replies = self._replies(questions, images, histories, options)
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
        options: dict[str, Any],
    ) -> list[Reply]:
        batch, gen = self._prepare(questions, images, histories, options)
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
        **options: Any,
    ) -> Stream:
        """Answer one question and stream the answer; the pieces joined are the reply's text. Arguments as for `chat`.

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
                f"pixel_values must be normalised numbers, not {given.dtype}: use chat.processor(image), or scale to "
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
        options: dict[str, Any],
    ) -> tuple[QuestionBatch, GenerationConfig]:
        """Text and images to arrays. All inputs are validated here, before the model runs."""
        asked = {name: options[name] for name in options.keys() & AskOptions.__dataclass_fields__.keys()}
        generation = {name: value for name, value in options.items() if name not in asked}
        self.check_ready()
        self._check_generation(generation)
        batch = self.prompts.build(questions, images, histories, AskOptions(**asked))
        gen = self._generation_config(generation, batch.attention_mask)
        pixels = batch.pixel_values
        features = None if pixels is None else self._features_like(pixels)
        self.generator.check(batch.input_ids, batch.attention_mask, features, gen)
        return batch, gen

    def _encode_batch(self, batch: QuestionBatch, timer: _Timer) -> jax.Array | None:
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

    def _stream(self, batch: QuestionBatch, gen: GenerationConfig) -> Iterator[str | Reply]:
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

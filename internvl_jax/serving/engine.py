"""The engine: many requests at once on one model, by continuous batching.

One thread owns the device. Each round it reads a chunk of new prompts, if some are waiting and rows are free, then
dispatches a few decode steps for all running rows, and reads the results of the dispatch before while this one runs. An
answer that ends gives its row to the next request. When there is nothing to do the thread waits for a request.

Every shape is compiled by `warm_up`; afterwards nothing compiles. What a row computes does not depend on the others:
an answer is the same alone and among any others, up to the rounding of sums over the ring's slots.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from internvl_jax.inference.chat import Chat
from internvl_jax.inference.generation.generate import DecodeState, num_compiles
from internvl_jax.inference.generation.sampling import EOS_SLOTS, GenerationConfig, RowSettings, make_row_settings
from internvl_jax.serving import programs
from internvl_jax.serving.caches import BytesCache, block_keys
from internvl_jax.serving.requests import (
    TOP_LOGPROBS,
    EngineError,
    EngineStopped,
    Output,
    QueueFull,
    Request,
    TokenLogprobs,
)
from internvl_jax.serving.sequence import Sequence
from internvl_jax.serving.settings import EngineSettings, EngineStats
from internvl_jax.serving.structured import GrammarCompiler

logger = logging.getLogger(__name__)


class Engine:
    """Answers requests from any thread; `start` it first, and `close` it at the end.

    Args:
        chat: the model, its tokenizer and image processor.
        settings: sizes.

    Raises:
        ValueError: the model cannot answer questions, or the sizes do not fit its context or its mesh.
    """

    def __init__(self, chat: Chat, settings: EngineSettings | None = None):
        self.chat, self.settings = chat, settings or EngineSettings()
        self._generator = chat.generator
        chat.check_ready()
        config = chat.config.required_text
        if self.settings.slots > config.max_position_embeddings:
            raise ValueError(
                f"{self.settings.slots} slots exceed the model's context of {config.max_position_embeddings} tokens"
            )
        if self.settings.rows % self._generator.row_multiple:
            raise ValueError(
                f"{self.settings.rows} rows do not divide over the mesh: use a multiple of "
                f"{self._generator.row_multiple}"
            )
        self._decoder = chat.answer_decoder
        self._images = BytesCache(self.settings.image_cache_bytes)
        self._prefixes = BytesCache(self.settings.prefix_cache_bytes)
        self._stats = EngineStats()
        self._compiler: GrammarCompiler | None = None
        self._compiling = threading.Lock()
        self._changed = threading.Condition()
        # Shared with other threads, under `_changed`:
        self._inbox: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._known: set[str] = set()  # ids of the requests that have not finished
        self._stopping = False
        self._failure: BaseException | None = None
        # The engine's thread only:
        self._waiting: deque[Sequence] = deque()
        self._state: DecodeState
        self._prompt: programs.PromptCache
        self._reading: Sequence | None = None
        self._reading_row = 0
        self._rows: list[Sequence | None] = [None] * self.settings.rows
        self._pending: deque[tuple[list[Sequence | None], programs.StepOutput]] = deque()
        self._compiles = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        with self._generator.on_mesh():
            self._reset()

    # For callers, from any thread.

    def warm_up(self) -> float:
        """Compile every program, before `start`. Returns the seconds that it took."""
        started, sizes = time.monotonic(), self.settings
        request = Request("warm-up", (0,))
        with self._generator.on_mesh():
            for _ in range(2):  # inputs of the first round come from the constructor, of the second from programs
                self._prompt = programs.restart_prompt(self._prompt)
                for size in sizes.chunk_sizes:
                    self._chunk(np.zeros(size, np.int32), np.zeros(size, bool), None, size)
                    self._prompt = programs.restart_prompt(self._prompt)
                if sizes.prefix_cache_bytes:
                    block = programs.take_block(self._prompt, np.int32(0), size=sizes.chunk)
                    self._prompt = programs.put_block(self._prompt, block, np.int32(0))
                self._insert(Sequence(request, lambda output: None, self._decoder), 0)
                self._dispatch()
                self._pending.clear()
                self._rows = [None] * sizes.rows
            if self.chat.config.vision is not None and self.chat.processor is not None:
                side = self.chat.config.required_image_size
                images = 1
                while images <= sizes.images_per_call:
                    shape = (images, self.chat.config.required_vision.num_channels, side, side)
                    np.asarray(self._generator.encode(np.zeros(shape, np.float32)))
                    images *= 2
            self._reset()
            jax.block_until_ready(self._state)
        return time.monotonic() - started

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """Queue a request. Returns at once, or with a grammar when that is compiled.

        Args:
            request: the request.
            on_output: called from the engine's thread with every Output; must not block. The last one has a finish
                reason. An exception that it raises cancels the request.

        Raises:
            QueueFull: too many requests are waiting.
            EngineStopped: the engine is shutting down.
            EngineError: the engine has failed.
            ValueError: the request cannot be answered.
        """
        self._check(request)
        with self._changed:
            self._admit(request)  # before a grammar is compiled, which takes time
        matcher = None if request.grammar is None else self._grammars().matcher(request.grammar)
        sequence = Sequence(request, on_output, self._decoder, matcher)
        with self._changed:
            self._admit(request)
            self._known.add(request.request_id)
            self._inbox.append(sequence)
            self._changed.notify()

    def _admit(self, request: Request) -> None:
        """Raise where no further request is taken; under `_changed`."""
        if self._failure is not None:
            raise EngineError("the engine has failed") from self._failure
        if self._stopping:
            raise EngineStopped("the engine is shutting down")
        if request.request_id in self._known:
            raise ValueError(f"there is a request {request.request_id!r} already")
        waiting = len(self._inbox) + len(self._waiting)
        if waiting >= self.settings.max_waiting:
            raise QueueFull(waiting, retry_after=1.0)

    def cancel(self, request_id: str) -> None:
        """End a request; nothing happens if it has finished."""
        with self._changed:
            if request_id in self._known:
                self._cancelled.add(request_id)
                self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Refuse new requests, let the others finish, and end the thread.

        Args:
            timeout: seconds after which the others are cancelled; None: no limit.

        Returns:
            Whether all requests finished by themselves.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if not self._thread.is_alive():
            return True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            self._cancelled |= self._known
            self._changed.notify()
        self._thread.join()
        return False

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        with self._changed:
            rows = [sequence for sequence in [*self._rows, self._reading] if sequence is not None]
            used = sum(sequence.length for sequence in rows)
            return replace(
                self._stats,
                running=len(rows),
                waiting=len(self._inbox) + len(self._waiting),
                cache_usage=used / (self.settings.rows * self.settings.slots),
                finished=dict(self._stats.finished),
                image_queries=self._images.queries,
                image_hits=self._images.hits,
            )

    @property
    def compiles(self) -> int:
        """Programs that the engine's thread has compiled: 0 after `warm_up`."""
        return self._compiles

    def _check(self, request: Request) -> None:
        """Raises ValueError for what cannot be answered."""
        gen, length = request.generation, len(request.input_ids)
        if gen.num_beams > 1:
            raise ValueError("the engine has no beam search: use num_beams 1")
        if gen.eos_token_ids is not None and len(gen.eos_token_ids) > EOS_SLOTS:
            raise ValueError(f"{len(gen.eos_token_ids)} end tokens: the engine takes at most {EOS_SLOTS}")
        if isinstance(gen.seed, tuple):
            raise ValueError("a request has one seed")
        if request.logprobs is not None and not 0 <= request.logprobs <= TOP_LOGPROBS:
            raise ValueError(f"logprobs must be 0 to {TOP_LOGPROBS}, not {request.logprobs}")
        if length + gen.max_new_tokens > self.settings.slots:
            raise ValueError(
                f"the prompt has {length} tokens; with {gen.max_new_tokens} new ones it exceeds the "
                f"{self.settings.slots} that this engine has room for"
            )
        shape = (len(request.images), self._tokens_per_image, self.chat.config.required_text.hidden_size)
        features = jax.ShapeDtypeStruct(shape, self._generator.dtype) if request.images else None
        self._generator.check(np.asarray(request.input_ids)[None], None, features, gen)
        if request.grammar is not None and gen.eos_token_ids not in (None, self.chat.eos_token_ids):
            raise ValueError("a request with a grammar ends at the model's own end tokens: leave out eos_token_ids")

    def _grammars(self) -> GrammarCompiler:
        """The compiler of grammars, made for the first request that has one."""
        with self._compiling:
            if self._compiler is None:
                config = self.chat.config.required_text
                try:
                    self._compiler = GrammarCompiler(self._decoder.tokenizer, config.vocab_size, self._eos_token_ids)
                except ImportError:
                    raise ValueError("structured output needs llguidance: install the extra 'serve'") from None
            return self._compiler

    # The engine's thread.

    def _run(self) -> None:
        with self._generator.on_mesh():
            while self._wait():
                before = self._count_compiles()
                try:
                    self._round()
                except Exception:
                    logger.exception("the engine failed; its running requests end with an error")
                    self._fail_all()
                self._compiles += self._count_compiles() - before

    def _wait(self) -> bool:
        """Wait for work. False at the end."""
        with self._changed:
            while not (self._inbox or self._busy() or self._cancelled or self._stopping):
                self._changed.wait()
            self._waiting += self._inbox
            self._inbox.clear()
            return bool(self._busy() or not self._stopping)

    def _busy(self) -> bool:
        return bool(self._waiting or self._reading or self._pending or any(self._rows))

    def _round(self) -> None:
        self._end_early()
        self._read_prompts()
        if self._structured():  # the next tokens that are allowed follow from the last ones
            while self._pending:
                self._collect()
        running = any(self._rows)
        if running:
            self._dispatch()
        while len(self._pending) > running:
            self._collect()

    def _read_prompts(self) -> None:
        """Read a chunk of a long prompt, or as many tokens of several short ones."""
        room = self.settings.chunk
        while room > 0:
            if self._reading is None:
                if not self._waiting or None not in self._rows:
                    return
                self._start(self._waiting.popleft())
            if self._reading is not None:  # it ends at once where its images cannot be encoded
                sequence, before = self._reading, self._reading.read
                self._read_chunk(sequence)
                room -= sequence.read - before

    def _structured(self) -> bool:
        """Whether a running answer has a grammar."""
        return any(sequence is not None and sequence.matcher is not None for sequence in self._rows)

    def _end_early(self) -> None:
        """End what was cancelled, and what is past its deadline."""
        now = time.monotonic()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        held = [*self._waiting, *filter(None, [self._reading, *self._rows])]
        for sequence in held:
            if sequence.request.request_id in cancelled:
                self._finish(sequence, "cancelled")
            elif sequence.is_late(now):
                self._finish(sequence, "deadline")

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        if not sequence.finished:
            self._call(partial(sequence.finish, reason, error), sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back what a finished sequence holds."""
        reason = sequence.finish_reason or ""
        with self._changed:
            self._known.discard(sequence.request.request_id)
            self._cancelled.discard(sequence.request.request_id)  # a later request may have this name
            self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            if self._reading is sequence:
                self._reading = None
            self._rows = [None if held is sequence else held for held in self._rows]

    def _call(self, send: Callable[[], None], sequence: Sequence) -> None:
        """Send an output; a receiver that raises loses its request, nobody else."""
        try:
            send()
        except Exception:
            logger.exception("%s: its receiver failed; the request is cancelled", sequence.request.request_id)
            sequence.abandon()

    def _fail_all(self) -> None:
        for sequence in filter(None, [self._reading, *self._rows]):
            self._finish(sequence, "error", "the engine failed while it worked on this request")
        self._pending.clear()
        try:
            self._reset()
        except Exception as error:  # the device does not come back: nothing can be answered any more
            logger.exception("the engine cannot be restarted")
            with self._changed:
                self._failure, self._stopping = error, True
            for sequence in list(self._waiting):
                self._finish(sequence, "error", "the engine has failed")

    def _reset(self) -> None:
        """New, empty caches on the device."""
        gen = GenerationConfig(max_new_tokens=1)
        settings = self._row_settings(gen, self.settings.rows)
        model = self._generator.model
        self._state = programs.make_ring(model, settings, slots=self.settings.slots)
        self._prompt = programs.make_prompt(model, slots=self.settings.slots)

    def _row_settings(self, gen: GenerationConfig, rows: int) -> RowSettings:
        return make_row_settings(gen, rows, self._eos_token_ids).replace(known=self._generator.known)

    @property
    def _eos_token_ids(self) -> tuple[int, ...]:
        return self.chat.eos_token_ids or self.chat.config.required_text.eos_token_ids

    def _allowed(self, sequences: list[Sequence | None]) -> np.ndarray:
        """Bits of the tokens that each row may generate next, [B,W] int32."""
        words = -(-self._state.uses.shape[1] // 32)
        allowed = np.full((len(sequences), words), -1, np.int32)
        for row, sequence in enumerate(sequences):
            if sequence is not None and sequence.matcher is not None:
                bits = sequence.matcher.allowed()
                allowed[row, : len(bits)], allowed[row, len(bits) :] = bits, 0
        return allowed

    # Prompts.

    @property
    def _tokens_per_image(self) -> int:
        return self.chat.config.tokens_per_image if self.chat.config.vision is not None else 0

    def _start(self, sequence: Sequence) -> None:
        """Begin a prompt: its images' features, and the prefix that the cache has."""
        sequence.start()
        self._reading, self._reading_row = sequence, self._rows.index(None)
        try:
            self._encode(sequence)
        except Exception:
            logger.exception("%s: its images could not be encoded", sequence.request.request_id)
            self._finish(sequence, "error", "the images could not be encoded")
            return
        self._prompt = programs.restart_prompt(self._prompt)
        if not self.settings.prefix_cache_bytes:
            return
        size = self.settings.chunk
        image_token = self._generator.image_token_id
        keys = block_keys(sequence.request, image_token, self._tokens_per_image, size)
        # At least one token is read, for the logits after it.
        sequence.block_keys = keys
        usable = keys[: (len(sequence.request.input_ids) - 1) // size]
        with self._changed:
            self._stats.prefix_queries += len(sequence.request.input_ids)
        for key in usable:
            block = self._prefixes.get(key)
            if block is None:
                break
            self._prompt = programs.put_block(self._prompt, block, np.int32(sequence.read))
            sequence.read += size
        sequence.cached_tokens = sequence.read
        with self._changed:
            self._stats.prefix_hits += sequence.read

    def _encode(self, sequence: Sequence) -> None:
        """Get the features of a prompt's images, and of waiting prompts' images as far as a call has room."""
        request = sequence.request
        if not request.images:
            return
        found = {image.key: self._images.get(image.key) for image in request.images}
        missing = {image.key: image.pixel_values for image in request.images if found[image.key] is None}
        for other in self._waiting:
            for image in other.request.images:
                if 0 < len(missing) < self.settings.images_per_call and image.key not in found:
                    missing.setdefault(image.key, image.pixel_values)
        keys = list(missing)
        for start in range(0, len(keys), self.settings.images_per_call):
            part = keys[start : start + self.settings.images_per_call]
            encoded = np.asarray(self._generator.encode(np.stack([missing[key] for key in part])))
            for key, features in zip(part, encoded):
                found[key] = features
                self._images.put(key, features)
        sequence.features = np.concatenate([found[image.key] for image in request.images])

    def _read_chunk(self, sequence: Sequence) -> None:
        ids = np.asarray(sequence.request.input_ids, np.int32)
        part = slice(sequence.read, min(sequence.read + self.settings.chunk, len(ids)))
        count = part.stop - part.start
        size = next(size for size in self.settings.chunk_sizes if size >= count)
        is_image = ids == self._generator.image_token_id if sequence.features is not None else np.zeros(len(ids), bool)
        features = None
        if sequence.features is not None:
            first = int(is_image[: part.start].sum())
            features = sequence.features[first : first + int(is_image[part].sum())]
        padding = (0, size - count)
        self._chunk(np.pad(ids[part], padding), np.pad(is_image[part], padding), features, count)
        if count == self.settings.chunk and self.settings.prefix_cache_bytes:
            key = sequence.block_keys[part.start // self.settings.chunk]
            block = programs.take_block(self._prompt, np.int32(part.start), size=self.settings.chunk)
            self._prefixes.put(key, block)
        sequence.read = part.stop
        if sequence.read == len(ids):
            self._insert(sequence, self._reading_row)
            with self._changed:
                self._stats.prompt_tokens += len(ids)

    def _chunk(self, ids: np.ndarray, is_image: np.ndarray, features: np.ndarray | None, count: int) -> None:
        rows = np.zeros((len(ids), self.chat.config.required_text.hidden_size), self._generator.dtype)
        if features is not None:
            rows[is_image] = features
        model = self._generator.model
        self._prompt = programs.chunk_step(model, self._prompt, ids[None], is_image[None], rows[None], np.int32(count))

    def _insert(self, sequence: Sequence, row: int) -> None:
        settings = self._row_settings(sequence.request.generation, 1).replace(allowed=self._allowed([sequence]))
        wanted = np.bool_(sequence.request.logprobs is not None)
        self._state, output = programs.insert_step(
            self._generator.model, self._state, self._prompt, settings, np.int32(row), wanted
        )
        with self._changed:
            self._reading = None
            self._rows[row] = sequence
        self._pending.append(([sequence], output))

    # Answers.

    def _dispatch(self) -> None:
        ended = np.array([sequence is None for sequence in self._rows])
        wanted = any(sequence is not None and sequence.request.logprobs is not None for sequence in self._rows)
        self._state, output = programs.decode_step(
            self._generator.model,
            self._state,
            ended,
            self._allowed(self._rows),
            np.int32(1 if self._structured() else self.settings.steps),
            np.bool_(wanted),
            size=self.settings.steps,
        )
        self._pending.append((list(self._rows), output))

    def _collect(self) -> None:
        """Read the results of the oldest dispatch and send them."""
        sequences, output = self._pending.popleft()
        output = jax.device_get(output)
        for row, sequence in enumerate(sequences):
            if sequence is None or sequence.finished:
                continue
            count = int(output.count[row])
            reason = None
            if output.failed[row]:
                reason = "error"
            elif output.done[row]:
                reason = "stop" if output.stopped[row] else "length"
            if not count and reason is None:
                continue
            tokens = output.tokens[row, :count].tolist()
            logprobs = self._token_logprobs(sequence.request, output, row, tokens)
            with self._changed:
                self._stats.generated_tokens += count
            self._call(partial(sequence.push, tokens, logprobs, reason), sequence)
            if sequence.finished:
                self._release(sequence)

    @staticmethod
    def _token_logprobs(request: Request, output: Any, row: int, tokens: list[int]) -> list[TokenLogprobs]:
        if request.logprobs is None:
            return []
        top = slice(0, request.logprobs)
        return [
            TokenLogprobs(
                token,
                float(output.logprobs[row, i]),
                tuple(zip(output.top_ids[row, i, top].tolist(), output.top_logprobs[row, i, top].tolist())),
            )
            for i, token in enumerate(tokens)
        ]

    @staticmethod
    def _count_compiles() -> int:
        return programs.num_compiles() + num_compiles()["encode"]

"""Requests on their way through the engine: admitted, submitted, read, cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from internvl_jax.serving.api.errors import ApiError, busy, unavailable
from internvl_jax.serving.api.metrics import HasStats, Metrics
from internvl_jax.serving.api.settings import ServerSettings
from internvl_jax.serving.requests import EngineError, EngineStopped, Output, QueueFull, Request

logger = logging.getLogger(__name__)

SUCCESS = ("stop", "length")


class AnyEngine(HasStats, Protocol):
    """What the server needs of `engine.Engine`."""

    def submit(self, request: Request, on_output: Callable[[Output], None]) -> None:
        """As `Engine.submit`."""
        ...

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`."""
        ...

    def warm_up(self) -> float:
        """As `Engine.warm_up`."""
        ...

    def start(self) -> None:
        """As `Engine.start`."""
        ...

    def close(self, timeout: float | None = None) -> bool:
        """As `Engine.close`."""
        ...


class Service:
    """The server's state: whether it takes requests, and how many it holds.

    Args:
        engine: answers requests.
        settings: limits.

    Attributes:
        ready: whether the engine takes requests; set after its warm-up.
        draining: whether the server is shutting down.
        idle: set while no request is held.
    """

    def __init__(self, engine: AnyEngine, settings: ServerSettings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine, settings.model_name)
        self.ready = self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()
        self._active = 0

    async def start(self) -> None:
        """Warm the engine up and start it."""
        seconds = await asyncio.to_thread(self.engine.warm_up)
        self.engine.start()
        self.ready = True
        logger.info("ready after a warm-up of %.1f seconds", seconds)

    def admit(self) -> contextlib.ExitStack:
        """Take up one more request.

        Returns:
            Its place, to be closed at its end.

        Raises:
            ApiError: there is no place, or the server is starting or shutting down.
        """
        if self.draining:
            raise unavailable("the server is shutting down")
        if not self.ready:
            raise unavailable("the server is starting: the model's programs are being compiled")
        if self._active >= self.settings.max_active:
            raise busy(f"{self._active} requests are being answered or waiting already: try again later", 1.0)
        place = contextlib.ExitStack()
        place.enter_context(self._place())
        return place

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        self._active += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self.idle.set()

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Submit the choices of one API request together.

        Raises:
            ApiError: the engine refuses one of them; none is submitted then.
        """
        answers = Answers(self, requests)
        try:
            answers.submit()
        except BaseException:
            answers.close()
            raise
        return answers


class Answers:
    """The answers to one API request: submitted together, read as they come, ended together.

    Args:
        service: the server's state.
        requests: one per answer.
    """

    def __init__(self, service: Service, requests: Sequence[Request]):
        self._service, self._requests = service, requests
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._clocks = [service.metrics.clock() for _ in requests]
        self._tokens = [0] * len(requests)
        self._running: set[int] = set()

    def submit(self) -> None:
        """Hand the requests to the engine. Raises ApiError where it refuses one."""
        for number, request in enumerate(self._requests):
            try:
                self._service.engine.submit(request, self._receiver(number))
            except QueueFull as error:
                raise busy(str(error), error.retry_after) from error
            except EngineStopped as error:
                raise unavailable("the server is shutting down") from error
            except EngineError as error:
                raise ApiError(503, "the engine has failed; the server's log has the details", "unavailable") from error
            except ValueError as error:
                raise ApiError(400, str(error), "invalid_request") from error
            self._running.add(number)

    def _receiver(self, number: int) -> Callable[[Output], None]:
        """Called in the engine's thread. A closed event loop raises, which cancels the request."""

        def receive(output: Output) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, output))

        return receive

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs of all answers with their numbers, until the last answer has ended.

        Raises:
            ApiError: an answer failed.
        """
        while self._running:
            number, output = await self._queue.get()
            self._clocks[number].observe(output)
            self._tokens[number] += len(output.tokens)
            if output.finish_reason is not None:
                self._running.discard(number)
                self._count(number, output.finish_reason)
                self._check(number, output)
            yield number, output

    def _count(self, number: int, reason: str) -> None:
        success = reason in SUCCESS and self._tokens[number] > 0
        outcome = "empty" if reason in SUCCESS and not success else reason
        self._service.metrics.finished(outcome, success=success)

    def _check(self, number: int, output: Output) -> None:
        """Raises ApiError for an answer that is none."""
        reason = output.finish_reason
        if reason == "deadline":
            seconds = self._service.settings.request_timeout
            raise ApiError(504, f"the answer took longer than {seconds:g} seconds: ask for fewer tokens", "timeout")
        if reason == "cancelled":
            raise unavailable("the server is shutting down")
        if reason == "error":
            logger.error("%s failed: %s", self._requests[number].request_id, output.error)
            raise ApiError(500, "the model gave no answer; the server's log has the details", "generation_failed")
        if not self._tokens[number]:
            raise ApiError(500, "the model gave no answer: not a single token", "empty_answer")

    def close(self) -> None:
        """Cancel what is still running."""
        for number in self._running:
            self._service.engine.cancel(self._requests[number].request_id)
            self._service.metrics.finished("cancelled", success=False)
        self._running.clear()

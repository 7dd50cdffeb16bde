"""The endpoints of OpenAI's API, and those of vLLM that count tokens."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from pydantic import ValidationError
from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from internvl_jax.inference.chat import Chat
from internvl_jax.inference.generation.sampling import GenerationConfig
from internvl_jax.inference.input_checks import DEFAULT_NEW_TOKENS
from internvl_jax.serving.api.answers import Answer, Head, TokenTexts, chat_logprobs, text_logprobs, usage
from internvl_jax.serving.api.errors import ApiError, from_validation
from internvl_jax.serving.api.prompts import Prompt, PromptMaker
from internvl_jax.serving.api.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from internvl_jax.serving.api.security import ApiKeys
from internvl_jax.serving.api.service import Answers, Service
from internvl_jax.serving.requests import Request
from internvl_jax.utils.logs import warn_once

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499  # nginx's status for the log; nobody reads the response
PREPARING = 4  # bodies that are decoded at once

Parsed = TypeVar("Parsed", bound=Body)


@dataclass(frozen=True)
class Job:
    """A request that is ready for the engine.

    Attributes:
        head: what the response begins with.
        asked: the body.
        requests: one per choice.
        prompt_tokens: of all prompts.
    """

    head: Head
    asked: ChatRequest | CompletionRequest
    requests: list[Request]
    prompt_tokens: int


class Endpoints:
    """The handlers.

    Args:
        chat: the model.
        service: the server's state.
        prompts: makes its prompts.
    """

    def __init__(self, chat: Chat, service: Service, prompts: PromptMaker):
        assert chat.tokenizer is not None  # Engine checks that the model can answer
        self._tokenizer, self._service, self._prompts = chat.tokenizer, service, prompts
        self._settings = service.settings
        self._keys = ApiKeys(service.settings.api_keys)
        self._texts = TokenTexts(chat.tokenizer)
        self._preparing = anyio.CapacityLimiter(PREPARING)
        self._started = int(time.time())

    # What is not guarded by a key: whether the process lives, for load balancers.

    async def health(self, _: HttpRequest) -> Response:
        """The process answers."""
        return PlainTextResponse("ok")

    async def ready(self, _: HttpRequest) -> Response:
        """The engine takes requests."""
        ready = self._service.ready and not self._service.draining
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    async def version(self, request: HttpRequest) -> Response:
        """The version of this project."""
        self._keys.check(request)
        return JSONResponse({"version": importlib.metadata.version("internvl-jax")})

    async def metrics(self, request: HttpRequest) -> Response:
        """Prometheus metrics."""
        self._keys.check(request)
        return Response(self._service.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        """The model."""
        self._keys.check(request)
        model = {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._started,
            "owned_by": "internvl-jax",
            "max_model_len": self._prompts.room,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def model(self, request: HttpRequest) -> Response:
        """One model by name."""
        self._keys.check(request)
        self._check_model(request.path_params["name"])
        return JSONResponse({"id": self._settings.model_name, "object": "model", "owned_by": "internvl-jax"})

    async def tokenize(self, request: HttpRequest) -> Response:
        """The tokens of a text or a conversation."""
        salt = self._keys.check(request)
        with self._service.admit():
            body = await self._body(request)

            def work() -> list[int]:
                asked = _parse(TokenizeRequest, body)
                self._check_model(asked.model)
                if asked.messages is not None:
                    return list(self._prompts.conversation(asked.messages, salt).input_ids)
                text = asked.prompt or ""
                return list(self._prompts.text(text, add_special_tokens=asked.add_special_tokens).input_ids)

            tokens = await anyio.to_thread.run_sync(work, limiter=self._preparing)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._prompts.room})

    async def detokenize(self, request: HttpRequest) -> Response:
        """The text of tokens."""
        self._keys.check(request)
        with self._service.admit():
            asked = _parse(DetokenizeRequest, await self._body(request))
        self._check_model(asked.model)
        try:
            return JSONResponse({"prompt": self._tokenizer.decode(asked.tokens, skip_special_tokens=False)})
        except (ValueError, OverflowError) as error:
            raise ApiError(400, "a token is outside the vocabulary", "invalid_value", "tokens") from error

    async def chat_completions(self, request: HttpRequest) -> Response:
        """Answers to a conversation."""
        return await self._generate(request, ChatRequest)

    async def completions(self, request: HttpRequest) -> Response:
        """Continuations of texts."""
        return await self._generate(request, CompletionRequest)

    # Implementation.

    async def _generate(self, request: HttpRequest, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        salt = self._keys.check(request)
        deadline = time.monotonic() + self._settings.request_timeout
        place = self._service.admit()
        try:
            body = await self._body(request)
            job = await anyio.to_thread.run_sync(
                lambda: self._prepare(_parse(kind, body), salt, deadline, request.state.request_id),
                limiter=self._preparing,
            )
            answers = self._service.submit(job.requests)
            if job.asked.stream:
                return _Stream(self._events(job, answers), answers, place.pop_all(), self._settings.send_timeout)
            try:
                return await self._collect(request, job, answers)
            finally:
                answers.close()
        finally:
            place.close()

    async def _body(self, request: HttpRequest) -> bytes:
        """The body, which a client has limited time to send. JSON only: a page of another site cannot send it."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the content type must be application/json", "unsupported_media_type")
        limit, body = self._settings.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise ApiError(413, f"the body has more than {limit:,} bytes", "body_too_large")
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", "body_timeout") from None
        except ClientDisconnect:
            raise ApiError(CLIENT_CLOSED, "the client closed the connection", "client_closed") from None
        return bytes(body)

    def _check_model(self, name: str) -> None:
        if name not in ("", self._settings.model_name):
            message = f"there is no model {name[:100]!r}; there is {self._settings.model_name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def _prepare(self, asked: ChatRequest | CompletionRequest, salt: str, deadline: float, request_id: str) -> Job:
        """Make the engine's requests; runs in a thread."""
        self._check_model(asked.model)
        if asked.user or asked.metadata:
            warn_once("user and metadata of requests have no effect here")
        limit = self._settings.max_choices
        number = asked.n * (1 if isinstance(asked, ChatRequest) else len(asked.prompts))
        if number > limit:
            raise ApiError(400, f"this server gives at most {limit} answers to a request", "invalid_value", "n")
        if isinstance(asked, ChatRequest):
            prompts = [self._prompts.conversation(asked.messages, salt)]
        else:
            prompts = [self._prompts.text(text) for text in asked.prompts]
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        requests = [
            Request(
                request_id=f"{request_id}-{number}",
                input_ids=prompt.input_ids,
                images=prompt.images,
                generation=self._generation(asked, prompt, (seed + number) % 2**31),
                logprobs=asked.num_logprobs,
                grammar=asked.grammar,
                salt=salt,
                deadline=deadline,
            )
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.n))
        ]
        chat = isinstance(asked, ChatRequest)
        head = Head(f"{'chatcmpl' if chat else 'cmpl'}-{request_id}", self._settings.model_name, chat)
        return Job(head, asked, requests, sum(len(prompt.input_ids) for prompt in prompts))

    def _generation(self, asked: Sampling, prompt: Prompt, seed: int) -> GenerationConfig:
        """The settings of one answer."""
        length, room = len(prompt.input_ids), self._prompts.room
        wanted = asked.limit
        if length >= room or (wanted is not None and length + wanted > room):
            more = "" if wanted is None else f", and {wanted} more are asked for"
            raise ApiError(
                400,
                f"the prompt has {length} tokens{more}; prompt and answer have room for {room} tokens together: "
                "shorten the conversation, show fewer images or ask for fewer tokens",
                "context_length_exceeded",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
            )
        try:
            return GenerationConfig(
                max_new_tokens=min(DEFAULT_NEW_TOKENS, room - length) if wanted is None else wanted,
                min_new_tokens=asked.min_tokens,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                repetition_penalty=asked.repetition_penalty,
                presence_penalty=asked.presence_penalty,
                frequency_penalty=asked.frequency_penalty,
                seed=seed,
                stop=asked.stops,
                eos_token_ids=self._prompts.chat.eos_token_ids,
            )
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    async def _collect(self, request: HttpRequest, job: Job, answers: Answers) -> Response:
        """Wait for all answers, or for the client to go."""

        async def read() -> list[Answer]:
            whole = [Answer() for _ in job.requests]
            async for number, output in answers:
                whole[number].add(output)
            return whole

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        reading, leaving = asyncio.create_task(read()), asyncio.create_task(gone())
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ApiError(CLIENT_CLOSED, "the client closed the connection", "client_closed")
            whole = reading.result()
        finally:
            reading.cancel()
            leaving.cancel()
        choices = [
            job.head.choice(number, answer, self._logprobs(job, answer.logprobs, 0))
            for number, answer in enumerate(whole)
        ]
        return JSONResponse(job.head.whole(choices, usage(job.prompt_tokens, whole)))

    def _logprobs(self, job: Job, logprobs: Any, offset: int) -> dict[str, Any] | None:
        if job.asked.num_logprobs is None:
            return None
        if job.head.chat:
            return chat_logprobs(self._texts, logprobs)
        return text_logprobs(self._texts, logprobs, offset)

    async def _events(self, job: Job, answers: Answers) -> AsyncIterator[ServerSentEvent]:
        """The events of a streamed response."""
        head, whole = job.head, [Answer() for _ in job.requests]
        try:
            if head.chat:
                for number in range(len(whole)):
                    first = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _event(head.chunk([first]))
            async for number, output in answers:
                offset = len(whole[number].text)
                whole[number].add(output)
                if output.text or output.finish_reason is not None or output.logprobs:
                    logprobs = self._logprobs(job, output.logprobs or (), offset)
                    yield _event(head.chunk([head.delta(number, output.text, logprobs, output.finish_reason)]))
            if job.asked.stream_options.include_usage:
                yield _event(head.chunk([], usage(job.prompt_tokens, whole)))
            yield ServerSentEvent("[DONE]", sep="\n")
        except ApiError as error:
            yield _event(error.body())


class _Stream(EventSourceResponse):
    """A streamed response, which ends its answers whatever becomes of the client."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], answers: Answers, place: Any, send_timeout: float):
        super().__init__(events, send_timeout=send_timeout, sep="\n")
        self._answers, self._place = answers, place

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("%s: the client does not read its answer: ended", scope["state"]["request_id"])
        finally:
            self._answers.close()
            self._place.close()


def _event(value: dict[str, Any]) -> ServerSentEvent:
    return JSONServerSentEvent(value, sep="\n")


def _parse(kind: type[Parsed], body: bytes) -> Parsed:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None

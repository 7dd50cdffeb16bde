"""The application: routes, start and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType

import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_jax.inference.chat import Chat
from internvl_jax.serving.api.endpoints import Endpoints
from internvl_jax.serving.api.errors import ApiError, on_api_error, on_failure, on_http_error
from internvl_jax.serving.api.media import ImageReader
from internvl_jax.serving.api.prompts import PromptMaker
from internvl_jax.serving.api.service import AnyEngine, Service
from internvl_jax.serving.api.settings import ServerSettings

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent.parent / "page"
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]
FORCED_SECONDS = 5  # for connections to close after the last answer
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def create_app(
    chat: Chat, engine: AnyEngine, settings: ServerSettings, *, room: int, reader: ImageReader | None = None
) -> Starlette:
    """The application. Its `state.service` says whether it is ready.

    Args:
        chat: the model, which makes the prompts.
        engine: answers them; warmed up and started when the application starts, closed when it ends.
        settings: limits.
        room: tokens that prompt and answer have together.
        reader: reads images; None: one with these settings.
    """
    service = Service(engine, settings)
    prompts = PromptMaker(chat, settings, reader or ImageReader(settings, chat.processor), room)
    at = Endpoints(chat, service, prompts)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        app.state.starting = starting
        yield
        service.draining = True
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.to_thread(engine.close, 0)

    app = Starlette(
        routes=[
            Route("/", _index),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/health", at.health),
            Route("/ready", at.ready),
            Route("/version", at.version),
            Route("/metrics", at.metrics),
            Route("/v1/models", at.models),
            Route("/v1/models/{name:path}", at.model),
            Route("/v1/chat/completions", at.chat_completions, methods=["POST"]),
            Route("/v1/completions", at.completions, methods=["POST"]),
            Route("/tokenize", at.tokenize, methods=["POST"]),
            Route("/detokenize", at.detokenize, methods=["POST"]),
        ],
        middleware=[
            Middleware(_RequestLog, service=service),
            *([Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)] if settings.local_only else []),
        ],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_failure},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def _index(_: Request) -> Response:
    return FileResponse(PAGE / "index.html")


class _RequestLog:
    """Gives each request an id and the response its headers, and logs how it went."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-cache")  # a page of another version would not fit this API
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            if status >= 400:
                self._service.metrics.refused(status)
            quiet = scope["path"] in ("/health", "/ready", "/metrics") and status < 400
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "request=%s method=%s path=%s status=%d seconds=%.3f",
                request_id,
                scope["method"],
                scope["path"][:200].encode("unicode_escape").decode(),
                status,
                time.monotonic() - started,
            )


class Server(uvicorn.Server):
    """Listens until a signal, then refuses new requests, lets running answers finish, and ends.

    A second signal ends running answers at once.

    Args:
        app: made by `create_app`.
        host: address to listen at.
        port: port to listen at; 0: any free one.

    Attributes:
        cut_off: whether answers were ended at shutdown.
        failed: whether the engine could not be started.
    """

    def __init__(self, app: Starlette, host: str, port: int):
        AppStatus.disable_automatic_graceful_drain()  # streams end by themselves, when their answers do
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FORCED_SECONDS,
            lifespan="on",
        )
        super().__init__(config)
        self.cut_off = self.failed = False
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list | None = None) -> None:
        """Begin to listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.should_exit:
            return
        for server in self.servers:
            for one in server.sockets:
                host, port = one.getsockname()[:2]
                logger.info("listening at http://%s:%d/", f"[{host}]" if ":" in host else host, port)
        self._app.state.starting.add_done_callback(self._on_started)

    def _on_started(self, starting: asyncio.Task[None]) -> None:
        if not starting.cancelled() and (error := starting.exception()) is not None:
            logger.error("the engine cannot be started", exc_info=error)
            self.failed = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit())
        else:
            self._hurry.set()

    async def _drain_and_exit(self) -> None:
        service: Service = self._app.state.service
        service.draining = True
        limit = service.settings.drain_timeout
        logger.info("shutting down: running answers have %g seconds to finish, new requests are refused", limit)
        waits = [asyncio.create_task(event.wait()) for event in (service.idle, self._hurry)]
        await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not service.idle.is_set():
            self.cut_off = True
            logger.warning("running answers are ended")
        if service.ready:
            await asyncio.to_thread(service.engine.close, 0)
        self.should_exit = True

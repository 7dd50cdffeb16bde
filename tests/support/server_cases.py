"""Servers in a thread of the test process, and an engine whose answers a test decides."""

import base64
import contextlib
import threading
import time

import openai
from support.serving_cases import IMAGES

from internvl_jax.serving.api.server import Server, create_app
from internvl_jax.serving.api.settings import ServerSettings
from internvl_jax.serving.requests import Output, Timings
from internvl_jax.serving.settings import EngineStats

ROOM = 192


def wait_until(condition, seconds=20):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _ThreadServer(Server):
    """Stops when the test says so."""

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.port = self.servers[0].sockets[0].getsockname()[1]


@contextlib.contextmanager
def serving(chat, engine, *, reader=None, room=ROOM, ready=True, **settings):
    """A server that has started; yields it with `url`, `service` and `client`."""
    app = create_app(chat, engine, ServerSettings(model_name="nano", **settings), room=room, reader=reader)
    server = _ThreadServer(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and (app.state.service.ready or not ready), 120)
    server.url = f"http://127.0.0.1:{server.port}"
    server.service, server.thread = app.state.service, thread
    key = settings.get("api_keys", ("none",))[0]
    server.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def data_uri(data, kind="image/png"):
    """A data: URI of bytes, or of a file of nano's images."""
    data = (IMAGES / data).read_bytes() if isinstance(data, str) else data
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(text, *urls, role="user"):
    """A message with images before its text."""
    if not urls:
        return {"role": role, "content": text}
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


class ScriptedEngine:
    """An engine that answers only when a test says so.

    Attributes:
        requests: what was submitted, by id, with the function that takes its outputs.
        cancelled: ids in the order of their cancellation.
        refuse: an exception that submitting raises, or None.
    """

    def __init__(self):
        self.requests, self.cancelled, self.refuse = {}, [], None
        self.stats, self.compiles = EngineStats(), 0

    def warm_up(self):
        return 0.0

    def start(self):
        pass

    def submit(self, request, on_output):
        if self.refuse is not None:
            raise self.refuse
        self.requests[request.request_id] = (request, on_output)

    def cancel(self, request_id):
        self.cancelled.append(request_id)

    def close(self, timeout=None):
        for request_id in list(self.requests):
            self.finish(request_id, "cancelled")
        return True

    def wait(self, count=1):
        """The ids of `count` requests that have arrived and have not ended."""
        wait_until(lambda: len(self.requests) >= count)
        return list(self.requests)

    def say(self, request_id, text, tokens=(5,)):
        """Send a part of an answer."""
        self.requests[request_id][1](Output(text, tuple(tokens)))

    def finish(self, request_id, reason="stop", text="", tokens=(2,), error=None):
        """Send the last part of an answer."""
        request, on_output = self.requests.pop(request_id)
        timings = Timings(0.1, 0.2, 0.3, len(request.input_ids), 0, len(tokens))
        on_output(Output(text, tuple(tokens), None, reason, error, timings))

"""An engine on nano, and requests to it."""

import threading

import numpy as np
from support.tiny_checkpoint import NANO

import internvl_jax
from internvl_jax.inference.input_checks import complete_settings
from internvl_jax.serving.caches import make_images
from internvl_jax.serving.engine import Engine
from internvl_jax.serving.requests import Request
from internvl_jax.serving.settings import EngineSettings

IMAGES = NANO.parent / "images"
SIZES = {"rows": 4, "slots": 192, "chunk": 32, "steps": 4, "images_per_call": 2}


def make_engine(chat=None, **settings):
    """A warmed-up engine that has not been started."""
    engine = Engine(chat or internvl_jax.load(), EngineSettings(**{**SIZES, **settings}))
    engine.warm_up()
    return engine


class Answer:
    """The outputs of one request."""

    def __init__(self):
        self.outputs = []
        self._finished = threading.Event()

    def __call__(self, output):
        self.outputs.append(output)
        if output.finish_reason is not None:
            self._finished.set()

    def wait(self):
        assert self._finished.wait(120)
        assert [output.finish_reason is None for output in self.outputs] == [True] * (len(self.outputs) - 1) + [False]
        return self

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)

    @property
    def tokens(self):
        return [token for output in self.outputs for token in output.tokens]

    @property
    def logprobs(self):
        return [one for output in self.outputs for one in output.logprobs]

    @property
    def last(self):
        return self.outputs[-1]


def make_request(chat, name, question, images=(), *, pixels=None, salt="", **options):
    """The request of a question, as `chat` would ask it. options: of the Request and of its generation settings."""
    fields = {key: options.pop(key) for key in ("logprobs", "grammar", "deadline") if key in options}
    batch = chat.prompts.build([question], [[IMAGES / image for image in images]])
    gen = complete_settings(chat.config, {"max_new_tokens": 40, **options}, batch.attention_mask, chat.eos_token_ids)
    ids = tuple(batch.input_ids[0][batch.attention_mask[0] > 0].tolist())
    arrays = pixels if pixels is not None else batch.pixel_values if batch.pixel_values is not None else ()
    return Request(name, ids, make_images(np.asarray(arrays), chat.name, salt), gen, salt=salt, **fields)


def ask(engine, name, question, images=(), **options):
    """Submit a question; returns its Answer."""
    answer = Answer()
    engine.submit(make_request(engine.chat, name, question, images, **options), answer)
    return answer

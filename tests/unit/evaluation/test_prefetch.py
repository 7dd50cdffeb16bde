"""Images made ready in threads: the right ones, errors where they are asked for, nothing else in the process."""

import logging
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from internvl_jax.evaluation import prefetch
from internvl_jax.inference.offline import BatchJob, Question
from internvl_jax.processing.images import ImageError


@dataclass
class Seen:
    """A chat that remembers the colors of the images that it is given."""

    name: str = "seen"
    processor: Any = None
    colors: list[list[int]] = field(default_factory=list)

    def batch_chat(self, questions, images, **options):
        self.colors.append([np.asarray(image)[0, 0, 0].item() for row in images for image in row])
        warnings.warn("of the main thread", stacklevel=1)
        return [None] * len(questions)


@pytest.fixture
def job(tmp_path):
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(paths[-1])
    questions = [Question(str(number), "?", (path,)) for number, path in enumerate(paths)]
    return BatchJob(questions, list(range(11, -1, -1)), Path("out"))


def ask(made, job, size):
    for first in range(0, len(job.pending), size):
        asked = [job.questions[number] for number in job.pending[first : first + size]]
        made.batch_chat([row.question for row in asked], [list(row.images) for row in asked])


@pytest.mark.parametrize("size", [1, 3])
def test_every_question_gets_its_image(job, size, recwarn):
    chat = Seen()
    with prefetch.PrefetchingChat(chat, job, size) as made:
        ask(made, job, size)
        assert made.num_loading <= size * prefetch.BATCHES_AHEAD
    assert [color for row in chat.colors for color in row] == list(range(11, -1, -1))
    assert {str(warning.message) for warning in recwarn} == {"of the main thread"}


def test_an_image_that_cannot_be_read(job, tmp_path):
    """It raises where it is asked for, again when it is asked for alone, and costs nobody else anything."""
    (tmp_path / "7.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    chat = Seen()
    with prefetch.PrefetchingChat(chat, job, 3) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in job.pending:
            row = job.questions[number]
            if number == 7:
                for asked in ([row, job.questions[6]], [row]):
                    with pytest.raises(ImageError, match=r"7\.png"):
                        made.batch_chat(["?"] * len(asked), [list(one.images) for one in asked])
            else:
                made.batch_chat(["?"], [list(row.images)])
    assert chat.colors == [[number] for number in range(11, -1, -1) if number != 7]


@pytest.mark.parametrize("error", [MemoryError(), ImageError("too little memory"), OSError(5, "Input/output error")])
def test_what_failed_beside_others_is_tried_again(job, monkeypatch, error):
    load, main = prefetch.load_image, threading.get_ident()

    def load_image(path, **options):
        if threading.get_ident() != main:
            raise error
        return load(path, **options)

    monkeypatch.setattr(prefetch, "load_image", load_image)
    chat = Seen()
    with prefetch.PrefetchingChat(chat, job, 2) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ask(made, job, 2)
    assert [color for row in chat.colors for color in row] == list(range(11, -1, -1))


def test_threads_leave_the_process_as_it_is(job, monkeypatch, recwarn):
    """While images are decoded, filters of warnings and logging are what the main thread has set."""
    filters, shown, inside = warnings.filters, warnings.showwarning, []
    handlers, load = list(logging.root.handlers), ImageFile.ImageFile.load

    def decode(image):
        inside.append(warnings.filters is filters and warnings.showwarning is shown)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with prefetch.PrefetchingChat(Seen(), job, 4) as made:
        ask(made, job, 4)
    assert len(inside) >= 12
    assert all(inside)
    assert warnings.filters is filters
    assert logging.root.handlers == handlers
    assert len(recwarn) >= 1

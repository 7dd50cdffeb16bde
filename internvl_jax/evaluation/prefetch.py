"""Pictures opened and scaled in threads while the device is busy with the batch before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from internvl_jax.inference import offline
from internvl_jax.inference.chat import Chat, Reply
from internvl_jax.processing.images import load_image

THREADS = 8
ROUNDS = 2  # batches whose pictures are made ready beside the one that is asked about


class Ahead:
    """Answers as its Chat does, with the pictures of `work` made ready in the order in which they will be asked for.

    An image that could not be made ready is tried again, without the others, where it is asked for: there it raises as
    from Chat.
    """

    def __init__(self, chat: Chat, work: offline.Work, size: int):
        self.name = chat.name
        self._chat = chat
        place = jax.process_index() if work.replicas > 1 else 0
        rounds = range(0, len(work.pending), size * work.replicas)
        mine = [n for first in rounds for n in work.pending[first + place * size : first + (place + 1) * size]]
        self._order = [path for number in mine for path in work.questions[number].images]
        self._done, self._window = 0, size * ROUNDS
        self._ready: dict[Path, Future[Image.Image]] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batch_chat(self, questions: Sequence[str], images: Sequence[Sequence[Path]], **options: Any) -> list[Reply]:
        """As Chat.batch_chat, with pictures by path."""
        wanted = dict.fromkeys(path for row in images for path in row)
        while self._done < len(self._order) and self._order[self._done] in wanted:
            self._done += 1
        coming = self._order[self._done : self._done + self._window]
        for path in dict.fromkeys((*wanted, *coming)):
            if path not in self._ready:
                self._ready[path] = self._pool.submit(self._load, path)
        pictures = {path: self._image(path) for path in wanted}
        self._ready = {path: self._ready[path] for path in coming}
        return self._chat.batch_chat(questions, [[pictures[path] for path in row] for row in images], **options)

    def _image(self, path: Path) -> Image.Image:
        try:
            return self._ready[path].result()
        except (ValueError, OSError, MemoryError):  # several at once may have been too much for the memory
            return self._load(path)

    def _load(self, path: Path) -> Image.Image:
        image = load_image(path, honour_exif=False)
        return image if self._chat.processor is None else self._chat.processor.scaled(image)

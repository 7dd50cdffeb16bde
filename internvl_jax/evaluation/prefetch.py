"""Loading and resizing images in threads while the device computes the previous batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_jax.inference import offline
from internvl_jax.inference.chat import Chat, Reply
from internvl_jax.processing.images import load_image

THREADS = 8
BATCHES_AHEAD = 2


class PrefetchingChat:
    """A Chat that takes images by path and loads them in the order in which a run will need them.

    An image that failed to load is loaded again when it is needed, without others at the same time; then its error is
    raised as from Chat.

    Args:
        chat: The model.
        job: The questions, in the order in which they will be asked.
        batch_size: Questions per batch.
    """

    def __init__(self, chat: Chat, job: offline.BatchJob, batch_size: int):
        self.name = chat.name
        self._chat = chat
        batches = job.own_batches(batch_size)
        self._order = [path for batch in batches for question in batch for path in question.images]
        self._done, self._window = 0, batch_size * BATCHES_AHEAD
        self._loading: dict[Path, Future[Image.Image]] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> PrefetchingChat:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def num_loading(self) -> int:
        """Number of images that are loaded, or being loaded, for later batches."""
        return len(self._loading)

    def batch_chat(self, questions: Sequence[str], images: Sequence[Sequence[Path]], **options: Any) -> list[Reply]:
        """Answer a batch as `Chat.batch_chat` does.

        Args:
            questions: One question per row.
            images: Paths of each row's images.
            **options: As for `Chat.batch_chat`.
        """
        wanted = dict.fromkeys(path for row in images for path in row)
        while self._done < len(self._order) and self._order[self._done] in wanted:
            self._done += 1
        upcoming = self._order[self._done : self._done + self._window]
        for path in dict.fromkeys((*wanted, *upcoming)):
            if path not in self._loading:
                self._loading[path] = self._pool.submit(self._load, path)
        loaded = {path: self._result(path) for path in wanted}
        self._loading = {path: self._loading[path] for path in upcoming}
        return self._chat.batch_chat(questions, [[loaded[path] for path in row] for row in images], **options)

    def _result(self, path: Path) -> Image.Image:
        try:
            return self._loading[path].result()
        except (ValueError, OSError, MemoryError):  # several at once may have exhausted the memory
            return self._load(path)

    def _load(self, path: Path) -> Image.Image:
        image = load_image(path, honor_exif=False)
        return image if self._chat.processor is None else self._chat.processor.scaled(image)

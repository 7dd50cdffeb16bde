"""What a model under training makes of data that it does not learn from: loss, accuracy, and answers to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax.config import ChatConfig
from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.data import labels
from internvl_jax.data.annotations import Corpus
from internvl_jax.data.batch import Batch, pad_rows
from internvl_jax.data.loader import Loader
from internvl_jax.data.packing import Layout, assemble
from internvl_jax.data.samples import SampleError, SampleMaker, image_names, read_entry
from internvl_jax.inference.bound_model import bind_model
from internvl_jax.inference.chat import Chat
from internvl_jax.inference.generator import Generator
from internvl_jax.inference.loading import inference_layout
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.images import ImageError, ImageProcessor, load_image
from internvl_jax.processing.tokenizer import Tokenizer
from internvl_jax.training import objective
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.state import Place, State
from internvl_jax.training.trainer import Settings, put_batch, stack_batches
from internvl_jax.training.trainer import assemble as assemble_params
from internvl_jax.utils import files

ANSWER_TOKENS = 64  # of an answer to read, at most


@dataclass(frozen=True)
class Question:
    """A held-out conversation's first turn."""

    text: str
    images: tuple[Path, ...]
    expected: str


@dataclass(frozen=True)
class Answered:
    """A question, and what the model said after so many steps."""

    step: int
    question: str
    expected: str
    answer: str

    def to_json(self) -> str:
        return files.to_json(vars(self))


class HeldOut:
    """Evaluates a State; called by the trainer on all processes.

    loader: of the held-out data, one epoch in the files' order. batches: how many of it, at most, are looked at.
    questions: answered greedily each time, and given to `tell` in process 0 and to `directory`/answers.jsonl.
    """

    def __init__(
        self,
        loader: Loader,
        layout: Layout,
        config: ChatConfig,
        recipe: Recipe,
        settings: Settings,
        place: Place,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        directory: Path,
        *,
        batches: int,
        questions: list[Question],
        tell: Callable[[Answered], None] | None = None,
    ):
        self._loader, self._layout, self._batches = loader, layout, batches
        self._recipe, self._place, self._processor = recipe, place, processor
        self._questions, self._tell, self._directory = questions, tell, directory
        axes = BATCH if place.mesh is None else mesh_lib.IMAGE_AXES[place.vision]
        model = bind_model(config, {}, dtype=settings.dtype, image_axes=axes)  # parameters follow
        generator = Generator.for_tokenizer(model, tokenizer, place.mesh)
        self._chat = Chat(generator, tokenizer, processor, name="the model")

        def sums(trained: Params, frozen: Params, batch: Batch) -> objective.Sums:
            variables = assemble_params(trained, frozen, recipe)
            part = jax.tree.map(lambda leaf: leaf[0], batch)
            return objective.loss(
                variables,
                config,
                part,
                objective.loss_weights(part.labels, part.segment_ids),
                chunk=settings.chunk,
                dtype=settings.dtype,
                image_axes=axes,
            )

        self._sums = jax.jit(sums)

    def __call__(self, state: State, frozen: Params) -> dict[str, float]:
        """eval_loss (mean over supervised tokens), eval_accuracy and eval_tokens."""
        loss = right = tokens = 0.0
        for batch in self._together():
            placed = put_batch(stack_batches([pad_rows(batch, self._layout.max_length)]), self._place)
            sums = jax.device_get(self._sums(state.trained, frozen, placed))
            loss += float(sums.loss) * float(sums.tokens)
            right += float(sums.right)
            tokens += float(sums.tokens)
        if self._questions:
            self._answer(int(jax.device_get(state.step)), state, frozen)
        return {"eval_loss": loss / max(1, tokens), "eval_accuracy": right / max(1, tokens), "eval_tokens": tokens}

    def _together(self) -> Iterator[Batch]:
        """Batches of this process, as many on every process: those that run out first go on with empty ones."""
        iterator = iter(self._loader)
        try:
            for _ in range(self._batches):
                batch = next(iterator, None)
                if not any(distributed.all_gather(b"" if batch is None else b"one")):
                    return
                yield assemble([], self._layout, self._processor.image_size) if batch is None else batch
        finally:
            iterator.close()

    def _answer(self, step: int, state: State, frozen: Params) -> None:
        variables = assemble_params(state.trained, frozen, self._recipe)
        params, adapters = (inference_layout(variables[name], self._place.mesh) for name in ("params", "lora"))
        chat = self._chat.with_params(params, adapters)
        # A question that fails is logged as a warning; it does not end the run.
        options: dict[str, Any] = {"honour_exif": False, "parse_special": True, "max_new_tokens": ANSWER_TOKENS}
        replies = [chat.batch_chat([q.text], [q.images], **options)[0] for q in self._questions]
        if not distributed.is_process_0():
            return
        said = [
            Answered(step, question.text, question.expected, reply.text)
            for question, reply in zip(self._questions, replies)
        ]
        lines = "".join(f"{answered.to_json()}\n" for answered in said)
        files.append_text(self._directory / "answers.jsonl", lines, sync=False)
        for answered in said if self._tell is not None else ():
            self._tell(answered)


def pick_questions(corpus: Corpus, count: int, room: int, maker: SampleMaker) -> list[Question]:
    """Up to `count` questions of a corpus, spread over it, that can be asked. room: tokens that question, images and
    answer may take. maker: the SampleMaker of the data."""
    picked: list[Question] = []
    for number in np.linspace(0, len(corpus) - 1, min(len(corpus), 4 * count), dtype=int):
        record = corpus[number]
        try:
            entry = read_entry(record.text)
            images = tuple(record.source.root / name for name in image_names(entry))
            turns = labels.place_training_images(
                labels.read_turns(entry.get("conversations")), len(images), first=maker.images_first
            )
            question, expected = turns[0]
            for path in images:
                load_image(path, honour_exif=False)
        except (SampleError, ImageError):
            continue
        asked = question.count(IMAGE_PLACEHOLDER)
        long = len(question.encode()) + asked * maker.tokens_per_image + ANSWER_TOKENS
        if question.strip() and asked == len(images) and long <= room:
            picked.append(Question(question, images, expected))
        if len(picked) == count:
            break
    return picked

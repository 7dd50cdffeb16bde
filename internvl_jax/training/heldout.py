"""Held-out evaluation during training: loss, accuracy, and a few answers to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax.config.conversation_templates import IMAGE_PLACEHOLDER
from internvl_jax.data import labels
from internvl_jax.data.annotations import Corpus
from internvl_jax.data.batch import Batch, pad_rows
from internvl_jax.data.loader import Loader
from internvl_jax.data.packing import Layout, assemble
from internvl_jax.data.samples import SampleError, SampleMaker, image_names, read_entry
from internvl_jax.inference.chat import Chat
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.loading import inference_layout
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.processing.images import ImageError, ImageProcessor, load_image
from internvl_jax.processing.tokenizer import Tokenizer
from internvl_jax.training import objective
from internvl_jax.training.context import TrainContext
from internvl_jax.training.state import State
from internvl_jax.training.step import assemble_variables, put_batch, stack_batches
from internvl_jax.utils import files

ANSWER_TOKENS = 64  # at most, per answer


@dataclass(frozen=True)
class HeldOutQuestion:
    """The first turn of a held-out conversation."""

    text: str
    images: tuple[Path, ...]
    expected: str


@dataclass(frozen=True)
class HeldOutAnswer:
    """What the model answered to a held-out question after a number of steps."""

    step: int
    question: str
    expected: str
    answer: str

    def to_json(self) -> str:
        """Return a line of answers.jsonl."""
        return files.to_json(vars(self))


@dataclass(frozen=True)
class HeldOutData:
    """What is evaluated.

    Attributes:
        loader: Held-out data, one epoch in the order of the files.
        layout: Shapes of its batches.
        tokenizer: The model's tokenizer.
        processor: The model's image processor.
        max_batches: Number of batches to evaluate, at most.
        questions: Questions to answer greedily.
    """

    loader: Loader
    layout: Layout
    tokenizer: Tokenizer
    processor: ImageProcessor
    max_batches: int
    questions: list[HeldOutQuestion]


class HeldOutEvaluation:
    """Evaluates a state on held-out data. The trainer calls it on all processes."""

    def __init__(
        self,
        data: HeldOutData,
        context: TrainContext,
        directory: Path,
        on_answer: Callable[[HeldOutAnswer], None] | None = None,
    ):
        """Prepare an evaluation.

        Args:
            data: What is evaluated.
            context: Context of the run.
            directory: Directory of the run; answers are appended to its answers.jsonl.
            on_answer: Called in process 0 with every answer.
        """
        self._data, self._context, self._directory, self._on_answer = data, context, directory, on_answer
        placement = context.placement
        dtype, axes = context.settings.dtype, placement.image_axes
        model = bind_model(placement.config, {}, dtype=dtype, image_axes=axes)  # parameters follow
        generator = Generator.for_tokenizer(model, data.tokenizer, placement.mesh)
        self._chat = Chat(generator, data.tokenizer, data.processor, name="the model")

        def sums(trained: Params, frozen: Params, batch: Batch) -> objective.LossSums:
            micro_batch = jax.tree.map(lambda leaf: leaf[0], batch)
            return objective.loss(
                assemble_variables(trained, frozen, context.recipe),
                placement.config,
                micro_batch,
                objective.loss_weights(micro_batch.labels, micro_batch.segment_ids),
                replace(context.loss_options, z_loss=0.0, remat=False),
            )

        self._sums = jax.jit(sums)

    def __call__(self, state: State, frozen: Params) -> dict[str, float]:
        """Return eval_loss (mean over supervised tokens), eval_accuracy and eval_tokens, and write answers."""
        loss = num_correct = num_tokens = 0.0
        for batch in self._batches():
            padded = stack_batches([pad_rows(batch, self._data.layout.max_length)])
            placed = put_batch(padded, self._context.placement)
            sums = jax.device_get(self._sums(state.trained, frozen, placed))
            loss += float(sums.loss) * float(sums.num_supervised)
            num_correct += float(sums.num_correct)
            num_tokens += float(sums.num_supervised)
        if self._data.questions:
            self._answer(int(jax.device_get(state.step)), state, frozen)
        count = max(1, num_tokens)
        return {"eval_loss": loss / count, "eval_accuracy": num_correct / count, "eval_tokens": num_tokens}

    def _batches(self) -> Iterator[Batch]:
        """Yield the same number of batches on every process: one whose data has ended yields empty batches."""
        iterator = iter(self._data.loader)
        try:
            for _ in range(self._data.max_batches):
                batch = next(iterator, None)
                if not any(distributed.all_gather(b"" if batch is None else b"one")):
                    return
                yield assemble([], self._data.layout, self._data.processor.image_size) if batch is None else batch
        finally:
            iterator.close()

    def _answer(self, step: int, state: State, frozen: Params) -> None:
        variables = assemble_variables(state.trained, frozen, self._context.recipe)
        mesh = self._context.placement.mesh
        params, adapters = (inference_layout(variables[name], mesh) for name in ("params", "lora"))
        chat = self._chat.with_params(params, adapters)
        # A question that fails is logged as a warning; it does not end the run.
        options: dict[str, Any] = {"honor_exif": False, "parse_special": True, "max_new_tokens": ANSWER_TOKENS}
        questions = self._data.questions
        replies = [chat.batch_chat([q.text], [q.images], **options)[0] for q in questions]
        if not distributed.is_process_0():
            return
        answers = [HeldOutAnswer(step, q.text, q.expected, reply.text) for q, reply in zip(questions, replies)]
        lines = "".join(f"{answer.to_json()}\n" for answer in answers)
        files.append_text(self._directory / "answers.jsonl", lines, sync=False)
        if self._on_answer is not None:
            for answer in answers:
                self._on_answer(answer)


def pick_questions(corpus: Corpus, count: int, max_tokens: int, maker: SampleMaker) -> list[HeldOutQuestion]:
    """Return questions of a corpus, spread over it, whose images can be read.

    Args:
        corpus: Held-out data.
        count: Number of questions, at most.
        max_tokens: Tokens that question, images and answer may take together.
        maker: Makes the samples of the data.
    """
    picked: list[HeldOutQuestion] = []
    for number in np.linspace(0, len(corpus) - 1, min(len(corpus), 4 * count), dtype=int):
        question = _read_question(corpus, number, maker)
        if question is None:
            continue
        num_images = question.text.count(IMAGE_PLACEHOLDER)
        num_tokens = len(question.text.encode()) + num_images * maker.tokens_per_image + ANSWER_TOKENS
        if question.text.strip() and num_images == len(question.images) and num_tokens <= max_tokens:
            picked.append(question)
        if len(picked) == count:
            break
    return picked


def _read_question(corpus: Corpus, number: int, maker: SampleMaker) -> HeldOutQuestion | None:
    """Return the question of a conversation, or None if it is invalid."""
    record = corpus[number]
    try:
        entry = read_entry(record.text)
        images = tuple(record.source.root / name for name in image_names(entry))
        turns = labels.read_turns(entry.get("conversations"))
        text, expected = labels.place_training_images(turns, len(images), first=maker.images_first)[0]
        for path in images:
            load_image(path, honor_exif=False)
    except (SampleError, ImageError):
        return None
    return HeldOutQuestion(text, images, expected)

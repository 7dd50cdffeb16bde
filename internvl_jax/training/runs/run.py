"""Runs a training run that `prepare` made: reads the checkpoint, trains, writes the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from internvl_jax.inference.loading import enable_compilation_cache
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.training.heldout import HeldOutAnswer, HeldOutData, HeldOutEvaluation, pick_questions
from internvl_jax.training.initialization import read_params
from internvl_jax.training.runs import costs, resizing
from internvl_jax.training.runs.model_output import write_model
from internvl_jax.training.runs.prepare import Progress, Run
from internvl_jax.training.runs.summary import peak_flops
from internvl_jax.training.saving import MODEL, make_run_directory
from internvl_jax.training.trainer import Outcome, TrainHooks, train
from internvl_jax.utils import files, logs

PROFILE, TENSORBOARD, LOG = "profile", "tensorboard", "log.txt"


@contextmanager
def log_file(run: Run) -> Iterator[None]:
    """Make the run's directory, and copy log messages to OUTPUT/log.txt, as well as the error that ends the block.

    To be called on all processes; process 0 writes.
    """
    make_run_directory(run.output, run.facts)
    if not distributed.is_process_0():
        yield
        return
    with logs.to_file(run.output / LOG):
        try:
            yield
        except BaseException as error:  # the caller prints it; Ctrl-C is one too
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {__name__}: {type(error).__name__}: {error}\n"
            with suppress(OSError):
                files.append_text(run.output / LOG, line)
            raise


def start(
    run: Run,
    *,
    log: Callable[[dict[str, Any]], None] | None = None,
    on_answer: Callable[[HeldOutAnswer], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and write the model at the end. A run with saved steps is resumed.

    Args:
        run: A run of `prepare`.
        log: Called with the metrics of every step and evaluation.
        on_answer: Called with every held-out answer.
        progress: Called with bytes read, bytes in all, and a description while the checkpoint is read.

    Raises:
        RunError: See `trainer.train`. TrainingError is a RunError.
        DataError: The data cannot be used any more.
    """
    enable_compilation_cache()
    params = _read_params(run, progress)
    profile = run.output / PROFILE if run.options.profile else None
    hooks = TrainHooks(log, _make_evaluation(run, on_answer), _ideal_seconds(run), profile)
    batches = iter(run.data.loader)
    try:
        outcome = train(
            run.output,
            run.context,
            params,
            batches,
            hooks=hooks,
            identity=run.identity,
            from_scratch=run.options.from_scratch,
        )
    finally:
        batches.close()
    if outcome.finished and not (run.output / MODEL).exists():
        trained = outcome.state.trained
        write_model(run.output / MODEL, run.model.directory, trained, run.context.placement, run.context.recipe)
    return outcome


def _read_params(run: Run, progress: Progress | None) -> Params:
    model = run.model
    params = read_params(
        model.directory,
        run.context,
        param_dtype=run.options.param_dtype,
        config=model.base_config,
        progress=progress,
    )
    return (
        params if model.config is model.base_config else resizing.resize_tower(params, model.base_config, model.config)
    )


def _make_evaluation(run: Run, on_answer: Callable[[HeldOutAnswer], None] | None) -> HeldOutEvaluation | None:
    loader = run.data.held_out
    if loader is None:
        return None
    count = 0 if run.context.recipe.captions else run.options.answers
    max_tokens = run.model.config.required_text.max_position_embeddings
    questions = pick_questions(loader.corpus, count, max_tokens, loader.maker)
    model, max_batches = run.model, run.options.eval_batches
    data = HeldOutData(loader, run.data.layout, model.tokenizer, model.processor, max_batches, questions)
    return HeldOutEvaluation(data, run.context, run.output, on_answer)


def _ideal_seconds(run: Run) -> Callable[[Any], float] | None:
    """Return the function of `TrainHooks.ideal_seconds`, or None if the chip's peak FLOP/s are unknown."""
    peak = peak_flops(run.context.placement)
    if peak is None:
        return None
    config, recipe, shards = run.model.config, run.context.recipe, run.context.placement.num_data_shards
    return lambda batch: costs.batch_flops(config, recipe, batch, shards) / peak

"""Prepares a training run: inputs are validated before anything large is read or compiled.

OUTPUT/run.json       identity of the run (saving.py)      OUTPUT/metrics.jsonl   metrics of every step
OUTPUT/steps/         saved steps, to resume from          OUTPUT/answers.jsonl   answers to held-out questions
OUTPUT/model/         the model or its adapters            OUTPUT/log.txt         messages on the terminal
OUTPUT/saved.json     the last saved step (saving.py)
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import checkpoint
from internvl_jax.config import ChatConfig, load_config
from internvl_jax.data.annotations import DataError
from internvl_jax.data.estimate import EpochEstimate, estimate_epoch
from internvl_jax.data.loader import Loader, ReadOptions, open_data
from internvl_jax.data.packing import Layout
from internvl_jax.data.samples import Problem, SampleMaker
from internvl_jax.inference.loading import NANO, resolve_dtype
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.processing.images import ImageProcessor, load_processor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer
from internvl_jax.quantize import scheme_of
from internvl_jax.training.context import TrainContext, TrainSettings
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.runs import costs, resizing
from internvl_jax.training.saving import MODEL, RUN, STEPS, RunError, is_existing_run
from internvl_jax.training.trainer import PROFILED, run_facts
from internvl_jax.utils import files, formats

Progress = Callable[[int, int, str], None]

PARTS = ("vision_model", "mlp1", "language_model")
PARAM_DTYPES = ("float32", "bfloat16")
HELD_OUT_SAMPLES = 100  # held-out samples that are read before a run starts


@dataclass(frozen=True)
class RunOptions:
    """What a user asks for.

    Attributes:
        recipe: What is trained, and with which numbers.
        data: Meta file, JSONL, or LLaVA's JSON.
        output: Directory of the run, new or to resume.
        checkpoint: Converted checkpoint to start from. None is nano.
        root: Directory that relative paths of `data` start from. None is that of `data`.
        steps: Number of steps. None is `recipe.epochs` over the data.
        max_seq_length: Tokens per row. None is the recipe's number, or less if the model's context is shorter.
        buckets: Shorter row lengths. If given, a row holds one sample.
        packed: Whether a row holds several samples.
        image_slots: Images in a process's batch. None is chosen from the data.
        gradient_accumulation_steps: Micro-batches per step.
        image_size: Image size to resize the vision tower to. None is that of the checkpoint.
        mesh: Mesh, as `make_mesh` reads it. None is one device.
        vision: Vision mode of the mesh. None is the default of the mesh.
        dtype: Computation dtype. None is float32 on CPU and bfloat16 elsewhere.
        param_dtype: Dtype of trained parameters.
        remat: Rematerialization policy.
        seed: Seed of the order of the data, dropout and adapters.
        workers: Processes that read data. 0 uses threads.
        fatal: Whether an invalid sample ends the run. Otherwise it is skipped.
        augmentation: Augmentation of data sets that ask for it: "crop", "jpeg" or None.
        save_every: Steps between saved steps.
        keep: Saved steps to keep.
        eval_data: Held-out data. None for no evaluation.
        eval_every: Steps between evaluations.
        eval_batches: Held-out batches, at most.
        answers: Held-out questions to answer.
        profile: Whether to write a trace of a few steps.
        from_scratch: Start at step 1 although there are saved steps.
    """

    recipe: Recipe
    data: Path
    output: Path
    checkpoint: Path | None = None
    root: Path | None = None
    steps: int | None = None
    max_seq_length: int | None = None
    buckets: tuple[int, ...] = ()
    packed: bool = True
    image_slots: int | None = None
    gradient_accumulation_steps: int = 1
    image_size: int | None = None
    mesh: str | None = None
    vision: str | None = None
    dtype: str | None = None
    param_dtype: str = "float32"
    remat: str = "full"
    seed: int = 0
    workers: int = 0
    fatal: bool = False
    augmentation: str | None = "crop"
    save_every: int = 500
    keep: int = 3
    eval_data: Path | None = None
    eval_every: int = 500
    eval_batches: int = 16
    answers: int = 3
    profile: bool = False
    from_scratch: bool = False

    def resolve_paths(self) -> RunOptions:
        """Return the options with absolute paths."""
        names = ("data", "output", "checkpoint", "root", "eval_data")
        paths: dict[str, Any] = {
            name: files.resolve(path) for name in names if (path := getattr(self, name)) is not None
        }
        return replace(self, **paths)


@dataclass(frozen=True)
class Model:
    """The checkpoint that a run starts from.

    Attributes:
        directory: Directory of the checkpoint.
        base_config: Its configuration.
        config: Configuration of the model in training, with another image size if the vision tower is resized.
        tokenizer: Its tokenizer.
        processor: Image processor for `config`.
    """

    directory: Path
    base_config: ChatConfig
    config: ChatConfig
    tokenizer: Tokenizer
    processor: ImageProcessor


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Attributes:
        layout: Shapes of a process's batches.
        loader: Training data.
        held_out: Held-out data, if any.
        epoch: Estimate of what an epoch has.
    """

    layout: Layout
    loader: Loader
    held_out: Loader | None
    epoch: EpochEstimate


@dataclass(frozen=True)
class Run:
    """A validated run, ready to start or resume. Made by `prepare`.

    Attributes:
        options: What the user asked for, with absolute paths.
        model: The checkpoint that it starts from.
        context: What the training step is made of.
        data: Training and held-out data.
        identity: Identity of checkpoint, data and shapes, for run.json.
        saved_step: The saved step that it resumes from, if any.
    """

    options: RunOptions
    model: Model
    context: TrainContext
    data: RunData
    identity: dict[str, Any]
    saved_step: int | None

    @property
    def output(self) -> Path:
        """Directory of the run."""
        return self.options.output

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return (self.output / MODEL).exists()  # written at the end, and complete

    @property
    def facts(self) -> dict[str, Any]:
        """Content of run.json."""
        return run_facts(self.context, self.identity)


def prepare(
    options: RunOptions,
    *,
    report: Callable[[Problem], None] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Validate everything that a run needs.

    Args:
        options: What the user asks for.
        report: Called once with each invalid sample.
        progress: Called with done, total, and a description while data are read.

    Raises:
        ValueError: Something is wrong, and the message says what is allowed: ConfigError, CheckpointError, DataError,
            MeshError, LoraError or RunError.
    """
    with distributed.barrier():
        return _prepare(options.resolve_paths(), report, progress)


def _prepare(options: RunOptions, report: Callable[[Problem], None] | None, progress: Progress | None) -> Run:
    model = _read_model(options)
    recipe = replace(options.recipe, max_seq_length=_max_seq_length(options, model.config))
    _check_options(options)
    facts = _read_facts(options.output)
    placement = _make_placement(options, model.config)
    rows = _rows_per_process(recipe, placement, options.gradient_accumulation_steps)
    data = _Data(options, recipe, model, placement, report, progress).open(rows, facts)
    settings = TrainSettings(
        steps=_num_steps(options, recipe, facts, data, placement.num_data_shards),
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        seed=options.seed,
        dtype=resolve_dtype(options.dtype).name,
        remat=options.remat,
        save_every=options.save_every,
        keep=options.keep,
        log_every=1,
        eval_every=options.eval_every,
    )
    if options.profile and settings.steps < PROFILED.stop:
        raise RunError(f"a profile is of steps {PROFILED.start + 1} to {PROFILED.stop}: the run has {settings.steps}")
    identity = {
        "checkpoint": _fingerprint(model.directory),
        "data": data.loader.corpus.fingerprint(),
        "image_size": model.config.image_size,
        "image_slots": data.layout.image_slots * placement.num_data_shards,
        "lengths": list(data.layout.lengths),
        "packed": data.layout.packed,
        "augmentation": options.augmentation,
        "param_dtype": options.param_dtype,
    }
    context = TrainContext(recipe, settings, placement)
    saved_step = None if options.from_scratch else _last_saved_step(options.output)
    run = Run(options, model, context, data, identity, saved_step)
    is_existing_run(run.output, run.facts)
    _check_disk_space(run)
    return run


def _read_model(options: RunOptions) -> Model:
    directory = NANO if options.checkpoint is None else options.checkpoint
    base_config = config = _read_trainable_config(directory)
    if options.image_size is not None:
        if "vision_model" not in options.recipe.train:
            raise RunError("another image size is for recipes that train the vision tower: stage1, full")
        config = resizing.resized_config(base_config, options.image_size)
    processor = load_processor(directory, config)
    assert processor is not None  # the model has a vision tower
    return Model(directory, base_config, config, load_tokenizer(directory), processor)


def _read_trainable_config(directory: Path) -> ChatConfig:
    if not directory.is_dir():
        raise RunError(f"{directory} is not a directory: --checkpoint takes one that internvl-jax convert wrote")
    config = load_config(directory)
    if config.text is None or config.vision is None or config.projector is None:
        raise RunError(f"{directory} is not a chat model: training needs a vision tower, projector and language model")
    if not checkpoint.is_converted(directory):
        raise RunError(
            f"{directory} is not converted: internvl-jax convert {files.quoted(directory)} DIR, then --checkpoint DIR"
        )
    if scheme_of(checkpoint.stored_tree(directory)) is not None:
        raise RunError(f"{directory} is quantized: train the checkpoint that it was made from, and quantize the result")
    return config


def _check_options(options: RunOptions) -> None:
    recipe = options.recipe
    for part in (*recipe.train, *recipe.lora):
        if part not in PARTS:
            raise RunError(f"{part} cannot be trained: the model has vision_model, mlp1 and language_model")
    for part, adapters in recipe.lora.items():
        adapters.targets_of(part)
    if options.from_scratch and (options.output / MODEL).exists():
        raise RunError(f"{options.output / MODEL} exists: the run has ended. Choose another directory for another run")
    if options.param_dtype not in PARAM_DTYPES:
        raise RunError(f"parameters are float32 or bfloat16, not {options.param_dtype}")


def _max_seq_length(options: RunOptions, config: ChatConfig) -> int:
    context = config.required_text.max_position_embeddings
    if options.max_seq_length is not None and options.max_seq_length > context:
        raise RunError(f"rows of {options.max_seq_length} tokens are longer than the model's context of {context}")
    length = min(options.recipe.max_seq_length, context) if options.max_seq_length is None else options.max_seq_length
    if any(not 2 <= bucket < length for bucket in options.buckets):
        raise RunError(f"buckets {', '.join(map(str, options.buckets))} must be shorter than rows of {length} tokens")
    if length <= config.tokens_per_image + 2:
        raise RunError(f"rows of {length} tokens have no room for an image of {config.tokens_per_image} and an answer")
    return length


def _make_placement(options: RunOptions, config: ChatConfig) -> MeshPlacement:
    if options.mesh is None and options.vision is not None:
        raise RunError("--vision-mode says how the vision tower is partitioned over a mesh: give --mesh too")
    if options.mesh is None and jax.process_count() > 1:
        raise RunError(f"{jax.process_count()} processes train on one mesh: give --mesh, for example data=-1")
    mesh = None if options.mesh is None else mesh_lib.make_mesh(options.mesh, config=config)
    return MeshPlacement(config, mesh, options.vision)


def _rows_per_process(recipe: Recipe, placement: MeshPlacement, accumulation_steps: int) -> int:
    processes = placement.num_data_shards
    if accumulation_steps < 1 or recipe.global_batch_size % (accumulation_steps * processes):
        raise RunError(
            f"{recipe.global_batch_size} rows per step do not divide into {accumulation_steps} micro-batches on "
            f"{processes} process(es): choose --global-batch-size, --gradient-accumulation-steps"
        )
    if placement.mesh is not None:
        mesh_lib.validate_mesh(placement.config, placement.mesh, recipe.global_batch_size // accumulation_steps)
    return recipe.global_batch_size // (accumulation_steps * processes)


@dataclass(frozen=True)
class _Data:
    """Opens the data of a run."""

    options: RunOptions
    recipe: Recipe
    model: Model
    placement: MeshPlacement
    report: Callable[[Problem], None] | None
    progress: Progress | None

    def open(self, rows: int, facts: dict[str, Any]) -> RunData:
        """Open training and held-out data, and read a part of both.

        Args:
            rows: Rows of a process's batch.
            facts: Content of run.json, if the run exists.

        Raises:
            DataError: No sample is valid, or one is not and that is fatal.
        """
        options = self.options
        lengths = (*sorted(options.buckets), self.recipe.max_seq_length)
        packed = options.packed and not options.buckets
        draft_layout = Layout(rows, lengths, options.image_slots or 10**6, packed)
        draft = self._loader(options.data, draft_layout, augmentation=options.augmentation)
        epoch = estimate_epoch(draft.corpus, draft.maker, seed=options.seed, progress=self.progress)
        if epoch.problems and options.fatal:
            first, count = epoch.problems[0], len(epoch.problems)
            raise DataError(
                f"{count} of {len(epoch.sizes) + count} checked samples are invalid; {first.location}: {first.message}"
            )
        layout = replace(draft_layout, image_slots=self._image_slots(epoch, draft_layout, facts))
        loader = self._loader(
            options.data,
            layout,
            augmentation=options.augmentation,
            seed=options.seed,
            fatal=options.fatal,
            workers=options.workers,
        )
        held_out = None
        if options.eval_data is not None:
            held_out = self._loader(options.eval_data, layout, augmentation=None, shuffle=False, epochs=1)
            estimate_epoch(held_out.corpus, held_out.maker, limit=HELD_OUT_SAMPLES)  # refused now, not after hours
        return RunData(layout, loader, held_out, epoch)

    def _loader(self, meta: Path, layout: Layout, *, augmentation: str | None, **read_options: Any) -> Loader:
        maker = SampleMaker.for_model(
            self.model.config,
            self.model.tokenizer,
            self.model.processor,
            max_length=layout.max_length,
            image_slots=layout.image_slots,
            augmentation=augmentation,
            images_first=self.recipe.images_first,
            captions=self.recipe.captions,
        )
        return open_data(
            meta,
            maker,
            layout,
            ReadOptions(process=(self.placement.data_shard, self.placement.num_data_shards), **read_options),
            base=self.options.root if meta == self.options.data else None,
            report=self.report,
            progress=self.progress,
        )

    def _image_slots(self, epoch: EpochEstimate, layout: Layout, facts: dict[str, Any]) -> int:
        """Return the image slots of a process's batch. A resumed run keeps its number."""
        processes = self.placement.num_data_shards
        if self.options.image_slots is not None:
            return self.options.image_slots
        if "image_slots" in facts and facts["image_slots"] % processes == 0:
            return facts["image_slots"] // processes
        wanted = epoch.image_slots(layout.rows, layout.max_length, layout.packed)
        if self.placement.mesh is None:
            return wanted
        shards = math.prod(self.placement.mesh.shape[axis] for axis in self.placement.image_axes)
        multiple = max(1, shards // processes)
        return -(-wanted // multiple) * multiple


def _read_facts(output: Path) -> dict[str, Any]:
    """Return the content of run.json if the run exists: numbers that were derived from the data are kept."""
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is a file: --output is the directory of the run")
    return files.read_json(output / RUN) if os.path.lexists(output / RUN) else {}


def _num_steps(options: RunOptions, recipe: Recipe, facts: dict[str, Any], data: RunData, processes: int) -> int:
    if options.steps is not None:
        return options.steps
    if "steps" in facts:
        return facts["steps"]
    batches = recipe.epochs * data.epoch.batches(data.layout)
    return max(1, round(batches / (processes * options.gradient_accumulation_steps)))


def _last_saved_step(output: Path) -> int | None:
    """Return the last saved step, by its name."""
    steps = output / STEPS
    names = [path.name for path in steps.iterdir()] if steps.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _check_disk_space(run: Run) -> None:
    """Refuse a run if the disk has no room for its saved steps and model."""
    directory = next(path for path in (run.output, *run.output.resolve().parents) if path.is_dir())
    settings, recipe = run.context.settings, run.context.recipe
    trained, _ = costs.count_parameters(run.model.config, recipe)
    step_bytes = trained * (costs.MOMENT_BYTES + jnp.dtype(run.options.param_dtype).itemsize)
    count = min(settings.keep, -(-settings.steps // settings.save_every)) + 1
    stored = jax.tree.leaves(checkpoint.stored_tree(run.model.directory)) if recipe.train else []
    model_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in stored)
    needed = step_bytes * (count if run.saved_step is None else 1) + model_bytes
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            f"{directory} has {formats.disk(free)} left, and the run writes about {formats.disk(needed)}: "
            f"{count} steps of {formats.disk(step_bytes)} (--keep) and a model of {formats.disk(model_bytes)}"
        )


def _fingerprint(directory: Path) -> str:
    """Return a hash of a converted checkpoint's configuration and of the time when it was written, not of its path."""
    names = ("config.json", f"{checkpoint.PARAMS}/_METADATA", f"{checkpoint.PARAMS}/_CHECKPOINT_METADATA")
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in names)).hexdigest()[:16]

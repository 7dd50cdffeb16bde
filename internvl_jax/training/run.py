"""A training run from what a user asks for: everything is looked at before anything is read or compiled.

OUTPUT/run.json       what the run is (saving.py)       OUTPUT/metrics.jsonl   every step's numbers
OUTPUT/steps/         where it can go on from           OUTPUT/answers.jsonl   answers to held-out questions
OUTPUT/model/         the model, or its adapters, at the end
OUTPUT/log.txt        what was said to the terminal     OUTPUT/saved.json      the last saved step (saving.py)
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from internvl_jax.inference.loading import NANO, enable_compilation_cache
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.processing.images import ImageProcessor, load_processor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer
from internvl_jax.quantize import scheme_of
from internvl_jax.training import costs, resizing
from internvl_jax.training.heldout import Answered, HeldOut, pick_questions
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.saving import MODEL, RUN, STEPS, RunError, begin, is_there
from internvl_jax.training.state import ADAPTERS, Place, read_params, write_model
from internvl_jax.training.trainer import PROFILED, Outcome, Settings, facts, train
from internvl_jax.utils import files, logs

Progress = Callable[..., None]

PROFILE, TENSORBOARD, LOG = "profile", "tensorboard", "log.txt"


@dataclass(frozen=True)
class Options:
    """What is asked for. None: decided by `prepare`."""

    recipe: Recipe
    data: Path
    output: Path
    checkpoint: Path | None = None  # converted; None: nano
    base: Path | None = None  # where relative paths of `data` start
    steps: int | None = None  # else recipe.epochs over the data
    length: int | None = None  # tokens of a row; else the recipe's, if the model's context has room
    buckets: tuple[int, ...] = ()  # shorter lengths of rows; one sample is a row then
    packed: bool = True
    images: int | None = None  # slots of a process's batch
    accumulate: int = 1
    image_size: int | None = None
    mesh: str | None = None
    vision: str | None = None
    dtype: str | None = None  # of computation
    param_dtype: str = "float32"  # of what is trained
    remat: str = "full"
    seed: int = 0
    workers: int = 0
    fatal: bool = False  # a sample that cannot be used ends the run
    augmentation: str | None = "crop"
    save_every: int = 500
    keep: int = 3
    eval_data: Path | None = None
    eval_every: int = 500
    eval_batches: int = 16
    answers: int = 3
    profile: bool = False
    from_scratch: bool = False  # begin at step 1 although there are saved steps


@dataclass(frozen=True)
class Run:
    """A run that can begin, or go on. Made by `prepare`."""

    options: Options
    recipe: Recipe
    settings: Settings
    config: ChatConfig
    base_config: ChatConfig  # the checkpoint's; config is another where the tower is resized
    checkpoint: Path
    place: Place
    layout: Layout
    loader: Loader
    held_out: Loader | None
    tokenizer: Tokenizer
    processor: ImageProcessor
    found: EpochEstimate
    identity: dict[str, Any]
    going_on: int | None  # the step that is there already

    @property
    def output(self) -> Path:
        return self.options.output

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return (self.output / MODEL).exists()  # which is written at the end, and whole


def prepare(
    options: Options, *, report: Callable[[Problem], None] | None = None, progress: Progress | None = None
) -> Run:
    """Look at everything that a run needs. report: told each sample that cannot be used, once.

    Raises ValueErrors of the part that is wrong (ConfigError, CheckpointError, DataError, MeshError, LoraError,
    RunError), each saying what would be right.
    """
    named = ("data", "output", "checkpoint", "base", "eval_data")
    with distributed.barrier():
        paths: dict[str, Any] = {
            name: files.resolve(path) for name in named if (path := getattr(options, name)) is not None
        }
        return _prepared(replace(options, **paths), report, progress)


def _prepared(options: Options, report: Callable[[Problem], None] | None, progress: Progress | None) -> Run:
    directory = NANO if options.checkpoint is None else options.checkpoint
    base_config = _trainable(directory)
    config, recipe = base_config, options.recipe
    if options.image_size is not None:
        if "vision_model" not in recipe.train:
            raise RunError("another image size is for recipes that train the tower itself: stage1, full")
        config = resizing.resized_config(base_config, options.image_size)
    for part in (*recipe.train, *recipe.lora):
        if part not in ("vision_model", "mlp1", "language_model"):
            raise RunError(f"{part} cannot be trained: the model has vision_model, mlp1 and language_model")
    for tower, adapter in recipe.lora.items():
        adapter.targets_of(tower)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    length = _row_length(options, recipe, config)
    recipe = replace(recipe, length=length)
    before = _before(options.output)
    if options.from_scratch and (options.output / MODEL).exists():
        raise RunError(f"{options.output / MODEL} exists: the run has ended. Choose another directory for another run")
    mesh = None if options.mesh is None else mesh_lib.make_mesh(options.mesh, config=config)
    if mesh is None and options.vision is not None:
        raise RunError("--vision-mode says how the tower lies on a mesh: give --mesh too")
    if mesh is None and jax.process_count() > 1:
        raise RunError(f"{jax.process_count()} processes train on one mesh: give --mesh, for example data=-1")
    place = Place(config, mesh, options.vision)
    processes = place.shares  # with data of their own
    rows = _rows(recipe, place, processes, options.accumulate)
    tokenizer, processor = load_tokenizer(directory), load_processor(directory, config)
    lengths = (*sorted(options.buckets), length)
    packed = options.packed and not options.buckets

    def open_with(meta: Path, layout: Layout, augmentation: str | None, **read_options: Any) -> Loader:
        maker = SampleMaker.for_model(
            config,
            tokenizer,
            processor,
            max_length=layout.max_length,
            image_slots=layout.image_slots,
            augmentation=augmentation,
            images_first=recipe.images_first,
            captions=recipe.captions,
        )
        return open_data(
            meta,
            maker,
            layout,
            ReadOptions(process=(place.share, processes), **read_options),
            base=options.base if meta == options.data else None,
            report=report,
            progress=progress,
        )

    draft = Layout(rows, lengths, options.images or 10**6, packed)
    looked = open_with(options.data, draft, options.augmentation)
    found = estimate_epoch(looked.corpus, looked.maker, seed=options.seed, progress=progress)
    if found.problems and options.fatal:
        raise DataError(
            f"{len(found.problems)} of {len(found.sizes) + len(found.problems)} samples looked at cannot be used; "
            f"{found.problems[0].location}: {found.problems[0].message}"
        )
    layout = Layout(rows, lengths, _image_slots(options, found, before, rows, length, packed, place), packed)
    steps = _steps(options, recipe, found, before, layout, processes)
    loader = open_with(
        options.data, layout, options.augmentation, seed=options.seed, fatal=options.fatal, workers=options.workers,
    )  # fmt: skip
    held_out = None
    if options.eval_data is not None:
        held_out = open_with(options.eval_data, layout, None, shuffle=False, epochs=1)
        estimate_epoch(held_out.corpus, held_out.maker, limit=100)  # refused now, not after hours
    settings = Settings(
        steps,
        accumulate=options.accumulate,
        seed=options.seed,
        dtype=dtype,
        remat=options.remat,
        save_every=options.save_every,
        keep=options.keep,
        log_every=1,
        eval_every=options.eval_every,
    )
    if options.profile and steps < PROFILED.stop:
        raise RunError(f"a profile shows steps {PROFILED.start + 1} to {PROFILED.stop}: the run has {steps}")
    if options.param_dtype not in ("float32", "bfloat16"):
        raise RunError(f"parameters are float32 or bfloat16, not {options.param_dtype}")
    identity = {
        "checkpoint": _fingerprint(directory),
        "data": loader.corpus.fingerprint(),
        "image_size": config.image_size,
        "image_slots": layout.image_slots * processes,
        "lengths": list(layout.lengths),
        "packed": layout.packed,
        "augmentation": options.augmentation,
        "param_dtype": options.param_dtype,
    }
    made = Run(
        options,
        recipe,
        settings,
        config,
        base_config,
        directory,
        place,
        layout,
        loader,
        held_out,
        tokenizer,
        processor,
        found,
        identity,
        None if options.from_scratch else _last_step(options.output),
    )
    is_there(options.output, facts(made.recipe, made.settings, made.identity))
    _check_room(made)
    return made


@contextmanager
def log_file(made: Run) -> Iterator[None]:
    """Make the run's directory; within, what is said goes to OUTPUT/log.txt too, as does the error that ends the block.

    On all processes; process 0 writes.
    """
    begin(made.output, facts(made.recipe, made.settings, made.identity))
    if not distributed.is_process_0():
        yield
        return
    with logs.to_file(made.output / LOG):
        try:
            yield
        except BaseException as error:  # who prints it is not here; Ctrl-C is one too
            ended = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {__name__}: {type(error).__name__}: {error}\n"
            with suppress(OSError):
                files.append_text(made.output / LOG, ended)
            raise


def start(
    made: Run,
    *,
    log: Callable[[dict[str, Any]], None] | None = None,
    tell: Callable[[Answered], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train, and write the model at the end. log: given the numbers of every step. tell: held-out answers.

    Raises RunError, TrainingError or DataError as trainer.train and the data do.
    """
    enable_compilation_cache()
    options, place = made.options, made.place
    params = _read(made, progress)
    evaluate = None
    if made.held_out is not None:
        room = made.config.text.max_position_embeddings
        maker = made.held_out.maker
        answers = 0 if made.recipe.captions else options.answers
        evaluate = HeldOut(
            made.held_out,
            made.layout,
            made.config,
            made.recipe,
            made.settings,
            place,
            made.tokenizer,
            made.processor,
            made.output,
            batches=options.eval_batches,
            questions=pick_questions(made.held_out.corpus, answers, room, maker),
            tell=tell,
        )
    peak = peak_flops(place)
    batches = iter(made.loader)
    try:
        outcome = train(
            made.output,
            made.config,
            made.recipe,
            made.settings,
            params,
            batches,
            place,
            log=log,
            identity=made.identity,
            evaluate=evaluate,
            ideal_seconds=None
            if peak is None
            else lambda batch: costs.batch_flops(made.config, made.recipe, batch, place.shares) / peak,
            profile=made.output / PROFILE if options.profile else None,
            from_scratch=options.from_scratch,
        )
    finally:
        batches.close()
    if outcome.finished and not (made.output / MODEL).exists():
        write_model(made.output / MODEL, made.checkpoint, outcome.state.trained, place, made.recipe)
    return outcome


def summary(made: Run) -> list[str]:
    """What is about to happen, in a few lines."""
    options, recipe, settings, layout, found = made.options, made.recipe, made.settings, made.layout, made.found
    trained, frozen = costs.parameters(made.config, recipe)
    what = [*recipe.train, *(f"adapters of {tower} (rank {one.rank})" for tower, one in recipe.lora.items())]
    name = "nano" if options.checkpoint is None else made.checkpoint.resolve().name
    rows = layout.rows * made.place.shares * settings.accumulate
    slots = layout.image_slots * made.place.shares * settings.accumulate
    lengths = " or ".join(map(str, layout.lengths))
    per_step = rows * (layout.max_length * _filled(made) / found.tokens if layout.packed else 1)
    where = "one device" if options.mesh is None else f"mesh {options.mesh}, {jax.device_count()} devices"
    device = made.place.mesh.devices.flat[0] if made.place.mesh is not None else jax.devices()[0]
    state, activations = memory(made)
    gib = 2**30
    lines = [
        f"recipe {recipe.name} on {name}: {', '.join(what)}; {trained:,} parameters trained, {frozen:,} frozen",
        f"data: {found.epoch:,} conversations an epoch, {found.tokens:.0f} tokens and {found.images:.2f} images each",
        f"a step: {rows} {'packed ' if layout.packed else ''}rows of {lengths} tokens, up to {slots} images, about "
        f"{per_step:,.0f} conversations" + (f", in {settings.accumulate} parts" if settings.accumulate > 1 else ""),
        f"{settings.steps:,} steps ({settings.steps * per_step / (found.epoch * found.usable):.2g} epochs), "
        f"{recipe.optimizer.warmup_steps(settings.steps)} of them warm up to a learning rate of "
        f"{recipe.optimizer.learning_rate:g}; loss mean over {'tokens' if recipe.mean == 'token' else 'devices'}",
        f"{where} ({device.device_kind}), {settings.dtype}, remat {settings.remat}: about {state / gib:.2f} GiB of "
        f"parameters and optimizer and {activations / gib:.2f} GiB of activations on each device",
    ]
    if (chip := _chip(made.place)) is not None and state + activations > chip.hbm_bytes // chip.devices:
        lines.append(
            f"this is more than the {chip.hbm_bytes / chip.devices / gib:.2f} GiB of a {chip.name}: it may not fit. "
            "--remat full, --gradient-accumulation-steps, --param-dtype bfloat16, more devices along fsdp or shorter "
            "rows need less"
        )
    if found.problems:
        bad = len(found.problems)
        lines.append(
            f"{bad} of {bad + len(found.sizes)} conversations looked at cannot be used and will be skipped "
            f"(internvl-jax data check {files.quoted(options.data)} lists them)"
        )
    if made.done:
        lines.append(f"{made.output} is done")
    elif made.going_on is not None:
        lines.append(f"{made.output} goes on after step {made.going_on}")
    return lines


def result(made: Run, outcome: Outcome | None) -> list[str]:
    """How a run ended, and what to do next. outcome: None of one that was done before."""
    if outcome is not None and not outcome.finished:
        return [f"stopped after step {outcome.step} of {made.settings.steps}, which is saved: the same command goes on"]
    model = made.output / MODEL
    there, beside_it = files.quoted(model), files.quoted(model / ADAPTERS)
    base = "" if made.options.checkpoint is None else f" --checkpoint {files.quoted(made.checkpoint)}"
    if made.recipe.lora and not made.recipe.train:
        return [
            f"adapters: {model}",
            f"  internvl-jax chat{base} --adapters {there}",
            f"  internvl-jax adapters merge {there} MERGED{base}    # a whole checkpoint",
            f"  internvl-jax adapters to-peft {there} PEFT{base}    # for Hugging Face's peft",
        ]
    beside = f" --adapters {beside_it}" if made.recipe.lora else ""
    if beside:
        merged = f"  internvl-jax adapters merge {beside_it} MERGED --checkpoint {there}    # into one checkpoint"
    else:
        merged = f"  internvl-jax export {there} EXPORTED    # for PyTorch"
    return [f"model: {model}", f"  internvl-jax chat --checkpoint {there}{beside}", merged]


def memory(made: Run) -> tuple[int, int]:
    """costs.memory_per_device of a run."""
    processes = made.place.shares
    return costs.memory_per_device(
        made.recipe,
        made.place,
        rows=made.layout.rows * processes,
        length=made.layout.max_length,
        images=made.layout.image_slots * processes,
        trained_dtype=made.options.param_dtype,
        dtype=made.settings.dtype,
        remat=made.settings.remat,
        chunk=made.settings.chunk,
    )


def peak_flops(place: Place) -> float | None:
    """FLOP/s in bfloat16 of the devices of a run together; None where the chip's figures are not known."""
    chip = _chip(place)
    devices = 1 if place.mesh is None else place.mesh.size
    return None if chip is None else devices / chip.devices * chip.bf16_flops


def _chip(place: Place) -> Any:
    from internvl_jax.inference.bench import chip_of

    return chip_of(place.mesh.devices.flat[0] if place.mesh is not None else jax.devices()[0])


def _filled(made: Run) -> float:
    """The part of packed rows that is tokens."""
    return min(1.0, made.found.epoch * made.found.usable * made.found.tokens / _epoch_tokens(made))


def _epoch_tokens(made: Run) -> float:
    return max(1.0, made.found.batches(made.layout) * made.layout.rows * made.layout.max_length)


def _trainable(directory: Path) -> ChatConfig:
    if not directory.is_dir():
        raise RunError(f"{directory} is no directory: --checkpoint takes one that internvl-jax convert wrote")
    config = load_config(directory)
    if config.text is None or config.vision is None or config.projector is None:
        raise RunError(f"{directory} is no chat model: a tower, a projector and a language model are trained together")
    if not checkpoint.is_converted(directory):
        raise RunError(
            f"{directory} is not converted: internvl-jax convert {files.quoted(directory)} DIR, then --checkpoint DIR"
        )
    if scheme_of(checkpoint.stored_tree(directory)) is not None:
        raise RunError(f"{directory} is quantized: train the checkpoint that it was made from, and quantize the result")
    return config


def _row_length(options: Options, recipe: Recipe, config: ChatConfig) -> int:
    context = config.text.max_position_embeddings
    if options.length is not None and options.length > context:
        raise RunError(f"rows of {options.length} tokens are longer than the model's context of {context}")
    length = min(recipe.length, context) if options.length is None else options.length
    if any(not 2 <= bucket < length for bucket in options.buckets):
        raise RunError(f"buckets {', '.join(map(str, options.buckets))} must be shorter than rows of {length} tokens")
    if length <= config.tokens_per_image + 2:
        raise RunError(f"rows of {length} tokens have no room for an image of {config.tokens_per_image} and an answer")
    return length


def _rows(recipe: Recipe, place: Place, processes: int, accumulate: int) -> int:
    """Rows of a process's batch."""
    if accumulate < 1 or recipe.rows % (accumulate * processes):
        raise RunError(
            f"{recipe.rows} rows of a step do not divide into {accumulate} parts on {processes} process(es): "
            "choose --global-batch-size, --gradient-accumulation-steps"
        )
    if place.mesh is not None:
        mesh_lib.validate_mesh(place.config, place.mesh, recipe.rows // accumulate)
    return recipe.rows // (accumulate * processes)


def _before(output: Path) -> dict[str, Any]:
    """What run.json says, where the run is there already: it keeps the numbers that were derived then."""
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is a file: --output is the directory of the run")
    return files.read_json(output / RUN) if os.path.lexists(output / RUN) else {}


def _image_slots(
    options: Options, found: EpochEstimate, before: dict[str, Any], rows: int, length: int, packed: bool, place: Place
) -> int:
    """Image slots of a process's batch."""
    processes = place.shares
    if options.images is not None:
        return options.images
    if "image_slots" in before and before["image_slots"] % processes == 0:
        return before["image_slots"] // processes
    wanted = found.image_slots(rows, length, packed)
    if place.mesh is None:
        return wanted
    along = math.prod(place.mesh.shape[axis] for axis in mesh_lib.IMAGE_AXES[place.vision])
    each = max(1, along // processes)
    return -(-wanted // each) * each


def _steps(
    options: Options, recipe: Recipe, found: EpochEstimate, before: dict[str, Any], layout: Layout, processes: int
) -> int:
    if options.steps is not None:
        return options.steps
    if "steps" in before:
        return before["steps"]
    return max(1, round(recipe.epochs * found.batches(layout) / (processes * options.accumulate)))


def _last_step(output: Path) -> int | None:
    """The newest saved step, by its name."""
    steps = output / STEPS
    names = [path.name for path in steps.iterdir()] if steps.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _check_room(made: Run) -> None:
    """Refuse a run whose steps and model the disk has no room for."""
    place = next(path for path in (made.output, *made.output.resolve().parents) if path.is_dir())
    trained, _ = costs.parameters(made.config, made.recipe)
    each = trained * (costs.MOMENTS + jnp.dtype(made.options.param_dtype).itemsize)
    count = min(made.settings.keep, -(-made.settings.steps // made.settings.save_every)) + 1
    model = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(checkpoint.stored_tree(made.checkpoint))
    ) if made.recipe.train else 0  # fmt: skip
    needed = each * (count if made.going_on is None else 1) + model
    free = shutil.disk_usage(place).free
    if free < needed:
        gib = 2**30
        raise RunError(
            f"{place} has {free / gib:.1f} GiB left, and the run writes about {needed / gib:.1f}: {count} steps of "
            f"{each / gib:.2f} GiB (--keep) and a model of {model / gib:.2f}"
        )


def _fingerprint(directory: Path) -> str:
    """Equal for the same converted checkpoint, wherever it lies: its configuration, and when its parameters were
    written."""
    names = ("config.json", f"{checkpoint.PARAMS}/_METADATA", f"{checkpoint.PARAMS}/_CHECKPOINT_METADATA")
    return hashlib.sha256(b"".join((directory / name).read_bytes() for name in names)).hexdigest()[:16]


def _read(made: Run, progress: Progress | None) -> Params:
    params = read_params(
        made.checkpoint,
        made.base_config,
        made.recipe,
        made.place,
        trained_dtype=made.options.param_dtype,
        frozen_dtype=made.settings.dtype,
        progress=progress,
    )
    return params if made.config is made.base_config else resizing.resize_tower(params, made.base_config, made.config)

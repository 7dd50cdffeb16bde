"""The training loop: one compiled step per shape, on any legal mesh, that can be stopped and gone on from anywhere.

The loop is one step ahead of what it has seen: while a step runs, the numbers of the one before are looked at. A step
whose loss or gradient is not a number ends the run before anything is saved, with the batch that did it on disk.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax import lora
from internvl_jax.config import ChatConfig
from internvl_jax.data.batch import Batch, global_image_index, pad_rows
from internvl_jax.models.layers import Params, Variables
from internvl_jax.models.stack import Remat
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.training import objective, optimizer
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.saving import RunError, Steps, begin, claimed
from internvl_jax.training.state import ADAPTERS, Place, State, abstract_state, init_state
from internvl_jax.utils import files

# What the backward pass keeps of a layer: its input (and makes the rest again), also products with weights, everything.
REMAT: dict[str, Remat] = {
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": False,
}


PROFILED = range(3, 6)  # steps that a profile shows: compiled, and under way


class TrainingError(RunError):
    """A run that went wrong; the message says at which step, and what lies where."""


class Batches(Protocol):
    """An endless iterator of this process's batches that knows its place, as grain's iterators do."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Settings:
    """A run on a machine. Those above the line make the run what it is; those below may change when it goes on."""

    steps: int
    accumulate: int = 1  # batches of one optimizer step
    seed: int = 0
    dtype: str = "float32"  # of compute
    # ---
    remat: str = "full"  # a key of REMAT
    chunk: int = objective.CHUNK
    save_every: int = 500
    keep: int = 3
    log_every: int = 10
    eval_every: int = 500

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is not one of {', '.join(REMAT)}")
        for name in ("steps", "accumulate", "chunk", "save_every", "keep", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run goes on."""
        return {name: getattr(self, name) for name in ("steps", "accumulate", "seed", "dtype")}


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    state: State
    frozen: Params
    step: int
    finished: bool  # all steps are done; otherwise it was asked to stop, and saved


Loss = Callable[..., objective.Sums]
Evaluate = Callable[[State, Params], dict[str, float]]
StepFunction = jax.stages.Wrapped  # (State, Params, Batch) -> (State, metrics); `lower` compiles it ahead of time


def make_step(
    config: ChatConfig,
    recipe: Recipe,
    settings: Settings,
    adamw: optax.GradientTransformation,
    place: Place,
    *,
    devices: int | None = None,
    loss: Loss = objective.loss,
) -> StepFunction:
    """The compiled step: (state, frozen, batch) -> (state, metrics); the state given is used up.

    The batch has micro-batches on a leading axis, [A,B,T] and so on, as `stack_batches` makes it. metrics are float32
    scalars: loss, accuracy, grad_norm, learning_rate, supervised and read (tokens).
    devices: groups of rows of the per-device mean (recipes.Recipe.mean); None: as many as the mesh has for rows.
    loss: takes what objective.loss takes; what is given here instead may look at more than the text.
    """
    config = training_config(config, recipe)
    shards = 1 if place.mesh is None else place.mesh.shape["data"] * place.mesh.shape["fsdp"]
    groups = None if recipe.mean == "token" else devices or shards
    rate = optimizer.schedule(recipe.optimizer, settings.steps)
    dtype = jnp.dtype(settings.dtype)

    def micro(trained: Params, frozen: Params, batch: Batch, weights: Any, key: Any) -> tuple[Any, objective.Sums]:
        variables = assemble(trained, frozen, recipe)
        rngs = {"dropout": jax.random.fold_in(key, 0)} if recipe.lora else {}
        if recipe.drop_path > 0 and "vision_model" in recipe.train:
            rngs["drop_path"] = jax.random.fold_in(key, 1)
        sums = loss(
            variables,
            config,
            batch,
            weights,
            z_loss=recipe.z_loss,
            chunk=settings.chunk,
            dtype=dtype,
            remat=REMAT[settings.remat],
            rngs=rngs,
            image_axes=BATCH if place.mesh is None else mesh_lib.IMAGE_AXES[place.vision],
        )
        return sums.loss, sums

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        weights = objective.loss_weights(batch.labels, batch.segment_ids, groups)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        slope = jax.grad(micro, has_aux=True)

        def one(number: Any) -> tuple[Params, objective.Sums]:
            part, weight = jax.tree.map(lambda x: x[number], (batch, weights))
            return slope(state.trained, frozen, part, weight, jax.random.fold_in(key, number))

        grads, sums = one(0)
        count = batch.labels.shape[0]
        if count > 1:

            def add(total: Any, number: Any) -> tuple[Any, None]:
                grads, sums = one(number)
                return jax.tree.map(jnp.add, total, (optimizer.full_precision(grads), sums)), None

            first = (optimizer.full_precision(grads), sums)
            (grads, sums), _ = jax.lax.scan(add, first, jnp.arange(1, count))
        norm = optax.tree.norm(optimizer.full_precision(grads))
        trained, moments = optimizer.apply_gradients(adamw, grads, state.optimizer, state.trained)
        metrics = {
            "loss": sums.loss,
            "accuracy": sums.right / jnp.maximum(sums.tokens, 1),
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "supervised": sums.tokens,
            "read": sums.read,
        }
        return state.replace(step=state.step + 1, trained=trained, optimizer=moments), metrics

    outs = None
    if place.mesh is not None:  # as the state came: where XLA lays it out itself, the next step is another program
        outs = (place.shardings(abstract_state(recipe, adamw, place)), NamedSharding(place.mesh, P()))
    return jax.jit(step, donate_argnums=0, out_shardings=outs)


def training_config(config: ChatConfig, recipe: Recipe) -> ChatConfig:
    """The model's configuration with the recipe's stochastic depth."""
    if config.vision is None:
        return config
    return replace(config, vision=replace(config.vision, drop_path_rate=recipe.drop_path))


def assemble(trained: Params, frozen: Params, recipe: Recipe) -> Variables:
    """The model's variables, of what is trained and what is not; adapters are the collection "lora".

    Layers stay stacked on a CPU too, unlike for decoding: a scan copies each layer's weights, which is little beside
    the products of a batch, and its backward pass writes their gradients where they belong. A loop holds slices of all
    layers and their gradients twice, and XLA's CPU backend undoes its rematerialization.
    """
    params = {**frozen, **{name: part for name, part in trained.items() if name != ADAPTERS}}
    return lora.attach(params, trained.get(ADAPTERS, {}), recipe.lora)


# Batches.


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Micro-batches on a leading axis, rows of one length."""
    length = max(batch.input_ids.shape[-1] for batch in batches)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(pad_rows(batch, length) for batch in batches))


def put_batch(batch: Batch, place: Place) -> Batch:
    """Put a stacked batch of this process's rows and images on the devices, as arrays of all processes.

    Args:
        batch: numpy arrays with micro-batches on the leading axis. Image slots that do not divide over this process's
            part of the mesh are filled up with empty ones.
        place: the mesh, or the one device.

    Returns:
        The global batch; its `image_index` counts the visual tokens of all processes.

    Raises:
        MeshError: the rows do not divide over the mesh.
    """
    if place.mesh is None:
        return jax.device_put(batch)
    mesh_lib.validate_mesh(place.config, place.mesh, batch.labels.shape[1] * place.shares)
    where, parts = NamedSharding(place.mesh, P(None, BATCH)), len(place.parts)
    tokens = -(-batch.pixel_values.shape[1] // parts) * place.config.tokens_per_image
    batch = batch.replace(image_index=global_image_index(batch.image_index, place.parts, tokens))

    def put(values: np.ndarray) -> jax.Array:
        values = np.pad(values, [(0, 0), (0, -values.shape[1] % parts), *[(0, 0)] * (values.ndim - 2)])
        shape = (values.shape[0], values.shape[1] * place.shares, *values.shape[2:])
        return jax.make_array_from_process_local_data(where, values, shape)

    return jax.tree.map(put, batch)


# The loop.


def train(
    directory: str | Path,
    config: ChatConfig,
    recipe: Recipe,
    settings: Settings,
    params: Params,
    batches: Batches,
    place: Place,
    *,
    log: Callable[[dict[str, Any]], None] | None = None,
    identity: dict[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    ideal_seconds: Callable[[Batch], float] | None = None,
    profile: Path | None = None,
    from_scratch: bool = False,
    loss: Loss = objective.loss,
) -> Outcome:
    """Train for settings.steps, going on from the last step in `directory` if there is one; save as it goes.

    params: from state.read_params, used up. batches: this process's; set to its saved place when the run goes on.
    log: called with the metrics of every settings.log_every-th step, in process 0; all of them are in metrics.jsonl.
    identity: of the data and the checkpoint, kept with the recipe's in run.json.
    evaluate: called on all processes with state and frozen parameters after every settings.eval_every-th step and the
        last; what it returns goes into metrics.jsonl beside the step, and to `log`.
    ideal_seconds: how long a step of a (stacked) batch takes at the chips' full speed; given, metrics have MFU.
    profile: a directory for a trace of a few steps (PROFILED), which xprof shows. loss: as make_step takes it.
    from_scratch: begin at step 1 although there are saved steps, which are moved aside.
    SIGTERM or Ctrl-C end the step, save and return; a second Ctrl-C interrupts at once.
    Raises RunError where the directory is another run's, cannot be written, or has steps of which none can be restored;
    OutputInUseError where another process trains there; TrainingError where a loss is no number.
    """
    directory = Path(directory)
    adamw = optimizer.make_optimizer(recipe.optimizer, settings.steps, config)
    with claimed(directory):
        begin(directory, facts(recipe, settings, identity))
        step_function = make_step(config, recipe, settings, adamw, place, loss=loss)
        state, frozen = init_state(params, recipe, adamw, place, settings.seed)
        del params
        with Steps(directory, place, keep=settings.keep, from_scratch=from_scratch) as steps, stopping() as asked:
            restored = steps.restore(state)
            if restored is not None:
                state, position = restored
                batches.set_state(position)
            run = _Run(
                directory,
                settings,
                recipe,
                step_function,
                frozen,
                batches,
                place,
                steps,
                log=log,
                evaluate=evaluate,
                ideal_seconds=ideal_seconds,
                profile=profile,
            )
            with jax.set_mesh(place.mesh) if place.mesh is not None else nullcontext():
                state, finished = run.loop(state, asked)
            return Outcome(state, frozen, int(jax.device_get(state.step)), finished)


class _Run:
    """The loop's own state: what is under way, what was measured."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        recipe: Recipe,
        step: StepFunction,
        frozen: Params,
        batches: Batches,
        place: Place,
        steps: Steps,
        *,
        log: Callable[[dict[str, Any]], None] | None,
        evaluate: Evaluate | None,
        ideal_seconds: Callable[[Batch], float] | None,
        profile: Path | None,
    ):
        self.directory, self.settings, self.recipe, self.place = directory, settings, recipe, place
        self.step, self.frozen, self.batches, self.steps, self.log = step, frozen, batches, steps, log
        self.evaluate, self.ideal_seconds, self.profile, self.tracing = evaluate, ideal_seconds, profile, False
        self.under_way: tuple[int, Batch, dict[str, jax.Array], float] | None = None
        self.ended = time.perf_counter()

    def loop(self, state: State, asked: Callable[[], bool]) -> tuple[State, bool]:
        first = int(jax.device_get(state.step))
        for number in range(first, self.settings.steps):
            self.trace(number - first, state)
            began = time.perf_counter()
            batch, stop = self.draw(asked)
            if stop:
                break
            position = self.batches.get_state()
            waited = time.perf_counter() - began
            placed = put_batch(batch, self.place)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, self.frozen, placed)
            self.look()
            self.steps.record()
            self.under_way = (number, batch, metrics, waited)
            if (number + 1) % self.settings.save_every == 0 and number + 1 < self.settings.steps:
                self.look()
                self.steps.save(state, position)
            if (number + 1) % self.settings.eval_every == 0 and number + 1 < self.settings.steps:
                self.held_out(number + 1, state)
        self.look()
        self.trace(PROFILED.stop, state)
        done = int(jax.device_get(state.step))
        finished = done >= self.settings.steps
        if done > first:
            self.steps.save(state, position, wait=True)
            if finished:
                self.held_out(done, state)
        return state, finished

    def draw(self, asked: Callable[[], bool]) -> tuple[Batch | None, bool]:
        """The batch of the next step, or that all processes stop here. Rows have the same length on all of them."""
        stop = asked()
        batch = None if stop else stack_batches([next(self.batches) for _ in range(self.settings.accumulate)])
        if distributed.is_multi_process():
            length = 0 if batch is None else batch.labels.shape[-1]
            told = [int(message) for message in distributed.all_gather(str(length).encode())]
            stop = 0 in told
            if not stop:
                batch = jax.tree.map(lambda *x: np.stack(x), *[pad_rows(b, max(told)) for b in _parts(batch)])
        return batch, stop

    def look(self) -> None:
        """Wait for the step that is under way, and see what came of it."""
        if self.under_way is None:
            return
        number, batch, metrics, waited = self.under_way
        self.under_way = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingError(self.broken(number, batch, values))
        now = time.perf_counter()
        seconds, self.ended = now - self.ended, now
        images = int(np.any(batch.pixel_values, axis=(2, 3, 4)).sum()) * self.place.shares
        entry = {
            "step": number + 1,
            **values,
            "seconds": seconds,
            "data_wait": waited,
            "tokens_per_second": values["read"] / seconds,
            "images_per_second": images / seconds,
            "memory_gib": memory_bytes() / 2**30,
            "compiles": self.step._cache_size(),  # type: ignore[attr-defined]
        }
        if self.ideal_seconds is not None:
            entry["mfu"] = self.ideal_seconds(batch) / seconds
        self.write(entry, (number + 1) % self.settings.log_every == 0 or number == 0)

    def held_out(self, step: int, state: State) -> None:
        """Evaluate, on all processes; the time that it takes is no step's."""
        if self.evaluate is None:
            return
        self.look()
        self.write({"step": step, **self.evaluate(state, self.frozen)}, True)
        self.ended = time.perf_counter()

    def write(self, entry: dict[str, Any], told: bool) -> None:
        if not distributed.is_process_0():
            return
        files.append_text(self.directory / "metrics.jsonl", json.dumps(entry) + "\n", sync=False)
        if self.log is not None and told:
            self.log(entry)

    def trace(self, number: int, state: State) -> None:
        """Begin or end the profile before the step of that number, counted from where this call of `train` began."""
        if self.profile is None or number not in (PROFILED.start, PROFILED.stop):
            return
        jax.block_until_ready(state)
        if number == PROFILED.start:
            jax.profiler.start_trace(str(self.profile))
            self.tracing = True
        elif self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def broken(self, number: int, batch: Batch, values: dict[str, float]) -> str:
        """Keep the batch that broke the run; the message that says so."""
        path = self.directory / f"bad_batch_step_{number + 1}_process_{jax.process_index()}.npz"
        names = ("input_ids", "labels", "segment_ids", "positions", "pixel_values")
        kept = f"Its batch is in {path}"
        try:
            np.savez(path, **{name: getattr(batch, name) for name in names})
        except OSError as error:  # a full disk must not hide what happened
            kept = f"Its batch could not be written to {path} ({error})"
        latest = self.steps.latest()
        saved = f"The last saved step is {latest}" if latest is not None else "No step was saved"
        return (
            f"step {number + 1}: the loss is {values['loss']}, the gradient's norm {values['grad_norm']}. {kept}. "
            f"{saved}; a lower learning rate, or float32, may help"
        )


def _parts(batch: Batch) -> list[Batch]:
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch.labels.shape[0])]


def facts(recipe: Recipe, settings: Settings, identity: dict[str, Any] | None) -> dict[str, Any]:
    """What run.json says: what must stay the same when a run goes on."""
    return {"recipe": asdict(recipe), **settings.identity(), **(identity or {})}


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and Ctrl-C into a question that the loop asks between steps. In the main thread; else never True."""
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_bytes() -> int:
    """The most memory used so far: of this process's fullest device, or of the process where devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

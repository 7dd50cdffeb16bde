"""The training loop: runs the compiled step on any legal mesh, saves, and resumes from any saved step.

The loop runs one step ahead of the metrics that it has read: the device computes a step while the host handles the
metrics of the previous one. A loss or gradient norm that is NaN or Inf ends the run before anything is saved, and the
batch that caused it is written to disk.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from internvl_jax.data.batch import Batch, pad_rows
from internvl_jax.models.layers import Params
from internvl_jax.parallel import distributed
from internvl_jax.training.context import TrainContext
from internvl_jax.training.initialization import init_state
from internvl_jax.training.saving import RunError, Steps, claimed, make_run_directory
from internvl_jax.training.state import State
from internvl_jax.training.step import StepFunction, make_step, put_batch, stack_batches, unstack_batches
from internvl_jax.utils import files

PROFILED = range(3, 6)  # steps of a profile: compiled, and with the step before still running

Evaluate = Callable[[State, Params], dict[str, float]]


class TrainingError(RunError):
    """A run whose loss or gradients are NaN or Inf. The message names the step and the file with its batch."""


class Batches(Protocol):
    """An endless iterator over this process's batches, whose position can be saved, such as grain's iterators."""

    def __next__(self) -> Batch:
        """Return the next batch."""

    def get_state(self) -> Any:
        """Return the position."""

    def set_state(self, state: Any) -> None:
        """Go to a position of `get_state`."""


@dataclass(frozen=True)
class TrainHooks:
    """Callbacks of a run, and its profile.

    Attributes:
        log: Called in process 0 with the metrics of every `TrainSettings.log_every`-th step. All metrics are in
            metrics.jsonl.
        evaluate: Called on all processes with state and frozen parameters after every `TrainSettings.eval_every`-th
            step and the last one. Its result goes to metrics.jsonl and to `log`.
        ideal_seconds: Returns the seconds that a step of a stacked batch takes at the chips' peak FLOP/s. If given,
            metrics contain MFU.
        profile: Directory for a trace of the steps PROFILED, for xprof.
    """

    log: Callable[[dict[str, Any]], None] | None = None
    evaluate: Evaluate | None = None
    ideal_seconds: Callable[[Batch], float] | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        state: The last state.
        frozen: Frozen parameters.
        step: Number of finished steps.
        finished: Whether all steps are done. Otherwise the run was stopped by a signal, and saved.
    """

    state: State
    frozen: Params
    step: int
    finished: bool


def train(
    directory: str | Path,
    context: TrainContext,
    params: Params,
    batches: Batches,
    *,
    hooks: TrainHooks | None = None,
    identity: dict[str, Any] | None = None,
    from_scratch: bool = False,
) -> Outcome:
    """Train for `context.settings.steps` steps, and save. Resumes from the last step in `directory`, if there is one.

    SIGTERM or Ctrl-C finish the current step, save it and return; a second Ctrl-C interrupts at once.

    Args:
        directory: Directory of the run.
        context: What the training step is made of.
        params: Parameters of `read_params`; must not be used afterwards.
        batches: This process's batches. A resumed run sets their position.
        hooks: Callbacks of the run, and its profile.
        identity: Identity of data and checkpoint, saved with the recipe in run.json.
        from_scratch: Start at step 1 although there are saved steps, which are moved aside.

    Raises:
        RunError: The directory belongs to another run, cannot be written, or has steps of which none can be restored.
        OutputInUseError: Another process trains in the directory.
        TrainingError: A loss or gradient norm is NaN or Inf.
    """
    directory, hooks = Path(directory), hooks or TrainHooks()
    placement = context.placement
    with claimed(directory):
        make_run_directory(directory, run_facts(context, identity))
        step_function = make_step(context)
        state, frozen = init_state(params, context)
        del params
        keep = context.settings.keep
        with Steps(directory, placement, keep=keep, from_scratch=from_scratch) as steps, stop_requests() as requested:
            restored = steps.restore(state)
            if restored is not None:
                state, position = restored
                batches.set_state(position)
            loop = TrainLoop(directory, context, step_function, frozen, batches, steps, hooks)
            with jax.set_mesh(placement.mesh) if placement.mesh is not None else nullcontext():
                state, finished = loop.run(state, requested)
            return Outcome(state, frozen, int(jax.device_get(state.step)), finished)


@dataclass(frozen=True)
class RunningStep:
    """A step whose metrics have not been read yet.

    Attributes:
        index: Number of steps before it.
        batch: Its stacked batch, on the host.
        metrics: Metrics on the device.
        data_wait: Seconds that the loop waited for the batch.
    """

    index: int
    batch: Batch
    metrics: dict[str, jax.Array]
    data_wait: float


class TrainLoop:
    """The loop over steps, with the step that is running and the time when the one before was finished."""

    def __init__(
        self,
        directory: Path,
        context: TrainContext,
        step: StepFunction,
        frozen: Params,
        batches: Batches,
        steps: Steps,
        hooks: TrainHooks,
    ):
        """Make a loop. Its arguments are as in `train`; `steps` are the saved ones."""
        self.directory, self.context, self.settings = directory, context, context.settings
        self.step, self.frozen, self.batches, self.steps, self.hooks = step, frozen, batches, steps, hooks
        self.tracing = False
        self.running: RunningStep | None = None
        self.last_finished = time.perf_counter()

    def run(self, state: State, stop_requested: Callable[[], bool]) -> tuple[State, bool]:
        """Run the steps from `state` on. Returns the last state, and whether all steps are done."""
        settings = self.settings
        first = int(jax.device_get(state.step))
        position = None
        for index in range(first, settings.steps):
            self.trace(index - first, state)
            started = time.perf_counter()
            batch = self.next_batch(stop_requested)
            if batch is None:
                break
            position = self.batches.get_state()
            data_wait = time.perf_counter() - started
            placed = put_batch(batch, self.context.placement)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, self.frozen, placed)
            self.finish_step()
            self.steps.record()
            self.running = RunningStep(index, batch, metrics, data_wait)
            is_last = index + 1 == settings.steps
            if (index + 1) % settings.save_every == 0 and not is_last:
                self.finish_step()  # a state with NaN must never be saved
                self.steps.save(state, position)
            if (index + 1) % settings.eval_every == 0 and not is_last:
                self.evaluate(index + 1, state)
        self.finish_step()
        self.trace(PROFILED.stop, state)
        done = int(jax.device_get(state.step))
        finished = done >= settings.steps
        if done > first:
            self.steps.save(state, position, wait=True)
            if finished:
                self.evaluate(done, state)
        return state, finished

    def next_batch(self, stop_requested: Callable[[], bool]) -> Batch | None:
        """Return the stacked batch of the next step, with rows of one length on all processes. None: all stop here."""
        batch = None
        if not stop_requested():
            batch = stack_batches([next(self.batches) for _ in range(self.settings.gradient_accumulation_steps)])
        if not distributed.is_multi_process():
            return batch
        length = 0 if batch is None else batch.labels.shape[-1]
        lengths = [int(message) for message in distributed.all_gather(str(length).encode())]
        if batch is None or 0 in lengths:
            return None
        return stack_batches([pad_rows(part, max(lengths)) for part in unstack_batches(batch)])

    def finish_step(self) -> None:
        """Wait for the running step, check its loss and write its metrics."""
        if self.running is None:
            return
        step, self.running = self.running, None
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise TrainingError(self.dump_bad_batch(step, values))
        now = time.perf_counter()
        seconds, self.last_finished = now - self.last_finished, now
        num_images = int(np.any(step.batch.pixel_values, axis=(2, 3, 4)).sum()) * self.context.placement.num_data_shards
        entry = {
            "step": step.index + 1,
            **values,
            "seconds": seconds,
            "data_wait": step.data_wait,
            "tokens_per_second": values["read"] / seconds,
            "images_per_second": num_images / seconds,
            "memory_gib": peak_memory_bytes() / 2**30,
            "compiles": self.step._cache_size(),  # type: ignore[attr-defined]
        }
        if self.hooks.ideal_seconds is not None:
            entry["mfu"] = self.hooks.ideal_seconds(step.batch) / seconds
        self.write(entry, reported=(step.index + 1) % self.settings.log_every == 0 or step.index == 0)

    def evaluate(self, step: int, state: State) -> None:
        """Evaluate on all processes. The time that it takes does not count as a step's."""
        if self.hooks.evaluate is None:
            return
        self.finish_step()
        self.write({"step": step, **self.hooks.evaluate(state, self.frozen)}, reported=True)
        self.last_finished = time.perf_counter()

    def write(self, entry: dict[str, Any], *, reported: bool) -> None:
        """Append to metrics.jsonl; also call the log hook if the entry is to be reported."""
        if not distributed.is_process_0():
            return
        files.append_text(self.directory / "metrics.jsonl", json.dumps(entry) + "\n", sync=False)
        if self.hooks.log is not None and reported:
            self.hooks.log(entry)

    def trace(self, steps_done: int, state: State) -> None:
        """Start or stop the profile. steps_done: steps since this call of `train` started."""
        if self.hooks.profile is None or steps_done not in (PROFILED.start, PROFILED.stop):
            return
        jax.block_until_ready(state)
        if steps_done == PROFILED.start:
            jax.profiler.start_trace(str(self.hooks.profile))
            self.tracing = True
        elif self.tracing:
            jax.profiler.stop_trace()
            self.tracing = False

    def dump_bad_batch(self, step: RunningStep, values: dict[str, float]) -> str:
        """Write the batch of a step whose loss or gradient norm is NaN or Inf. Returns the error message."""
        number = step.index + 1
        path = self.directory / f"bad_batch_step_{number}_process_{jax.process_index()}.npz"
        names = ("input_ids", "labels", "segment_ids", "positions", "pixel_values")
        where = f"Its batch is in {path}"
        try:
            np.savez(path, **{name: getattr(step.batch, name) for name in names})
        except OSError as error:  # a full disk must not hide what happened
            where = f"Its batch could not be written to {path} ({error})"
        latest = self.steps.latest()
        saved = f"The last saved step is {latest}" if latest is not None else "No step was saved"
        return (
            f"step {number}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}. {where}. {saved}; "
            "a lower learning rate or float32 may help"
        )


def run_facts(context: TrainContext, identity: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of run.json: what must stay the same when a run is resumed."""
    return {"recipe": asdict(context.recipe), **context.settings.identity(), **(identity or {})}


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and Ctrl-C. Yields a function that says whether a signal has come; the loop asks between steps.

    Signals are caught in the main thread only; in others, the function is always False. A second Ctrl-C raises
    KeyboardInterrupt.
    """
    requested = False

    def handle(number: int, _: Any) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        previous = {}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def peak_memory_bytes() -> int:
    """Return the peak memory of this process's fullest device, or of the process if its devices do not report any."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

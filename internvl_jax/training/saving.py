"""A run's directory, and its saved steps, from which it can be resumed however it ended.

    DIRECTORY/run.json          identity of the run: recipe and settings; another run is refused
    DIRECTORY/steps/1200/       Orbax: State in true shapes, data position of every data shard, checksums
    DIRECTORY/steps/damaged-N   a step with damaged content; the one before it was used
    DIRECTORY/steps-before/     steps of before --from-scratch
    DIRECTORY/saved.json        last complete step: a run whose steps have vanished does not restart by itself

Steps are written in the background, and get their final name when they are complete.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax.checkpoint import check_path
from internvl_jax.parallel import distributed
from internvl_jax.training.damage import DATA, STATE, find_damage
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.state import State
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

RUN, STEPS, MODEL, SAVED = "run.json", "steps", "model", "saved.json"
DAMAGED = "damaged-"

# Names of settings in run.json as earlier versions wrote them, and as they are now.
RENAMED_SETTINGS = {
    "accumulate": "gradient_accumulation_steps",
    "recipe.rows": "recipe.global_batch_size",
    "recipe.length": "recipe.max_seq_length",
    "recipe.mean": "recipe.loss_mean",
    "recipe.optimizer.clip": "recipe.optimizer.max_grad_norm",
}


class RunError(ValueError):
    """A run that cannot start, resume or be saved. The message says why and what to do."""


class Steps:
    """The saved steps of a run. A context manager: leaving it waits for steps that are still being written.

    Attributes:
        directory: Directory of the steps.
        pending_record: A step that is to be written to saved.json when it is complete.
    """

    def __init__(self, directory: str | Path, placement: MeshPlacement, *, keep: int = 3, from_scratch: bool = False):
        """Open the saved steps.

        Args:
            directory: Directory of the run.
            placement: Placement of the run.
            keep: Number of steps to keep.
            from_scratch: Move existing steps aside, so that nothing is restored.

        Raises:
            RunError: A file or a dangling link is where the steps should be.
        """
        self.directory = Path(directory).resolve() / STEPS
        self._placement = placement
        self._keep = keep
        self.pending_record: int | None = None
        self._prepare_directory(from_scratch)
        self._manager = self._open()

    def _prepare_directory(self, from_scratch: bool) -> None:
        with distributed.process_0_first() as first:
            if first:
                if from_scratch and self.directory.is_dir() and any(self.directory.iterdir()):
                    aside = _unused(self.directory.with_name(f"{STEPS}-before"))
                    self.directory.rename(aside)
                    logger.warning("training starts at step 1; what was saved before is in %s", aside)
                if from_scratch:
                    self._record.unlink(missing_ok=True)
                try:
                    self.directory.mkdir(parents=True, exist_ok=True)
                except FileExistsError:
                    where = f"a link to {os.readlink(self.directory)}" if self.directory.is_symlink() else "a file"
                    raise RunError(
                        f"{self.directory} is {where}, where nothing can be saved: make that a directory, or remove it"
                    ) from None
                for path in self.directory.glob("*orbax-checkpoint-tmp*"):  # Orbax removes them
                    logger.warning("removing %s, which an interrupted process left", path)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.directory, options=options)

    @property
    def _record(self) -> Path:
        return self.directory.with_name(SAVED)

    def record(self) -> None:
        """Write saved.json, as soon as the last step is complete. Cheap if there is nothing to write.

        From it, a later command knows of steps that have vanished.
        """
        step = self.pending_record
        if step is None or not distributed.is_process_0() or not (self.directory / str(step)).is_dir():
            return
        self.pending_record = None
        with suppress(OSError):  # a full disk; the step itself is saved
            files.write_text(self._record, json.dumps({"step": step}) + "\n")

    def latest(self) -> int | None:
        """Return the last complete step, after waiting for the one that is being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, state: State, data: Any, *, wait: bool = False) -> None:
        """Save a step in the background. A step that is saved already is left as it is.

        Args:
            state: The state, on the mesh.
            data: Position in the data, of the iterator's `get_state`.
            wait: Wait until it is written.

        Raises:
            RunError: This step or the one before could not be written, for example on a full disk. Earlier steps are
                still there.
        """
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        messages = distributed.all_gather(json.dumps([self._placement.data_shard, _encode(data)]).encode())
        by_shard = dict(json.loads(message) for message in messages)  # processes of one shard have the same position
        positions = [by_shard[shard] for shard in sorted(by_shard)]
        true = self._placement.unpad_state(state)
        data = {"processes": positions, "crc32": _crc32(positions), "checksums": self._placement.checksums(true)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(true), DATA: ocp.args.JsonSave(data)}),
            )
            self.pending_record = step
            if wait:
                self._manager.wait_until_finished()
                self.record()
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(self._write_error(step, error)) from error

    def _write_error(self, step: int, error: Exception) -> str:
        with suppress(OSError, ValueError, RuntimeError):
            self._manager.wait_until_finished()  # the step before may still be being written
        good = [name for path in self.directory.iterdir() if (name := path.name).isdigit() and int(name) != step]
        last = f"step {max(map(int, good))} is the last good one" if good else "there is no earlier step"
        full = re.search(r"No space left|[Qq]uota|File too large", str(error))
        return (
            f"step {step} could not be written to {self.directory} ({error}); {last}: "
            f"{'make room' if full else 'fix the cause'} and start again"
        )

    def restore(self, like: State) -> tuple[State, Any] | None:
        """Restore the last step that is not damaged.

        A damaged step is skipped, and set aside once an earlier one is restored.

        Args:
            like: A state with the shapes, dtypes and shardings of the one to restore.

        Returns:
            The state and this process's position in the data, or None if the run has no steps.

        Raises:
            RunError: A step could not be read although its content is not known to be damaged, or all steps are
                damaged. All steps are left as they were.
        """
        abstract = self._placement.abstract_state(like)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = self._read(step, abstract)
            if isinstance(found, str):
                damaged[step] = found
                continue
            restored = self._resume_from(step, found)
            self._set_aside(damaged)
            self.pending_record = step
            self.record()
            return restored
        with distributed.barrier():
            self._check_never_saved(damaged)
        return None

    def _read(self, step: int, abstract: State) -> Any:
        """Return a step as Orbax restores it, in true shapes, or what is damaged as text. Raises RunError otherwise."""
        error: Exception | None = None
        found: Any = None
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract), DATA: ocp.args.JsonRestore()}),
            )
        except Exception as caught:  # Orbax and TensorStore raise anything, for any reason
            error = caught
        answers = distributed.all_gather(json.dumps([_describe(error), _is_external(error)]).encode() if error else b"")
        problems = [json.loads(answer) for answer in answers if answer]
        if not problems:
            return _find_changes(found, self._placement) or found
        text = next((text for text, external in problems if external), problems[0][0])
        damage = None
        if not any(external for _, external in problems):
            with distributed.process_0_first() as first:
                result: list[Any] = self._examine(step) if first else []
            damage, failure = json.loads(distributed.broadcast_from_process_0(json.dumps(result).encode()))
            text = failure or text
        if damage is None:
            raise RunError(
                f"step {step} in {self.directory} could not be restored ({text}); its content is not known to be "
                "damaged, so every step is left as it was. Fix the cause and start again, or start at step 1 with "
                "--from-scratch"
            )
        return damage

    def _examine(self, step: int) -> list[str | None]:
        """Return what is damaged, or None, and the error that prevented finding out, or None."""
        try:
            return [find_damage(self.directory / str(step)), None]
        except Exception as error:
            return [None, _describe(error)]

    def _check_never_saved(self, damaged: dict[int, str]) -> None:
        """Raise RunError if the run has saved steps, all of which are damaged or gone."""
        for name in sorted(path.name for path in self.directory.iterdir()):
            if name.isdigit() or name.startswith(DAMAGED):
                damaged = damaged or {int(re.sub(r"\D.*", "", name.removeprefix(DAMAGED)) or -1): "set aside before"}
        if damaged:
            listed = "; ".join(f"step {step}: {text}" for step, text in sorted(damaged.items(), reverse=True))
            raise RunError(
                f"all saved steps in {self.directory} are damaged ({listed}); they are left as they were. "
                "--from-scratch starts at step 1"
            )
        if os.path.lexists(self._record):
            raise RunError(
                f"{self.directory} has no steps, but {self._record} says that the run had saved some: put them back "
                "(is a disk not mounted?), or start at step 1 with --from-scratch"
            )

    def _resume_from(self, step: int, found: Any) -> tuple[State, Any]:
        positions = found[DATA]["processes"]
        if len(positions) != self._placement.num_data_shards:
            raise RunError(
                f"{self.directory / str(step)} was written by {len(positions)} processes, now there are "
                f"{self._placement.num_data_shards}: each has its own position in the data, so start as many as before"
            )
        return self._placement.pad_state(found[STATE]), _decode(positions[self._placement.data_shard])

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        self._manager.close()
        with distributed.process_0_first() as first:
            for step, problem in damaged.items() if first else ():
                aside = _unused(self.directory / f"{DAMAGED}{step}")
                (self.directory / str(step)).rename(aside)
                logger.warning("step %s is damaged (%s); moved to %s", step, problem, aside)
        self._manager = self._open()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._manager.wait_until_finished()
            self.record()
        except (OSError, ValueError, RuntimeError) as error:
            if kind is None:
                raise RunError(self._write_error(-1, error).replace("step -1", "the last step")) from error
        self._manager.close()


def is_existing_run(directory: str | Path, facts: dict[str, Any]) -> bool:
    """Return whether a directory has this run, or False if a new run can use it.

    Args:
        directory: Directory of the run, which need not exist.
        facts: What run.json of this run says.

    Raises:
        RunError: The directory has another run, and the message lists the settings that differ; or something else.
    """
    check_path(directory)  # Orbax writes the steps through TensorStore
    path = Path(directory) / RUN
    if not os.path.lexists(path):
        # files.claim puts its lock inside the directory if it cannot be beside it, for example on a mounted disk.
        if path.parent.exists() and (
            not path.parent.is_dir() or any(not entry.name.startswith(".lock") for entry in path.parent.iterdir())
        ):
            raise RunError(f"{directory} is not empty and holds no {RUN}: choose another directory for the run")
        return False
    before, now = flatten_facts(files.read_json(path)), flatten_facts(json.loads(json.dumps(facts)))
    different = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if different:
        raise RunError(
            f"{directory} belongs to another run: "
            + "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in different)
            + ". Resume with its settings, or choose another directory"
        )
    return True


def flatten_facts(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full names, "recipe.optimizer.learning_rate", with today's names."""
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten_facts(value, f"{name}.") if isinstance(value, dict) else {RENAMED_SETTINGS.get(name, name): value}
        )
    return flat


def make_run_directory(directory: str | Path, facts: dict[str, Any]) -> bool:
    """Make a run's directory with run.json, or check that it has this run. Returns whether it existed.

    Raises:
        RunError: See `is_existing_run`.
    """
    path = Path(directory) / RUN
    with distributed.barrier():
        exists = is_existing_run(directory, facts)
    with distributed.process_0_first() as first:
        if first and not exists:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(facts, indent=2) + "\n")
    return exists


_claimed: set[Path] = set()


@contextmanager
def claimed(directory: str | Path) -> Iterator[None]:
    """Lock a run's directory for one run; process 0 does so for all of its processes.

    Within another claim of the same directory it does nothing. Temporary files of a killed process are removed.

    Raises:
        OutputInUseError: Another run has the lock; the message says which process. DistributedError on other
            processes.
    """
    directory = Path(directory).expanduser().resolve()
    if directory in _claimed:
        yield
        return
    with ExitStack() as stack:
        with distributed.barrier():
            if distributed.is_process_0():
                stack.enter_context(files.claim(directory))
                for name in (RUN, MODEL):
                    files.remove_leftovers(directory / name)
        _claimed.add(directory)
        stack.callback(_claimed.remove, directory)
        yield


def _describe(error: Exception) -> str:
    """Return the first line of an error with information; Orbax wraps TensorStore's errors."""
    while type(error) is Exception and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = re.split(r" ?\[(?:source|tensorstore_spec)", str(error))[0].strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_external(error: Exception | None) -> bool:
    """Return whether the cause of an error is outside the files, so that reading them would prove nothing."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, ImportError))


def _find_changes(found: Any, placement: MeshPlacement) -> str | None:
    """Return what differs from what was saved, by its checksums, or None. Steps of earlier versions have none."""
    data = found[DATA]
    if data.get("crc32", _crc32(data["processes"])) != _crc32(data["processes"]):
        return f"{DATA}: the checksum differs from the saved one"
    before = data.get("checksums")
    now = {} if before is None else placement.checksums(found[STATE])
    different = [name for name in now if now[name] != before.get(name, now[name])]
    return f"{', '.join(different[:3])}: checksums differ from the saved ones" if different else None


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _unused(path: Path) -> Path:
    """Return `path`, with a number appended if it exists."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not os.path.lexists(candidate))


def _encode(data: Any) -> dict[str, Any]:
    """Return a data iterator's state for JSON; grain's are dictionaries or bytes."""
    return {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"value": data}


def _decode(entry: dict[str, Any]) -> Any:
    return base64.b64decode(entry["bytes"]) if "bytes" in entry else entry["value"]

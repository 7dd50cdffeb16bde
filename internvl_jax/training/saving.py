"""A run on disk: steps from which it can be resumed, however it ended.

    DIRECTORY/run.json          what the run is: its recipe and settings; another run cannot go on here
    DIRECTORY/steps/1200/       Orbax's: the State in true shapes, the place in the data of every share, checksums
    DIRECTORY/steps/damaged-N   a step whose content is damaged; the one before it was used
    DIRECTORY/steps-before/     what was saved before a run was told to begin at step 1 again
    DIRECTORY/saved.json        the last step that was whole: a run whose steps are gone does not begin anew by itself

Steps are written while training goes on, and have their names only when they are whole.
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
from internvl_jax.training.state import Place, State
from internvl_jax.utils import files

logger = logging.getLogger(__name__)

RUN, STEPS, MODEL, SAVED = "run.json", "steps", "model", "saved.json"
ASIDE = "damaged-"


class RunError(ValueError):
    """A run that cannot begin, go on or be saved; the message says why and what to do."""


class Steps:
    """The saved steps of a run. A context manager: leaving it waits for what is still being written."""

    def __init__(self, directory: str | Path, place: Place, *, keep: int = 3, from_scratch: bool = False):
        """from_scratch: what was saved before is moved aside, and nothing is restored."""
        self.directory = Path(directory).resolve() / STEPS
        self._place = place
        self._keep = keep
        self._unrecorded: int | None = None
        with distributed.process_0_first() as first:
            if first:
                if from_scratch and self.directory.is_dir() and any(self.directory.iterdir()):
                    aside = _unused(self.directory.with_name(f"{STEPS}-before"))
                    self.directory.rename(aside)
                    logger.warning("training begins at step 1; what was saved before is in %s", aside)
                if from_scratch:
                    self._record.unlink(missing_ok=True)
                try:
                    self.directory.mkdir(parents=True, exist_ok=True)
                except FileExistsError:
                    where = f"a link to {os.readlink(self.directory)}" if self.directory.is_symlink() else "a file"
                    raise RunError(
                        f"{self.directory} is {where}, where nothing can be saved: make that a directory, or remove it"
                    ) from None
                for path in self.directory.glob("*orbax-checkpoint-tmp*"):  # Orbax removes it
                    logger.warning("removing %s, which an interrupted process left", path)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.directory, options=options)

    @property
    def _record(self) -> Path:
        return self.directory.with_name(SAVED)

    def record(self) -> None:
        """Write down, beside the steps, that one was saved, as soon as the last one is whole. Cheap when none is due.

        It is what a later command knows of steps that are no longer there.
        """
        step = self._unrecorded
        if step is None or not distributed.is_process_0() or not (self.directory / str(step)).is_dir():
            return
        self._unrecorded = None
        with suppress(OSError):  # a full disk: the step itself is there
            files.write_text(self._record, json.dumps({"step": step}) + "\n")

    def latest(self) -> int | None:
        """The last whole step, what is still being written included."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def save(self, state: State, data: Any, *, wait: bool = False) -> None:
        """Write a step in the background. data: what the data iterator's get_state gave.

        Raises RunError where an earlier one could not be written (a full disk): the last good step is still there.
        """
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        told = distributed.all_gather(json.dumps([self._place.share, _encode(data)]).encode())
        shares = dict(json.loads(message) for message in told)  # processes of one share are at one place
        places = [shares[number] for number in sorted(shares)]
        true = self._place.resized(state, self._place.unpad, storage=True)
        data = {"processes": places, "crc32": _crc32(places), "checksums": self._place.checksums(true)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(true), DATA: ocp.args.JsonSave(data)}),
            )
            self._unrecorded = step
            if wait:
                self._manager.wait_until_finished()
                self.record()
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(self._failed(step, error)) from error

    def _failed(self, step: int, error: Exception) -> str:
        with suppress(OSError, ValueError, RuntimeError):
            self._manager.wait_until_finished()  # the one before may still be on its way
        good = [name for path in self.directory.iterdir() if (name := path.name).isdigit() and int(name) != step]
        last = f"step {max(map(int, good))} is the last good one" if good else "there is no earlier step"
        full = re.search(r"No space left|[Qq]uota|File too large", str(error))
        return (
            f"step {step} could not be written to {self.directory} ({error}); {last}: "
            f"{'make room' if full else 'mend that'} and start again"
        )

    def restore(self, like: State) -> tuple[State, Any] | None:
        """The last step that is whole, as a State laid out like `like`, and this process's place in the data.

        A step whose content is damaged is passed over, and set aside once an earlier one is restored. None where the
        run has no steps.

        Raises:
            RunError: a step could not be read although its content is not known to be damaged, or no step is whole.
                All steps are left as they were.
        """
        abstract = self._place.abstract(like)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = self._read(step, abstract)
            if isinstance(found, str):
                damaged[step] = found
                continue
            restored = self._continued(step, found)
            self._set_aside(damaged)
            self._unrecorded = step
            self.record()
            return restored
        with distributed.barrier():
            self._check_never_saved(damaged)
        return None

    def _read(self, step: int, abstract: State) -> Any:
        """A step as Orbax restores it, in true shapes; or what is damaged, as text. Raises RunError otherwise."""
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
            return _altered(found, self._place) or found
        text = next((text for text, external in problems if external), problems[0][0])
        damage = None
        if not any(external for _, external in problems):
            with distributed.process_0_first() as first:
                verdict: list[Any] = self._examined(step) if first else []
            damage, unread = json.loads(distributed.broadcast_from_process_0(json.dumps(verdict).encode()))
            text = unread or text
        if damage is None:
            raise RunError(
                f"step {step} in {self.directory} could not be restored ({text}); its content is not known to be "
                "damaged, so every step is left as it was. Mend the cause and start again, or begin at step 1 with "
                "--from-scratch"
            )
        return damage

    def _examined(self, step: int) -> list[str | None]:
        """What is damaged, if anything, and what came in the way of finding out."""
        try:
            return [find_damage(self.directory / str(step)), None]
        except Exception as error:
            return [None, _describe(error)]

    def _check_never_saved(self, damaged: dict[int, str]) -> None:
        """Raise RunError where the run has saved steps, of which none is whole."""
        for name in sorted(path.name for path in self.directory.iterdir()):
            if name.isdigit() or name.startswith(ASIDE):
                damaged = damaged or {int(re.sub(r"\D.*", "", name.removeprefix(ASIDE)) or -1): "set aside before"}
        if damaged:
            said = "; ".join(f"step {step}: {text}" for step, text in sorted(damaged.items(), reverse=True))
            raise RunError(
                f"no saved step in {self.directory} is whole ({said}); they are left as they were. "
                "--from-scratch begins at step 1"
            )
        if os.path.lexists(self._record):
            raise RunError(
                f"{self.directory} has no steps, but {self._record} says that the run had saved some: put them back "
                "(is a disk not mounted?), or begin at step 1 with --from-scratch"
            )

    def _continued(self, step: int, found: Any) -> tuple[State, Any]:
        places = found[DATA]["processes"]
        if len(places) != self._place.shares:
            raise RunError(
                f"{self.directory / str(step)} was written by {len(places)} processes, now there are "
                f"{self._place.shares}: each has its own place in the data, so start as many as before"
            )
        state = self._place.resized(found[STATE], self._place.pad, storage=False)
        return state, _decode(places[self._place.share])

    def _set_aside(self, damaged: dict[int, str]) -> None:
        if not damaged:
            return
        self._manager.close()
        with distributed.process_0_first() as first:
            for step, problem in damaged.items() if first else ():
                aside = _unused(self.directory / f"{ASIDE}{step}")
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
                raise RunError(self._failed(-1, error).replace("step -1", "the last step")) from error
        self._manager.close()


def is_there(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a directory is this run's already; False where it is free for it.

    Raises RunError that lists the settings that differ, and for a directory that holds something else.
    """
    check_path(directory)  # Orbax writes the steps through TensorStore
    path = Path(directory) / RUN
    if not os.path.lexists(path):
        # files.claim puts its lock inside where it cannot be beside: a mounted disk.
        if path.parent.exists() and (
            not path.parent.is_dir() or any(not one.name.startswith(".lock") for one in path.parent.iterdir())
        ):
            raise RunError(f"{directory} is not empty and holds no {RUN}: choose another directory for the run")
        return False
    before, settings = _flat(files.read_json(path)), _flat(json.loads(json.dumps(settings)))
    different = [name for name in sorted(before | settings) if before.get(name) != settings.get(name)]
    if different:
        raise RunError(
            f"{directory} is another run's: "
            + "; ".join(f"{n} was {before.get(n)!r}, is {settings.get(n)!r}" for n in different)
            + ". Go on with its settings, or choose another directory"
        )
    return True


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole name, "recipe.optimizer.learning_rate"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def begin(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Make a run's directory, or see that it is this run's. Returns whether it was there already.

    Raises RunError as `is_there` does.
    """
    path = Path(directory) / RUN
    with distributed.barrier():
        there = is_there(directory, settings)
    with distributed.process_0_first() as first:
        if first and not there:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(settings, indent=2) + "\n")
    return there


_held: set[Path] = set()


@contextmanager
def claimed(directory: str | Path) -> Iterator[None]:
    """Hold a run's directory, for one run alone: process 0 does so for all of its processes.

    Within another claim of the same directory it does nothing. What a killed process left there is removed.

    Raises:
        OutputInUseError: another run holds it; the message says which process. DistributedError on other processes.
    """
    directory = Path(directory).expanduser().resolve()
    if directory in _held:
        yield
        return
    with ExitStack() as stack:
        with distributed.barrier():
            if distributed.is_process_0():
                stack.enter_context(files.claim(directory))
                for name in (RUN, MODEL):
                    files.remove_leftovers(directory / name)
        _held.add(directory)
        stack.callback(_held.remove, directory)
        yield


def _describe(error: Exception) -> str:
    """The first line of an error that says something; TensorStore's stands behind Orbax's own."""
    while type(error) is Exception and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = re.split(r" ?\[(?:source|tensorstore_spec)", str(error))[0].strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_external(error: Exception | None) -> bool:
    """Whether an error has a cause outside of the files, so that looking at them would say nothing."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return isinstance(error, (MemoryError, ImportError))


def _altered(found: Any, place: Place) -> str | None:
    """What differs from what was saved, by its checksums; steps of before there were any have none."""
    data = found[DATA]
    if data.get("crc32", _crc32(data["processes"])) != _crc32(data["processes"]):
        return f"{DATA}: another checksum than when it was saved"
    before = data.get("checksums")
    now = {} if before is None else place.checksums(found[STATE])
    different = [name for name in now if now[name] != before.get(name, now[name])]
    return f"{', '.join(different[:3])}: other checksums than when they were saved" if different else None


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _unused(path: Path) -> Path:
    """`path`, or with a number behind it where there is something already."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(one for one in chain([path], numbered) if not os.path.lexists(one))


def _encode(data: Any) -> dict[str, Any]:
    """A data iterator's state for JSON; grain's are dictionaries, or bytes."""
    return {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"value": data}


def _decode(entry: dict[str, Any]) -> Any:
    return base64.b64decode(entry["bytes"]) if "bytes" in entry else entry["value"]

"""A run on disk: steps that can be gone on from, however the run ended.

    DIRECTORY/run.json          what the run is: its recipe and settings; another run cannot go on here
    DIRECTORY/steps/1200/       Orbax's: the State in true shapes, and the place in the data of every share
    DIRECTORY/steps/damaged-N   a step that could not be read; the one before it was used

Steps are written while training goes on, and have their names only when they are whole.
"""

from __future__ import annotations

import base64
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax import distributed
from internvl_jax.training.state import Place, State

logger = logging.getLogger(__name__)

RUN, STEPS = "run.json", "steps"


class RunError(ValueError):
    """A run that cannot begin, go on or be saved; the message says why and what to do."""


class Steps:
    """The saved steps of a run. A context manager: leaving it waits for what is still being written."""

    def __init__(self, directory: str | Path, place: Place, *, keep: int = 3):
        self.directory = Path(directory).resolve() / STEPS
        self._place = place
        self._keep = keep
        with distributed.first_alone() as first:
            if first:
                self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.directory, options=options)

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
        told = distributed.exchange(json.dumps([self._place.share, _encode(data)]).encode())
        shares = dict(json.loads(message) for message in told)  # processes of one share are at one place
        places = [shares[number] for number in sorted(shares)]
        true = self._place.resized(state, self._place.unpad, storage=True)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(true), data=ocp.args.JsonSave({"processes": places})
                ),
            )
            if wait:
                self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(self._failed(step, error)) from error

    def _failed(self, step: int, error: Exception) -> str:
        with suppress(OSError, ValueError, RuntimeError):
            self._manager.wait_until_finished()  # the one before may still be on its way
        good = [name for path in self.directory.iterdir() if (name := path.name).isdigit() and int(name) != step]
        last = f"step {max(map(int, good))} is the last good one" if good else "there is no earlier step"
        return f"step {step} could not be written to {self.directory} ({error}); {last}: make room and start again"

    def restore(self, like: State) -> tuple[State, Any] | None:
        """The last step that can be read, as a State laid out like `like`, and this process's place in the data.

        A step that cannot be read is set aside with a warning, and the one before it is tried. None where none is left.
        """
        abstract = self._place.abstract(like)
        while (step := self._manager.latest_step()) is not None:
            error: Exception | None = None
            found: Any = None
            try:
                found = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
                )
            except Exception as caught:  # whatever Orbax and TensorStore raise for files that are short or missing
                error = caught
            problems = [text.decode() for text in distributed.exchange(str(error or "").encode()) if text]
            if error is None and not problems:
                return self._continued(step, found)
            self._set_aside(step, problems[0])
        return None

    def _continued(self, step: int, found: Any) -> tuple[State, Any]:
        places = found["data"]["processes"]
        if len(places) != self._place.shares:
            raise RunError(
                f"{self.directory / str(step)} was written by {len(places)} processes, now there are "
                f"{self._place.shares}: each has its own place in the data, so start as many as before"
            )
        state = self._place.resized(found["state"], self._place.pad, storage=False)
        return state, _decode(places[self._place.share])

    def _set_aside(self, step: int, problem: str) -> None:
        self._manager.close()
        with distributed.first_alone() as first:
            if first:
                aside = self.directory / f"damaged-{step}"
                (self.directory / str(step)).rename(aside)
                shown = problem.splitlines()[0][:300]
                logger.warning("step %s cannot be read (%s); moved to %s", step, shown, aside)
        self._manager = self._open()

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            if kind is None:
                raise RunError(self._failed(-1, error).replace("step -1", "the last step")) from error
        self._manager.close()


def is_there(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Whether a directory is this run's already; False where it is free for it.

    Raises RunError that lists the settings that differ, and for a directory that holds something else.
    """
    path = Path(directory) / RUN
    if not path.exists():
        if path.parent.exists() and (not path.parent.is_dir() or any(path.parent.iterdir())):
            raise RunError(f"{directory} is not empty and holds no {RUN}: choose another directory for the run")
        return False
    before, settings = (_flat(json.loads(text)) for text in (path.read_text(encoding="utf-8"), json.dumps(settings)))
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


def claim(directory: str | Path, settings: dict[str, Any]) -> bool:
    """Make a run's directory, or see that it is this run's. Returns whether it was there already.

    Raises RunError as `is_there` does.
    """
    path = Path(directory) / RUN
    with distributed.all_or_none():
        there = is_there(directory, settings)
    with distributed.first_alone() as first:
        if first and not there:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
    return there


def _encode(data: Any) -> dict[str, Any]:
    """A data iterator's state for JSON; grain's are dictionaries, or bytes."""
    return {"bytes": base64.b64encode(data).decode()} if isinstance(data, bytes) else {"value": data}


def _decode(entry: dict[str, Any]) -> Any:
    return base64.b64decode(entry["bytes"]) if "bytes" in entry else entry["value"]

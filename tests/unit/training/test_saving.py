"""Saved steps: what is taken for damage and what is not, and that nothing which was saved is lost."""

import json
import logging
import os
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from support.tiny_model import tiny
from support.training_cases import RECIPES, Batches, run, steps_of

from internvl_jax.config import load_config
from internvl_jax.inference.loading import NANO
from internvl_jax.training import damage as damage_of
from internvl_jax.training import run as training_run
from internvl_jax.training import saving, state
from internvl_jax.training.saving import RunError
from internvl_jax.training.state import ADAPTERS, Place
from internvl_jax.training.trainer import Settings
from internvl_jax.utils import files

# Of what could not be read, in threads that nobody waits for.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damage(step):
    """Cut the largest file of a saved step in half, as a disk that filled up or a copy that broke off would."""
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def flip(path):
    """Two bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A whole run of six steps, saved after 2, 4 and 6: (directory, state at the end). Not to be changed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    return directory, jax.device_get(run(directory, 6).state)


@pytest.fixture
def saved(straight, tmp_path):
    """The directory of a copy of `straight`, and its largest file of values in step 6."""
    shutil.copytree(straight[0], tmp_path / "run")
    values = (tmp_path / "run" / "steps" / "6" / "state" / "ocdbt.process_0" / "d").iterdir()
    return tmp_path / "run", max(values, key=lambda path: path.stat().st_size)


class Interrupted(Batches):
    """Broken off at the fourth batch, as a second Ctrl-C would."""

    def make(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return super().make(number)


def restored(directory, like):
    """The step that a run would resume from, and the place in the data."""
    with saving.Steps(directory, Place(tiny())) as steps:
        state, position = steps.restore(jax.tree.map(jnp.zeros_like, like))
    return jax.device_get(state), position


def tree_of(steps):
    """All names below a directory, with contents."""
    return {
        path.relative_to(steps).as_posix(): path.read_bytes()
        for path in steps.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


DAMAGES = {
    "truncated": lambda step, values: damage(step),
    "a bit of a value": lambda step, values: flip(values),  # which decodes; its checksum differs
    "values are missing": lambda step, values: values.unlink(),
    "index": lambda step, values: [flip(path) for path in (step / "state" / "d").iterdir()],
    "manifest": lambda step, values: flip(step / "state" / "manifest.ocdbt"),
    "no manifest": lambda step, values: (step / "state" / "manifest.ocdbt").unlink(),
    "metadata": lambda step, values: os.truncate(step / "state" / "_METADATA", 1000),
    "no state": lambda step, values: shutil.rmtree(step / "state"),
    "no place in the data": lambda step, values: (step / "data" / "metadata").unlink(),
    "empty place": lambda step, values: (step / "data" / "metadata").write_text(""),
    "another place": lambda step, values: (step / "data" / "metadata").write_text(
        (step / "data" / "metadata").read_text().replace('"next": 6', '"next": 5')
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_step_is_set_aside(logged, straight, saved, kind):
    directory, values = saved
    steps = directory / "steps"
    before = tree_of(steps / "6")
    DAMAGES[kind](steps / "6", values)
    assert tree_of(steps / "6") != before
    state, position = restored(directory, straight[1])
    assert (int(state.step), position) == (4, {"next": 4})
    (said,) = logged
    assert re.fullmatch(r"step 6 is damaged \(.*\); moved to .*/steps/damaged-6", said)
    assert sorted(path.name for path in steps.iterdir()) == ["2", "4", "damaged-6"]
    state, position = restored(straight[0], straight[1])
    assert (int(state.step), position) == (6, {"next": 6})
    jax.tree.map(np.testing.assert_array_equal, state, straight[1])


def test_resumes_from_the_step_before_a_damaged_one(logged, straight, saved):
    directory, _ = saved
    damage(directory / "steps" / "6")
    again = run(directory, 6)
    assert sorted(path.name for path in (directory / "steps").iterdir()) == ["2", "4", "6", "damaged-6"]
    assert [entry["step"] for entry in steps_of(directory)] == [1, 2, 3, 4, 5, 6, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), straight[1])


def test_no_whole_step_never_begins_anew_untold(logged, straight, saved):
    """Two damaged steps fall back to the third; three end the run, unless it is told to begin at step 1."""
    directory, _ = saved
    steps = directory / "steps"
    for step in ("6", "4", "2"):
        damage(steps / step)
    before = tree_of(steps)
    with pytest.raises(RunError, match=r"no saved step in .* is whole \(step 6: .*; step 4: .*--from-scratch begins"):
        run(directory, 6)
    assert tree_of(steps) == before
    shutil.rmtree(steps / "2")
    shutil.copytree(straight[0] / "steps" / "2", steps / "2")
    assert restored(directory, straight[1])[0].step == 2
    assert sorted(path.name for path in steps.iterdir()) == ["2", "damaged-4", "damaged-6"]
    shutil.rmtree(steps / "2")
    with pytest.raises(RunError, match=r"no saved step in .* is whole .*set aside before"):  # damaged-N is left
        run(directory, 6)
    again = run(directory, 6, from_scratch=True)
    assert [entry["step"] for entry in steps_of(directory)][-6:] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), straight[1])
    assert sorted(path.name for path in (directory / "steps-before").iterdir()) == ["damaged-4", "damaged-6"]
    assert logged[-1].endswith("what was saved before is in " + str(directory / "steps-before"))


@pytest.mark.parametrize("kind", ["deleted", "emptied", "not mounted"])
def test_a_run_whose_steps_are_gone_never_begins_anew_untold(straight, saved, kind):
    directory, _ = saved
    steps = directory / "steps"
    assert json.loads((directory / "saved.json").read_text()) == {"step": 6}
    shutil.rmtree(steps)
    if kind == "emptied":
        steps.mkdir()
    if kind == "not mounted":
        steps.symlink_to(directory / "disk" / "steps")
    said = "a link to .*disk/steps, where nothing" if kind == "not mounted" else "no steps, but .*saved.json.*scratch"
    metrics = (directory / "metrics.jsonl").read_text()
    for _ in range(2):  # the first refusal changes nothing
        with pytest.raises(RunError, match=said):
            run(directory, 6)
    assert (directory / "metrics.jsonl").read_text() == metrics
    if kind != "not mounted":
        run(directory, 6, from_scratch=True)
        assert [entry["step"] for entry in steps_of(directory)][-6:] == [1, 2, 3, 4, 5, 6]
        assert json.loads((directory / "saved.json").read_text()) == {"step": 6}


def test_what_was_saved_is_recorded_while_the_run_goes_on(tmp_path):
    """So that a run that was killed later is known to have had steps."""
    seen = []
    run(tmp_path / "run", 5, log=lambda entry: seen.append((tmp_path / "run" / "saved.json").exists()))
    assert seen[:2] == [False, False]  # nothing was saved then
    assert seen[-1]  # step 2 is whole when step 4 begins to be saved
    assert json.loads((tmp_path / "run" / "saved.json").read_text()) == {"step": 5}


def test_a_run_that_was_killed_before_its_first_save_begins_by_itself(straight, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(directory, 6, batches=Interrupted(tiny()), save_every=4)
    assert [entry["step"] for entry in steps_of(directory)] == [1, 2]
    assert not (directory / "saved.json").exists()
    run(directory, 6, save_every=4)
    assert [entry["step"] for entry in steps_of(directory)] == [1, 2, 1, 2, 3, 4, 5, 6]


def test_only_whole_steps_are_recorded(straight, tmp_path):
    """One that is still being written is none."""
    with saving.Steps(tmp_path / "run", Place(tiny())) as steps:
        steps._unrecorded = 2
        (steps.directory / "2.orbax-checkpoint-tmp").mkdir()
        steps.record()
        assert not (tmp_path / "run" / "saved.json").exists()
        (steps.directory / "2.orbax-checkpoint-tmp").rename(steps.directory / "2")
        steps.record()
    assert json.loads((tmp_path / "run" / "saved.json").read_text()) == {"step": 2}


def test_a_second_damage_of_a_step_has_another_name(logged, straight, saved):
    directory, _ = saved
    (directory / "steps" / "damaged-6").mkdir()
    damage(directory / "steps" / "6")
    restored(directory, straight[1])
    assert logged[-1].endswith("moved to " + str(directory / "steps" / "damaged-6-2"))


def fails(error):
    def restore(*args, **options):
        raise error

    return restore


ERRORS = {
    "storage": OSError(5, "Input/output error"),
    "permissions": PermissionError(13, "Permission denied", "/runs/steps/6/state/_METADATA"),
    "memory": MemoryError(),
    "network": ConnectionResetError(104, "Connection reset by peer"),
    "a package": ModuleNotFoundError("No module named 'zstandard'"),
    "another optimizer": ValueError(
        "User-provided restore item and on-disk value metadata tree structures do not match"
    ),
    "TensorStore": ValueError("UNKNOWN: Error reading: Input/output error [os_error_code='5'] [source locations=...]"),
    "unknown": KeyError("item"),
    "moved while read": FileNotFoundError(2, "No such file or directory", "/runs/steps/6/state/_METADATA"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_reading_leave_steps_untouched(logged, straight, saved, monkeypatch, kind):
    directory, _ = saved
    before = tree_of(directory / "steps")
    monkeypatch.setattr(saving.ocp.CheckpointManager, "restore", fails(ERRORS[kind]))
    message = (
        r"step 6 in .* could not be restored \(.*\); its content is not known to be damaged, so every step is left"
    )
    with pytest.raises(RunError, match=message) as caught:
        restored(directory, straight[1])
    assert "source locations" not in str(caught.value)
    assert tree_of(directory / "steps") == before
    assert not logged


@pytest.mark.parametrize(
    "name", ["state/_METADATA", "state/manifest.ocdbt", "state/array_metadatas/process_0", "data/metadata", "values"]
)
@pytest.mark.parametrize("kind", ["link", "directory"])
def test_files_that_the_system_cannot_read(straight, saved, name, kind):
    """Errors of the operating system itself, on which Orbax says "not found", "structure error" or "truncated"."""
    directory, values = saved
    steps = directory / "steps"
    path = values if name == "values" else steps / "6" / name
    path.rename(directory / "kept")
    path.symlink_to(path.name) if kind == "link" else path.mkdir()
    before = tree_of(steps)
    said = "Too many levels of symbolic links" if kind == "link" else "Is a directory"
    with pytest.raises(RunError, match=rf"{said}.*every step is left as it was"):
        restored(directory, straight[1])
    assert tree_of(steps) == before
    path.unlink() if kind == "link" else path.rmdir()
    (directory / "kept").rename(path)
    assert restored(directory, straight[1])[0].step == 6  # the error has gone


@pytest.mark.parametrize("what", ["shape", "tree"])
def test_another_optimizer_is_not_damage(straight, saved, what):
    directory, _ = saved
    before = tree_of(directory / "steps")
    like = straight[1]
    other = like.replace(optimizer=(like.optimizer,)) if what == "tree" else like.replace(key=np.zeros(3, np.uint32))
    with pytest.raises(RunError, match=r"could not be restored .*not known to be damaged"):
        restored(directory, other)
    assert tree_of(directory / "steps") == before


def test_errors_of_reading_end_a_run(logged, saved, monkeypatch):
    """Before a step of training, with nothing written."""
    directory, _ = saved
    before = tree_of(directory)
    monkeypatch.setattr(saving.ocp.CheckpointManager, "restore", fails(ERRORS["storage"]))
    with pytest.raises(RunError, match="Input/output error"):
        run(directory, 6)
    assert tree_of(directory) == before


def test_steps_of_before_checksums_are_read(straight, saved):
    directory, _ = saved
    path = directory / "steps" / "6" / "data" / "metadata"
    path.write_text(json.dumps({"processes": json.loads(path.read_text())["processes"]}))
    assert restored(directory, straight[1])[0].step == 6


def test_checksums_know_every_bit_and_place():
    place = Place(tiny())
    leaves = {"f": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16), "i": jnp.zeros((), jnp.int32)}
    sums = place.checksums(leaves)
    assert set(sums) == {"f", "b", "i"}
    assert place.checksums(leaves) == sums
    signs = leaves["f"].at[0, :2].multiply(-1)  # the highest bit of two elements, which a plain sum loses
    for name, other in (("f", signs), ("f", leaves["f"][::-1]), ("b", leaves["b"].at[1].set(1.0078125)), ("i", 1)):
        changed = place.checksums({**leaves, name: jnp.asarray(other, leaves[name].dtype)})
        assert {key for key in sums if changed[key] != sums[key]} == {name}


def test_one_process_claims_a_run_for_all_of_its(tmp_path, monkeypatch):
    with files.claim(tmp_path / "run"):
        with pytest.raises(files.OutputInUseError, match=r"is being written by process"):
            with saving.claimed(tmp_path / "run"):
                pass
        monkeypatch.setattr(saving.distributed, "is_process_0", lambda: False)
        with saving.claimed(tmp_path / "run"):
            pass
    monkeypatch.undo()
    with saving.claimed(tmp_path / "run"), saving.claimed(tmp_path / "run" / ".." / "run"):  # its own, again
        with pytest.raises(files.OutputInUseError), files.claim(tmp_path / "run"):
            pass


def test_a_model_never_stands_without_its_adapters(tmp_path, monkeypatch):
    """Where writing them fails, there is no model either, and nothing is left."""
    place = Place(load_config(NANO))
    monkeypatch.setattr(state.checkpoint, "write_changed", lambda to, *_, **__: to.mkdir())
    trained = {"mlp1": {}, ADAPTERS: {}}

    def fail(directory, *_):
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(state.lora, "save", fail)
    with pytest.raises(OSError, match="No space"):
        state.write_model(tmp_path / "model", NANO, trained, place, RECIPES["lora"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(state.lora, "save", lambda directory, *_: directory.mkdir())
    state.write_model(tmp_path / "model", NANO, trained, place, RECIPES["lora"])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/adapters"]


def test_a_run_logs_what_is_said_and_what_ends_it(tmp_path):
    made = SimpleNamespace(output=tmp_path / "run", recipe=RECIPES["lora"], settings=Settings(3), identity=None)

    def fail():
        with training_run.log_file(made):
            logging.getLogger("internvl_jax.training.saving").warning("step %s moved", 6)
            raise RunError("step 7: the loss is nan")

    with pytest.raises(RunError, match="the loss"):
        fail()
    with training_run.log_file(made):  # appended to
        logging.getLogger("internvl_jax").info("resumed")
    warned, ended, resumed = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert warned.endswith(" WARNING internvl_jax.training.saving: step 6 moved")
    assert ended.endswith(" ERROR internvl_jax.training.run: RunError: step 7: the loss is nan")
    assert resumed.endswith(" INFO internvl_jax: resumed")
    assert sorted(path.name for path in made.output.iterdir()) == ["log.txt", "run.json"]


def test_a_lock_inside_is_nothing_that_a_directory_holds(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock.holder").touch()
    assert not saving.is_there(tmp_path, {"steps": 3})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"is not empty and holds no run\.json"):
        saving.is_there(tmp_path, {"steps": 3})


@pytest.mark.parametrize(
    ("now", "said"),
    [({"steps": 3}, "recipe.lora was 4, is None"), ({"steps": 3, "recipe": {"lora": 4, "clip": 1}}, "recipe.clip was")],
)
def test_a_setting_that_is_gone_or_new_makes_another_run(tmp_path, now, said):
    before = {"steps": 3, "recipe": {"lora": 4}}
    saving.begin(tmp_path, before)
    assert saving.is_there(tmp_path, before)
    with pytest.raises(RunError, match=f"another run's: {said}"):
        saving.is_there(tmp_path, now)


@pytest.mark.parametrize("number", range(3))
def test_every_chunk_of_an_array_is_looked_at(tmp_path, number):
    """Of an array whose last chunk is a part of one."""
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    metadata = {"shape": [5], "chunks": [2], "dtype": "<f4", "fill_value": None}
    spec = {"driver": "zarr", "kvstore": {**database, "path": "a/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(np.ones(5, np.float32)).result()
    damage_of._read_arrays(tmp_path)
    ts.KvStore.open(database).result().write(f"a/{number}", None).result()  # deleted
    with pytest.raises(ValueError, match="NOT_FOUND"):
        damage_of._read_arrays(tmp_path)

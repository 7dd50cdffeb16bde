"""Saved steps: what counts as damage and what does not, and that nothing that was saved is lost."""

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
from internvl_jax.training import saving
from internvl_jax.training.damage import read_arrays
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.runs import model_output
from internvl_jax.training.runs import run as training_run
from internvl_jax.training.saving import RunError
from internvl_jax.training.state import ADAPTERS
from internvl_jax.training.trainer import TrainHooks
from internvl_jax.utils import files

# From failed reads in threads that nobody joins.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damage(step):
    """Cut the largest file of a saved step in half, as a full disk or an interrupted copy would."""
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def flip(path):
    """Invert two bytes in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    path.write_bytes(data)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A complete run of six steps, saved after 2, 4 and 6: (directory, final state). Must not be changed."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    return directory, jax.device_get(run(directory, 6).state)


@pytest.fixture
def saved(straight, tmp_path):
    """The directory of a copy of `straight`, and the largest file of values in its step 6."""
    shutil.copytree(straight[0], tmp_path / "run")
    values = (tmp_path / "run" / "steps" / "6" / "state" / "ocdbt.process_0" / "d").iterdir()
    return tmp_path / "run", max(values, key=lambda path: path.stat().st_size)


class Interrupted(Batches):
    """Interrupted at the fourth batch, as by a second Ctrl-C."""

    def make(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return super().make(number)


def restored(directory, like):
    """The step that a run would resume from, and the position in the data."""
    with saving.Steps(directory, MeshPlacement(tiny())) as steps:
        state, position = steps.restore(jax.tree.map(jnp.zeros_like, like))
    return jax.device_get(state), position


def tree_of(steps):
    """All file names below a directory, with contents."""
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
    "no data position": lambda step, values: (step / "data" / "metadata").unlink(),
    "empty data position": lambda step, values: (step / "data" / "metadata").write_text(""),
    "another data position": lambda step, values: (step / "data" / "metadata").write_text(
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
    (message,) = logged
    assert re.fullmatch(r"step 6 is damaged \(.*\); moved to .*/steps/damaged-6", message)
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


def test_a_run_with_only_damaged_steps_never_restarts_by_itself(logged, straight, saved):
    """Two damaged steps fall back to the third; three end the run, unless --from-scratch restarts it."""
    directory, _ = saved
    steps = directory / "steps"
    for step in ("6", "4", "2"):
        damage(steps / step)
    before = tree_of(steps)
    with pytest.raises(
        RunError, match=r"all saved steps in .* are damaged \(step 6: .*; step 4: .*--from-scratch starts"
    ):
        run(directory, 6)
    assert tree_of(steps) == before
    shutil.rmtree(steps / "2")
    shutil.copytree(straight[0] / "steps" / "2", steps / "2")
    assert restored(directory, straight[1])[0].step == 2
    assert sorted(path.name for path in steps.iterdir()) == ["2", "damaged-4", "damaged-6"]
    shutil.rmtree(steps / "2")
    with pytest.raises(RunError, match=r"all saved steps in .* are damaged .*set aside before"):  # damaged-N is left
        run(directory, 6)
    again = run(directory, 6, from_scratch=True)
    assert [entry["step"] for entry in steps_of(directory)][-6:] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), straight[1])
    assert sorted(path.name for path in (directory / "steps-before").iterdir()) == ["damaged-4", "damaged-6"]
    assert logged[-1].endswith("what was saved before is in " + str(directory / "steps-before"))


@pytest.mark.parametrize("kind", ["deleted", "emptied", "not mounted"])
def test_a_run_whose_steps_have_vanished_never_restarts_by_itself(straight, saved, kind):
    directory, _ = saved
    steps = directory / "steps"
    assert json.loads((directory / "saved.json").read_text()) == {"step": 6}
    shutil.rmtree(steps)
    if kind == "emptied":
        steps.mkdir()
    if kind == "not mounted":
        steps.symlink_to(directory / "disk" / "steps")
    message = (
        "a link to .*disk/steps, where nothing" if kind == "not mounted" else "no steps, but .*saved.json.*scratch"
    )
    metrics = (directory / "metrics.jsonl").read_text()
    for _ in range(2):  # the first refusal changes nothing
        with pytest.raises(RunError, match=message):
            run(directory, 6)
    assert (directory / "metrics.jsonl").read_text() == metrics
    if kind != "not mounted":
        run(directory, 6, from_scratch=True)
        assert [entry["step"] for entry in steps_of(directory)][-6:] == [1, 2, 3, 4, 5, 6]
        assert json.loads((directory / "saved.json").read_text()) == {"step": 6}


def test_saved_steps_are_recorded_during_the_run(tmp_path):
    """A run that is killed later is known to have had steps."""
    seen = []
    hooks = TrainHooks(log=lambda entry: seen.append((tmp_path / "run" / "saved.json").exists()))
    run(tmp_path / "run", 5, hooks=hooks)
    assert seen[:2] == [False, False]  # nothing was saved yet
    assert seen[-1]  # step 2 is complete when saving of step 4 starts
    assert json.loads((tmp_path / "run" / "saved.json").read_text()) == {"step": 5}


def test_a_run_that_was_killed_before_its_first_save_restarts_by_itself(straight, tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(directory, 6, batches=Interrupted(tiny()), save_every=4)
    assert [entry["step"] for entry in steps_of(directory)] == [1, 2]
    assert not (directory / "saved.json").exists()
    run(directory, 6, save_every=4)
    assert [entry["step"] for entry in steps_of(directory)] == [1, 2, 1, 2, 3, 4, 5, 6]


def test_only_complete_steps_are_recorded(tmp_path):
    """Not one that is still being written."""
    with saving.Steps(tmp_path / "run", MeshPlacement(tiny())) as steps:
        steps.pending_record = 2
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
    """Errors of the operating system, which Orbax reports as "not found", "structure error" or "truncated"."""
    directory, values = saved
    steps = directory / "steps"
    path = values if name == "values" else steps / "6" / name
    path.rename(directory / "kept")
    path.symlink_to(path.name) if kind == "link" else path.mkdir()
    before = tree_of(steps)
    message = "Too many levels of symbolic links" if kind == "link" else "Is a directory"
    with pytest.raises(RunError, match=rf"{message}.*every step is left as it was"):
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
    """Before the first step, with nothing written."""
    directory, _ = saved
    before = tree_of(directory)
    monkeypatch.setattr(saving.ocp.CheckpointManager, "restore", fails(ERRORS["storage"]))
    with pytest.raises(RunError, match="Input/output error"):
        run(directory, 6)
    assert tree_of(directory) == before


def test_steps_without_checksums_are_read(straight, saved):
    directory, _ = saved
    path = directory / "steps" / "6" / "data" / "metadata"
    path.write_text(json.dumps({"processes": json.loads(path.read_text())["processes"]}))
    assert restored(directory, straight[1])[0].step == 6


def test_checksums_depend_on_every_bit_and_index():
    placement = MeshPlacement(tiny())
    leaves = {"f": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, jnp.bfloat16), "i": jnp.zeros((), jnp.int32)}
    sums = placement.checksums(leaves)
    assert set(sums) == {"f", "b", "i"}
    assert placement.checksums(leaves) == sums
    signs = leaves["f"].at[0, :2].multiply(-1)  # the sign bits of two elements, which a plain sum would not see
    for name, other in (("f", signs), ("f", leaves["f"][::-1]), ("b", leaves["b"].at[1].set(1.0078125)), ("i", 1)):
        changed = placement.checksums({**leaves, name: jnp.asarray(other, leaves[name].dtype)})
        assert {key for key in sums if changed[key] != sums[key]} == {name}


def test_process_0_claims_a_run_for_all_processes(tmp_path, monkeypatch):
    with files.claim(tmp_path / "run"):
        with pytest.raises(files.OutputInUseError, match=r"is being written by process"):
            with saving.claimed(tmp_path / "run"):
                pass
        monkeypatch.setattr(saving.distributed, "is_process_0", lambda: False)
        with saving.claimed(tmp_path / "run"):
            pass
    monkeypatch.undo()
    with saving.claimed(tmp_path / "run"), saving.claimed(tmp_path / "run" / ".." / "run"):  # its own claim, again
        with pytest.raises(files.OutputInUseError), files.claim(tmp_path / "run"):
            pass


def test_a_model_is_never_written_without_its_adapters(tmp_path, monkeypatch):
    """If writing the adapters fails, there is no model either, and nothing is left over."""
    placement = MeshPlacement(load_config(NANO))
    monkeypatch.setattr(model_output.checkpoint, "write_changed", lambda to, *_, **__: to.mkdir())
    trained = {"mlp1": {}, ADAPTERS: {}}

    def fail(directory, *_):
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(model_output.lora, "save", fail)
    with pytest.raises(OSError, match="No space"):
        model_output.write_model(tmp_path / "model", NANO, trained, placement, RECIPES["lora"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(model_output.lora, "save", lambda directory, *_: directory.mkdir())
    model_output.write_model(tmp_path / "model", NANO, trained, placement, RECIPES["lora"])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/adapters"]


def test_a_run_logs_messages_and_the_error_that_ends_it(tmp_path):
    started = SimpleNamespace(output=tmp_path / "run", facts={"steps": 3})

    def fail():
        with training_run.log_file(started):
            logging.getLogger("internvl_jax.training.saving").warning("step %s moved", 6)
            raise RunError("step 7: the loss is nan")

    with pytest.raises(RunError, match="the loss"):
        fail()
    with training_run.log_file(started):  # appended to
        logging.getLogger("internvl_jax").info("resumed")
    warned, ended, resumed = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert warned.endswith(" WARNING internvl_jax.training.saving: step 6 moved")
    assert ended.endswith(" ERROR internvl_jax.training.runs.run: RunError: step 7: the loss is nan")
    assert resumed.endswith(" INFO internvl_jax: resumed")
    assert sorted(path.name for path in started.output.iterdir()) == ["log.txt", "run.json"]


def test_a_directory_with_only_a_lock_is_empty(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock.holder").touch()
    assert not saving.is_existing_run(tmp_path, {"steps": 3})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"is not empty and holds no run\.json"):
        saving.is_existing_run(tmp_path, {"steps": 3})


@pytest.mark.parametrize(
    ("now", "message"),
    [({"steps": 3}, "recipe.lora was 4, is None"), ({"steps": 3, "recipe": {"lora": 4, "clip": 1}}, "recipe.clip was")],
)
def test_a_removed_or_new_setting_makes_another_run(tmp_path, now, message):
    before = {"steps": 3, "recipe": {"lora": 4}}
    saving.make_run_directory(tmp_path, before)
    assert saving.is_existing_run(tmp_path, before)
    with pytest.raises(RunError, match=f"another run: {message}"):
        saving.is_existing_run(tmp_path, now)


def test_settings_of_earlier_versions_are_read(tmp_path):
    """run.json of an earlier version has other names for some settings."""
    optimizer = {"learning_rate": 0.1, "clip": 1.0}
    recipe = {"rows": 2, "length": 48, "mean": "token", "optimizer": optimizer, "lora": {"language_model": {"rank": 4}}}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe, "accumulate": 2, "seed": 0}))
    optimizer = {"learning_rate": 0.1, "max_grad_norm": 1.0}
    recipe = {"global_batch_size": 2, "max_seq_length": 48, "loss_mean": "token", "optimizer": optimizer}
    facts = {"recipe": {**recipe, "lora": {"language_model": {"rank": 4}}}, "gradient_accumulation_steps": 2, "seed": 0}
    assert saving.is_existing_run(tmp_path, facts)
    with pytest.raises(RunError, match=r"recipe\.global_batch_size was 2, is 4"):
        saving.is_existing_run(tmp_path, {**facts, "recipe": {**facts["recipe"], "global_batch_size": 4}})


@pytest.mark.parametrize("number", range(3))
def test_every_chunk_of_an_array_is_read(tmp_path, number):
    """Of an array whose last chunk is partial."""
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    metadata = {"shape": [5], "chunks": [2], "dtype": "<f4", "fill_value": None}
    spec = {"driver": "zarr", "kvstore": {**database, "path": "a/"}, "metadata": metadata}
    ts.open(spec, create=True).result().write(np.ones(5, np.float32)).result()
    read_arrays(tmp_path)
    ts.KvStore.open(database).result().write(f"a/{number}", None).result()  # deleted
    with pytest.raises(ValueError, match="NOT_FOUND"):
        read_arrays(tmp_path)

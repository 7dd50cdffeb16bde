"""The training loop: it learns, resumes bit for bit wherever it was killed, and stops at NaN."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.golden import assert_close
from support.paths import SUPPORT
from support.tiny_model import IMAGE, random_params, tiny
from support.training_cases import RECIPES, Batches, run, steps_of

from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import trainer
from internvl_jax.training.context import TrainContext, TrainSettings
from internvl_jax.training.initialization import init_state
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.saving import RunError
from internvl_jax.training.state import ADAPTERS
from internvl_jax.training.step import make_step, put_batch, stack_batches
from internvl_jax.training.trainer import TrainHooks, TrainingError

CASES = SUPPORT / "training_cases.py"


def numbers(entries):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries]


@pytest.mark.parametrize("name", list(RECIPES))
def test_trained_parts_learn_and_frozen_parts_stay(tmp_path, name):
    config = tiny()
    before = random_params(config)
    batches = Batches(config)
    batches.make = lambda number, make=batches.make: make(0)  # the same batch at every step
    done = run(tmp_path / "run", 12, name, batches=batches, own_step=True)
    entries = steps_of(tmp_path / "run")
    assert done.finished
    assert len(entries) == 12
    assert entries[-1]["loss"] < entries[0]["loss"] - 0.02
    assert entries[-1]["compiles"] == 1
    assert entries[0]["learning_rate"] == 0
    recipe = RECIPES[name]
    for part in before:
        if part in recipe.train:
            moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), done.state.trained[part], before[part])
            assert min(jax.tree.leaves(moved)) > 0, part
        else:
            jax.tree.map(np.testing.assert_array_equal, done.frozen[part], before[part])


def test_one_compile_per_shape(tmp_path):
    run(tmp_path / "run", 6, own_step=True)  # rows of 48 and of 64 tokens
    assert [entry["compiles"] for entry in steps_of(tmp_path / "run")][-1] == 2


def test_accumulation_and_remat_equal_the_whole_batch():
    """Two micro-batches equal the four rows at once, and rematerialization changes nothing."""
    config, recipe = tiny(), RECIPES["stage2"]
    placement, batches = MeshPlacement(config), Batches(config)
    one, two = (jax.tree.map(np.asarray, batches.make(number)) for number in (0, 1))
    two = two.replace(labels=np.where(np.arange(48) < 30, two.labels, -100))  # so that they have different weights
    whole = jax.tree.map(lambda a, b: np.concatenate([a, b]), one, two)
    whole = whole.replace(image_index=image_token_index(whole.input_ids == IMAGE))

    def after(batch, **settings):
        params = jax.tree.map(jnp.asarray, random_params(config))
        context = TrainContext(recipe, TrainSettings(4, **settings), placement)
        state, frozen = init_state(params, context)
        return jax.device_get(make_step(context)(state, frozen, put_batch(batch, placement)))

    expected, figures = after(stack_batches([whole]), remat="none")
    for batch, remat in (([one, two], "none"), ([whole], "full"), ([whole], "dots")):
        state, again = after(stack_batches(batch), remat=remat)
        assert again["loss"] == pytest.approx(figures["loss"], abs=1e-5)
        assert again["grad_norm"] == pytest.approx(figures["grad_norm"], rel=1e-4)
        assert again["supervised"] == figures["supervised"]
        moments = [
            s.optimizer[1][0].mu["language_model"]["layers"]["mlp"]["up_proj"]["kernel"] for s in (state, expected)
        ]
        assert_close(*moments, 1e-5 * np.abs(moments[1]).max(), remat)


@pytest.fixture(scope="module")
def dropping():
    """Gradient norms of steps with dropout or drop path: (recipe, step, micro-batches) -> norm, from equal weights."""
    config = tiny()  # one layer of its vision tower runs, which never drops
    config = replace(config, vision=replace(config.vision, num_hidden_layers=4))
    placement = MeshPlacement(config)
    steps = {}

    def norm(name, number, batches):
        recipe = replace(RECIPES[name], drop_path=0.5 if name == "stage1" else 0)
        settings = TrainSettings(4, gradient_accumulation_steps=len(batches), remat="none")
        context = TrainContext(recipe, settings, placement)
        if (name, len(batches)) not in steps:
            steps[name, len(batches)] = make_step(context)
        params = jax.tree.map(jnp.asarray, random_params(config))
        state, frozen = init_state(params, context)
        if ADAPTERS in state.trained:  # lora_b starts at 0, which would hide dropout before it
            moved = jax.tree.map(lambda leaf: leaf + 0.05, state.trained[ADAPTERS])
            state = state.replace(trained={**state.trained, ADAPTERS: moved})
        state = state.replace(step=jnp.asarray(number, jnp.int32))
        batch = put_batch(stack_batches(batches), placement)
        return float(steps[name, len(batches)](state, frozen, batch)[1]["grad_norm"])

    return norm


@pytest.mark.parametrize("name", ["stage1", "lora"])  # drop path; dropout of adapters
def test_every_step_has_another_dropout_mask(dropping, name):
    batch = Batches(tiny(), rows=8).make(0)
    first, again, second, third = (dropping(name, number, [batch]) for number in (0, 0, 1, 2))
    assert first == again  # a resumed step has the same mask
    assert len({first, second, third}) == 3  # the same program and inputs: only the masks differ


def test_every_micro_batch_has_another_dropout_mask(dropping):
    """Two equal micro-batches: with equal masks, the mean of the gradients would be the first one's."""
    batch = Batches(tiny(), rows=8).make(0)
    one, two = dropping("stage1", 0, [batch]), dropping("stage1", 0, [batch, batch])
    assert abs(one - two) > 1e-4 * one  # 5e-4; a sum in another order is some 1e-7


# Saving and resuming.


def test_resumes_bit_for_bit(tmp_path):
    straight = run(tmp_path / "straight", 6, "stage1", save_every=3)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "steps" / "6")
    batches = Batches(tiny())
    original = type(batches).__next__
    stop_at = 4

    class Stops(Batches):
        def __next__(self):
            if self.next == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self)

    first = run(tmp_path / "parts", 6, "stage1", batches=Stops(tiny()), save_every=3)
    assert not first.finished
    assert first.step == stop_at + 1  # the running step is finished and saved
    second = run(tmp_path / "parts", 6, "stage1", save_every=3)
    assert second.finished
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(second.state), jax.device_get(straight.state))
    assert numbers(steps_of(tmp_path / "parts")) == numbers(steps_of(tmp_path / "straight"))
    # From a step that was saved in the background.
    third = run(tmp_path / "killed", 6, "stage1", save_every=3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(third.state), jax.device_get(straight.state))
    assert numbers(steps_of(tmp_path / "killed"))[6:] == numbers(steps_of(tmp_path / "straight"))[3:]
    again = run(tmp_path / "parts", 6, "stage1", save_every=3)  # nothing is left to do
    assert again.finished
    assert again.step == 6
    with pytest.raises(RunError, match="another run: steps was 6, is 8"):
        run(tmp_path / "parts", 8, "stage1", save_every=3)


def process(directory, steps=12, *more, **pipes):
    return subprocess.Popen(
        [sys.executable, str(CASES), str(directory), str(steps), *map(str, more)],
        stdout=subprocess.PIPE,
        **pipes,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def losses(text):
    return {int(line.split()[0]): line.split()[1:] for line in text.splitlines() if line[0].isdigit()}


def test_killed_while_a_step_is_written(tmp_path):
    """A process dies without clean-up just after it started to save: the next one resumes with the same numbers."""
    straight = run(tmp_path / "straight", 6)
    victim = process(tmp_path / "killed", 6, "die", 4)  # saves after steps 2 and 4
    lines, _ = victim.communicate(timeout=200)
    assert victim.returncode == 9
    assert max(losses(lines)) in (3, 4)
    saved = [path.name for path in (tmp_path / "killed" / "steps").iterdir()]
    done = run(tmp_path / "killed", 6)
    assert "2" in saved
    assert done.finished
    entries = steps_of(tmp_path / "killed")
    assert entries[len(losses(lines))]["step"] == (5 if "4" in saved else 3)
    by_step = ({step: rest for step, *rest in numbers(found)} for found in (entries, steps_of(tmp_path / "straight")))
    assert next(by_step) == next(by_step)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(done.state), jax.device_get(straight.state))


@pytest.mark.slow  # four processes
def test_killed_at_a_random_moment(tmp_path):
    """kill -9 while it trains or saves: it resumes from the last complete step, with the same numbers."""
    whole, _ = process(tmp_path / "straight").communicate(timeout=200)
    assert whole.splitlines()[-1] == "finished"
    expected = losses(whole)
    assert sorted(expected) == list(range(1, 13))
    seen = {}
    chance = random.Random(os.urandom(4))
    for _ in range(2):
        victim = process(tmp_path / "killed")
        lines = ""
        for _ in range(chance.randint(2, 4)):
            lines += victim.stdout.readline()
        time.sleep(chance.random() * 0.1)
        victim.kill()
        lines += victim.communicate()[0].rpartition("\n")[0]
        seen |= losses(lines)
    rest, _ = process(tmp_path / "killed").communicate(timeout=200)
    assert rest.splitlines()[-1] == "finished"
    assert min(losses(rest)) > 1  # it did resume
    seen |= losses(rest)
    assert seen == expected


def test_half_written_step_is_removed(logged, tmp_path):
    """A step that was being written when the process was killed has a temporary name, and is removed with a message."""
    run(tmp_path / "run", 6)
    steps = tmp_path / "run" / "steps"
    (steps / "6").rename(steps / "6.orbax-checkpoint-tmp-7")
    run(tmp_path / "run", 6)
    assert logged == [f"removing {steps}/6.orbax-checkpoint-tmp-7, which an interrupted process left"]
    assert sorted(path.name for path in steps.iterdir()) == ["2", "4", "6"]
    assert [entry["step"] for entry in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 5, 6]


def test_nan_loss_stops_the_run_and_dumps_the_batch(tmp_path):
    class Poisoned(Batches):
        def make(self, number):
            batch = super().make(number)
            return batch.replace(pixel_values=batch.pixel_values * np.nan) if number == 4 else batch

    with pytest.raises(TrainingError, match=r"step 5: the loss is nan.*The last saved step is 4"):
        run(tmp_path / "run", 6, batches=Poisoned(tiny()))
    saved = np.load(tmp_path / "run" / "bad_batch_step_5_process_0.npz")
    np.testing.assert_array_equal(saved["input_ids"][0], Batches(tiny()).make(4).input_ids)
    assert np.isnan(saved["pixel_values"]).all()
    assert len(steps_of(tmp_path / "run")) == 4
    run(tmp_path / "run", 6)  # without the NaN in the batch, it resumes
    assert [entry["step"] for entry in steps_of(tmp_path / "run")] == list(range(1, 7))


def test_a_step_with_nan_loss_is_never_saved(tmp_path):
    """The NaN is in a step that was to be saved: a run that resumed from it would have NaN parameters."""

    class Poisoned(Batches):
        def make(self, number):
            batch = super().make(number)
            return batch.replace(pixel_values=batch.pixel_values * np.nan) if number == 3 else batch

    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*The last saved step is 2"):
        run(tmp_path / "run", 6, batches=Poisoned(tiny()))
    assert sorted(path.name for path in (tmp_path / "run" / "steps").iterdir()) == ["2"]


def test_step_time_excludes_evaluation(tmp_path, monkeypatch):
    """With a clock that advances by a millisecond per reading, and by 100 seconds per evaluation."""
    reads = itertools.count()
    evaluated = []

    def evaluate(state, frozen):
        evaluated.append(int(state.step))
        return {"heldout_loss": 1.0}

    clock = SimpleNamespace(perf_counter=lambda: next(reads) / 1000 + 100 * len(evaluated))
    monkeypatch.setattr(trainer, "time", clock)
    run(tmp_path / "run", 6, hooks=TrainHooks(evaluate=evaluate), eval_every=2)
    assert evaluated == [2, 4, 6]
    entries = steps_of(tmp_path / "run")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in entries if "heldout_loss" in entry] == evaluated
    assert len(steps) == 6
    assert all(0 < entry["seconds"] < 1 for entry in steps)
    for entry in steps:  # rates count all tokens, unsupervised ones included
        assert entry["read"] > entry["supervised"]
        assert entry["tokens_per_second"] == pytest.approx(entry["read"] / entry["seconds"])


def test_full_disk_leaves_the_last_good_step(tmp_path, monkeypatch):
    """A step that cannot be written ends the run with an error that names the last good one."""
    import orbax.checkpoint as ocp

    real = ocp.CheckpointManager.save

    def full(self, step, *args, **options):
        if step == 4:
            raise OSError(28, "No space left on device")
        return real(self, step, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError, match=r"step 4 could not be written .*No space left.*step 2 is the last good one"):
        run(tmp_path / "run", 6)
    monkeypatch.undo()
    assert run(tmp_path / "run", 6).finished
    assert [entry["step"] for entry in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_disk_that_fills_up_while_a_step_is_written(tmp_path):
    """The file system refuses to write more while a step is written in the background."""
    victim = process(tmp_path / "run", 6, "fill", 3, stderr=subprocess.PIPE)
    _, errors = victim.communicate(timeout=200)
    assert victim.returncode == 1
    error = next(line for line in errors.splitlines() if "RunError: " in line)
    assert re.search(r"could not be written .*step 2 is the last good one: make room", error)
    again = run(tmp_path / "run", 6)
    straight = run(tmp_path / "straight", 6)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), jax.device_get(straight.state))


def test_another_number_of_processes_is_refused(tmp_path):
    run(tmp_path / "run", 6)
    (places,) = (tmp_path / "run" / "steps" / "6" / "data").glob("metadata")
    found = json.loads(places.read_text())
    places.write_text(json.dumps({"processes": 2 * found["processes"]}))
    with pytest.raises(
        RunError, match="written by 2 processes, now there are 1: each has its own position in the data"
    ):
        run(tmp_path / "run", 6)


def test_directories_of_other_things_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not empty and holds no run\.json"):
        run(tmp_path, 2)
    with pytest.raises(ValueError, match="remat 'some' is not one of full, dots, none"):
        TrainSettings(3, remat="some")
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0"):
        TrainSettings(3, gradient_accumulation_steps=0)

"""`internvl-jax train` and `adapters` as a user runs them: from data to answers, stops, resumption, bad input."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from support.tiny_checkpoint import tiny_config, write_checkpoint, write_squares

import internvl_jax
from internvl_jax import checkpoint
from internvl_jax.cli import main
from internvl_jax.config import load_config
from internvl_jax.training.recipes import recipe_of
from internvl_jax.training.runs import prepare
from internvl_jax.training.runs import run as training_run
from internvl_jax.utils import files

QUESTION = "What color is it?"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny converted checkpoint and a data set."""
    directory = tmp_path_factory.mktemp("train")
    write_checkpoint(directory / "tiny")
    write_squares(directory)
    write_squares(directory, 6, "heldout", text_only=False)
    return directory


@pytest.fixture
def train(place, capsys):
    """Run `train`: (exit code, what it printed). A value of None takes an option away."""

    def train(recipe, output, *argv, **options):
        options = {
            "data": place / "squares.json", "checkpoint": place / "tiny", "output": output,
            "global_batch_size": 2, "max_seq_length": 96, "remat": "none", "learning_rate": 3e-3, "steps": 6, **options,
        }  # fmt: skip
        named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
        code = main.main(["train", recipe, *named, *argv])
        return code, capsys.readouterr().err

    return train


def entries(output, kind="loss"):
    return [e for line in (output / "metrics.jsonl").read_text().splitlines() if kind in (e := json.loads(line))]


def numbers(output):
    return [(e["step"], e["loss"], e["grad_norm"]) for e in entries(output)]


def logits(chat, pixels):
    ids = [1, *[chat.image_token_id] * chat.config.tokens_per_image, 30, 40, 50, 60]
    return chat.logits(np.asarray([ids]), pixels)


def pixels(size=56):
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


# From data to answers.


def test_adapters_from_data_to_chat(train, place, tmp_path):
    """A LoRA run: what it prints and writes; it learns, and answers held-out questions; the adapters work unmerged."""
    pytest.importorskip("tensorboardX")
    out = tmp_path / "run"
    code, printed = train(
        "lora",
        out,
        "--tensorboard",
        "--profile",
        steps=40,
        learning_rate=3e-2,
        eval_data=place / "heldout.json",
        eval_every=20,
        log_every=20,
    )
    assert code == 0, printed
    assert "recipe lora on tiny: adapters of language_model (rank 16)" in printed
    assert re.search(r"global batch: 2 packed rows of 96 tokens, up to \d+ images", printed)
    assert "40 steps (" in printed
    assert f"internvl-jax chat --checkpoint {place / 'tiny'} --adapters {out / 'model'}" in printed
    steps = entries(out)
    assert [entry["step"] for entry in steps] == list(range(1, 41))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert steps[-1]["compiles"] == 1
    held = entries(out, "eval_loss")
    assert [entry["step"] for entry in held] == [20, 40]
    assert held[1]["eval_loss"] < held[0]["eval_loss"]
    logged = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in logged] == [20] * 3 + [40] * 3
    assert {answer["expected"] for answer in logged} <= {"red", "green", "blue"}
    assert any((out / "tensorboard").iterdir())
    assert any((out / "profile").rglob("*.xplane.pb"))
    chat = internvl_jax.load(place / "tiny", adapters=out / "model")
    assert chat.chat(logged[3]["question"], place / "images" / "heldout0.png").text == logged[3]["answer"]
    plain = logits(internvl_jax.load(place / "tiny"), pixels())
    assert np.abs(logits(chat, pixels()) - plain).max() > 0.1
    code, printed = train("lora", out, steps=40, learning_rate=3e-2)
    assert code == 0
    assert f"{out} is done" in printed


def test_whole_model_is_written_and_can_be_trained_again(train, place, tmp_path):
    code, _ = train("stage2", tmp_path / "run", steps=3)
    assert code == 0
    model = tmp_path / "run" / "model"
    before, after = (checkpoint.Reader(path) for path in (place / "tiny", model))
    assert before.leaves == after.leaves
    for name in before.leaves:
        same = np.array_equal(before.read(name), after.read(name))
        assert same == name.startswith("vision_model"), name
    assert internvl_jax.load(model).chat(QUESTION, place / "images" / "squares0.png").text is not None
    code, printed = train("lora", tmp_path / "again", checkpoint=model, steps=1)
    assert code == 0, printed


def test_stage_1_for_larger_images(train, place, tmp_path):
    code, printed = train("stage1", tmp_path / "run", image_size=84, steps=2, drop_path=0.1)
    assert code == 0, printed
    config = load_config(tmp_path / "run" / "model")
    assert (config.image_size, config.vision.image_size, config.tokens_per_image) == (84, 84, 9)
    chat = internvl_jax.load(tmp_path / "run" / "model")
    assert chat.processor.image_size == 84
    assert chat.params["vision_model"]["embeddings"]["position_embedding"].shape == (37, 40)
    assert chat.chat(QUESTION, place / "images" / "squares0.png").prompt_tokens > 9
    code, printed = train("stage2", tmp_path / "no", image_size=84)
    assert code == 2
    assert "for recipes that train the vision tower" in printed


def test_steps_and_image_slots_follow_the_data(place, tmp_path):
    options = prepare.RunOptions(
        replace(recipe_of("lora"), global_batch_size=2, epochs=3.0),
        place / "squares.json", tmp_path / "run", place / "tiny", packed=False, max_seq_length=96,
    )  # fmt: skip
    run = prepare.prepare(options)
    assert run.context.settings.steps == 36  # 24 conversations, 2 per step
    assert run.data.layout.image_slots == 2
    assert run.data.epoch.epoch == 24
    assert run.data.epoch.images == pytest.approx(20 / 24)
    packed = prepare.prepare(replace(options, packed=True))
    assert packed.context.settings.steps < 36
    assert packed.data.layout.image_slots >= 3


# Stops.


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_stopped_run_resumes_bit_for_bit(train, tmp_path, monkeypatch, workers):
    """With the real loader, whose position is saved in the checkpoint; with worker processes too."""
    assert train("lora", tmp_path / "straight", save_every=2)[0] == 0
    real = training_run.train

    def stopped(*args, hooks, **options):
        def log(entry):
            hooks.log(entry)
            if entry["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return real(*args, hooks=replace(hooks, log=log), **options)

    monkeypatch.setattr(training_run, "train", stopped)
    code, printed = train("lora", tmp_path / "parts", save_every=2, workers=workers)
    assert code == 1
    done = int(re.search(r"stopped after step (\d) of 6, which is saved: the same command resumes the run", printed)[1])
    assert done in (4, 5)
    assert not (tmp_path / "parts" / "model").exists()
    monkeypatch.undo()
    code, printed = train("lora", tmp_path / "parts", save_every=2, workers=workers)
    assert code == 0
    assert f"{tmp_path / 'parts'} resumes after step {done}" in printed
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "straight")
    trees = [checkpoint.load(tmp_path / name / "model", checkpoint.stored_tree(tmp_path / name / "model"))
             for name in ("parts", "straight")]  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_bfloat16_parameters(train, place, tmp_path, monkeypatch):
    """Stored in bfloat16, updated in float32; a stopped run resumes bit for bit."""
    options = {"param_dtype": "bfloat16", "learning_rate": 3e-2, "save_every": 2, "steps": 4}
    assert train("stage2", tmp_path / "straight", **options)[0] == 0
    real = training_run.train

    def stopped(*args, hooks, **options):
        stop = lambda entry: entry["step"] == 1 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        return real(*args, hooks=replace(hooks, log=stop), **options)

    monkeypatch.setattr(training_run, "train", stopped)
    code, printed = train("stage2", tmp_path / "parts", **options)
    assert code == 1, printed
    monkeypatch.undo()
    states = []

    def watched(*args, **options):
        outcome = real(*args, **options)
        states.append(outcome.state)
        return outcome

    monkeypatch.setattr(training_run, "train", watched)
    assert train("stage2", tmp_path / "parts", **options)[0] == 0
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "straight")
    assert entries(tmp_path / "parts")[-1]["loss"] < entries(tmp_path / "parts")[0]["loss"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(states[0].trained)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(states[0].optimizer[1][0].mu)} == {"float32"}
    code, printed = train("stage2", tmp_path / "parts", **{**options, "param_dtype": "float32"})
    assert code == 2
    assert "param_dtype was 'bfloat16', is 'float32'" in printed


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_ctrl_c_saves_and_says_how_to_resume(place, tmp_path, workers):
    """Ctrl-C goes to the whole process group, as a terminal sends it: workers that read data get it too."""
    out = tmp_path / "run"
    argv = f"train lora --data {place}/squares.json --checkpoint {place}/tiny --output {out}"
    argv += " --global-batch-size 2 --max-seq-length 96"
    process = subprocess.Popen(
        [sys.executable, "-m", "internvl_jax.cli.main", *argv.split(), "--steps=100000", f"--workers={workers}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            if (out / "metrics.jsonl").exists() and len(entries(out)) >= 3:
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1, printed
    done = re.search(r"stopped after step (\d+) of 100000, which is saved: the same command resumes the run", printed)[
        1
    ]
    assert "Traceback" not in printed
    assert [path.name for path in (out / "steps").iterdir()] == [done]
    assert entries(out)[-1]["step"] == int(done)


def test_derived_numbers_stay_when_a_run_resumes(train, tmp_path):
    assert train("lora", tmp_path / "run", steps=None, epochs=0.5)[0] == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert train("lora", tmp_path / "run", steps=None, epochs=0.5)[0] == 0
    code, printed = train("lora", tmp_path / "run", steps=written["steps"] + 1, epochs=None)
    assert code == 2
    assert "belongs to another run: " in printed
    assert f"steps was {written['steps']}, is {written['steps'] + 1}" in printed
    code, printed = train("lora", tmp_path / "run", steps=None, epochs=0.5, learning_rate=1)
    assert code == 2
    assert "another run: recipe.optimizer.learning_rate was 0.003, is 1.0. Resume with its settings" in printed


def test_messages_about_steps_are_printed_and_logged(train, tmp_path):
    out = tmp_path / "run"
    assert train("lora", out, steps=2, save_every=1)[0] == 0
    shutil.rmtree(out / "model")
    (out / ".model.tmp-99999" / "model").mkdir(parents=True)  # of a process that was killed
    (out / "steps" / "2" / "data" / "metadata").unlink()
    code, printed = train("lora", out, steps=2, save_every=1)
    assert code == 0
    assert sorted(path.name for path in (out / "steps").iterdir()) == ["1", "2", "damaged-2"]
    assert [entry["step"] for entry in entries(out)] == [1, 2, 2]
    assert not (out / ".model.tmp-99999").exists()
    assert (out / "model").is_dir()
    assert f"warning: removing {out}/.model.tmp-99999, which an interrupted process left" in printed
    moved = f"step 2 is damaged (data/metadata is missing); moved to {out}/steps/damaged-2"
    assert f"warning: {moved}" in printed
    assert moved in (out / "log.txt").read_text()
    code, printed = train("lora", out, "--from-scratch", steps=2, save_every=1)
    assert code == 2
    assert f"{out}/model exists: the run has ended" in printed


def test_a_second_run_into_one_output_is_refused(train, place, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(prepare, "open_data", None)  # refused before anything is read
    (tmp_path / "other").symlink_to(out)
    with files.claim(out):
        for name in (out, tmp_path / "other", tmp_path / "no" / ".." / "run"):
            code, printed = train("lora", name)
            assert code == 2
            assert re.search(rf"{out} is being written by process {os.getpid()} on .*: wait for it, or name", printed)
    assert not out.exists()


# Invalid data.


def test_data_errors(train, place, tmp_path):
    lines = (place / "squares.jsonl").read_text().splitlines()
    lines[3] = "{"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    bad = {"data": tmp_path / "bad.jsonl", "root": place}
    code, printed = train("lora", tmp_path / "run", steps=2, **bad)
    assert code == 0
    assert "1 of 24 checked conversations are invalid and will be skipped" in printed
    assert f"{tmp_path / 'bad.jsonl'}:4: not JSON" in printed
    assert "1 conversations were invalid and skipped: 1 annotation" in printed
    log = (tmp_path / "run" / "log.txt").read_text()
    for message in ("warning: skipped", "1 of 24 checked conversations", "1 conversations were invalid"):
        assert message in printed
    assert "1 of 24 checked conversations are invalid" in log
    assert re.search(r"WARNING internvl_jax\.training\.runs\.reporting: skipped .*bad\.jsonl:4: not JSON", log)
    assert re.search(r"INFO internvl_jax\.training\.runs\.reporting: step 2/2: loss", log)
    assert re.search(r"INFO .*: adapters: .*/run/model\n", log)
    code, printed = train("lora", tmp_path / "fatal", data_errors="fatal", **bad)
    assert code == 2
    assert re.search(r"1 of 24 checked samples are invalid; .*bad\.jsonl:4: not JSON", printed)
    assert not (tmp_path / "fatal").exists()
    value = {"squares": {"root": "nowhere", "annotation": str(place / "squares.jsonl")}}
    (tmp_path / "root.json").write_text(json.dumps(value))
    code, printed = train("lora", tmp_path / "nowhere", data=tmp_path / "root.json")
    assert code == 2
    assert re.search(r"none of 8 images can be read: is the data set's root right\? .*squares0\.png does not", printed)


# Refused before anything starts.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "stage3"}, "recipe 'stage3' is not known: stage1, stage2"),
        ({"data": "nowhere.json"}, "nowhere.json does not exist"),
        ({"checkpoint": "nowhere"}, "nowhere is not a directory"),
        ({"max_seq_length": 129}, "rows of 129 tokens are longer than the model's context of 128"),
        ({"max_seq_length": 5}, "no room for an image"),
        (
            {"global_batch_size": 3, "gradient_accumulation_steps": 2},
            "3 rows per step do not divide into",
        ),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"lora_rank": 0}, "a rank is positive"),
        ({"lora_targets": "query"}, "no layer query can have adapters: there are self_attn/q_proj"),
        ({"recipe": "stage2", "lora_rank": 4}, "recipe 'stage2' has no adapters"),
        ({"train": "vision"}, "vision cannot be trained"),
        ({"train": "language_model"}, "not both"),
        ({"mesh": "tensor=3"}, "the mesh data=1,fsdp=1,tensor=3 needs 3 devices"),
        ({"mesh": "tensor:2"}, "is not understood"),
        ({"vision_mode": "data"}, "give --mesh too"),
        ({"steps": 0}, "steps is 0"),
        ({"save_every": 0}, "save_every is 0"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"buckets": 200}, "must be shorter than rows of 96"),
        ({"image_size": 60, "recipe": "stage1"}, "patches"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_refused(train, tmp_path, options, message):
    code, printed = train(options.pop("recipe", "lora"), tmp_path / "run", **options)
    assert code == 2
    assert message in printed
    assert not (tmp_path / "run").exists()


def test_paths_are_resolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = prepare.RunOptions(
        recipe_of("lora"), Path("a/../m.json"), Path("~/runs"), eval_data=Path("./e.json")
    ).resolve_paths()
    assert (options.data, options.eval_data) == (tmp_path / "m.json", tmp_path / "e.json")
    assert options.output == Path.home() / "runs"
    assert (options.checkpoint, options.root) == (None, None)


def test_other_directories_are_refused(train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, printed = train("lora", tmp_path)
    assert code == 2
    assert "is not empty and holds no run.json" in printed
    code, printed = train("lora", tmp_path / "notes.txt")
    assert code == 2
    assert "is a file" in printed


def test_checkpoints_that_cannot_be_trained(train, place, tmp_path):
    shutil.copytree(place / "tiny", tmp_path / "published")
    shutil.rmtree(tmp_path / "published" / "params")
    code, printed = train("lora", tmp_path / "run", checkpoint=tmp_path / "published")
    assert code == 2
    assert "is not converted: internvl-jax convert" in printed


def test_a_full_disk_is_seen_before(train, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    code, printed = train("lora", tmp_path / "run")
    assert code == 2
    assert "has 1.00 kB left, and the run writes about" in printed


def test_missing_packages_are_named(train, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for name in ("grain", "tensorboardX"):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda wanted, name=name: None if wanted == name else find(wanted)
        )
        code, printed = train("lora", tmp_path / "run", "--tensorboard")
        assert code == 2
        assert "pip install 'internvl-jax[train]'" in printed


# Adapters.


@pytest.fixture(scope="module")
def adapters(place, tmp_path_factory):
    """Adapters of both towers that a run wrote."""
    out = tmp_path_factory.mktemp("adapters") / "run"
    argv = f"train lora-both --data {place}/squares.json --checkpoint {place}/tiny --output {out}"
    argv += " --global-batch-size 2 --max-seq-length 96"
    assert main.main([*argv.split(), "--steps", "3", "--learning-rate", "0.01"]) == 0
    return out / "model"


def test_merged_peft_and_unmerged_are_the_same_model(place, adapters, tmp_path, capsys):
    base = ["--checkpoint", str(place / "tiny")]
    assert main.main(["adapters", "merge", str(adapters), str(tmp_path / "merged"), *base]) == 0
    unmerged = logits(internvl_jax.load(place / "tiny", adapters=adapters), pixels())
    assert np.abs(unmerged - logits(internvl_jax.load(place / "tiny"), pixels())).max() > 0.1
    merged = logits(internvl_jax.load(tmp_path / "merged"), pixels())
    assert np.abs(merged - unmerged).max() < 1e-3
    pytest.importorskip("torch")  # of the extra 'convert'
    assert main.main(["adapters", "to-peft", str(adapters), str(tmp_path / "peft"), *base]) == 0
    assert main.main(["adapters", "from-peft", str(tmp_path / "peft"), str(tmp_path / "back"), *base]) == 0
    assert "chat --adapters" in capsys.readouterr().err
    back = logits(internvl_jax.load(place / "tiny", adapters=tmp_path / "back"), pixels())
    assert np.array_equal(back, unmerged)


def test_adapters_on_a_mesh_and_on_quantized_weights(place, adapters):
    unmerged = logits(internvl_jax.load(place / "tiny", adapters=adapters), pixels())
    on_mesh = logits(internvl_jax.load(place / "tiny", mesh="data=1", adapters=adapters), pixels())
    assert np.abs(on_mesh - unmerged).max() < 1e-3
    low = logits(internvl_jax.load(place / "tiny", quantize="int8", adapters=adapters), pixels())
    assert 0 < np.abs(low - unmerged).max() < 1


def test_adapters_that_do_not_fit(place, adapters, tmp_path, capsys):
    write_checkpoint(tmp_path / "wider", tiny_config(intermediate_size=64))
    code = main.main(["chat", "--checkpoint", str(tmp_path / "wider"), "--adapters", str(adapters), "Hi"])
    assert code == 2
    assert "the adapter is not of this model" in capsys.readouterr().err
    code = main.main(["chat", "--adapters", str(tmp_path), "Hi"])
    assert code == 2
    assert "holds no adapter" in capsys.readouterr().err
    code = main.main(["adapters", "merge", str(adapters), str(adapters), "--checkpoint", str(place / "tiny")])
    assert code == 2
    assert "exists already" in capsys.readouterr().err

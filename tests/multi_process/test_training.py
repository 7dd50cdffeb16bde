"""Training on two processes against one."""

import json
import os
import subprocess
import sys

import pytest
from support.mesh_training_cases import ADAMW, CONFIG, FULL, equal_numbers
from support.processes import free_port, run_two
from support.tiny_checkpoint import write_checkpoint, write_squares
from support.training_cases import Shares, run

from internvl_jax import checkpoint
from internvl_jax.cli import main
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe


def entries_of(directory, kind="loss"):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if kind in (entry := json.loads(line))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The metrics of one process."""
    directory, recipe = tmp_path_factory.mktemp("one") / "run", Recipe("full", FULL, ADAMW, 2, 48)
    run(directory, 4, recipe, placement=MeshPlacement(CONFIG), batches=Shares(CONFIG))
    return entries_of(directory)


def check_stop(results):
    """One was asked, and both ended after the step under way; both resumed."""
    for result in results:
        assert (result["stopped"]["step"], result["stopped"]["finished"]) == (2, False)
        assert result["resumed"]["finished"]


def test_two_processes_equal_one(tmp_path, expected):
    results = first, second = run_two("train", tmp_path, devices=2)
    parts = [{name: result[name].pop("parts") for name in ("stopped", "resumed")} for result in results]
    assert first == second | {"stopped": first["stopped"]}
    assert [of["resumed"] for of in parts] == [[0, 2], [1, 3]]
    check_stop(results)
    equal_numbers(entries_of(tmp_path / "parts"), expected)


@pytest.mark.long
def test_two_processes_bring_the_same_rows(tmp_path, expected):
    first, second = run_two("train_tensor", tmp_path, devices=2)
    assert first == second
    assert first["tensor"]["parts"] == [0, 1]
    assert "was written by 2 processes, now there are 1" in first["refused"]
    equal_numbers(entries_of(tmp_path / "tensor"), expected)


@pytest.mark.long  # on one process this is short (multi_device), and so is resuming on two
def test_two_processes_resume_on_another_mesh(tmp_path, expected):
    check_stop(run_two("train_elsewhere", tmp_path, devices=2))
    equal_numbers(entries_of(tmp_path / "parts"), expected)


def command(directory, output, *more):
    options = {
        "data": directory / "squares.json", "eval-data": directory / "heldout.json", "checkpoint": directory / "tiny",
        "output": output, "global-batch-size": 2, "max-seq-length": 96, "steps": 3, "lora-dropout": 0, "remat": "none",
    }  # fmt: skip
    return ["train", "lora", "--no-packing", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.mark.long  # the same training; the command's flags for two processes are tested with `eval`
def test_the_command_on_two_processes(tmp_path, monkeypatch):
    """What one process does, once: the same numbers, answers and adapters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "tiny")
    write_squares(tmp_path)
    write_squares(tmp_path, 6, "heldout", text_only=False)
    assert main.main(command(tmp_path, tmp_path / "one")) == 0
    where = ["--mesh=data=2", f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    argv = [sys.executable, "-m", "internvl_jax.cli.main", *command(tmp_path, tmp_path / "two", *where)]
    options = {"env": {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*argv, f"--process-id={n}"], **pipes, **options) for n in range(2)]
    printed = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert f"internvl-jax chat --checkpoint {tmp_path / 'tiny'} --adapters" in printed[0][1]
    assert "held-out loss" in printed[0][1]
    assert not any(word in printed[1][1] for word in ("recipe", "loss", "adapters"))
    equal_numbers(entries_of(tmp_path / "two"), entries_of(tmp_path / "one"))
    (mine,), (theirs,) = (entries_of(tmp_path / name, "eval_loss") for name in ("two", "one"))
    assert mine == {**theirs, "eval_loss": pytest.approx(theirs["eval_loss"], abs=5e-6)}
    assert (tmp_path / "two" / "answers.jsonl").read_text() == (tmp_path / "one" / "answers.jsonl").read_text()
    stored = [checkpoint.stored_tree(tmp_path / name / "model") for name in ("two", "one")]
    assert stored[0] == stored[1]

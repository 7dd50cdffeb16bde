"""Conversion and export refused or interrupted: every case says what is wrong, and nothing half-written is left."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from support.published import VIT_BIN, VIT_SAFE, single_file  # noqa: E402

from checkpoints_convert import export as export_module  # noqa: E402
from checkpoints_convert.convert import convert, load_hf  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import ConversionError  # noqa: E402
from checkpoints_convert.readers import open_weights  # noqa: E402
from internvl_jax import checkpoint  # noqa: E402
from internvl_jax.config import ConfigError, load_config  # noqa: E402
from internvl_jax.models import chat_model  # noqa: E402
from internvl_jax.training import saving  # noqa: E402
from internvl_jax.utils import files  # noqa: E402

SHARD = "pytorch_model-00001-of-00002.bin"

# What goes wrong, before anything is written.


@pytest.fixture(params=["bin", "safetensors"])
def broken(request, tmp_path):
    """A copy of a golden checkpoint to break, and its second shard."""
    source = VIT_BIN if request.param == "bin" else VIT_SAFE
    shutil.copytree(source, tmp_path / "hf")
    return tmp_path / "hf", next((tmp_path / "hf").glob("*model-00002*"))


def refused(source, tmp_path, error=ConversionError):
    """Convert, and read, what cannot be: nothing may be left; returns the message."""
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "made" / "ours")
    assert not (tmp_path / "made").exists()
    wanted = chat_model.abstract_params(load_config(VIT_BIN))
    with pytest.raises(error) as direct:
        load_hf(source, wanted)
    assert str(direct.value) == str(caught.value)
    return str(caught.value)


def test_missing_shards(broken, tmp_path):
    directory, shard = broken
    names = [path.name for path in directory.iterdir() if path.suffix == shard.suffix]
    for name in names:
        (directory / name).unlink()
    message = refused(directory, tmp_path)
    assert all(f"missing: {name}" in message for name in names)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.99])
def test_truncated_shard(broken, keep, tmp_path):
    directory, shard = broken
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    message = refused(directory, tmp_path)
    assert f"{shard.name} is truncated or damaged" in message
    assert "download it again" in message


def test_shard_of_noise(broken, tmp_path):
    directory, shard = broken
    shard.write_bytes(np.random.default_rng(0).bytes(5000))
    assert f"{shard.name} is truncated or damaged" in refused(directory, tmp_path)


def test_damaged_pickle(tmp_path):
    """A zip that is whole around a pickle that is not."""
    shutil.copytree(VIT_BIN, tmp_path / "hf")
    shard = tmp_path / "hf" / "pytorch_model-00001-of-00002.bin"
    data = bytearray(shard.read_bytes())
    where = data.index(b"encoder.layers.0")
    data[where - 5 : where + 40] = bytes(45)
    shard.write_bytes(data)
    assert shard.name in refused(tmp_path / "hf", tmp_path)


def test_git_lfs_pointer(broken, tmp_path):
    directory, shard = broken
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9931000000\n")
    assert "git lfs pull" in refused(directory, tmp_path)


def rewrite(shard, change):
    if shard.suffix == ".bin":
        state = torch.load(shard, weights_only=True)
        change(state)
        torch.save(state, shard)
    else:
        state = safetensors_torch.load_file(shard)
        state = {key: values.clone() for key, values in state.items()}
        change(state)
        safetensors_torch.save_file(state, shard)


def test_index_and_shard_differ(broken, tmp_path):
    directory, shard = broken
    gone = []

    def change(state):
        gone.append(sorted(state)[0])
        state["stowaway"] = state.pop(gone[0])

    rewrite(shard, change)
    message = refused(directory, tmp_path)
    assert f"{shard.name} lacks {gone[0]}" in message
    assert f"{shard.name} holds stowaway, which the index does not name there" in message


def test_missing_unexpected_and_misshapen_are_all_listed(tmp_path):
    def change(state):
        del state["encoder.layers.0.ls1"], state["encoder.layers.4.mlp.fc2.bias"]
        state["encoder.layers.5.ls1"] = torch.ones(80)
        state["head.weight"] = torch.ones(3, 80)
        state["encoder.layers.1.norm1.weight"] = torch.ones(81)

    message = refused(single_file(tmp_path, change), tmp_path)
    for line in (
        "missing: encoder.layers.0.ls1 [80]",
        "missing: encoder.layers.4.mlp.fc2.bias [80]",
        "unexpected: encoder.layers.5.ls1 [80]",
        "unexpected: head.weight [3, 80]",
        "misshapen: encoder.layers.1.norm1.weight is [81], config.json asks for [80]",
    ):
        assert line in message


def test_dtypes_that_cannot_be_kept(tmp_path):
    def change(state):
        state["encoder.layers.0.ls1"] = torch.ones(80, dtype=torch.int8)
        state["encoder.layers.2.ls2"] = state["encoder.layers.2.ls2"].to(torch.float8_e4m3fn)

    message = refused(single_file(tmp_path, change), tmp_path)
    assert "encoder.layers.0.ls1 is int8: only float32, float16, bfloat16 can be read" in message
    assert "encoder.layers.2.ls2 is float8_e4m3fn: only" in message


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_numbers_that_are_not_finite(number, quantize, tmp_path):
    def change(state):
        state["encoder.layers.3.attn.proj.weight"][5, 7] = number

    source = single_file(tmp_path, change)
    words = rf"encoder\.layers\.3\.attn\.proj\.weight has values that are not finite \({number} in bfloat16\)"
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "ours", quantize=quantize)
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ConversionError, match=words):
        load_hf(source, chat_model.abstract_params(load_config(VIT_BIN), jnp.bfloat16))


def test_export_of_numbers_that_are_not_finite(tmp_path):
    convert(VIT_BIN, tmp_path / "ours")
    chunk = tmp_path / "ours" / "params" / "vision_model.layers.ls1" / "3.0"
    chunk.write_bytes(chunk.read_bytes()[:-2] + b"\x80\x7f")
    with pytest.raises(checkpoint.CheckpointError, match=r"3\.0 is damaged"):
        export(tmp_path / "ours", tmp_path / "back")
    (tmp_path / "ours" / "params" / "checksums.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"vision_model/layers/ls1 .* not finite \(inf\)"):
        export(tmp_path / "ours", tmp_path / "back")
    assert os.listdir(tmp_path) == ["ours"]


class Code:
    def __reduce__(self):
        return os.system, ("echo was run >&2",)


def test_pickle_with_code_is_not_run(tmp_path, capfd):
    message = refused(single_file(tmp_path, lambda state: state.update(code=Code())), tmp_path)
    assert f"pytorch_model.bin holds more than tensors, it asks for {os.system.__module__}.system" in message
    assert "never run" in message
    assert "was run" not in capfd.readouterr().err


def test_pickle_of_other_things(tmp_path):
    message = refused(single_file(tmp_path, lambda state: state.update(epoch=3)), tmp_path)
    assert "epoch is a int, not a tensor" in message
    torch.save([torch.ones(3)], tmp_path / "hf" / "pytorch_model.bin")
    assert "holds a list" in refused(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "../other/pytorch_model.bin"}}', "outside its directory: ../other/pytorch_model.bin"),
        ('{"weight_map": {"a": "/other/pytorch_model.bin"}}', "outside its directory: /other/pytorch_model.bin"),
    ],
)
def test_unreadable_index(content, words, broken, tmp_path):
    directory, _ = broken
    next(directory.glob("*.index.json")).write_text(content)
    message = refused(directory, tmp_path)
    assert words in message
    assert ".index.json" in message


def test_shards_without_index(broken, tmp_path):
    directory, shard = broken
    index = next(directory.glob("*.index.json"))
    index.unlink()
    assert f"{shard.name} but no {index.name}" in refused(directory, tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "hf").mkdir()
    shutil.copy(VIT_BIN / "config.json", tmp_path / "hf")
    assert "has no weights" in refused(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not readable JSON"), ('{"model_type": "qwen2_vl"}', "model_type 'qwen2_vl'"), (None, "does not exist")],
)
def test_config_that_cannot_be_read(content, words, broken, tmp_path):
    directory, _ = broken
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    message = refused(directory, tmp_path, ConfigError)
    assert words in message
    assert "config.json" in message


def test_source_is_no_directory(tmp_path):
    with pytest.raises(ConversionError, match="is not a directory"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_converted_already(tmp_path):
    convert(VIT_BIN, tmp_path / "ours")
    with pytest.raises(ConversionError, match="converted already"):
        convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="convert a checkpoint"):
        export(VIT_BIN, tmp_path / "again")
    assert os.listdir(tmp_path) == ["ours"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_destination_exists(kind, tmp_path):
    convert(VIT_BIN, tmp_path / "ours")
    there = tmp_path / "there"
    {"directory": there.mkdir, "file": there.touch, "dangling link": lambda: there.symlink_to("nowhere")}[kind]()
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        with pytest.raises(ConversionError, match="exists already"):
            run(source, there)
    assert sorted(os.listdir(tmp_path)) == ["ours", "there"]


@pytest.mark.parametrize("change", ["config", "published", "damaged"])
def test_export_of_what_does_not_fit(change, tmp_path):
    ours = tmp_path / "ours"
    convert(VIT_BIN, ours)
    if change == "config":
        config = json.loads((ours / "config.json").read_text())
        (ours / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        words = "do not agree"
    elif change == "published":
        record = json.loads((ours / "published.json").read_text())
        del record["weight_map"]["encoder.layers.0.ls1"]
        (ours / "published.json").write_text(json.dumps(record))
        words = r"does not name encoder\.layers\.0\.ls1"
    else:
        next((ours / "params" / "vision_model.layers.ls1").glob("0.*")).unlink()
        words = "damaged or incomplete"
    with pytest.raises(ValueError, match=words):
        export(ours, tmp_path / "back")
    assert os.listdir(tmp_path) == ["ours"]


# What goes wrong while writing.


def test_not_enough_space(tmp_path, monkeypatch, logged):
    """What an interrupted run left is removed before the room is measured."""
    convert(VIT_BIN, tmp_path / "ours")
    usage = collections.namedtuple("usage", "total used free")

    def measure(path):
        assert not left.exists()
        return usage(2e6, 1e6, 1e6)

    monkeypatch.setattr(shutil, "disk_usage", measure)
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        left = files.temporary_path(tmp_path / "new", 7)
        left.mkdir()
        with pytest.raises(ConversionError, match=r"needs \d+\.\d\d MB, .* has 1\.00 MB left: free some space"):
            run(source, tmp_path / "new")
        assert logged.pop() == f"removing {left}, which an interrupted process left"
        with pytest.raises(ConversionError, match="needs"):
            run(source, tmp_path / "a" / "b" / "new")
    assert os.listdir(tmp_path) == ["ours"]


# TensorStore's words when a disk is full, and the system's.
FULL = (
    ValueError(
        'RESOURCE_EXHAUSTED: Failed to write 30208 bytes to file 4: No space left on device [os_error_code="28"]'
    ),
    OSError(28, "No space left on device"),
)


@pytest.mark.parametrize("error", [*FULL, KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_failure_in_the_middle_leaves_nothing(error, tmp_path, monkeypatch):
    convert(VIT_BIN, tmp_path / "ours")
    full = error in FULL

    def fail_later(function):
        calls = []

        def wrapper(*args):
            calls.append(args)
            if len(calls) > 20:
                assert any(".tmp-" in name for name in os.listdir(tmp_path))
                raise error
            return function(*args)

        return wrapper

    monkeypatch.setattr(checkpoint.Writer, "write", fail_later(checkpoint.Writer.write))
    monkeypatch.setattr(export_module, "write_at", fail_later(export_module.write_at))
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        with pytest.raises(ConversionError if full else type(error)) as caught:
            run(source, tmp_path / "new")
        assert ("is full" in str(caught.value)) == full
        assert os.listdir(tmp_path) == ["ours"]


def test_interrupt_by_the_user(tmp_path):
    """Ctrl-C reaches the converter in the middle of a write."""

    def interrupt(done, total, what):
        if done > total / 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(VIT_BIN, tmp_path / "new", progress=interrupt)
    assert not os.listdir(tmp_path)


KILL = """
import os, signal, sys
from checkpoints_convert.convert import convert
from checkpoints_convert.export import export
run = {"convert": convert, "export": export}[sys.argv[1]]
run(*sys.argv[2:4], progress=lambda done, total, what: done > total / 2 and os.kill(os.getpid(), int(sys.argv[4])))
"""


@pytest.mark.parametrize("command", ["convert", "export"])
def test_killed(command, tmp_path, logged):
    """What a process leaves that cannot clean up has a temporary name; the next one names and removes it."""
    source = VIT_BIN
    if command == "export":
        convert(VIT_BIN, source := tmp_path / "ours")
    args = [sys.executable, "-c", KILL, command, source, tmp_path / "out" / "new", str(int(signal.SIGKILL))]
    assert subprocess.run(args, check=False).returncode == -signal.SIGKILL
    names = sorted(os.listdir(tmp_path / "out"))
    (left,) = [name for name in names if name.startswith(".new.tmp-")]
    assert "new" not in names
    assert not checkpoint.is_converted(tmp_path / "out" / left)
    {"convert": convert, "export": export}[command](source, tmp_path / "out" / "new")
    assert logged == [f"removing {tmp_path / 'out' / left}, which an interrupted process left"]
    assert os.listdir(tmp_path / "out") == ["new"]


def test_two_into_one_place(tmp_path):
    """The second is refused and told who the first is."""
    refusals = []

    def meanwhile(done, total, what):
        if not refusals:
            script = "import sys; from checkpoints_convert.convert import convert; convert(*sys.argv[1:])"
            args = [sys.executable, "-c", script, VIT_BIN, tmp_path / "new"]
            refusals.append(subprocess.run(args, check=False, capture_output=True, text=True).stderr)

    convert(VIT_BIN, tmp_path / "new", progress=meanwhile)
    assert f"OutputInUseError: {tmp_path}/new is being written by process {os.getpid()} on " in refusals[0]
    assert os.listdir(tmp_path) == ["new"]


AWKWARD = ["a b", "a%20b", "a?b#c|d", "a\nb", "中文ü", "n" * 200, "-x", "~x", "link/../up", "a.tmp-3", "[a]*"]


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_names(name, tmp_path):
    """Everything goes to the very directory that is named."""
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/inner")
    wanted = tmp_path / "elsewhere" / "up" if name == "link/../up" else tmp_path / name
    convert(VIT_BIN, f"{tmp_path}/{name}/")
    assert (wanted / "params" / "vision_model.layers.ls1" / "0.0").is_file()
    export(f"{tmp_path}/{name}/", f"{tmp_path}/{name} back/")
    back = wanted.with_name(wanted.name + " back")
    state, again = (torch.load(path / SHARD, weights_only=True) for path in (VIT_BIN, back))
    assert {key: values.tolist() for key, values in state.items()} == {k: v.tolist() for k, v in again.items()}
    params = chat_model.abstract_params(load_config(wanted))
    loaded = checkpoint.load(f"{tmp_path}/{name}/", params)
    np.testing.assert_array_equal(
        np.asarray(loaded["vision_model"]["layers"]["ls1"][0], np.float32),
        state["encoder.layers.0.ls1"].float().numpy(),
    )


@pytest.mark.parametrize("name", ["a\\b", "\\", "a\\", "x.__lock", os.fsdecode(b"\xff")])
def test_names_that_tensorstore_misreads(name, tmp_path):
    for place in (tmp_path / name, tmp_path / name / "ours"):
        with pytest.raises(checkpoint.CheckpointError, match=r"TensorStore .*: rename the directory"):
            convert(VIT_BIN, place)
        with pytest.raises(checkpoint.CheckpointError, match="rename the directory"):
            checkpoint.save(place, {"mlp1": {"norm": {"scale": np.ones(4)}}})
        with pytest.raises(checkpoint.CheckpointError, match="rename the directory"):
            saving.is_existing_run(place, {})
    assert not os.listdir(tmp_path)
    shutil.copytree(VIT_BIN, tmp_path / name)
    if not name.isprintable():  # torch cannot either
        return
    convert(tmp_path / name, tmp_path / "ours")  # published files are read from anywhere
    (tmp_path / "ours").rename(tmp_path / name / "ours")
    with pytest.raises(checkpoint.CheckpointError, match="rename the directory"):
        checkpoint.Reader(tmp_path / name / "ours")

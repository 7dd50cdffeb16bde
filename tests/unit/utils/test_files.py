"""files.py: paths, text with byte order marks, outputs that appear whole and belong to one process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.full_disk import full_disk

from internvl_jax.utils import files

HOLD = """
import sys, time
from internvl_jax.utils import files
with files.claim(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_paths_are_resolved_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/inner")
    (tmp_path / "real/image.png").symlink_to("blob")
    assert files.resolve("~/x") == tmp_path / "x"
    assert files.resolve("link/../y") == tmp_path / "real/y"  # as the system reads it, not by the letter
    assert files.resolve("link/..") == tmp_path / "real"
    assert files.resolve("real/image.png") == tmp_path / "real/image.png"
    assert files.resolve("") == files.resolve(".") == tmp_path
    assert files.resolve("back\\slash/") == tmp_path / "back\\slash"
    with pytest.raises(ValueError, match="is not a path"):
        files.resolve("~nobody-has-this-name/x")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_are_read(tmp_path, mark):
    path = tmp_path / "a.json"
    path.write_bytes(mark + '{"a": "中"}'.encode())
    assert files.read_json(path) == {"a": "中"}


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "a.json"
    for data, message in (
        (b"{}\n\xff", r"a\.json:2: not UTF-8 text"),
        ("{}".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (b"{", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
    ):
        path.write_bytes(data)
        with pytest.raises(files.TextError, match=message):
            files.read_json(path)


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = files.write_text(tmp_path / ("n" * 250), "old")

    def write(error):
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(RuntimeError):
        write(RuntimeError())
    with pytest.raises(OSError, match="nnn") as caught:
        write(OSError(28, "No space left on device"))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_appending_all_or_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    with full_disk(100):
        files.append_text(path, "é" * 20)
        files.append_text(path, "b" * 20)
        with pytest.raises(OSError, match="No space left") as caught:
            files.append_text(path, "c" * 41)
    assert caught.value.filename == str(path)
    assert path.read_text(encoding="utf-8") == "é" * 20 + "b" * 20
    with pytest.raises(OSError, match="directory"):
        files.append_text(tmp_path, "x")


def test_json_with_lone_surrogates(tmp_path):
    value = {"é": ["\ud800 red", "\U0001f600"], "n": 1.5}
    path = files.write_text(tmp_path / "a.json", files.to_json(value))
    assert files.read_json(path) == value
    assert path.read_text(encoding="utf-8") == '{"é": ["\\ud800 red", "\U0001f600"], "n": 1.5}'
    assert files.replace_surrogates("a\udfffb") == "a\ufffdb"


def test_an_output_belongs_to_one_process(tmp_path):
    output = tmp_path / "out put"
    with subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = f"out put is being written by process {other.pid} on .*since"
        for _ in range(2):
            with pytest.raises(files.OutputInUseError, match=message), files.claim(output):
                pass
        with files.claim(tmp_path / "another"):
            pass
        other.kill()
    with files.claim(output):  # the lock of a dead process holds nobody up
        pass
    assert os.listdir(tmp_path) == []


def test_a_directory_in_one_that_cannot_be_written(tmp_path, monkeypatch):
    output = tmp_path / "disk"
    output.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    with files.claim(output):
        assert os.listdir(tmp_path) == ["disk"]
        assert ".lock" in os.listdir(output)
        with pytest.raises(files.OutputInUseError, match=f"by process {os.getpid()}"), files.claim(output):
            pass
    assert os.listdir(output) == []


def test_leftovers_are_named_and_removed(tmp_path, logged):
    output = tmp_path / "model"
    other = files.temporary_path(tmp_path / "model2", 5)
    for path in (files.temporary_path(output, 5), files.temporary_path(output, 6), files.temporary_path(output), other):
        path.mkdir()
        (path / "chunk").touch()
    files.remove_leftovers(output)
    assert sorted(tmp_path.iterdir()) == sorted([other, files.temporary_path(output)])
    assert [text.split()[1] for text in logged] == [f"{tmp_path}/.model.tmp-5,", f"{tmp_path}/.model.tmp-6,"]


def test_new_directory_appears_whole_or_not_at_all(tmp_path, logged):
    wanted = tmp_path / "a" / "model"

    def fill(error=None, **options):
        with files.new_directory(tmp_path / "a" / "b" / ".." / "model", **options) as directory:
            assert not (wanted / "file").exists()
            (directory / "file").write_text("content")
            if error is not None:
                raise error

    for error in (KeyError("a"), KeyboardInterrupt(), SystemExit(143)):  # a signal's handler raises such ones
        with pytest.raises(type(error)):
            fill(error)
        assert os.listdir(tmp_path) == []  # the parents that were made for it neither
    with pytest.raises(files.OutputError, match=r"the disk of .* is full, nothing was kept"):
        fill(OSError(28, "No space left on device"))
    (tmp_path / "a").mkdir()
    files.temporary_path(wanted).mkdir()  # of a killed process that had this one's number
    older = tmp_path / "a" / "model.tmp-712"
    older.mkdir()
    fill()
    assert logged == [
        f"{older} looks like what an interrupted run of an earlier version left: remove it",
        f"removing {files.temporary_path(wanted)}, which an interrupted process left",
    ]
    older.rmdir()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["a", "a/model", "a/model/file"]
    with pytest.raises(files.OutputError, match="exists already"):
        fill()
    (wanted / "file").rename(wanted / "old")
    with pytest.raises(KeyError):
        fill(KeyError("a"), replace=True)
    assert (wanted / "old").exists()
    fill(replace=True)
    assert os.listdir(wanted) == ["file"]
    assert os.listdir(tmp_path / "a") == ["model"]


def test_new_directory_belongs_to_one_process(tmp_path):
    with files.new_directory(tmp_path / "model"):
        args = [sys.executable, "-c", HOLD, tmp_path / "model"]
        other = subprocess.run(args, capture_output=True, text=True, check=False)
        assert f"model is being written by process {os.getpid()} on" in other.stderr
    assert os.listdir(tmp_path) == ["model"]


def test_new_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/model") as caught, files.new_directory(tmp_path / "file" / "model"):
        pass
    assert caught.value.filename == str(tmp_path / "file" / "model")


def test_new_directory_leaves_some_room_on_the_disk(tmp_path, monkeypatch):
    """What is needed must fit beside a reserve, to the byte."""
    left = SimpleNamespace(free=10**9 + files._SPARE)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: left)
    with files.new_directory(tmp_path / "a", 10**9):
        pass
    assert (tmp_path / "a").is_dir()
    left.free -= 1
    refused = r"b needs 1\.02 GB, .* has 1\.02 GB left"
    with pytest.raises(files.OutputError, match=refused), files.new_directory(tmp_path / "b", 10**9):
        pass
    assert not (tmp_path / "b").exists()

"""The small data sets: nothing that they did not write themselves is replaced."""

import json
import os

import pytest

from internvl_jax.evaluation.datasets import tiny
from internvl_jax.utils import files


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def quick(monkeypatch):
    """One question of GQA, without the rendering."""
    monkeypatch.setattr(
        tiny, "write_benchmarks", lambda root, count: tiny.write_json(root / "gqa/questions.json", {"count": count})
    )


def test_a_folder_with_real_data_is_left_alone(tmp_path, capsys, quick):
    (tmp_path / "data/pope").mkdir(parents=True)
    (tmp_path / "data/pope/llava_pope_test.jsonl").write_text("real")
    before = content(tmp_path)
    for directory in ("data", "data/pope", "data/pope/llava_pope_test.jsonl"):
        with pytest.raises(SystemExit):
            tiny.main([str(tmp_path / directory), "--count", "4"])
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path / directory} " in told
        assert told.endswith(": choose a new directory") or told.endswith("is a file: choose a directory")
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["data"]


def test_only_what_it_wrote_is_written_again(tmp_path, quick):
    """Empty directories and its own are written; there, a changed file stops it before anything is touched."""
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "link").symlink_to("data")
    tiny.main([str(tmp_path / "link"), "--count", "4"])
    first = content(root)
    assert set(first) == {"gqa/questions.json", tiny.MARKER}
    (root / "notes.txt").write_text("mine")
    path = root / "gqa/questions.json"
    path.unlink()
    leftover = files.temporary_path(root, 5)
    leftover.mkdir()
    tiny.write(root, 4)
    assert content(root) == first | {"notes.txt": b"mine"}
    assert not leftover.exists()
    tiny.write(root, 8)
    assert json.loads(path.read_text()) == {"count": 8}
    path.write_text("{}")
    before = content(root)
    for wrong in (lambda: None, path.unlink, path.mkdir):
        wrong()
        if path.exists():
            with pytest.raises(ValueError, match=f"{path} has been changed since it was written"):
                tiny.write(root, 4)
    path.rmdir()
    assert content(root) == {name: data for name, data in before.items() if name != str(path.relative_to(root))}
    (root / tiny.MARKER).write_text("[]")
    with pytest.raises(ValueError, match="is not from this command"):
        tiny.write(root, 4)
    assert sorted(os.listdir(tmp_path)) == ["data", "link"]


def test_counts_that_leave_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.main([str(tmp_path / "data"), "--count", "3"])
    assert "--count must be at least 4, not 3" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()

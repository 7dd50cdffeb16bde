"""The tutorial of docs/training.md, as it is written there, on fewer pictures and steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
from support.paths import ROOT

from internvl_jax.cli import main
from internvl_jax.nano import lesson

DOCS = ROOT / "docs" / "training.md"
SHORTER = {"internvl_jax.nano.lesson": ["--samples", "400"], "train": ["--steps", "36"]}


def commands():
    block = re.search(r"<!-- tutorial -->\n```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[1]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.long  # what its commands do is tested on smaller models too
def test_nano_learns_a_new_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "internvl_jax").symlink_to(ROOT / "internvl_jax")
    monkeypatch.chdir(tmp_path)
    answers = {}
    for program, *argv in commands():
        if program == "python":
            assert argv[:2] == ["-m", "internvl_jax.nano.lesson"]
            lesson.main([*argv[2:], *SHORTER[argv[1]]])
            continue
        assert program == "internvl-jax"
        if argv[0] == "export":
            pytest.importorskip("torch")
        assert main.main([*argv, *SHORTER.get(argv[0], [])]) == 0
        printed = capsys.readouterr()
        if argv[0] == "chat":
            answers[argv[-1]] = printed.out.strip()
        elif argv[:2] == ["data", "check"]:
            assert "⟦" in printed.out
            assert "cannot be used" not in printed.out
    metrics = [json.loads(line) for line in Path("runs/lesson/metrics.jsonl").read_text().splitlines()]
    held_out = [entry["eval_accuracy"] for entry in metrics if "eval_accuracy" in entry]
    assert held_out[-1] > 0.95
    assert answers == {"What kind of picture is this?": "words", "这是什么图片？": "手写数字"}
    assert Path("runs/lesson/pytorch/config.json").is_file()
    # What it could do before, it still can.
    capsys.readouterr()
    argv = ["--adapters", "runs/lesson/model", "--image", "internvl_jax/nano/images/shapes.png"]
    assert main.main(["chat", *argv, "How many shapes are there?"]) == 0
    assert capsys.readouterr().out.strip() == "5"

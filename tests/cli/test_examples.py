"""Every script in examples/ runs on nano and prints what its reader expects."""

import runpy

import pytest
from support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PRINTED = {
    "chat.py": ["How many shapes are there? 5", "Is there a circle? no"],
    "batch_inference.py": ["4 answers in", "shapes.png: How many shapes are there? 5", "word.png: What word"],
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in PRINTED[script.name]:
        assert expected in printed

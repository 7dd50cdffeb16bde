"""Every script in examples/ runs on nano and prints what its reader expects."""

import runpy

import pytest
from support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"convert_and_parity.py": ["torch"], "compile_for_slice.py": ["libtpu"], "lora_finetuning.py": ["grain"]}
PRINTED = {
    "compile_for_slice.py": ["encode: peak", "prefill: peak", "decode: peak", "mesh tensor=4"],
    "convert_and_parity.py": ["logits: KL max", "passed"],
    "lora_finetuning.py": ["recipe lora on nano", "What kind of picture is this? "],
    "evaluate.py": ["# POPE: nano", "**nano, this run**", "24 questions"],
    "chat.py": ["How many shapes are there? 5", "Is there a circle? yes"],
    "batch_inference.py": ["4 answers in", "shapes.png: How many shapes are there? 5", "word.png: What word"],
}


SHORTER = {"lora_finetuning.py": ["--steps", "2"]}  # all of its steps take minutes without XLA's optimizations


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example(script, tmp_path, monkeypatch, capsys):
    printed = run(script, SHORTER.get(script.name, []), tmp_path, monkeypatch, capsys)
    for expected in PRINTED[script.name]:
        assert expected in printed


@pytest.mark.long
def test_lora_finetuning_learns(tmp_path, monkeypatch, capsys):
    printed = run(ROOT / "examples" / "lora_finetuning.py", [], tmp_path, monkeypatch, capsys)
    assert "What kind of picture is this? words" in printed


def run(script, arguments, tmp_path, monkeypatch, capsys):
    """What an example prints."""
    for module in NEEDS.get(script.name, []):
        pytest.importorskip(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out

"""Every script in examples/ runs on nano and prints what its reader expects."""

import runpy

import pytest
from support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"convert_and_parity.py": ["torch"], "compile_for_slice.py": ["libtpu"], "lora_finetuning.py": ["grain"]}
PRINTED = {
    "compile_for_slice.py": ["encode: peak", "prefill: peak", "decode: peak", "mesh tensor=4"],
    "convert_and_parity.py": ["logits: KL max", "passed"],
    "lora_finetuning.py": ["recipe lora on nano", "What kind of picture is this? words"],
    "evaluate.py": ["# POPE: nano", "**nano, this run**", "24 questions"],
    "chat.py": ["How many shapes are there? 5", "Is there a circle? no"],
    "batch_inference.py": ["4 answers in", "shapes.png: How many shapes are there? 5", "word.png: What word"],
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example(script, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(script.name, []):
        pytest.importorskip(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in PRINTED[script.name]:
        assert expected in printed

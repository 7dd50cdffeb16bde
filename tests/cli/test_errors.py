"""Errors of the command line: one line that says what to do, exit codes, warnings."""

import logging
import shutil
import warnings

import pytest
from support.cli_cases import BUNDLE, FACTS, GOLDEN, IMAGE, LLAVA
from support.golden import DATA

from internvl_jax.cli import session


def test_errors_say_what_to_do(run, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((BUNDLE / FACTS["images"]["rgb"]["file"]).read_bytes()[:2000])
    text = tmp_path / "text[bold].txt"
    text.write_text("no image")
    empty = tmp_path / "empty"
    empty.mkdir()
    lonely = tmp_path / "llava"
    shutil.copytree(LLAVA / "original", lonely)
    for argv, message in (
        ((*GOLDEN, "--image", "nowhere.png", "Hi"), "nowhere.png does not exist"),
        ((*GOLDEN, "--image", truncated, "Hi"), f"{truncated} is damaged or truncated"),
        ((*GOLDEN, "--image", text, "Hi"), f"{text} is not an image in a format that can be read"),
        ((*GOLDEN, "--image", tmp_path, "Hi"), "is a directory, not an image"),
        ((*GOLDEN, "--image", IMAGE, "none.png"), "none.png does not exist"),
        ((*GOLDEN, "--num-beams", 0, "Hi"), "num_beams must be at least 1"),
        ((*GOLDEN, "--top-k", -1, "Hi"), "top_k must be at least 0"),
        ((*GOLDEN, "--top-p", 0, "Hi"), "top_p must lie in (0, 1]"),
        ((*GOLDEN, "--temperature", "nan", "Hi"), "temperature must be a number, not nan"),
        ((*GOLDEN, "--max-new-tokens", 0, "Hi"), "max_new_tokens must be at least 1"),
        ((*GOLDEN, "--repetition-penalty", 0, "Hi"), "repetition_penalty must be above 0"),
        ((*GOLDEN, "--seed", -1, "Hi"), "seed must be at least 0"),
        ((*GOLDEN, "--seed", 2**32, "Hi"), "seed must be at least 0 and below 2**31"),
        ((*GOLDEN, "--stop", "", "Hi"), "stop must be non-empty strings"),
        ((*GOLDEN, "bytes\udcff"), "the text is not valid UTF-8"),
        ((*GOLDEN, "--temperature", "-1", "Hi"), "temperature must be 0 (greedy) or more, not -1.0"),
        ((*GOLDEN, "--num-beams", 2, "--temperature", 1, "Hi"), "beam search does not sample"),
        ((*GOLDEN, "--mesh", "tensor:4", "Hi"), 'write for example "data=2,tensor=8"'),
        ((*GOLDEN, "--mesh", "tensor=4096", "Hi"), "needs 4096 devices"),
        ((*GOLDEN, "Look: <image>"), "no images are given"),
        (("chat", "--checkpoint", tmp_path / "nowhere", "Hi"), "nowhere does not exist: pass a directory"),
        (("chat", "--checkpoint", text, "Hi"), "is a file: pass the directory that holds config.json"),
        (("chat", "--checkpoint", empty, "Hi"), "config.json does not exist"),
        (
            ("chat", "--checkpoint", lonely, "Hi"),
            "which is published separately: put its directory (config.json",
        ),
        (("chat", "--checkpoint", DATA / "intern_vit" / "checkpoint_bin", "Hi"), "can only `encode`"),
        (("chat", "--checkpoint", DATA / "intern_vit" / "checkpoint_bin"), "can only `encode`"),  # not asked first
    ):
        monkeypatch.setattr(session.Session, "run", lambda _: pytest.fail("a session has started"))
        code, out, err = run(*argv)
        assert code == 2, argv
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1  # in one line, whatever the terminal's width


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "torch; pip install 'internvl-jax[convert]'"),
        (ImportError("no torch: pip install 'internvl-jax[convert]'"), 2, "pip install 'internvl-jax[convert]'"),
        (PermissionError(13, "Permission denied", "out"), 2, "Permission denied: 'out'"),
        (MemoryError(), 2, "too little memory (out of memory); try --dtype bfloat16"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB\nmore"), 2, "too little memory (RESOURCE_EXHAUSTED: 9 GB); try"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_of_the_machine(run, monkeypatch, raised, code, message):
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: (_ for _ in ()).throw(raised))
    got, out, err = run("chat", "Hi")
    assert (got, out) == (code, "")
    assert message in err


def test_our_own_mistakes_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr("internvl_jax.inference.loading.load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("chat", "Hi")


def test_warnings_are_one_line(run, monkeypatch):
    def load(*_, **__):
        logging.getLogger("internvl_jax.config.hf").warning("config.json: ignored fields: answer_style")
        warnings.warn("of a library", UserWarning, stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("internvl_jax.inference.loading.load", load)
    _, _, err = run("chat", "Hi")
    assert err == "warning: config.json: ignored fields: answer_style\nwarning: of a library\nerror: enough\n"


def test_an_answer_that_is_not_finite(golden, chat, monkeypatch):
    """Exit 1, a failed check, however the answer was wanted; a session goes on."""
    read = chat.generator.read

    def spoiled(state):
        rows, reasons, running = read(state)
        return rows, ["error"] * len(reasons), running & False

    monkeypatch.setattr(chat.generator, "read", spoiled)
    for argv in ((), ("--json",), ("--temperature", "1"), ("--stop", "x")):
        code, out, err = golden(*argv, "Hello")
        assert (code, out) == (1, "")
        assert err.startswith("error: the model's logits are not finite (NaN or Inf): its weights are damaged")
    code, out, err = golden(stdin="Hello\nHello\n")
    assert err.count("error: the model's logits are not finite") == 2

"""What the command line's tests share: commands in this process, the golden model read once."""

import io
import sys

import pytest
from support.cli_cases import CHECKPOINT, GOLDEN

import internvl_jax
from internvl_jax.cli import main


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Programs compiled in one process are read in the next."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """GOLDEN on a converted checkpoint, which processes read without torch."""
    pytest.importorskip("torch")
    from checkpoints_convert.convert import convert

    directory = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(CHECKPOINT, directory)
    return ("chat", "--checkpoint", str(directory), *GOLDEN[3:])


@pytest.fixture(scope="session")
def chat():
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    return internvl_jax.load(CHECKPOINT)


@pytest.fixture
def golden(run, chat, monkeypatch):
    """Run `chat` with the golden model, read once for all. What `load` was given is in `golden.loaded`."""

    def golden(*argv, **options):
        return run(*GOLDEN, *argv, **options)

    def load(path, options, **_):
        golden.loaded = (path, options)
        return chat

    monkeypatch.setattr("internvl_jax.inference.loading.load", load)
    return golden

"""Fixtures for whole runs: the benchmarks' files in small, nano loaded once, the command."""

import pytest
from support.evaluation_files import FAST

import internvl_jax
from internvl_jax.cli.main import main
from internvl_jax.evaluation.datasets import tiny
from internvl_jax.inference import loading


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("data")
    tiny.write(root, 8)
    return root


@pytest.fixture(scope="session")
def nano():
    return internvl_jax.load()


@pytest.fixture
def run(data, nano, tmp_path, monkeypatch):
    """Run a benchmark with nano, which is loaded once for all tests; returns (exit code, the run's directory)."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: nano)

    def run(name, *options, out="run"):
        code = main(["eval", name, "--data", str(data), "--output", str(tmp_path / out), *FAST, *options])
        return code, tmp_path / out

    return run

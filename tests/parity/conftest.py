"""What every parity test runs under."""

import pytest
from support.paths import DATA

try:
    import torch
except ImportError:  # some of these tests need only recorded outputs
    torch = None


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small run slower when torch splits them between threads."""
    threads = torch and torch.get_num_threads()
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The golden chat checkpoint in this project's format."""
    from checkpoints_convert.convert import convert

    directory = tmp_path_factory.mktemp("converted") / "jax"
    convert(DATA / "internvl_chat_v1_1" / "checkpoint", directory)
    return directory

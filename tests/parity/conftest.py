"""What every parity test runs under."""

import pytest

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

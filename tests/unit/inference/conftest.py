"""The golden checkpoint, loaded once."""

import pytest


@pytest.fixture(scope="package")
def chat():
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    from support.chat_cases import CHECKPOINT

    import internvl_jax

    return internvl_jax.load(CHECKPOINT)

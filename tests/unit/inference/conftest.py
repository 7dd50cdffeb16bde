"""The golden checkpoint, and a small random language model; each is made once."""

import jax
import jax.numpy as jnp
import pytest
from support.generation_cases import IMAGE, LLAMA, llama_weights

from internvl_jax.config import config_from_hf
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator


@pytest.fixture(scope="package")
def chat():
    pytest.importorskip("torch")  # the golden checkpoint is PyTorch's
    from support.chat_cases import CHECKPOINT

    import internvl_jax

    return internvl_jax.load(CHECKPOINT)


@pytest.fixture(scope="package")
def weights():
    return jax.tree.map(jnp.asarray, llama_weights(11))


@pytest.fixture(scope="package")
def model(weights):
    config = config_from_hf(LLAMA)
    return Generator(bind_model(config, {"language_model": weights}, dtype=jnp.float32), image_token_id=IMAGE)

"""What XLA's CPU backend needs is chosen on CPUs only: a GPU traces the same program as a TPU."""

import jax
import jax.numpy as jnp
import pytest
from support import modules

from internvl_jax.config import PRESETS
from internvl_jax.models import chat_model, cpu

CONFIG = PRESETS["nano"]()


def traced_for(backend, monkeypatch):
    """The gradient's jaxpr, images and all, as it is traced on a backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    params = chat_model.abstract_params(CONFIG)
    pixels = jax.ShapeDtypeStruct((1, 3, CONFIG.image_size, CONFIG.image_size), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(params, ids, pixels):
        return modules.forward(params, CONFIG, ids, pixels, image_token_id=3)[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss))(params, ids, pixels))


def test_a_gpu_runs_the_plain_program(monkeypatch):
    gpu = traced_for("gpu", monkeypatch)
    assert gpu == traced_for("tpu", monkeypatch)
    assert gpu != traced_for("cpu", monkeypatch)


@pytest.mark.parametrize(("backend", "expected"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_on_cpu(backend, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert cpu.on_cpu() is expected

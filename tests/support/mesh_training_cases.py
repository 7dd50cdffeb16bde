"""Training on meshes: the model, the optimizer, and how close its numbers are to one device's."""

import pytest
from support.tiny_model import tiny

from internvl_jax.training.optimizer import AdamW

# 5 heads in the tower, which nothing divides; 12 in the language model, which share 4: on tensor=8 they become 16, and
# the kv heads are repeated.
CONFIG = tiny(num_attention_heads=12, num_key_value_heads=4, head_dim=16)


# eps as large as gradients are: else Adam makes a whole step of the rounding of a gradient that is nearly zero.
ADAMW = AdamW(1e-2, warmup=0, eps=1e-3)


FULL = ("vision_model", "mlp1", "language_model")


def equal_numbers(entries, expected):
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in expected]
    for one, other in zip(entries, expected):
        assert one["loss"] == pytest.approx(other["loss"], abs=5e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=3e-6)
        for name in ("accuracy", "supervised", "read", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=1e-6), name

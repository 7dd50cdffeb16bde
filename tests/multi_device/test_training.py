"""Training on meshes of eight devices against one device.

Float32 sums are in another order. Measured differences: 5e-7 in losses of about 4, 3e-7 in gradient norms, 2e-6 of the
largest gradient and its square, 6e-8 in parameters. Ten times these are allowed.
"""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from support.golden import assert_close
from support.mesh_training_cases import ADAMW, CONFIG, FULL, equal_numbers
from support.tiny_model import IMAGE
from support.training_cases import RECIPES, Batches, run

from internvl_jax.lora import Lora
from internvl_jax.parallel.mesh import make_mesh
from internvl_jax.parallel.partitioning import path_of
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe

STEPS = 4
LORA = {
    "language_model": Lora(4, dropout=0.1, targets=("self_attn/o_proj", "mlp/gate_proj")),
    "vision_model": Lora(4, dropout=0.1, targets=("attn/qkv", "attn/proj")),
}
RECIPE = {
    **{name: replace(RECIPES[name], optimizer=ADAMW) for name in ("stage1", "stage2")},
    "full": Recipe("full", FULL, ADAMW, 2, 48, drop_path=0.3, z_loss=0.01),
    "both": Recipe("both", ("mlp1",), ADAMW, 2, 48, lora=LORA),
}


class Rows(Batches):
    """Batches of one length, of 8 rows or parts of them, with empty image slots. stop_at: sends SIGTERM."""

    def __init__(self, parts=1, stop_at=None, empty=1):
        super().__init__(CONFIG, rows=8 // parts)
        self.parts, self.stop_at, self.empty = parts, stop_at, empty

    def make(self, number):
        if number == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        whole = Batches(CONFIG, rows=8).make(8 * (number // self.parts))  # a multiple of 4: no longer rows
        batch = jax.tree.map(lambda leaf: leaf[number % self.parts :: self.parts], whole)
        pixels = np.pad(batch.pixel_values, [(0, self.empty), (0, 0), (0, 0), (0, 0)])
        return batch.replace(image_index=image_token_index(batch.input_ids == IMAGE), pixel_values=pixels)


def train(directory, name, mesh_spec=None, *, vision=None, accumulate=1, stop_at=None, remat="none"):
    """Every step's metrics, how the run ended, and its placement."""
    placement = MeshPlacement(CONFIG, None if mesh_spec is None else make_mesh(mesh_spec, config=CONFIG), vision)
    batches = Rows(accumulate, stop_at, empty=1 if vision is None else 8)  # as many as lie over all devices
    options = {"gradient_accumulation_steps": accumulate, "remat": remat, "chunk": 16, "save_every": STEPS}
    done = run(directory, STEPS, RECIPE[name], batches=batches, placement=placement, **options)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done, placement


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Metrics and state of a recipe on one device without a mesh."""
    known = {}

    def of(name):
        if name not in known:
            entries, done, _ = train(tmp_path_factory.mktemp(name) / "run", name)
            known[name] = entries, jax.device_get(done.state)
        return known[name]

    return of


def equal_states(true, expected):
    assert true.step == expected.step
    np.testing.assert_array_equal(true.key, expected.key)
    adam, other = true.optimizer[1][0], expected.optimizer[1][0]
    for what, ours, theirs in (
        ("", true.trained, expected.trained), ("mu ", adam.mu, other.mu), ("nu ", adam.nu, other.nu)
    ):  # fmt: skip
        for (keys, leaf), right in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            tolerance = 2e-5 * np.abs(right).max() if what else 6e-7
            assert_close(np.asarray(leaf), right, tolerance, f"{what}{path_of(keys)}")


def equal(found, expected):
    entries, done, placement = found
    equal_numbers(entries, expected[0])
    true = placement.unpad_state(done.state)
    equal_states(true, expected[1])
    if placement.mesh is None:
        return
    assert entries[-1]["compiles"] == 1  # the step's output has the shardings of its input
    for leaf, where in zip(
        jax.tree.leaves(done.state), jax.tree.leaves(placement.state_shardings(done.state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (leaf.shape, leaf.sharding, where)
    # Only zeros were cropped: padding is not trained, and has no moments.
    again = placement.pad_state(true)
    for leaf, expected in zip(jax.tree.leaves(done.state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(
    ("name", "mesh_spec", "options"),
    [
        pytest.param("stage1", "data=8", {}, marks=pytest.mark.long),
        pytest.param("stage1", "data=2,tensor=4", {"vision": "data"}, marks=pytest.mark.long),
        pytest.param("stage2", "fsdp=8", {}, marks=pytest.mark.long),
        ("stage2", "data=2,fsdp=2,tensor=2", {"accumulate": 2}),
        ("full", "tensor=8", {}),
        pytest.param("both", "tensor=4", {}, marks=pytest.mark.long),
        ("both", "fsdp=2,tensor=4", {"vision": "data", "remat": "full"}),
    ],
)
def test_mesh_equals_one_device(tmp_path, reference, name, mesh_spec, options):
    equal(train(tmp_path / "run", name, mesh_spec, **options), reference(name))


def test_resumes_on_another_mesh(tmp_path, reference):
    """Two steps on one mesh; the rest on another with other padding, and on one device without a mesh."""
    _, done, _ = train(tmp_path / "first", "full", "data=2,fsdp=2,tensor=2", stop_at=1)
    assert (done.step, done.finished) == (2, False)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    equal(train(tmp_path / "first", "full", "tensor=8"), reference("full"))
    equal(train(tmp_path / "second", "full"), reference("full"))


def test_rows_that_do_not_divide(tmp_path):
    with pytest.raises(ValueError, match="a batch of 4 rows does not divide over data=8"):
        train(tmp_path / "run", "stage2", "data=8", accumulate=2)

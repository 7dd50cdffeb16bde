"""FLOPs and memory of a step, against XLA's count and the arrays' real size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_checkpoint import tiny_config
from support.tiny_model import IMAGE, random_params

from internvl_jax.aot import hlo
from internvl_jax.data.batch import Batch
from internvl_jax.processing.conversation import image_token_index
from internvl_jax.training import recipes
from internvl_jax.training.context import TrainContext, TrainSettings
from internvl_jax.training.initialization import init_state
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.runs import costs
from internvl_jax.training.step import make_step, stack_batches

ROWS, LENGTH, IMAGES = 2, 256, 3


def config():
    """Wide enough for matrix products to dominate."""
    tiny = tiny_config(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64, intermediate_size=512
    )
    vision = dataclasses.replace(tiny.vision, hidden_size=160, intermediate_size=640, num_attention_heads=5)
    projector = dataclasses.replace(tiny.projector, in_features=640)
    text = dataclasses.replace(tiny.text, max_position_embeddings=512)
    return dataclasses.replace(tiny, vision=vision, projector=projector, text=text)


@pytest.mark.parametrize("name", ["stage1", pytest.param("stage2", marks=pytest.mark.long), "lora"])
def test_flops_are_those_of_the_compiled_step(name):
    model = config()
    recipe = dataclasses.replace(recipes.recipe_of(name), drop_path=0.0)
    adapters = {tower: dataclasses.replace(lora, dropout=0.0, rank=1) for tower, lora in recipe.lora.items()}
    recipe = dataclasses.replace(recipe, lora=adapters)
    context = TrainContext(recipe, TrainSettings(4, remat="none", chunk=LENGTH), MeshPlacement(model))
    ids = np.full((ROWS, LENGTH), 5, np.int32)
    ids[0, : IMAGES * 4] = IMAGE
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    pixels = np.ones((IMAGES, 3, 56, 56), np.float32)
    batch = stack_batches([Batch(ids, ids, np.ones_like(ids), positions, image_token_index(ids == IMAGE), pixels)])
    params = jax.tree.map(jnp.asarray, random_params(model))
    state, frozen = init_state(params, context)
    step = make_step(context)
    counted = hlo.flops(hlo.parse(step.lower(state, frozen, batch).compile().as_text()))
    ours = costs.batch_flops(model, recipe, batch, 1)
    # XLA computes the whole square of attention, and the head's forward pass twice.
    assert 1 < counted / ours < 1.2
    trained, frozen_count = costs.count_parameters(model, recipe)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    assert trained == count
    assert frozen_count == sum(leaf.size for leaf in jax.tree.leaves(frozen))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.trained, state.optimizer, frozen)))
    estimated, _ = costs.memory_per_device(context, costs.BatchShape(ROWS, LENGTH, IMAGES), "float32")
    assert estimated == pytest.approx(held + 4 * count, rel=0.01)

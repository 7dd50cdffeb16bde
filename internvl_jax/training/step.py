"""The compiled training step, and the batches that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax import lora
from internvl_jax.data.batch import Batch, global_image_index, pad_rows
from internvl_jax.models.layers import Params, Variables
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.training import objective, optimizer
from internvl_jax.training.context import TrainContext
from internvl_jax.training.initialization import abstract_state
from internvl_jax.training.mesh_placement import MeshPlacement
from internvl_jax.training.recipes import Recipe
from internvl_jax.training.state import State, split_adapters

StepFunction = jax.stages.Wrapped  # (State, frozen Params, Batch) -> (State, metrics)


def make_step(context: TrainContext) -> StepFunction:
    """Return the jitted training step: (state, frozen, batch) -> (state, metrics). It donates the state.

    The batch has micro-batches on a leading axis, [A,B,T] and so on, as `stack_batches` makes it. Metrics are float32
    scalars: loss, accuracy, grad_norm, learning_rate, supervised (tokens with a label) and read (tokens without
    padding).
    """
    groups = None
    if context.recipe.loss_mean == "device":
        groups = context.loss_groups or context.placement.num_row_shards
    learning_rate = optimizer.schedule(context.recipe.optimizer, context.settings.steps)

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        weights = objective.loss_weights(batch.labels, batch.segment_ids, groups)
        grads, sums = _accumulate_gradients(context, state, frozen, batch, weights)
        norm = optax.tree.norm(optimizer.full_precision(grads))
        trained, moments = optimizer.apply_gradients(context.optimizer, grads, state.optimizer, state.trained)
        metrics = {
            "loss": sums.loss,
            "accuracy": sums.num_correct / jnp.maximum(sums.num_supervised, 1),
            "grad_norm": norm,
            "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
            "supervised": sums.num_supervised,
            "read": sums.num_tokens,
        }
        return state.replace(step=state.step + 1, trained=trained, optimizer=moments), metrics

    # The state keeps its shardings: if XLA chose others, the next step would be another program.
    out_shardings = None
    if context.placement.mesh is not None:
        out_shardings = (context.placement.state_shardings(abstract_state(context)), context.placement.replicated)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def _accumulate_gradients(
    context: TrainContext, state: State, frozen: Params, batch: Batch, weights: Any
) -> tuple[Params, objective.LossSums]:
    """Add up gradients and sums over the micro-batches."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    grad_fn = jax.grad(partial(_micro_batch_loss, context), has_aux=True)

    def micro_batch_gradients(index: Any) -> tuple[Params, objective.LossSums]:
        part, part_weights = jax.tree.map(lambda x: x[index], (batch, weights))
        return grad_fn(state.trained, frozen, part, part_weights, jax.random.fold_in(key, index))

    grads, sums = micro_batch_gradients(0)
    num_micro_batches = batch.labels.shape[0]
    if num_micro_batches == 1:
        return grads, sums

    def add(total: Any, index: Any) -> tuple[Any, None]:
        grads, sums = micro_batch_gradients(index)
        return jax.tree.map(jnp.add, total, (optimizer.full_precision(grads), sums)), None

    first = (optimizer.full_precision(grads), sums)
    return jax.lax.scan(add, first, jnp.arange(1, num_micro_batches))[0]


def _micro_batch_loss(
    context: TrainContext, trained: Params, frozen: Params, batch: Batch, weights: Any, key: Any
) -> tuple[Any, objective.LossSums]:
    recipe = context.recipe
    rngs = {"dropout": jax.random.fold_in(key, 0)} if recipe.lora else {}
    if recipe.drop_path > 0 and "vision_model" in recipe.train:
        rngs["drop_path"] = jax.random.fold_in(key, 1)
    sums = context.loss(
        assemble_variables(trained, frozen, recipe),
        context.config,
        batch,
        weights,
        context.loss_options,
        rngs=rngs,
    )
    return sums.loss, sums


def assemble_variables(trained: Params, frozen: Params, recipe: Recipe) -> Variables:
    """Return the model's variables: trained and frozen parameters, and adapters as the collection "lora".

    Layers stay stacked on a CPU too, unlike for decoding: a scan copies each layer's weights, which costs little beside
    the products of a batch, and its backward pass writes gradients in place. A loop would hold slices of all layers and
    their gradients twice, and XLA's CPU backend undoes its rematerialization.

    Args:
        trained: Trained parts, and adapters under ADAPTERS.
        frozen: The other parts.
        recipe: Recipe with the adapters' settings.
    """
    parts, adapters = split_adapters(trained)
    return lora.attach({**frozen, **parts}, adapters or {}, recipe.lora)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Stack micro-batches on a new leading axis, with all rows padded to the longest."""
    length = max(batch.input_ids.shape[-1] for batch in batches)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(pad_rows(batch, length) for batch in batches))


def unstack_batches(batch: Batch) -> list[Batch]:
    """Return the micro-batches of a stacked batch."""
    return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(batch.labels.shape[0])]


def put_batch(batch: Batch, placement: MeshPlacement) -> Batch:
    """Put a stacked batch of this process's rows and images on the devices, as global arrays.

    Args:
        batch: Numpy arrays with micro-batches on the leading axis. Image slots are padded with empty ones if they do
            not divide over this process's part of the mesh.
        placement: Placement of the run.

    Returns:
        The global batch. Its `image_index` counts the visual tokens of all processes.

    Raises:
        MeshError: The rows do not divide over the mesh.
    """
    if placement.mesh is None:
        return jax.device_put(batch)
    shards = placement.num_data_shards
    mesh_lib.validate_mesh(placement.config, placement.mesh, batch.labels.shape[1] * shards)
    multiple = len(placement.row_shards)
    num_tokens = -(-batch.pixel_values.shape[1] // multiple) * placement.config.tokens_per_image
    image_index = global_image_index(batch.image_index, placement.row_shards, num_tokens)
    batch = batch.replace(image_index=image_index)
    sharding = NamedSharding(placement.mesh, P(None, BATCH))

    def put(values: np.ndarray) -> jax.Array:
        values = np.pad(values, [(0, 0), (0, -values.shape[1] % multiple), *[(0, 0)] * (values.ndim - 2)])
        shape = (values.shape[0], values.shape[1] * shards, *values.shape[2:])
        return jax.make_array_from_process_local_data(sharding, values, shape)

    return jax.tree.map(put, batch)

"""The state at the first step: parameters of a checkpoint, new adapters, optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import checkpoint, lora
from internvl_jax.config import ChatConfig
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Array, Params
from internvl_jax.training import optimizer
from internvl_jax.training.context import TrainContext
from internvl_jax.training.state import ADAPTERS, State

Progress = Callable[[int, int, str], None]


def read_params(
    directory: Path,
    context: TrainContext,
    *,
    param_dtype: Any,
    config: ChatConfig | None = None,
    progress: Progress | None = None,
) -> Params:
    """Read the parameters of a converted checkpoint: the vision layers that run, padded for the mesh.

    Args:
        directory: Converted checkpoint.
        context: Context of the run. Frozen parts are read in its computation dtype.
        param_dtype: Dtype of the trained parts.
        config: The checkpoint's configuration. None is that of the context, which has another image size if the
            vision tower is to be resized.
        progress: Called with bytes read, bytes in all, and a description.

    Raises:
        CheckpointError: The directory is not converted, or damaged.
    """
    placement = context.placement
    config = placement.config if config is None else config
    abstract = {}
    for name, part in abstract_for_running(config, jnp.float32).items():
        dtype = param_dtype if name in context.recipe.train else context.dtype
        abstract[name] = jax.tree.map(lambda leaf, dtype=dtype: jax.ShapeDtypeStruct(leaf.shape, dtype), part)
    if placement.mesh is None:
        return checkpoint.load(directory, abstract, progress=progress)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        placement.param_shardings(abstract, storage=True),
    )
    params = checkpoint.load(directory, abstract, progress=progress)
    return param_sharding.place_params(params, config, placement.mesh, vision=placement.vision)


def init_state(params: Params, context: TrainContext) -> tuple[State, Params]:
    """Return the state before the first step, and the frozen parameters.

    Adapters are drawn from the seed in true shapes, so that they are the same on every mesh.

    Args:
        params: Parameters of `read_params`. The trained ones become part of the state.
        context: Context of the run.

    Raises:
        ValueError: The model lacks a part that the recipe trains.
    """
    recipe, placement, adamw = context.recipe, context.placement, context.optimizer
    trained, frozen = optimizer.split(params, recipe.train)
    adapter_key, state_key = jax.random.split(jax.random.key(context.settings.seed))
    on_mesh = placement.mesh is not None
    if recipe.lora:
        true = jax.eval_shape(placement.unpad, params)

        def adapters() -> Params:
            return placement.pad({ADAPTERS: lora.init_adapters(adapter_key, true, recipe.lora)})

        shardings = placement.param_shardings(jax.eval_shape(adapters))
        trained = {**trained, **jax.jit(adapters, out_shardings=shardings if on_mesh else None)()}

    def rest_of_state(trained: Params) -> tuple[Array, Any, Array]:
        moments = adamw.init(optimizer.full_precision(trained))
        return jnp.zeros((), jnp.int32), moments, jax.random.key_data(state_key)

    step, moments, key = jax.eval_shape(rest_of_state, trained)
    where = placement.state_shardings(State(step, trained, moments, key))
    out_shardings = (where.step, where.optimizer, where.key) if on_mesh else None
    step, moments, key = jax.jit(rest_of_state, out_shardings=out_shardings)(trained)
    return State(step, trained, moments, key), frozen


def abstract_state(context: TrainContext) -> State:
    """Return the shapes of `init_state`'s state, with parameters in float32. Computes nothing."""
    params = jax.eval_shape(context.placement.pad, abstract_for_running(context.placement.config, jnp.float32))
    return jax.eval_shape(lambda params: init_state(params, context)[0], params)

"""What changes while a model is trained: parameters, optimizer and randomness, on a mesh and in true shapes.

On a mesh some shapes are padded (param_sharding.pad_params). What is saved never is, so any mesh can resume from it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax import checkpoint, lora
from internvl_jax.config import ChatConfig, load_config
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Array, Params
from internvl_jax.parallel import distributed
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.training import optimizer, resizing
from internvl_jax.training.recipes import Recipe
from internvl_jax.utils import files

Progress = Callable[[int, int, str], None]

ADAPTERS = "adapters"  # beside the parts of the model, in what is trained


class State(flax.struct.PyTreeNode):
    """Everything that a step changes, and that going on from a step needs, but for the place in the data."""

    step: Array  # [] int32, steps done
    trained: Params  # parts of the model by name, and adapters under ADAPTERS
    optimizer: Any  # optax's, of what is trained
    key: Array  # [2] uint32, of all randomness; each step folds its number in


class Place:
    """Where a run's arrays lie: a mesh with its rules, or one device. And which rows this process loads.

    Raises MeshError where the mesh's processes cannot share out rows, or this process has no device in it.
    """

    def __init__(self, config: ChatConfig, mesh: Mesh | None = None, vision: str | None = None):
        self.config, self.mesh = config, mesh
        self.vision = vision if vision is not None or mesh is None else mesh_lib.default_vision_mode(mesh)
        # The data are shared out to this many, of which this process is number `share`. Its rows are these of as many
        # equal parts of a batch as data and fsdp have devices.
        self.shares, self.share = 1, 0
        self.parts: tuple[int, ...] = (0,)
        if mesh is not None:
            shard_of_part, shares = mesh_lib.data_shards(mesh)
            if jax.process_index() not in shares:
                raise mesh_lib.MeshError(
                    f"process {jax.process_index()} has no device in the mesh {dict(mesh.shape)}: it must take in all "
                    f"{jax.device_count()} devices"
                )
            self.shares, self.share = len(set(shard_of_part)), shares[jax.process_index()]
            self.parts = tuple(part for part, shard in enumerate(shard_of_part) if shard == self.share)

    def specs(self, params: Params, *, storage: bool = False) -> Params:
        """Shardings of parameters and adapters; storage: of true shapes. On one device: None for every leaf."""
        if self.mesh is None:
            return jax.tree.map(lambda _: None, params)
        adapters, own = params.get(ADAPTERS), {name: part for name, part in params.items() if name != ADAPTERS}
        of = param_sharding.storage_shardings if storage else param_sharding.param_shardings
        placed = dict(of(own, self.mesh, vision=self.vision)) if own else {}
        if adapters is not None:
            placed[ADAPTERS] = param_sharding.adapter_shardings(adapters, self.mesh, vision=self.vision)
        return placed

    def pad(self, params: Params) -> Params:
        """True shapes to the mesh's. Under jit or eval_shape."""
        if self.mesh is None:
            return params
        fit = partial(param_sharding.pad_params, config=self.config, mesh=self.mesh, vision=self.vision)
        own = fit({name: part for name, part in params.items() if name != ADAPTERS})
        return {**own, ADAPTERS: fit(params[ADAPTERS])} if ADAPTERS in params else own

    def unpad(self, params: Params) -> Params:
        """The mesh's shapes to true ones. Under jit or eval_shape."""
        if self.mesh is None:
            return params
        own = param_sharding.unpad_params({n: part for n, part in params.items() if n != ADAPTERS}, self.config)
        return (
            {**own, ADAPTERS: param_sharding.unpad_params(params[ADAPTERS], self.config)} if ADAPTERS in params else own
        )

    def true_params(self, params: Params) -> Params:
        """`unpad` of arrays, laid out as their shapes allow."""
        if self.mesh is None:
            return dict(params)
        places = self.specs(jax.eval_shape(self.unpad, params), storage=True)
        return dict(jax.jit(self.unpad, out_shardings=places)(params))

    def resized(self, state: State, fit: Callable[[Params], Params], *, storage: bool) -> State:
        """The state with `fit` (pad or unpad) done to parameters and moments, laid out as their shapes allow."""

        def run(state: State) -> State:
            return state.replace(trained=fit(state.trained), optimizer=_over_params(fit, state.optimizer))

        abstract = jax.eval_shape(run, state)
        if self.mesh is None:
            return state
        where = self.shardings(abstract, storage=storage)
        if jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, state):
            return jax.device_put(state, where)
        return jax.jit(run, out_shardings=where)(state)

    def shardings(self, state: State, *, storage: bool = False) -> State:
        """A State of shardings, None everywhere on one device."""
        whole = None if self.mesh is None else NamedSharding(self.mesh, P())
        placed = _over_params(partial(self.specs, storage=storage), state.optimizer, lambda _: whole)
        return State(whole, self.specs(state.trained, storage=storage), placed, whole)

    def checksums(self, true: State) -> dict[str, int]:
        """A number for every array of a state in true shapes, by its name: other bits give another. Any mesh gives the
        same ones, and so does every process."""
        whole = None if self.mesh is None else NamedSharding(self.mesh, P())
        sums = jax.device_get(jax.jit(_checksums, out_shardings=whole)(true))
        return {
            jax.tree_util.keystr(keys, simple=True, separator="/"): int(value)
            for keys, value in jax.tree_util.tree_leaves_with_path(sums)
        }

    def abstract(self, state: State) -> State:
        """Shapes, dtypes and shardings of a state in true shapes, for reading one."""
        true = jax.eval_shape(
            lambda s: s.replace(trained=self.unpad(s.trained), optimizer=_over_params(self.unpad, s.optimizer)), state
        )
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), true)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            true,
            self.shardings(true, storage=True),
        )


def _over_params(function: Callable[[Any], Any], tree: Any, others: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """`function` of the trees of parameters in an optimizer state, its only dictionaries, `others` of other leaves."""
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, dict) else others(node),
        tree,
        is_leaf=lambda node: isinstance(node, dict),
    )


def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(leaf: Array) -> Array:
    """The sum of a hash of every element's bits and index, exact in any order of summation. [] uint32."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.sum(_mixed(bits ^ _mixed(index)), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
    """MurmurHash3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def read_params(
    directory: Path,
    config: ChatConfig,
    recipe: Recipe,
    place: Place,
    *,
    trained_dtype: Any,
    frozen_dtype: Any,
    progress: Progress | None = None,
) -> Params:
    """Parameters of a converted checkpoint as training wants them: layers that run, padded for the mesh.

    What is trained is read in trained_dtype, the rest in frozen_dtype.
    Raises CheckpointError where the directory is not converted, or damaged.
    """
    abstract = {
        name: jax.tree.map(
            lambda leaf, dtype=trained_dtype if name in recipe.train else frozen_dtype: jax.ShapeDtypeStruct(
                leaf.shape, dtype
            ),
            part,
        )
        for name, part in abstract_for_running(config, jnp.float32).items()
    }
    if place.mesh is None:
        return checkpoint.load(directory, abstract, progress=progress)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        place.specs(abstract, storage=True),
    )
    params = checkpoint.load(directory, abstract, progress=progress)
    return param_sharding.place_params(params, config, place.mesh, vision=place.vision)


def init_state(
    params: Params, recipe: Recipe, adamw: optax.GradientTransformation, place: Place, seed: int
) -> tuple[State, Params]:
    """The state before the first step, and the frozen parameters. params: as `read_params` gives them.

    Adapters are drawn from the seed, in true shapes, the same on every mesh.
    """
    trained, frozen = optimizer.split(params, recipe.train)
    drawn, rest = jax.random.split(jax.random.key(seed))
    if recipe.lora:
        true = jax.eval_shape(place.unpad, params)

        def adapters() -> Params:
            return place.pad({ADAPTERS: lora.init_adapters(drawn, true, recipe.lora)})

        places = place.specs(jax.eval_shape(adapters))
        trained = {**trained, **jax.jit(adapters, out_shardings=None if place.mesh is None else places)()}

    def rest_of(trained: Params) -> tuple[Array, Any, Array]:
        whole = optimizer.full_precision(trained)
        return jnp.zeros((), jnp.int32), adamw.init(whole), jax.random.key_data(rest)

    step, moments, key = jax.eval_shape(rest_of, trained)
    where = place.shardings(State(step, trained, moments, key))
    outs = None if place.mesh is None else (where.step, where.optimizer, where.key)
    step, moments, key = jax.jit(rest_of, out_shardings=outs)(trained)
    return State(step, trained, moments, key), frozen


def abstract_state(recipe: Recipe, adamw: optax.GradientTransformation, place: Place) -> State:
    """Shapes of `init_state`'s State, parameters in float32; computes nothing."""
    params = jax.eval_shape(place.pad, abstract_for_running(place.config, jnp.float32))
    return jax.eval_shape(lambda params: init_state(params, recipe, adamw, place, 0)[0], params)


def write_model(directory: str | Path, base: str | Path, trained: Params, place: Place, recipe: Recipe) -> None:
    """Write what was trained: a checkpoint that chats and exports, or, of adapters alone, an adapter directory.

    base: the converted checkpoint that the run began from. What is not trained, vision layers past select_layer
    included, is copied from it, and its dtypes are kept. trained: on the mesh, as a State holds it. A tower that was
    resized (place.config says so) is written for its new size.
    Raises CheckpointError where `directory` exists.
    """
    directory, base = Path(directory), Path(base)
    true = place.true_params(trained)
    adapters = true.pop(ADAPTERS, None)
    if not true and adapters is not None:
        lora.save(directory, adapters, recipe.lora)
        return
    resized = place.config.image_size != load_config(base).image_size
    texts = resizing.resized_files(base, place.config) if resized else None

    def write(to: Path) -> None:
        checkpoint.write_changed(to, base, true, reshaped=[resizing.POSITIONS] if resized else (), files=texts)

    if adapters is None:
        write(directory)
        return
    number = distributed.broadcast_from_process_0(str(os.getpid()).encode()).decode()
    within = files.temporary_path(directory, number)  # a model without its adapters must never stand at `directory`
    try:
        with distributed.process_0_first() as first:
            if first and os.path.lexists(directory):
                raise checkpoint.CheckpointError(f"{directory} exists already: remove it, or write somewhere else")
            if first:
                shutil.rmtree(within, ignore_errors=True)
                within.mkdir(parents=True)
        write(within / directory.name)
        lora.save(within / directory.name / ADAPTERS, adapters, recipe.lora)
        with distributed.process_0_first() as first:
            if first:
                (within / directory.name).rename(directory)
    finally:
        if distributed.is_process_0():
            shutil.rmtree(within, ignore_errors=True)

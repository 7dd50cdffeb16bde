"""Where the arrays of a training run are: on one device, or on a mesh where some of their shapes are padded.

What is saved is never padded, so that any mesh can resume from it (`param_sharding.pad_params`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.config import ChatConfig
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.training.state import ADAPTERS, State, checksum, map_param_trees, split_adapters


class MeshPlacement:
    """Places parameters, optimizer state and batches on a mesh, or on one device.

    Attributes:
        config: Configuration of the model.
        mesh: The mesh. None is one device.
        vision: Vision mode, a key of `mesh.IMAGE_AXES`.
        num_data_shards: Number of processes, or groups of processes, that load different rows.
        data_shard: Which of these this process is in.
        row_shards: Which rows this process loads: indices of the `num_row_shards` equal parts of a batch's rows.
    """

    def __init__(self, config: ChatConfig, mesh: Mesh | None = None, vision: str | None = None):
        """Make a placement.

        Args:
            config: Configuration of the model.
            mesh: Mesh of `make_mesh`. None for one device.
            vision: Vision mode. None chooses one for the mesh.

        Raises:
            MeshError: The mesh's processes cannot divide the rows among them, or this process has no device in it.
        """
        self.config, self.mesh = config, mesh
        self.vision = vision or ("tensor" if mesh is None else mesh_lib.default_vision_mode(mesh))
        self.num_data_shards, self.data_shard = 1, 0
        self.row_shards: tuple[int, ...] = (0,)
        if mesh is not None:
            data_shards, shard_of_process = mesh_lib.data_shards(mesh)
            if jax.process_index() not in shard_of_process:
                raise mesh_lib.MeshError(
                    f"process {jax.process_index()} has no device in the mesh {dict(mesh.shape)}: it must have all "
                    f"{jax.device_count()} devices"
                )
            self.num_data_shards, self.data_shard = len(set(data_shards)), shard_of_process[jax.process_index()]
            self.row_shards = tuple(row for row, shard in enumerate(data_shards) if shard == self.data_shard)

    @property
    def device(self) -> Any:
        """The first device."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def num_row_shards(self) -> int:
        """Number of parts that the mesh divides the rows of a batch into."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def image_axes(self) -> tuple[str, ...]:
        """Mesh axes that images are sharded over."""
        return BATCH if self.mesh is None else mesh_lib.IMAGE_AXES[self.vision]

    @property
    def replicated(self) -> NamedSharding | None:
        """Sharding of an array that every device holds whole. None on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    def param_shardings(self, params: Params, *, storage: bool = False) -> Params:
        """Return the shardings of parameters and adapters, None for every leaf on one device.

        Args:
            params: Parameters or their shapes, with adapters under ADAPTERS or without.
            storage: `params` have true shapes; otherwise those of the mesh.
        """
        if self.mesh is None:
            return jax.tree.map(lambda _: None, params)
        parts, adapters = split_adapters(params)
        shardings = param_sharding.storage_shardings if storage else param_sharding.param_shardings
        placed = dict(shardings(parts, self.mesh, vision=self.vision)) if parts else {}
        if adapters is not None:
            placed[ADAPTERS] = param_sharding.adapter_shardings(adapters, self.mesh, vision=self.vision)
        return placed

    def state_shardings(self, state: State, *, storage: bool = False) -> State:
        """Return a State of shardings, None everywhere on one device. `storage` as in `param_shardings`."""
        specs = partial(self.param_shardings, storage=storage)
        moments = map_param_trees(specs, state.optimizer, lambda _: self.replicated)
        return State(self.replicated, specs(state.trained), moments, self.replicated)

    def pad(self, params: Params) -> Params:
        """Pad parameters of true shapes for the mesh. Under jit or eval_shape."""
        if self.mesh is None:
            return params
        pad = partial(param_sharding.pad_params, config=self.config, mesh=self.mesh, vision=self.vision)
        parts, adapters = split_adapters(params)
        return pad(parts) if adapters is None else {**pad(parts), ADAPTERS: pad(adapters)}

    def unpad(self, params: Params) -> Params:
        """Crop the mesh's parameters to their true shapes. Under jit or eval_shape."""
        if self.mesh is None:
            return params
        unpad = partial(param_sharding.unpad_params, config=self.config)
        parts, adapters = split_adapters(params)
        return unpad(parts) if adapters is None else {**unpad(parts), ADAPTERS: unpad(adapters)}

    def unpadded_params(self, params: Params) -> Params:
        """Return the mesh's parameters in their true shapes, sharded as these allow."""
        if self.mesh is None:
            return dict(params)
        shardings = self.param_shardings(jax.eval_shape(self.unpad, params), storage=True)
        return dict(jax.jit(self.unpad, out_shardings=shardings)(params))

    def pad_state(self, state: State) -> State:
        """Return a state of true shapes as the mesh holds it."""
        return self._resize(state, self.pad, storage=False)

    def unpad_state(self, state: State) -> State:
        """Return the mesh's state in true shapes, sharded as these allow."""
        return self._resize(state, self.unpad, storage=True)

    def abstract_state(self, state: State) -> State:
        """Return shapes, dtypes and shardings of a state in true shapes, for reading it.

        Args:
            state: A state, or its shapes, as the mesh holds it.
        """
        true = jax.eval_shape(lambda state: _map_state_params(self.unpad, state), state)
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(self.device)
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), true)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            true,
            self.state_shardings(true, storage=True),
        )

    def checksums(self, state: State) -> dict[str, int]:
        """Return checksums of a state in true shapes by the arrays' names, the same in every process."""
        # A program per shape: a parameter's moments share it, and one program of hundreds of arrays compiles for long.
        # One after the other: XLA's CPU backend may begin programs that communicate in another order in each process.
        run = jax.jit(checksum, out_shardings=self.replicated)
        return {
            jax.tree_util.keystr(keys, simple=True, separator="/"): int(jax.device_get(run(leaf)))
            for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
        }

    def _resize(self, state: State, resize: Any, *, storage: bool) -> State:
        if self.mesh is None:
            return state
        resize_state = partial(_map_state_params, resize)
        abstract = jax.eval_shape(resize_state, state)
        shardings = self.state_shardings(abstract, storage=storage)
        if jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, state):
            return jax.device_put(state, shardings)
        return jax.jit(resize_state, out_shardings=shardings)(state)


def _map_state_params(function: Any, state: State) -> State:
    return state.replace(trained=function(state.trained), optimizer=map_param_trees(function, state.optimizer))

"""What is compiled ahead of time: a model on the mesh of a TPU slice, and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from internvl_jax.aot.compiled_program import bytes_per_device, mesh_name
from internvl_jax.aot.flags import DEFAULT, compiler_flags
from internvl_jax.aot.topology import Topology, parse_topology
from internvl_jax.config import PRESETS, ChatConfig, load_config
from internvl_jax.inference.loading import abstract_for_running
from internvl_jax.models import param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.quantize import quantize_params
from internvl_jax.utils.files import resolve


@dataclass(frozen=True)
class WorkloadRequest:
    """What a compile report is asked for, as a user writes it.

    Attributes:
        topology: TPU slice as `parse_topology` reads it, for example "v5e-8" or "v5e:2x4".
        preset: Name in `config.PRESETS`, or a directory with a config.json.
        mesh: Mesh as `mesh_lib.make_mesh` reads it, for example "data=2,tensor=4". None puts the largest legal size
            on the tensor axis and the other devices on the data axis.
        batch: Number of rows, each with one image. None is one row, or in `planner` the largest number that fits.
        length: Cache slots per row: tokens of the prompt and of the answer.
        prompt: Prompt tokens that prefill reads. None is `length`.
        vision: How the vision tower is partitioned, a key of `mesh_lib.IMAGE_AXES`. None:
            `mesh_lib.default_vision_mode` for single images.
        dtype: Computation dtype.
        cache_dtype: KV cache dtype. None is `dtype`.
        quantize: "int8" or "int4" weights. None keeps them in `dtype`.
        flags: Compiler flags, as `flags.compiler_flags` reads them.
    """

    topology: str
    preset: str = "internvl_chat_v1_1"
    mesh: str | None = None
    batch: int | None = None
    length: int = 2048
    prompt: int | None = None
    vision: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    quantize: str | None = None
    flags: str = DEFAULT


@dataclass(frozen=True)
class Workload:
    """A validated request: a model on the mesh of a slice, with abstract parameters.

    Attributes:
        config: Model configuration.
        topology: TPU slice.
        mesh: Mesh over the slice's devices.
        vision: How the vision tower is partitioned, a key of `mesh_lib.IMAGE_AXES`.
        params: ShapeDtypeStructs with shardings, padded for the mesh.
        batch: Number of rows, each with one image.
        length: Cache slots per row.
        prompt: Prompt tokens that prefill reads.
        dtype: Computation dtype.
        cache_dtype: KV cache dtype.
        quantize: Name of the weight quantization in `quantize.SCHEMES`, or None.
        flags: Compiler flags.
    """

    config: ChatConfig
    topology: Topology
    mesh: Mesh
    vision: str
    params: Params
    batch: int
    length: int
    prompt: int
    dtype: Any
    cache_dtype: Any
    quantize: str | None
    flags: Mapping[str, str]

    @property
    def image_axes(self) -> tuple[str, ...]:
        """Mesh axes over which a batch of images is partitioned."""
        return mesh_lib.IMAGE_AXES[self.vision]

    @property
    def mesh_name(self) -> str:
        """The mesh as the option --mesh takes it."""
        return mesh_name(self.mesh)

    def param_bytes(self, parts: Iterable[str] | None = None) -> int:
        """Return the bytes per chip of these parts of the parameter tree, by default of all of them."""
        names = self.params if parts is None else parts
        present = [self.params[name] for name in names if name in self.params]
        return self.topology.chip.devices * bytes_per_device(present)

    def unread_param_bytes(self, parts: Iterable[str]) -> int:
        """Return the bytes per chip of parameters that a program holds but hardly reads.

        That is the embedding table, of which a program reads a few rows, unless the table is also the output head.
        """
        language = self.params["language_model"] if "language_model" in parts else {}
        if "lm_head" not in language:
            return 0
        return self.topology.chip.devices * bytes_per_device(language["embed_tokens"])


_running_params = lru_cache(abstract_for_running)  # tracing the initialization of the full model takes seconds


def make_workload(request: WorkloadRequest) -> Workload:
    """Validate a request and describe the devices, the mesh and the parameters.

    Raises:
        ValueError: A value is not legal; the message lists the legal ones. `TopologyError` and `MeshError` are
            ValueErrors.
        ImportError: libtpu is not installed.
    """
    topology = parse_topology(request.topology)
    config = read_config(request.preset)
    batch = 1 if request.batch is None else request.batch
    if batch < 1:
        raise ValueError(f"a batch has at least one row, not {batch}")
    prompt = request.length if request.prompt is None else request.prompt
    if config.text is not None and not 1 <= prompt <= request.length <= config.text.context:
        raise ValueError(
            f"prompt {prompt} and length {request.length} must satisfy 1 <= prompt <= length <= "
            f"{config.text.context}, the model's context"
        )
    mesh = mesh_over(topology, request.mesh, config)
    mesh_lib.validate_mesh(config, mesh, batch)
    vision = request.vision or mesh_lib.default_vision_mode(mesh)
    dtype = jnp.dtype(request.dtype)
    return Workload(
        config=config,
        topology=topology,
        mesh=mesh,
        vision=vision,
        params=_abstract_params(config, mesh, vision, dtype, request.quantize),
        batch=batch,
        length=request.length,
        prompt=prompt,
        dtype=dtype,
        cache_dtype=jnp.dtype(request.cache_dtype or request.dtype),
        quantize=request.quantize,
        flags=compiler_flags(request.flags, topology.chip.name),
    )


def mesh_over(topology: Topology, spec: str | None, config: ChatConfig) -> Mesh:
    """Make a mesh over all devices of a slice.

    Raises:
        MeshError: The mesh does not use every device of the slice, or is not legal for the model.
    """
    devices = topology.devices()
    mesh = mesh_lib.make_mesh(spec, devices, config)
    if mesh.size != len(devices):
        raise mesh_lib.MeshError(
            f"the mesh {spec} uses {mesh.size} of the {len(devices)} devices of {topology.name}: choose a smaller "
            "slice, or put the other devices on the data axis"
        )
    return mesh


def read_config(preset: str) -> ChatConfig:
    """Return the configuration of a preset, or of a directory with a config.json.

    Raises:
        ValueError: `preset` is neither.
    """
    if preset in PRESETS:
        return PRESETS[preset]()
    directory = resolve(preset)
    if directory.exists():
        return load_config(directory)
    raise ValueError(f"preset {preset!r} is neither one of {', '.join(PRESETS)} nor a directory with a config.json")


def _abstract_params(config: ChatConfig, mesh: Mesh, vision: str, dtype: Any, scheme: str | None) -> Params:
    """Parameters that inference needs, as ShapeDtypeStructs: quantized, padded for the mesh, with shardings."""
    params = _running_params(config, dtype)
    if scheme is not None:
        params = jax.eval_shape(partial(quantize_params, scheme=scheme), params)
    params = jax.eval_shape(lambda tree: param_sharding.pad_params(tree, config, mesh, vision=vision), params)
    shardings = param_sharding.param_shardings(params, mesh, vision=vision)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params, shardings
    )

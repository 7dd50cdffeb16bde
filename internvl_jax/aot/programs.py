"""The inference programs: how each is lowered for a workload, and the FLOPs that it cannot do without.

The jitted functions of `inference.generation.generate` are lowered themselves, donation included, with
ShapeDtypeStructs that carry the shardings of `parallel.partitioning`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.aot.compiled_program import bytes_per_device
from internvl_jax.aot.workload import Workload
from internvl_jax.config import ChatConfig
from internvl_jax.inference.generation import generate, ideal_flops
from internvl_jax.inference.generation.bound_model import BoundModel, PromptBatch
from internvl_jax.inference.generation.generator import pad_images
from internvl_jax.inference.generation.sampling import GenerationConfig, RowSettings, make_row_settings
from internvl_jax.parallel.partitioning import fit_spec

ShapeDtype = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class InferenceProgram:
    """One jitted inference function.

    Attributes:
        lower: Lowers the function for a workload.
        parts: Parts of the parameter tree that the function reads.
        num_layers: Number of layers that run.
        ideal_flops: FLOPs of matrix products on all devices together, with the true number of heads and tokens and the
            true vocabulary size.
        items_per_call: Number of items, in `unit`, that one call yields.
        unit: Unit of the throughput.
    """

    lower: Callable[[Workload], jax.stages.Lowered]
    parts: tuple[str, ...]
    num_layers: Callable[[ChatConfig], int]
    ideal_flops: Callable[[Workload], float]
    items_per_call: Callable[[Workload], int]
    unit: str


def decode_state_bytes(workload: Workload) -> int:
    """Return the bytes per chip of the decode state, most of which is the KV cache."""
    with jax.set_mesh(workload.mesh):
        return workload.topology.chip.devices * bytes_per_device(_abstract_decode_state(workload))


def _lower_encode(workload: Workload) -> jax.stages.Lowered:
    config = workload.config
    pixels = ShapeDtype(
        (workload.batch, config.required_vision.num_channels, *[config.required_image_size] * 2), jnp.float32
    )
    multiple = math.prod(workload.mesh.shape[axis] for axis in workload.image_axes)
    pixels = jax.eval_shape(partial(pad_images, multiple=multiple), pixels)
    return generate.encode_step.lower(_bound_model(workload), pixels)


def _bound_model(workload: Workload) -> BoundModel:
    """What the inference steps take, with shapes in place of arrays."""
    return BoundModel(
        params=workload.params,
        config=workload.config,
        dtype=workload.dtype,
        cache_dtype=workload.cache_dtype,
        image_axes=workload.image_axes,
    )


def _prefill_arguments(workload: Workload) -> tuple[BoundModel, PromptBatch, RowSettings]:
    config, shape = workload.config, (workload.batch, workload.prompt)
    tokens, features, image_index = ShapeDtype(shape, jnp.int32), None, None
    if config.projector is not None and workload.prompt > config.tokens_per_image:
        features = ShapeDtype(
            (workload.batch, config.tokens_per_image, config.required_text.hidden_size), workload.dtype
        )
        features = jax.eval_shape(pad_images, features)
        features = ShapeDtype(features.shape, features.dtype, sharding=NamedSharding(workload.mesh, P()))
        image_index = tokens
    settings = make_row_settings(GenerationConfig(), workload.batch, config.required_text.eos_token_ids)
    settings = jax.tree.map(lambda row: ShapeDtype(row.shape, row.dtype), settings)
    prompt = PromptBatch(tokens, ShapeDtype(shape, bool), features, image_index)
    return _bound_model(workload), prompt, settings


def _lower_prefill(workload: Workload) -> jax.stages.Lowered:
    return generate.prefill_step.lower(*_prefill_arguments(workload), slots=workload.length)


def _abstract_decode_state(workload: Workload) -> generate.DecodeState:
    """The decode state that prefill returns, with the shardings that prefill gives it."""
    prefill = partial(generate.prefill_step, slots=workload.length)
    state = jax.eval_shape(prefill, *_prefill_arguments(workload))

    def with_sharding(leaf: Any, spec: P) -> Any:
        sharding = NamedSharding(workload.mesh, fit_spec(spec, leaf.shape, workload.mesh.shape))
        return ShapeDtype(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, state, generate.state_specs(state))


def _lower_decode(workload: Workload) -> jax.stages.Lowered:
    steps = ShapeDtype((), jnp.int32)
    return generate.decode_loop.lower(_bound_model(workload), _abstract_decode_state(workload), steps)


def _num_text_layers(config: ChatConfig) -> int:
    return config.required_text.num_hidden_layers


PROGRAMS = {
    "encode": InferenceProgram(
        lower=_lower_encode,
        parts=ideal_flops.PARTS["encode"],
        num_layers=lambda config: config.num_vision_layers,
        ideal_flops=lambda workload: ideal_flops.encode(workload.config, workload.batch),
        items_per_call=lambda workload: workload.batch,
        unit="images/s",
    ),
    "prefill": InferenceProgram(
        lower=_lower_prefill,
        parts=ideal_flops.PARTS["prefill"],
        num_layers=_num_text_layers,
        ideal_flops=lambda workload: ideal_flops.prefill(workload.config, workload.batch, workload.prompt),
        items_per_call=lambda workload: workload.batch * workload.prompt,
        unit="prompt tokens/s",
    ),
    "decode": InferenceProgram(
        lower=_lower_decode,
        parts=ideal_flops.PARTS["decode"],
        num_layers=_num_text_layers,
        ideal_flops=lambda workload: ideal_flops.decode(workload.config, workload.batch, workload.length),
        items_per_call=lambda workload: workload.batch,
        unit="tokens/s",
    ),
}

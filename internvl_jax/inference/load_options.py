"""How a checkpoint is loaded: the options that `load` and the command line share. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from internvl_jax.quantize import Scheme

DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("int8", *DTYPES)


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is loaded.

    Attributes:
        mesh: devices to shard the model over: a mesh of `mesh.make_mesh`, or its specification such as
            "data=2,tensor=4". Each device reads and holds only its shard. None: one device.
        vision_mode: how the vision tower uses the mesh: "tensor" shards its weights, "data" its images,
            "gather" both (`mesh.IMAGE_AXES`). None: `mesh.default_vision_mode` for `images_per_call`.
        images_per_call: how many images are usually encoded together.
        dtype: dtype of parameters and computation, one of DTYPES. None: bfloat16, on CPU float32 (XLA's CPU backend has
            no bfloat16 kernels).
        quantize: "int8" or "int4" weights (see quantize.py), quantized while they are read: no device holds more than
            one unquantized layer. None: as stored, which may be quantized.
        cache_dtype: dtype of the KV cache, one of CACHE_DTYPES. None: `dtype`.
        adapters: directory of low-rank adapters written by training. They are not merged, so the weights may be
            quantized. None: no adapters.
        template: name of a conversation template (`conversation_templates.TEMPLATES`). None: the checkpoint's.
    """

    mesh: Mesh | str | Mapping[str, int] | None = None
    vision_mode: str | None = None
    images_per_call: int = 1
    dtype: Any = None
    quantize: Scheme | str | None = None
    cache_dtype: Any = None
    adapters: str | Path | None = None
    template: str | None = None

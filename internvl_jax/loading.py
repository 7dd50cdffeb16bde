"""From a directory to the Chat that runs it: configuration, tokenizer, parameters onto their devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from internvl_jax import checkpoint, sharding
from internvl_jax.chat import Chat
from internvl_jax.config import ChatConfig, ConfigError, read_json
from internvl_jax.models import chat_model
from internvl_jax.models.layers import BATCH, Params
from internvl_jax.processing.images import ImageProcessor
from internvl_jax.processing.tokenizer import load_tokenizer

Progress = Callable[[int, int, str], None]

NANO = Path(__file__).parent / "nano" / "model"


def load(
    path: str | Path | None = None,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    dtype: Any = None,
    *,
    vision: str | None = None,
    progress: Progress | None = None,
) -> Chat:
    """Load a checkpoint and return the Chat that runs it.

    path: a directory that `internvl-jax convert` wrote, or a published Hugging Face directory as it is (extra
        `convert`). None: the small model "nano" that ships with the project.
    mesh: devices to spread the model over: a mesh of sharding.make_mesh, or what it makes one of, "data=2,tensor=4".
        Each device reads and holds its share only. None: one device.
    dtype: of parameters and compute, "bfloat16" or "float32". None: bfloat16 on TPU and GPU, float32 on CPU, whose XLA
        backend has no bfloat16 kernels.
    vision: how the vision tower lies on the mesh, "tensor" or "data" (sharding.IMAGE_AXES). None:
        sharding.default_vision_mode.
    progress: called as progress(done_bytes, total_bytes, what) while reading.
    Raises ConfigError, CheckpointError, TokenizerError, ImageError or MeshError (ValueErrors all) naming the file or
    the setting and what to do; everything but a damaged parameter is refused before parameters are read.
    """
    directory = NANO if path is None else Path(path).expanduser()
    if not directory.is_dir():
        if directory.exists():
            raise ConfigError(f"{directory} is a file: pass the directory that holds config.json")
        raise ConfigError(f"{directory} does not exist: pass a directory on this machine (nothing is downloaded here)")
    dtype = _dtype(dtype)
    config = ChatConfig.from_file(directory)
    if mesh is None:
        if vision is not None:
            raise ValueError(f"vision={vision!r} says how the tower lies on a mesh: pass a mesh too")
    else:
        mesh = _mesh(mesh, config)
        vision = sharding.default_vision_mode(mesh) if vision is None else vision
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = load_tokenizer(directory) if has_tokenizer and config.text is not None else None
    processor = _load_processor(directory, config)
    eos_token_ids = _generation_eos(directory)
    _enable_compilation_cache()
    return Chat(
        config,
        _load_params(directory, config, dtype, mesh, vision, progress),
        dtype=dtype,
        tokenizer=tokenizer,
        processor=processor,
        eos_token_ids=eos_token_ids,
        name="nano" if path is None else directory.resolve().name,
        mesh=mesh,
        image_axes=BATCH if mesh is None else sharding.IMAGE_AXES[vision],
    )


def abstract_for_running(config: ChatConfig, dtype: Any) -> Params:
    """The parameters that running needs: all but the vision layers past select_layer."""
    tree = chat_model.abstract_params(config, dtype)
    if config.vision is not None:
        count = config.num_vision_layers
        layers = tree["vision_model"]["layers"]
        tree["vision_model"]["layers"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), layers
        )
    return tree


def unstack_towers(params: Params) -> Params:
    """Both towers' layers as tuples, for CPU, where a scan copies every layer's weights at each step.

    On the host, where it is free: sliced by jax, every leaf would be copied by a program that is compiled first.
    """

    def layer(stack: Params, index: int) -> Params:
        return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index]), stack)

    towers: Params = {}
    for name in ("vision_model", "language_model"):
        if name in params:
            stack = params[name]["layers"]
            count = jax.tree.leaves(stack)[0].shape[0]
            towers[name] = {**params[name], "layers": tuple(layer(stack, index) for index in range(count))}
    return {**params, **towers}


def _dtype(dtype: Any) -> jnp.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype {getattr(known, 'name', dtype)!r} is not supported: use 'float32' or 'bfloat16'")
    return known


def _mesh(mesh: Mesh | str | Mapping[str, int], config: ChatConfig) -> Mesh:
    """The mesh that is meant, checked against the model's sizes."""
    if not isinstance(mesh, Mesh):
        return sharding.make_mesh(mesh, config=config)
    sharding.validate_mesh(config, mesh)
    return mesh


def _load_params(
    directory: Path, config: ChatConfig, dtype: Any, mesh: Mesh | None, vision: str | None, progress: Progress | None
) -> Params:
    abstract = abstract_for_running(config, dtype)
    if mesh is None:
        params = _read(directory, abstract, progress)
        return unstack_towers(params) if jax.default_backend() == "cpu" else params
    shardings = sharding.storage_shardings(abstract, mesh, vision=vision)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, shardings
    )
    return sharding.place_params(_read(directory, abstract, progress), config, mesh, vision=vision)


def _read(directory: Path, abstract: Params, progress: Progress | None) -> Params:
    if checkpoint.is_converted(directory):
        return checkpoint.load(directory, abstract, progress=progress)
    try:
        from checkpoints_convert.convert import load_hf
    except ImportError as error:
        raise ImportError(
            f"{directory} is not converted, and reading PyTorch weights needs more packages ({error}): "
            "pip install 'internvl-jax[convert]'"
        ) from None
    return load_hf(directory, abstract, progress=progress)


def _load_processor(directory: Path, config: ChatConfig) -> ImageProcessor | None:
    """The image processor of a model that sees; None where its file is absent: `encode` and `generate` need none."""
    if config.vision is None or not (directory / "preprocessor_config.json").exists():
        return None
    return ImageProcessor.from_dir(directory, config.image_size, pad_to_square=config.pad_to_square)


def _generation_eos(directory: Path) -> tuple[int, ...] | None:
    """The end tokens of generation_config.json, where there is one: transformers prefers them to config.json's."""
    path = directory / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    if eos is None:
        return None
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{path} has eos_token_id {eos!r}: a token id or a list of them is needed")
    return ids


def _enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second process starts fast.

    jax's own settings go first: JAX_COMPILATION_CACHE_DIR chooses another place, JAX_ENABLE_COMPILATION_CACHE=0 none.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "internvl_jax" / "xla"))
    # By default only programs that took over a second to compile are kept; nano's all take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

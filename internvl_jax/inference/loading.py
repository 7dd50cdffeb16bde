"""From a directory to the Chat that runs it: configuration, tokenizer, parameters onto their devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from internvl_jax import checkpoint, lora
from internvl_jax.config import ChatConfig, ConfigError, load_config
from internvl_jax.config.chat_template import find_template
from internvl_jax.config.conversation_templates import TEMPLATES
from internvl_jax.inference.chat import Chat
from internvl_jax.models import chat_model, param_sharding
from internvl_jax.models.layers import Params
from internvl_jax.models.stack import unstack
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel.partitioning import BATCH
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import load_tokenizer
from internvl_jax.quantize import QuantizeError, Scheme, quantize_params, scheme_of
from internvl_jax.utils import files
from internvl_jax.utils.files import read_json_object

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

DTYPES = ("float32", "bfloat16")
NANO = Path(__file__).parents[1] / "nano" / "model"


def load(
    path: str | Path | None = None,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    dtype: Any = None,
    *,
    vision: str | None = None,
    quantize: Scheme | str | None = None,
    cache_dtype: Any = None,
    adapters: str | Path | None = None,
    template: str | None = None,
    progress: Progress | None = None,
) -> Chat:
    """Load a checkpoint and return the Chat that runs it.

    path: a directory that `internvl-jax convert` wrote, or a published Hugging Face directory as it is (extra
        `convert`). None: the small model "nano" that ships with the project.
    mesh: devices to spread the model over: a mesh of mesh.make_mesh, or what it makes one of, "data=2,tensor=4".
        Each device reads and holds its share only. None: one device.
    dtype: of parameters and compute, "bfloat16" or "float32". None: bfloat16 on TPU and GPU, float32 on CPU, whose XLA
        backend has no bfloat16 kernels.
    vision: how the vision tower lies on the mesh, "tensor" or "data" (mesh.IMAGE_AXES). None:
        mesh.default_vision_mode.
    quantize: "int8" or "int4" weights (quantize.py says which), quantized while they are read, so that no device ever
        holds more than one layer as it was. None: as they are stored, which may be quantized already.
    cache_dtype: of keys and values of what was read, "int8" for half the memory of bfloat16. None: dtype.
    adapters: a directory of low-rank adapters that training wrote; they stay beside the weights, quantized ones too.
    template: the conversation template to ask in, a name of processing.conversation.TEMPLATES. None: what the
        checkpoint says; one whose own is not among them loads, but answers arrays only.
    progress: called as progress(done_bytes, total_bytes, what) while reading.
    Raises ConfigError, CheckpointError, TokenizerError, ImageError, MeshError, QuantizeError or LoraError (ValueErrors
    all) naming the file or the setting and what to do; everything but a damaged parameter is refused before parameters
    are read.
    """
    directory = NANO if path is None else files.resolve(path)
    if not directory.is_dir():
        if directory.exists():
            raise ConfigError(f"{directory} is a file: pass the directory that holds config.json")
        raise ConfigError(f"{directory} does not exist: pass a directory on this machine (nothing is downloaded here)")
    dtype = _dtype(dtype)
    cache_dtype = dtype if cache_dtype is None else _dtype(cache_dtype, "cache_dtype", ("int8", *DTYPES))
    config = load_config(directory)
    if template is not None:
        if template not in TEMPLATES:
            raise ValueError(
                f"there is no conversation template {template!r}; there are {', '.join(sorted(TEMPLATES))}"
            )
        config = replace(config, template=template)
    elif config.layout == "llava_hf" and not _says_template(directory, config):
        logger.warning(
            "%s says nowhere which conversation template it was trained with: %s is assumed; load(template=...) or "
            "--template names another",
            directory,
            config.template,
        )
    if mesh is None:
        if vision is not None:
            raise ValueError(f"vision={vision!r} says how the tower lies on a mesh: pass a mesh too")
    else:
        mesh = _mesh(mesh, config)
        vision = mesh_lib.default_vision_mode(mesh) if vision is None else vision
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = load_tokenizer(directory) if has_tokenizer and config.text is not None else None
    processor = load_processor(directory, config)
    eos_token_ids = _generation_eos(directory)
    added = None if adapters is None else lora.load(adapters, abstract_for_running(config, dtype))
    enable_compilation_cache()
    params = _load_params(directory, config, dtype, mesh, vision, quantize, progress)
    attached = None
    if added is not None:
        pairs, settings = added
        pairs = jax.device_get(pairs)
        if mesh is not None:
            replaced = {name: pairs.pop(name) for name in (lora.REPLACED,) if name in pairs}
            pairs = {**param_sharding.place_adapters(pairs, config, mesh, vision=vision), **replaced}
        variables = lora.attach(params, pairs, settings)
        params, attached = variables["params"], variables["lora"]
        if _runs_unstacked(mesh):
            attached = unstack_towers(attached)
    return Chat(
        config,
        params,
        dtype=dtype,
        cache_dtype=cache_dtype,
        tokenizer=tokenizer,
        processor=processor,
        eos_token_ids=eos_token_ids,
        name="nano" if path is None else directory.resolve().name,
        mesh=mesh,
        image_axes=BATCH if mesh is None else mesh_lib.IMAGE_AXES[vision],
        adapters=attached,
    )


def _says_template(directory: Path, config: ChatConfig) -> bool:
    named = read_json_object(directory / "config.json", ConfigError).get("template")
    return named is not None or find_template(directory, config.layout) is not None


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


def _runs_unstacked(mesh: Mesh | None) -> bool:
    return mesh is None and jax.default_backend() == "cpu"


def unstack_towers(params: Params) -> Params:
    """Both towers' layers as tuples, for CPU, where a scan copies every layer's weights at each step.

    Args:
        params: one collection, parameters or adapters.
    """
    towers = {name: params[name] for name in ("vision_model", "language_model") if name in params}
    return {**params, **{name: {**tower, "layers": unstack(tower["layers"])} for name, tower in towers.items()}}


def _dtype(dtype: Any, what: str = "dtype", names: tuple[str, ...] = DTYPES) -> jnp.dtype:
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    name = getattr(known, "name", dtype)
    if name not in names:
        raise ValueError(f"{what} {name!r} is not supported: use {' or '.join(map(repr, names))}")
    return known


def _mesh(mesh: Mesh | str | Mapping[str, int], config: ChatConfig) -> Mesh:
    """The mesh that is meant, checked against the model's sizes."""
    if not isinstance(mesh, Mesh):
        return mesh_lib.make_mesh(mesh, config=config)
    mesh_lib.validate_mesh(config, mesh)
    return mesh


def _load_params(
    directory: Path,
    config: ChatConfig,
    dtype: Any,
    mesh: Mesh | None,
    vision: str | None,
    scheme: Scheme | str | None,
    progress: Progress | None,
) -> Params:
    abstract = _quantized(abstract_for_running(config, dtype), directory, scheme)
    if mesh is None:
        params = _read(directory, abstract, progress)
        return unstack_towers(params) if _runs_unstacked(mesh) else params
    shardings = param_sharding.storage_shardings(abstract, mesh, vision=vision)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, shardings
    )
    return param_sharding.place_params(_read(directory, abstract, progress), config, mesh, vision=vision)


def _quantized(abstract: Params, directory: Path, scheme: Scheme | str | None) -> Params:
    """What is wanted of parameters that are stored as they were, or quantized as they are stored."""
    scheme = Scheme(scheme) if isinstance(scheme, str) else scheme
    stored = scheme_of(checkpoint.stored_tree(directory)) if checkpoint.is_converted(directory) else None
    if stored is not None and scheme not in (None, stored):
        raise QuantizeError(
            f"{directory} is {stored.name} already: leave quantize out, or quantize the weights as they were published"
        )
    wanted = stored or scheme
    return jax.eval_shape(partial(quantize_params, scheme=wanted), abstract) if wanted else abstract


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


def _generation_eos(directory: Path) -> tuple[int, ...] | None:
    """The end tokens of generation_config.json, where there is one: transformers prefers them to config.json's."""
    path = directory / "generation_config.json"
    eos = read_json_object(path, ConfigError).get("eos_token_id") if path.exists() else None
    if eos is None:
        return None
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{path} has eos_token_id {eos!r}: a token id or a list of them is needed")
    return ids


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the second process starts fast.

    jax's own settings go first: JAX_COMPILATION_CACHE_DIR chooses another place, JAX_ENABLE_COMPILATION_CACHE=0 none.
    """
    values = jax.config.values
    if values["jax_compilation_cache_dir"] is not None or not values["jax_enable_compilation_cache"]:
        return
    directory = files.cache_directory("xla")
    if directory is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # By default only programs that took over a second to compile are kept; nano's all take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

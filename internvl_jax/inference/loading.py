"""From a checkpoint directory to a Chat: configuration, tokenizer, and parameters on their devices."""

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
from internvl_jax.inference.generation.bound_model import bind_model
from internvl_jax.inference.generation.generator import Generator
from internvl_jax.inference.load_options import CACHE_DTYPES, DTYPES, LoadOptions
from internvl_jax.models import chat_model, param_sharding
from internvl_jax.models.cpu import on_cpu
from internvl_jax.models.layers import Params
from internvl_jax.models.stack import unstack
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.processing.images import load_processor
from internvl_jax.processing.tokenizer import Tokenizer, load_tokenizer
from internvl_jax.quantize import QuantizeError, Scheme, quantize_params, scheme_of
from internvl_jax.utils import files
from internvl_jax.utils.files import read_json_object

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

NANO = Path(__file__).parents[1] / "nano" / "model"


def load(
    path: str | Path | None = None,
    options: LoadOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Chat:
    """Load a checkpoint.

    Everything is validated before parameters are read; only a damaged parameter is found later.

    Args:
        path: a directory written by `internvl-jax convert`, or a published Hugging Face directory as it is (extra
            `convert`). None: nano, the small model in the package.
        options: how to load it; None: the defaults.
        progress: called as progress(done_bytes, total_bytes, what) while reading.
        **fields: fields of `LoadOptions`, which replace those of `options`: load(path, mesh="data=2,tensor=4",
            dtype="bfloat16", quantize="int8").

    Raises:
        ConfigError, CheckpointError, TokenizerError, ImageError, MeshError, QuantizeError, LoraError: the checkpoint or
            an option cannot be used. All are ValueErrors that name the file or the option.
    """
    options = replace(options or LoadOptions(), **fields)
    directory = _resolve_directory(path)
    dtype = resolve_dtype(options.dtype)
    cache_dtype = (
        dtype if options.cache_dtype is None else _check_dtype(options.cache_dtype, "cache_dtype", CACHE_DTYPES)
    )
    config = _load_config(directory, options.template)
    mesh, vision_mode = resolve_mesh(options, config)
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.model", "tokenizer.json", "vocab.json"))
    tokenizer = load_tokenizer(directory) if has_tokenizer and config.text is not None else None
    processor = load_processor(directory, config)
    eos_token_ids = _template_eos(config, tokenizer) or _generation_eos(directory)
    adapters = None
    if options.adapters is not None:
        adapters = lora.load(options.adapters, abstract_for_running(config, dtype))
    enable_compilation_cache()
    abstract = _quantize_abstract(abstract_for_running(config, dtype), directory, options.quantize)
    params = load_params(directory, config, abstract, mesh, vision_mode, progress)
    attached = None
    if adapters is not None:
        params, attached = _attach(params, *adapters, config=config, mesh=mesh, vision_mode=vision_mode)
    image_axes = mesh_lib.IMAGE_AXES[vision_mode]
    model = bind_model(config, params, dtype=dtype, cache_dtype=cache_dtype, adapters=attached, image_axes=image_axes)
    return Chat(
        Generator.for_tokenizer(model, tokenizer, mesh),
        tokenizer,
        processor,
        eos_token_ids=eos_token_ids,
        name="nano" if path is None else directory.resolve().name,
    )


# Configuration.


def _resolve_directory(path: str | Path | None) -> Path:
    directory = NANO if path is None else files.resolve(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ConfigError(f"{directory} is a file: pass the directory that holds config.json")
    raise ConfigError(f"{directory} does not exist: pass a directory on this machine (nothing is downloaded)")


def _load_config(directory: Path, template: str | None) -> ChatConfig:
    """The checkpoint's configuration with `template`, if given, as its conversation template."""
    config = load_config(directory)
    if template is not None:
        if template not in TEMPLATES:
            raise ValueError(
                f"there is no conversation template {template!r}; there are {', '.join(sorted(TEMPLATES))}"
            )
        return replace(config, template=template)
    if config.layout == "llava_hf" and not _names_template(directory, config):
        logger.warning(
            "%s does not say which conversation template it was trained with: %s is assumed; load(template=...) or "
            "--template names another",
            directory,
            config.template,
        )
    return config


def _names_template(directory: Path, config: ChatConfig) -> bool:
    named = read_json_object(directory / "config.json", ConfigError).get("template")
    return named is not None or find_template(directory, config.layout) is not None


def _template_eos(config: ChatConfig, tokenizer: Tokenizer | None) -> tuple[int, ...] | None:
    """The token at which the conversation template ends an answer, if it is not left to the checkpoint."""
    template = TEMPLATES.get(config.template or "")
    if tokenizer is None or template is None or template.stop is None:
        return None
    stop = tokenizer.token_to_id(template.stop)
    if stop is None:
        raise ConfigError(f"the template {config.template!r} ends answers with {template.stop}, which is not a token")
    return (stop,)


def _generation_eos(directory: Path) -> tuple[int, ...] | None:
    """End tokens of generation_config.json, which transformers prefers to config.json's; None if there are none."""
    path = directory / "generation_config.json"
    eos = read_json_object(path, ConfigError).get("eos_token_id") if path.exists() else None
    if eos is None:
        return None
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{path} has eos_token_id {eos!r}: a token id or a list of them is needed")
    return ids


# Dtypes and meshes.


def resolve_dtype(dtype: Any) -> jnp.dtype:
    """The dtype of parameters and computation; None: bfloat16, on CPU float32.

    Raises:
        ValueError: it is not one of DTYPES.
    """
    if dtype is None:
        dtype = jnp.float32 if on_cpu() else jnp.bfloat16
    return _check_dtype(dtype, "dtype", DTYPES)


def _check_dtype(dtype: Any, what: str, names: tuple[str, ...]) -> jnp.dtype:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in names:
        name = dtype if known is None else known.name
        raise ValueError(f"{what} {name!r} is not supported: use {' or '.join(map(repr, names))}")
    return known


def resolve_mesh(options: LoadOptions, config: ChatConfig) -> tuple[Mesh | None, str]:
    """The mesh, None for one device, and the vision mode, which has no effect there.

    Raises:
        MeshError: the model's sizes or the devices do not allow the mesh.
        ValueError: there is a vision mode without a mesh.
    """
    if options.mesh is None:
        if options.vision_mode is not None:
            raise ValueError(f"vision_mode {options.vision_mode!r} needs a mesh: pass a mesh too")
        return None, "tensor"
    if isinstance(options.mesh, Mesh):
        mesh = options.mesh
        mesh_lib.validate_mesh(config, mesh)
    else:
        mesh = mesh_lib.make_mesh(options.mesh, config=config)
    return mesh, options.vision_mode or mesh_lib.default_vision_mode(mesh, options.images_per_call)


# Parameters.


def abstract_for_running(config: ChatConfig, dtype: Any) -> Params:
    """Shapes of the parameters that inference needs: all but the vision layers past select_layer."""
    tree = chat_model.abstract_params(config, dtype)
    if config.vision is not None:
        count = config.num_vision_layers
        layers = tree["vision_model"]["layers"]
        tree["vision_model"]["layers"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), layers
        )
    return tree


def load_params(
    directory: Path,
    config: ChatConfig,
    abstract: Params,
    mesh: Mesh | None,
    vision_mode: str,
    progress: Progress | None,
) -> Params:
    """Read parameters onto their devices, padded for the mesh.

    Args:
        directory: a converted or published checkpoint.
        config: its configuration.
        abstract: shapes and dtypes to read, in true shapes.
        mesh: the mesh; None: one device.
        vision_mode: how the vision tower uses the mesh.
        progress: called as progress(done_bytes, total_bytes, what).
    """
    if mesh is None:
        return inference_layout(read_params(directory, abstract, progress), mesh)
    shardings = param_sharding.storage_shardings(abstract, mesh, vision=vision_mode)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return param_sharding.place_params(read_params(directory, abstract, progress), config, mesh, vision=vision_mode)


def read_params(directory: Path, abstract: Params, progress: Progress | None) -> Params:
    """Read the parameters of a converted or published checkpoint.

    Args:
        directory: the checkpoint.
        abstract: shapes, dtypes and shardings.
        progress: called as progress(done_bytes, total_bytes, what).

    Raises:
        ImportError: the checkpoint is not converted, and the packages that read PyTorch's files are missing.
    """
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


def inference_layout(params: Params, mesh: Mesh | None) -> Params:
    """Parameters, or another collection, with their layers as inference runs them fastest.

    On one CPU that is a tuple of layers, since a scan copies the weights of every layer at each step; elsewhere they
    stay stacked.
    """
    return unstack_towers(params) if mesh is None and on_cpu() else params


def unstack_towers(params: Params) -> Params:
    """One collection (parameters or adapters) with the layers of both towers as tuples."""
    towers = {name: params[name] for name in ("vision_model", "language_model") if name in params}
    return {**params, **{name: {**tower, "layers": unstack(tower["layers"])} for name, tower in towers.items()}}


def _quantize_abstract(abstract: Params, directory: Path, scheme: Scheme | str | None) -> Params:
    """Shapes and dtypes of quantized parameters, if they are stored quantized or `scheme` quantizes them."""
    scheme = Scheme(scheme) if isinstance(scheme, str) else scheme
    stored = scheme_of(checkpoint.stored_tree(directory)) if checkpoint.is_converted(directory) else None
    if stored is not None and scheme not in (None, stored):
        raise QuantizeError(
            f"{directory} is {stored.name} already: leave quantize out, or quantize the weights as they were published"
        )
    scheme = stored or scheme
    return abstract if scheme is None else jax.eval_shape(partial(quantize_params, scheme=scheme), abstract)


def _attach(
    params: Params,
    adapters: Params,
    settings: Mapping[str, lora.Lora],
    *,
    config: ChatConfig,
    mesh: Mesh | None,
    vision_mode: str,
) -> tuple[Params, Params]:
    """The parameters, with those that adapters replace, and the collection "lora"."""
    adapters = jax.device_get(adapters)
    if mesh is not None:
        replaced = {name: adapters.pop(name) for name in (lora.REPLACED,) if name in adapters}
        adapters = {**param_sharding.place_adapters(adapters, config, mesh, vision=vision_mode), **replaced}
    variables = lora.attach(params, adapters, settings)
    return variables["params"], inference_layout(variables["lora"], mesh)


# Compilation cache.


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, so that the next process starts fast.

    jax's own settings take precedence: JAX_COMPILATION_CACHE_DIR names the directory, JAX_ENABLE_COMPILATION_CACHE=0
    turns the cache off.
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

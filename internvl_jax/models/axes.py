"""The logical axes of all parameters, read from the modules that declare them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax

from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.models.chat_model import init_params
from internvl_jax.models.declare import Declared, ParamAxes, recording_axes
from internvl_jax.models.layers import Params
from internvl_jax.parallel.partitioning import path_of

LAYERS = "layers"


@lru_cache(maxsize=64)
def logical_axes(config: ChatConfig) -> Params:
    """The axes of every parameter of a model, in the tree of its parameters with stacked layers.

    Computes nothing and needs no device.

    Returns:
        A tree of ParamAxes.

    Raises:
        ValueError: a module made a parameter without declaring its axes.
    """
    with recording_axes():
        tree = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def axes_of_leaf(keys: Sequence[Any], leaf: Any) -> ParamAxes:
        if not isinstance(leaf, Declared):
            raise ValueError(f"{path_of(keys)} {list(leaf.shape)} is a parameter without logical axes: use declare")
        stacked = leaf.value.ndim == len(leaf.axes.names) + 1
        return dataclasses.replace(leaf.axes, names=(LAYERS, *leaf.axes.names)) if stacked else leaf.axes

    return jax.tree_util.tree_map_with_path(axes_of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, Declared))


@lru_cache(maxsize=1)
def declared_parameters() -> dict[str, ParamAxes]:
    """The axes by path, "a/b/c", of every parameter that some model has, in the order of their declaration."""
    nano = PRESETS["nano"]()
    every_option = dataclasses.replace(
        nano,
        vision=dataclasses.replace(
            nano.required_vision, norm_type="layer_norm", qkv_bias=True, embedding_norm=True, patch_bias=True
        ),
        text=dataclasses.replace(nano.required_text, attention_bias=True, mlp_bias=True, family="qwen3"),
    )
    found = {path_of(keys): axes for keys, axes in jax.tree_util.tree_leaves_with_path(logical_axes(every_option))}
    return dict(sorted(found.items(), key=lambda entry: entry[1].order))


def find_axes(path: str) -> ParamAxes | None:
    """The axes of a parameter or of a matrix of an adapter, "a/b/lora_a", with layers stacked; None for others."""
    known = declared_parameters()
    if path in known:
        return known[path]
    parent, _, last = path.rpartition("/")
    kernel = known.get(f"{parent}/kernel")
    if kernel is None or not kernel.inputs or last not in ("lora_a", "lora_b"):
        return None
    first = kernel.names.count(LAYERS) + kernel.inputs
    layers = kernel.names[: kernel.names.count(LAYERS)]
    if last == "lora_a":
        return ParamAxes((*kernel.names[:first], "rank"))
    return ParamAxes((*layers, "rank", *kernel.names[first:]))


def axes_of(path: str) -> ParamAxes:
    """As `find_axes`. Raises ValueError for what no module declares."""
    axes = find_axes(path)
    if axes is None:
        raise ValueError(f"{path} is not a parameter of the model, nor a matrix of an adapter of one of its kernels")
    return axes


def linear_layers(part: str) -> tuple[str, ...]:
    """The linear layers of a part's stack, "self_attn/q_proj", in the order of their declaration."""
    prefix = f"{part}/{LAYERS}/"
    return tuple(
        path.removeprefix(prefix).removesuffix("/kernel")
        for path, axes in declared_parameters().items()
        if path.startswith(prefix) and axes.inputs
    )

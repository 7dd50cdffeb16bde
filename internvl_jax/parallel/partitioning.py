"""Where arrays live on a mesh of devices: parameters by name, from one table. Knows parameter names, never modules.

Mesh axes, always all three, so that every rule means something on every mesh:
    data      rows of the batch; parameters are repeated along it
    fsdp      rows of the batch too, and one axis of every large parameter, which is gathered where it is used
    tensor    heads, mlp hidden and vocabulary: each device computes its part, two sums per layer put them together

Some true sizes divide no mesh: InternViT-6B's 25 heads, a vocabulary of any number. They are padded with zeros when
parameters are placed on a mesh (`pad_params`) and cropped when they leave it (`unpad_params`); a checkpoint never holds
pads. Zero heads are exact: their q, k and v are zero, their output meets zero rows of `proj`, and the q/k norm divides
by the true width. Their gradient is exactly zero too, so training leaves them zero.

A quantized kernel (quantize.py) is two leaves under the kernel's name, and the kernel's rule lays out both: scales lie
where their integers lie, axes that share a scale aside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.config import ChatConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
TENSOR = "tensor"

# The mesh axes that each logical axis of a parameter or an activation is sharded over.
AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "images": BATCH,
    "layers": None,
    "embed": "fsdp",
    "embed_vector": None,  # the width of norms, biases, layer scales and small tables: every device holds them whole
    "features": "fsdp",  # the input of the projector
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "head_dim": None,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "vision_heads": TENSOR,
    "vision_mlp": TENSOR,
    "projector_mlp": TENSOR,
    "qkv": None,
    "patch": None,  # the pixels of a patch
    "position": None,
}
VISION_AXES = ("vision_heads", "vision_mlp", "projector_mlp")  # whole on each device in vision mode "data"
VOCABULARY_TILE = 128  # each device's part of the vocabulary is a multiple of this: whole tiles of a TPU's matrix unit

# How the vision tower is spread, and the mesh axes along which images then lie. "tensor" splits heads and mlp over the
# tensor axis, as the language model does: each device holds its share of the tower, and one image is encoded by all.
# "data" keeps images whole: every device along tensor holds the tower (gathered along fsdp, layer by layer) and encodes
# its own images, with nothing to sum.
IMAGE_AXES = {"tensor": ("data", "fsdp"), "data": AXES}


def logical_spec(*axes: str | None, image_axes: tuple[str, ...] = BATCH) -> P:
    """The PartitionSpec of an array whose axes have these logical names; None for an axis that is not sharded.

    Args:
        axes: keys of AXIS_RULES, or None.
        image_axes: the mesh axes over which images are sharded, a value of IMAGE_AXES.

    Raises:
        ValueError: there is no rule for an axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in AXIS_RULES]
    if unknown:
        raise ValueError(f"no sharding rule for the logical axis {', '.join(unknown)}: add one to AXIS_RULES")
    rules = {**AXIS_RULES, "images": image_axes}
    if TENSOR in image_axes:
        rules |= dict.fromkeys(VISION_AXES)
    return P(*(None if axis is None else rules[axis] for axis in axes))


def constrain(x: jax.Array, *axes: str | None, image_axes: tuple[str, ...] = BATCH) -> jax.Array:
    """Shard an activation by the logical names of its axes; mesh axes that do not divide it are left out.

    Without a mesh (jax.set_mesh), x is returned as it is. Arguments as `logical_spec`.
    """
    return constrain_to(x, logical_spec(*axes, image_axes=image_axes))


def constrain_to(x: jax.Array, spec: P) -> jax.Array:
    """Shard an activation by a PartitionSpec; mesh axes that do not divide it are left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh.shape))


def fit_spec(spec: P, shape: tuple[int, ...], sizes: Any) -> P:
    """A PartitionSpec without the mesh axes that do not divide `shape`; sizes: devices per mesh axis."""
    return P(*(axes if size % axis_size(axes, sizes) == 0 else None for size, axes in zip(shape, spec)))


def axis_size(axes: str | tuple[str, ...] | None, sizes: Any) -> int:
    """Devices along one entry of a PartitionSpec."""
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


class MeshError(ValueError):
    """A mesh that this model, batch or machine cannot use; the message lists what can be used."""


class Rule(NamedTuple):
    """Parameters whose whole path matches `pattern` are laid out by `spec`, one entry per axis, layer axis first.

    optional: the parameter is absent from some models, so the rule may stay unused.
    """

    pattern: str
    spec: P
    optional: bool = False


_VIT = "vision_model/layers/"
_LLM = "language_model/layers/"

PARAM_RULES = (
    Rule(
        r"vision_model/embeddings/"
        r"(patch_embedding/(kernel|bias)|class_embedding|position_embedding|pre_layrnorm/(scale|bias))",
        P(),
    ),
    Rule(_VIT + r"(norm[12]/(scale|bias)|ls[12]|attn/proj/bias|mlp/fc2/bias)", P()),
    Rule(_VIT + r"attn/qkv/kernel", P(None, "fsdp", None, "tensor", None)),  # [L,D,3,N,H]
    Rule(_VIT + r"attn/qkv/bias", P(None, None, "tensor", None), optional=True),  # [L,3,N,H]
    Rule(_VIT + r"attn/(q_norm|k_norm)/scale", P(None, "tensor", None), optional=True),  # [L,N,H]
    Rule(_VIT + r"attn/proj/kernel", P(None, "tensor", None, "fsdp")),  # [L,N,H,D]
    Rule(_VIT + r"mlp/fc1/kernel", P(None, "fsdp", "tensor")),  # [L,D,F]
    Rule(_VIT + r"mlp/fc1/bias", P(None, "tensor")),
    Rule(_VIT + r"mlp/fc2/kernel", P(None, "tensor", "fsdp")),  # [L,F,D]
    Rule(r"mlp1/(norm/(scale|bias)|fc2/bias)", P()),
    Rule(r"mlp1/fc1/kernel", P("fsdp", "tensor")),  # [E,D]
    Rule(r"mlp1/fc1/bias", P("tensor")),
    Rule(r"mlp1/fc2/kernel", P("tensor", "fsdp")),  # [D,D]
    Rule(r"language_model/embed_tokens/embedding", P("tensor", "fsdp")),  # [V,D]
    Rule(r"language_model/lm_head/kernel", P("fsdp", "tensor"), optional=True),  # [D,V]
    Rule(r"language_model/norm/scale", P()),
    Rule(_LLM + r"(input_layernorm|post_attention_layernorm)/scale", P()),
    Rule(_LLM + r"self_attn/[qkv]_proj/kernel", P(None, "fsdp", "tensor", None)),  # [L,D,N,H]
    Rule(_LLM + r"self_attn/[qkv]_proj/bias", P(None, "tensor", None), optional=True),  # [L,N,H]
    Rule(_LLM + r"self_attn/o_proj/kernel", P(None, "tensor", None, "fsdp")),  # [L,N,H,D]
    Rule(_LLM + r"mlp/(gate|up)_proj/kernel", P(None, "fsdp", "tensor")),  # [L,D,F]
    Rule(_LLM + r"mlp/(gate|up)_proj/bias", P(None, "tensor"), optional=True),
    Rule(_LLM + r"mlp/down_proj/kernel", P(None, "tensor", "fsdp")),  # [L,F,D]
    Rule(_LLM + r"(self_attn/o_proj|mlp/down_proj)/bias", P(), optional=True),
)

# Fewer kv heads than the tensor axis has devices: each device keeps all of them.
_SHARED_IF_FEW = re.compile(_LLM + r"self_attn/[kv]_proj/(kernel|bias)")


# Meshes.


def parse_mesh(spec: str | Mapping[str, int]) -> dict[str, int]:
    """Sizes of all three axes from "data=2,tensor=8" or a mapping; axes not named are 1, one may be -1 (the rest)."""
    if isinstance(spec, str):
        pairs = [part.split("=") for part in spec.replace(" ", "").split(",") if part]
        if not all(len(pair) == 2 and re.fullmatch(r"-?\d+", pair[1]) for pair in pairs):
            raise MeshError(f'mesh {spec!r} is not understood: write for example "data=2,tensor=8"')
        sizes = {name: int(size) for name, size in pairs}
        if len(sizes) < len(pairs):
            raise MeshError(f"mesh {spec!r} names an axis twice")
    else:
        sizes = dict(spec)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise MeshError(f"mesh {spec!r} has the axis {', '.join(unknown)}; there are {', '.join(AXES)}")
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh {spec!r}: sizes are positive, and one of them may be -1 for the remaining devices")
    return {axis: sizes.get(axis, 1) for axis in AXES}


def make_mesh(
    spec: str | Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    config: ChatConfig | None = None,
) -> Mesh:
    """A mesh over the first devices that `spec` needs.

    spec: "data=2,tensor=8" or a mapping. None: the largest tensor axis that the config's sizes (if given) and the
        number of devices allow, the rest on data.
    Raises MeshError where there are too few devices, or, with a config, where its sizes do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    if spec is None:
        tensor = max(legal_tensor_sizes(config, len(devices))) if config else len(devices)
        sizes = parse_mesh({"data": len(devices) // tensor, "tensor": tensor})
    else:
        sizes = parse_mesh(spec)
    if -1 in sizes.values():
        others = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: len(devices) // others if size == -1 else size for axis, size in sizes.items()}
    needed = math.prod(sizes.values())
    if not 1 <= needed <= len(devices):
        tensors = legal_tensor_sizes(config, len(devices)) if config else _divisors(len(devices))
        raise MeshError(
            f"the mesh {_named(sizes)} needs {needed or 'more'} devices, there are {len(devices)}: data * fsdp * "
            f"tensor must be at most {len(devices)}; legal tensor sizes are {_listed(tensors)}"
        )
    if config is not None:
        _check_sizes(config, sizes)
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=devices[:needed])
    except NotImplementedError:  # an axis that is no product of the torus's own: jax splits these on v5e alone
        split = create_device_mesh(tuple(sizes.values()), devices[:needed], allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)
    except AssertionError:  # of a TPU slice jax takes what forms a block
        raise MeshError(
            f"the mesh {_named(sizes)} takes {needed} of the slice's {len(devices)} devices, and the first {needed} "
            f"form no block: use all {len(devices)}, or fewer that do (the powers of 2)"
        ) from None


def validate_mesh(config: ChatConfig, mesh: Mesh, batch: int | None = None) -> None:
    """Refuse, before anything is read or compiled, a mesh that the model (or a batch of rows) does not divide over.

    Raises MeshError with the legal choices.
    """
    if tuple(mesh.axis_names) != AXES:
        raise MeshError(f"the mesh has the axes {tuple(mesh.axis_names)}, not {AXES}: make it with make_mesh")
    _check_sizes(config, mesh.shape)
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if batch is not None and batch % (data * fsdp):
        raise MeshError(
            f"a batch of {batch} rows does not divide over data={data} x fsdp={fsdp}: use a multiple of {data * fsdp} "
            f"rows, or data * fsdp one of {_listed(_divisors(batch))}"
        )


def _check_sizes(config: ChatConfig, mesh: Mapping[str, int]) -> None:
    devices = math.prod(mesh.values())
    for axis, sizes in (("tensor", _tensor_sizes(config)), ("fsdp", _fsdp_sizes(config))):
        wrong = [f"{what} ({number})" for what, number in sizes.items() if number % mesh[axis]]
        if wrong:
            legal = [n for n in _divisors(math.gcd(*sizes.values())) if n <= devices]
            raise MeshError(
                f"{axis}={mesh[axis]} does not divide {', '.join(wrong)}; legal sizes of {axis} on {devices} devices "
                f"are {_listed(legal)}; other devices can go to the other axes"
            )


def _named(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def row_owners(mesh: Mesh) -> tuple[tuple[int, ...], dict[int, int]]:
    """Who brings the rows of a batch: for every part of them along data and fsdp, in order, the number of its owner;
    and the owner that each process is, or belongs to.

    An owner is a process, or several that tensor spans: they hold the same parts and bring the same rows. Its parts
    need not stand together: a mesh follows the wires of a TPU, not its hosts.
    Raises MeshError where processes share some parts and not all, or hold different numbers of them.
    """
    held: dict[int, list[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for process in {device.process_index for device in devices}:
            held.setdefault(process, []).append(part)
    owners = sorted({tuple(parts) for parts in held.values()})
    count = mesh.shape["data"] * mesh.shape["fsdp"]
    if len({len(parts) for parts in owners}) > 1 or sum(map(len, owners)) != count:
        raise MeshError(
            f"the mesh {dict(mesh.shape)} shares out {count} parts of a batch to {len(held)} processes unevenly: "
            f"{'; '.join(f'process {process} has {parts}' for process, parts in sorted(held.items())[:8])}. Along data "
            "and fsdp each process needs parts of its own, as many as the others, or the same as others on tensor"
        )
    owner_of = {part: number for number, parts in enumerate(owners) for part in parts}
    return tuple(owner_of[part] for part in range(count)), {
        process: owner_of[parts[0]] for process, parts in held.items()
    }


def default_vision_mode(mesh: Mesh) -> str:
    """ "data" where the tensor axis is 1 and there is nothing to split, else "tensor".

    "tensor" is the rule because the tower is 11 GB in bfloat16, and because a chat encodes one image at a time. "data"
    is worth choosing where many images come at once and every device has room for the tower.
    """
    return "data" if mesh.shape["tensor"] == 1 else "tensor"


def legal_tensor_sizes(config: ChatConfig, devices: int) -> list[int]:
    """Sizes of the tensor axis that divide both the model and the number of devices, ascending."""
    return _divisors(math.gcd(devices, *_tensor_sizes(config).values()))


def _tensor_sizes(config: ChatConfig) -> dict[str, int]:
    """What the tensor axis must divide. Vision heads and vocabulary are padded instead, few kv heads repeated."""
    sizes = {}
    if config.vision is not None:
        sizes["the vision tower's intermediate_size"] = config.vision.intermediate_size
    if config.text is not None:
        sizes["the language model's heads"] = config.text.num_attention_heads
        sizes["the language model's intermediate_size"] = config.text.intermediate_size
    if config.projector is not None:
        sizes["the projector's width"] = config.projector.out_features
    return sizes


def _fsdp_sizes(config: ChatConfig) -> dict[str, int]:
    sizes = {}
    if config.vision is not None:
        sizes["the vision tower's hidden_size"] = config.vision.hidden_size
    if config.text is not None:
        sizes["the language model's hidden_size"] = config.text.hidden_size
    return sizes


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# Parameters.


def path_of(keys: Sequence[Any]) -> str:
    """A tree path as the table writes it: names joined by "/", without the index of a per-layer tree.

    Integers and scales of a quantized kernel are attributes, not names: both are called what the kernel is called.
    """
    names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(map(str, names))


def param_specs(abstract: Any, *, vision: str = "tensor") -> Any:
    """The PartitionSpec of every parameter, as the table says. abstract: a tree of anything with a shape.

    vision: how the tower is spread, a key of IMAGE_AXES.
    Raises ValueError for a parameter that no rule matches, or more than one, and for rules that match nothing.
    """
    if vision not in IMAGE_AXES:
        raise ValueError(f"vision mode {vision!r} is not one of {', '.join(IMAGE_AXES)}")
    used: set[str] = set()

    def spec_of(keys: Sequence[Any], leaf: Any) -> P:
        path = path_of(keys)
        rules = rules_of(path)
        if len(rules) != 1:
            raise ValueError(f"{path} {list(leaf.shape)} must match one sharding rule, it matches {len(rules)}")
        used.add(rules[0].pattern)
        spec = tuple(rules[0].spec)
        if any(isinstance(key, jax.tree_util.SequenceKey) for key in keys):  # a tuple of layers has no layer axis
            spec = spec[1:]
        if vision == "data" and path.startswith(("vision_model/", "mlp1/")):
            spec = tuple(None if axis == "tensor" else axis for axis in spec)
        return P(*(None if _is_scale(keys) and size == 1 else axis for axis, size in zip(spec, leaf.shape)))

    specs = jax.tree_util.tree_map_with_path(spec_of, abstract)
    parts = tuple(f"{part}/" for part in abstract)
    idle = [r.pattern for r in PARAM_RULES if r.pattern.startswith(parts) and not r.optional and r.pattern not in used]
    if idle:
        raise ValueError(f"sharding rules that match no parameter: {', '.join(idle)}")
    return specs


def adapter_specs(adapters: Any, *, vision: str = "tensor") -> Any:
    """The PartitionSpec of every leaf of low-rank adapters (lora.py): as their kernel's, the rank whole.

    Raises ValueError for an adapter of a kernel that no rule matches.
    """

    def spec_of(keys: Sequence[Any], leaf: Any) -> P:
        path, kind = path_of(keys[:-1]), keys[-1].key
        rules = rules_of(f"{path}/kernel")
        if len(rules) != 1 or kind not in ("lora_a", "lora_b"):
            raise ValueError(f"{path}/{kind} {list(leaf.shape)} is not an adapter of a kernel with a sharding rule")
        layer, *axes = rules[0].spec
        if vision == "data" and path.startswith("vision_model/"):
            axes = [None if axis == "tensor" else axis for axis in axes]
        count = leaf.ndim - 2  # axes besides layer and rank: the kernel's first ones of lora_a, its last of lora_b
        return P(layer, *axes[:count], None) if kind == "lora_a" else P(layer, None, *axes[len(axes) - count :])

    return jax.tree_util.tree_map_with_path(spec_of, adapters)


def adapter_shardings(adapters: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """A NamedSharding for every leaf of adapters; axes that do not divide are kept whole."""
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh.shape)),
        adapters,
        adapter_specs(adapters, vision=vision),
    )


def place_adapters(adapters: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Adapters of true shapes, padded and laid out on the mesh beside the parameters of `place_params`."""

    def pad(tree: Any) -> Any:
        return pad_params(tree, config, mesh, vision=vision)

    places = adapter_shardings(jax.eval_shape(pad, adapters), mesh, vision=vision)
    return jax.jit(pad, out_shardings=places)(adapters)


def rules_of(path: str) -> list[Rule]:
    """The rules that match a parameter's path: one, if the table is right."""
    return [rule for rule in PARAM_RULES if re.fullmatch(rule.pattern, path)]


def param_shardings(abstract: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """A NamedSharding for every parameter of a tree whose shapes divide the mesh (see `pad_params`).

    Raises ValueError for parameters that no rule matches, for idle rules and for shapes that do not divide.
    """

    def place(keys: Sequence[Any], leaf: Any, spec: P) -> NamedSharding:
        path = path_of(keys)
        if _is_scale(keys):  # groups that do not divide are kept whole
            spec = fit_spec(spec, leaf.shape, mesh.shape)
        if not _divides(leaf.shape, spec, mesh):
            if not _SHARED_IF_FEW.fullmatch(path):
                raise ValueError(f"{path} {list(leaf.shape)} does not divide as {spec} over {dict(mesh.shape)}")
            spec = P(*(None if axis == "tensor" else axis for axis in spec))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract, param_specs(abstract, vision=vision))


def storage_shardings(abstract: Any, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """As `param_shardings`, for true shapes: where they do not divide, tensor moves to an axis that does.

    For reading and writing checkpoints, which hold no pads: each device still holds its share only.
    """

    def place(leaf: Any, spec: P) -> NamedSharding:
        if _divides(leaf.shape, spec, mesh):
            return NamedSharding(mesh, spec)
        rest = [None if axis == "tensor" else axis for axis in spec]
        for index in range(len(leaf.shape)):
            axes = ("tensor",) if rest[index] is None else (rest[index], "tensor")
            moved = P(*rest[:index], axes, *rest[index + 1 :])
            # Not along the layers: the pad that follows would move whole layers between devices.
            if (index > 0 or len(leaf.shape) == 2) and _divides(leaf.shape, moved, mesh):
                return NamedSharding(mesh, moved)
        return NamedSharding(mesh, P(*rest))

    return jax.tree.map(place, abstract, param_specs(abstract, vision=vision))


def _is_scale(keys: Sequence[Any]) -> bool:
    """Whether a path leads to the scales of a quantized kernel."""
    return keys[-1] == jax.tree_util.GetAttrKey("scale")


def _divides(shape: Sequence[int], spec: P, mesh: Mesh) -> bool:
    return all(size % axis_size(axis, mesh.shape) == 0 for size, axis in zip(shape, spec))


# Pads.


def pad_heads(params: Any, config: ChatConfig, tensor: int) -> Any:
    """Add zero heads to the vision tower, up to a multiple of `tensor`. Works on arrays and under jax.eval_shape."""
    return _resize_heads(params, -(-config.vision.num_attention_heads // tensor) * tensor)


def unpad_heads(params: Any, config: ChatConfig) -> Any:
    """Take the zero heads away again."""
    return _resize_heads(params, config.vision.num_attention_heads)


def pad_vocabulary(params: Any, rows: int) -> Any:
    """Add zero rows to the embedding table and zero columns to the head, up to `rows`; the model masks their logits."""
    return _resize(params, {"embed_tokens/embedding": -2, "lm_head/kernel": -1}, "language_model/", rows)


def pad_params(params: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """True shapes to shapes that divide the mesh. Works on arrays, under jit and under jax.eval_shape."""
    tensor = mesh.shape["tensor"]
    if "vision_model" in params and vision == "tensor":
        params = pad_heads(params, config, tensor)
    if "language_model" in params and tensor > 1:
        tile = tensor * VOCABULARY_TILE
        params = pad_vocabulary(params, -(-config.text.vocab_size // tile) * tile)
    return params


def unpad_params(params: Any, config: ChatConfig) -> Any:
    """Shapes that divide a mesh to true shapes, for export."""
    if "vision_model" in params:
        params = unpad_heads(params, config)
    if "language_model" in params:
        params = pad_vocabulary(params, config.text.vocab_size)
    return params


def place_params(params: Any, config: ChatConfig, mesh: Mesh, *, vision: str = "tensor") -> Any:
    """Parameters of true shapes, on any devices, padded and laid out on the mesh. The arrays given may be used up."""
    padded = jax.eval_shape(lambda tree: pad_params(tree, config, mesh, vision=vision), params)
    shardings = param_shardings(padded, mesh, vision=vision)
    params = jax.device_put(params, storage_shardings(params, mesh, vision=vision))
    leaves, structure = jax.tree.flatten(params)
    # Arrays that grow cannot be donated; jax would warn of them, and warnings are muted for all threads or for none.
    stays = [
        leaf.shape == made.shape and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        for leaf, made, sharding in zip(leaves, jax.tree.leaves(padded), jax.tree.leaves(shardings))
    ]

    def pad(kept: list[Any], growing: list[Any]) -> Any:
        either = iter(kept), iter(growing)
        tree = jax.tree.unflatten(structure, [next(either[0] if same else either[1]) for same in stays])
        return pad_params(tree, config, mesh, vision=vision)

    kept = [leaf for leaf, same in zip(leaves, stays) if same]
    growing = [leaf for leaf, same in zip(leaves, stays) if not same]
    return jax.jit(pad, out_shardings=shardings, donate_argnums=0)(kept, growing)


def _resize_heads(params: Any, heads: int) -> Any:
    axes = {"attn/qkv/kernel": -2, "attn/qkv/bias": -2, "attn/q_norm/scale": -2, "attn/k_norm/scale": -2}
    adapters = {"attn/qkv/lora_b": -2, "attn/proj/lora_a": -3}
    return _resize(params, {**axes, "attn/proj/kernel": -3, **adapters}, _VIT, heads)


def _resize(params: Any, axes: Mapping[str, int], prefix: str, size: int) -> Any:
    """Zero-pad or crop axis `axes[name]` of the parameters prefix + name to `size`."""

    def fit(keys: Sequence[Any], leaf: Any) -> Any:
        axis = axes.get(path_of(keys).removeprefix(prefix)) if path_of(keys).startswith(prefix) else None
        if axis is None or leaf.shape[axis] == size or (_is_scale(keys) and leaf.shape[axis] == 1):
            return leaf
        if leaf.shape[axis] > size:
            return jax.lax.slice_in_dim(leaf, 0, size, axis=axis % leaf.ndim)
        width = [(0, 0)] * leaf.ndim
        width[axis] = (0, size - leaf.shape[axis])
        return jnp.pad(leaf, width)

    return jax.tree_util.tree_map_with_path(fit, params)

"""Meshes, sharding rules and padding. What needs several devices is in tests/multi_device."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from support.chat_model_cases import tower

from internvl_jax.config import PRESETS, ChatConfig
from internvl_jax.models import chat_model, param_sharding
from internvl_jax.models.stack import unstack
from internvl_jax.parallel import mesh as mesh_lib
from internvl_jax.parallel import partitioning
from internvl_jax.parallel.mesh import AXES, MeshError, make_mesh, parse_mesh, validate_mesh

V1_1 = PRESETS["internvl_chat_v1_1"]()
NANO = PRESETS["nano"]()


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("data=2,tensor=8", (2, 1, 8)),
        (" fsdp = 4 ", (1, 4, 1)),
        ({"tensor": 3}, (1, 1, 3)),
        ("data=-1,tensor=4", (-1, 1, 4)),
        ("", (1, 1, 1)),
    ],
)
def test_parse_mesh(spec, sizes):
    assert parse_mesh(spec) == dict(zip(AXES, sizes))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tensor", "not understood"),
        ("tensor=x", "not understood"),
        ("model=2", "there are data, fsdp, tensor"),
        ("tensor=0", "sizes are positive"),
        ("data=-1,tensor=-1", "one of them"),
        ("data=2,data=2", "twice"),
    ],
)
def test_parse_mesh_refuses(spec, words):
    with pytest.raises(MeshError, match=words):
        parse_mesh(spec)


def test_make_mesh():
    device = jax.devices()[:1]
    assert dict(make_mesh(None, device).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh("data=-1", device).shape)["data"] == 1
    with pytest.raises(MeshError, match=r"needs 3 devices, there are 1.*at most 1"):
        make_mesh("tensor=3", device)


def hosts(processes, **sizes):
    """A mesh whose devices are of these processes, in order."""
    shape = tuple(mesh_of(**sizes).shape.values())
    devices = np.empty(len(processes), object)
    devices[:] = [SimpleNamespace(process_index=process) for process in processes]
    return SimpleNamespace(shape=dict(zip(AXES, shape)), devices=devices.reshape(shape))


def test_who_brings_which_rows():
    """The orders are those that a v5e-16 of four hosts has."""
    ring = (0, 0, 1, 1, 1, 1, 0, 2, 3, 3, 3, 3, 2, 2, 2, 0)
    assert mesh_lib.data_shards(hosts(ring, fsdp=16)) == (ring, {0: 0, 1: 1, 2: 2, 3: 3})
    assert mesh_lib.data_shards(hosts((2, 2, 0, 0), fsdp=4)) == ((0, 0, 1, 1), {2: 0, 0: 1})
    pairs = (0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3)  # tensor spans two hosts
    expected = ((0, 0, 1, 1), {0: 0, 1: 0, 2: 1, 3: 1})
    assert mesh_lib.data_shards(hosts(pairs, fsdp=4, tensor=4)) == expected
    with pytest.raises(
        MeshError, match=r"shares out 3 parts .* unevenly: process 0 has \[0, 1\]; process 1 has \[1, 2\]"
    ):
        mesh_lib.data_shards(hosts((0, 0, 0, 1, 1, 1), data=3, tensor=2))
    with pytest.raises(MeshError, match="unevenly"):
        mesh_lib.data_shards(hosts((0, 0, 1), data=3))


def test_meshes_that_split_an_axis_of_the_torus():
    """Of v6e's 4 x 4 chips, 2 x 8 are no whole axes."""
    pytest.importorskip("libtpu")
    from internvl_jax.aot.topology import parse_topology

    mesh = make_mesh("data=2,fsdp=8", parse_topology("v6e-16").devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_illegal_meshes_name_the_legal_ones():
    with pytest.raises(MeshError, match=r"tensor=16 does not divide the language model's heads \(40\).* 1, 2, 4, 8;"):
        validate_mesh(V1_1, mesh_of(tensor=16))
    with pytest.raises(MeshError, match=r"fsdp=3 .*hidden_size \(3200\).*legal sizes of fsdp on 3 devices are 1, 2;"):
        validate_mesh(V1_1, mesh_of(fsdp=3))
    with pytest.raises(MeshError, match=r"batch of 6 rows .* multiple of 4 rows, or data \* fsdp one of 1, 2, 3, 6"):
        validate_mesh(V1_1, mesh_of(data=2, fsdp=2), batch=6)
    validate_mesh(V1_1, mesh_of(data=2, fsdp=2, tensor=8), batch=8)
    assert mesh_lib.legal_tensor_sizes(V1_1, 256) == [1, 2, 4, 8]
    with pytest.raises(MeshError, match="make it with make_mesh"):
        validate_mesh(V1_1, AbstractMesh((1,), ("tensor",)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal", "padded"),
    [
        (14, 2, {1: 14, 2: 14, 4: 16, 8: 16, 16: 16}, "14 with 2 kv heads"),  # published sizes
        (28, 4, {1: 28, 2: 28, 4: 28, 8: 32, 16: 32, 32: 32}, "28 with 4 kv heads"),
        (40, 8, {1: 40, 2: 40, 4: 40, 8: 40, 16: 48, 32: 64, 64: 64}, "40 with 8 kv heads"),
        (64, 8, {1: 64, 2: 64, 4: 64, 8: 64, 16: 64, 32: 64, 64: 64}, "64 with 8 kv heads"),
    ],
)
def test_heads_on_a_tensor_axis(heads, kv_heads, legal, padded):
    """kv heads are repeated and groups padded, with fewer zero heads than true ones."""
    text = dataclasses.replace(
        V1_1.text, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=1 << 14
    )
    config = ChatConfig(vision=None, projector=None, text=text, layout="llama")
    assert mesh_lib.legal_tensor_sizes(config, 256) == list(legal)
    assert {size: mesh_lib.padded_heads(text, size) for size in legal} == legal
    with pytest.raises(MeshError, match=rf"tensor=256 does not divide the language model's heads \({padded}\)"):
        validate_mesh(config, mesh_of(tensor=256))


@pytest.mark.parametrize("config", [V1_1, NANO], ids=["v1_1", "nano"])
@pytest.mark.parametrize("vision", mesh_lib.IMAGE_AXES)
def test_every_parameter_has_a_place(config, vision):
    mesh = mesh_of(fsdp=2, tensor=4)
    abstract = jax.eval_shape(
        lambda tree: param_sharding.pad_params(tree, config, mesh, vision=vision), chat_model.abstract_params(config)
    )
    total, mine = 0, 0
    for leaf, place in zip(
        jax.tree.leaves(abstract), jax.tree.leaves(param_sharding.param_shardings(abstract, mesh, vision=vision))
    ):
        total += leaf.size
        mine += np.prod(place.shard_shape(leaf.shape))
    if config is V1_1 and vision == "tensor":
        assert mine < total / 8 * 1.01  # norms, biases and the patch embedding are on every device
    stored = param_sharding.storage_shardings(chat_model.abstract_params(config), mesh, vision=vision)
    qkv = stored["vision_model"]["layers"]["attn"]["qkv"]["kernel"].spec
    assert qkv == P(None, "fsdp" if vision == "data" else ("fsdp", "tensor"), None, None, None)


@pytest.mark.parametrize("config", [V1_1, NANO], ids=["v1_1", "nano"])
def test_vision_mode_data_splits_tower_and_projector_by_no_tensor_axis(config):
    """Both see whole images, of which every device has its own: only the language model is split."""
    abstract = chat_model.abstract_params(config)
    for vision in ("tensor", "data"):
        specs = param_sharding.param_specs(abstract, vision=vision)
        split = {
            part: any(
                "tensor" in str(spec) for spec in jax.tree.leaves(specs[part], is_leaf=lambda x: isinstance(x, P))
            )
            for part in specs
        }
        assert split == {"vision_model": vision == "tensor", "mlp1": vision == "tensor", "language_model": True}


def test_vision_mode_by_mesh_and_images():
    mode = mesh_lib.default_vision_mode
    assert [mode(mesh_of(fsdp=8)), mode(mesh_of(fsdp=8), 64)] == ["data", "data"]
    assert [mode(mesh_of(data=2, tensor=4), images) for images in (1, 15, 16, 64)] == ["tensor"] * 2 + ["gather"] * 2


def test_what_has_no_spec_is_refused():
    tree = chat_model.abstract_params(NANO)
    with pytest.raises(ValueError, match="mlp1/fc3 is not a parameter of the model"):
        param_sharding.param_specs({**tree, "mlp1": {**tree["mlp1"], "fc3": jax.ShapeDtypeStruct((7,), jnp.float32)}})
    with pytest.raises(ValueError, match=r"mlp1/fc1/bias \[7, 3\] does not have the axes projector_mlp"):
        param_sharding.param_specs({"mlp1": {"fc1": {"bias": jax.ShapeDtypeStruct((7, 3), jnp.float32)}}})
    with pytest.raises(ValueError, match="vision mode 'pixels' is not one of tensor, data, gather"):
        param_sharding.param_specs(tree, vision="pixels")
    with pytest.raises(ValueError, match="does not divide"):
        param_sharding.param_shardings(tree, mesh_of(tensor=4))


def test_layers_one_by_one_follow_the_same_rules():
    tree = jax.eval_shape(unstack, chat_model.abstract_params(NANO)["language_model"]["layers"])
    language = {**chat_model.abstract_params(NANO)["language_model"], "layers": tree}
    specs = param_sharding.param_specs({"language_model": language})["language_model"]["layers"]
    assert specs[1]["self_attn"]["q_proj"]["kernel"] == P("fsdp", "tensor", None)


def test_padded_heads_are_exact():
    config = NANO
    params = jax.jit(chat_model.init_params, static_argnames="config")(jax.random.key(0), config)
    padded = param_sharding.resize_axes(params, {"vision_heads": 8})
    assert padded["vision_model"]["layers"]["attn"]["proj"]["kernel"].shape[1] == 8
    pixels = jax.random.normal(jax.random.key(1), (1, 3, config.image_size, config.image_size))
    with jax.default_matmul_precision("highest"):
        outputs = [tower(p["vision_model"], config.vision, pixels)[0] for p in (params, padded)]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, param_sharding.unpad_params(padded, config), params)


@pytest.mark.parametrize(
    ("images", "axes"),
    [
        (8, ("data", "fsdp", "tensor")),
        (12, ("data", "fsdp")),  # a prefix that divides
        (2, ("data",)),
        (3, None),
    ],
)
def test_images_lie_over_the_mesh_axes_that_divide_them(images, axes):
    spec = partitioning.logical_spec("residual_images", None)
    assert partitioning.fit_spec(spec, (images, 5), {"data": 2, "fsdp": 2, "tensor": 2}) == P(axes, None)
    assert partitioning.fit_spec(P("tensor"), (images,), {"tensor": 16}) == P(None)


def test_images_spread_over_tensor_are_not_split_again():
    over_all = mesh_lib.IMAGE_AXES["data"]
    assert partitioning.logical_spec("residual_images", image_axes=over_all) == P(over_all)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (2, 2), (4, 4), (3, 2), (2, 3), (8, 16)])
def test_an_axis_over_all_chips_is_a_ring(shape):
    coords = [(x, y, 0) for y in range(shape[1]) for x in range(shape[0])]
    order = mesh_lib.ring_order(coords)
    assert sorted(order) == list(range(len(coords)))
    places = np.array(coords)[order]
    assert (np.abs(places - np.roll(places, 1, axis=0)).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    "coords",
    [
        [(0, 0, 0)],
        [(x, 0, 0) for x in range(4)],  # a line
        [(x, y, 0) for x in range(3) for y in range(3)],  # no ring
        [(x, y, z) for x in range(2) for y in range(2) for z in range(2)],
        [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 0)],  # two devices on a chip
        [(0, 0, 0), (1, 0, 0), (0, 1, 0), (2, 0, 0)],
        [()] * 8,  # CPUs
    ],
)
def test_other_chips_keep_the_order_of_jax(coords):
    assert mesh_lib.ring_order(coords) is None

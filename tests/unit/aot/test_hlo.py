"""Counts in optimized HLO against counts by hand, on programs that the TPU's compiler made here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.aot import hlo
from internvl_jax.aot.topology import parse_topology


@pytest.fixture(scope="module")
def devices():
    pytest.importorskip("libtpu")
    return parse_topology("v5e-4").devices()


@pytest.fixture(scope="module")
def compile_on(devices):
    """compile_on(mesh sizes, function, (shape, spec), ...) -> hlo.HloModule; bfloat16 arguments."""

    def compiled(sizes, function, *arguments):
        mesh = jax.make_mesh(sizes, ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices[: sizes[0] * sizes[1]])
        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
        with jax.set_mesh(mesh):
            return hlo.parse(jax.jit(function).lower(*shapes).compile().as_text())

    return compiled


def test_loops_count_as_often_as_they_run(compile_on):
    """An outer loop of 3 around an inner one of 5, each with a product; more products before and after."""

    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, w):
        x, _ = jax.lax.scan(inner, x, w)
        return jax.nn.silu(x @ w[0]) * x, None

    def program(x, w):
        x, _ = jax.lax.scan(outer, x @ w[0, 1], w)
        return x @ w[2, 4]

    found = compile_on((1, 1), program, ((64, 256), P()), ((3, 5, 256, 256), P()))
    assert hlo.flops(found) == 2 * 64 * 256 * 256 * (3 * 5 + 3 + 2)


def test_loops_that_count_by_two(compile_on):
    """As XLA's rings do, which gather a matrix from both sides while it is multiplied."""

    def program(x, w):
        def body(carry):
            number, x = carry
            return number + 2, jnp.tanh(x @ w)

        return jax.lax.while_loop(lambda carry: carry[0] < 7, body, (0, x))[1]

    found = compile_on((1, 1), program, ((64, 256), P()), ((256, 256), P()))
    assert hlo.flops(found) == 4 * 2 * 64 * 256 * 256


def test_loops_that_end_when_the_data_say_so_count_once(compile_on):
    def program(x, w):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: (x @ w) * 0.5, x)

    found = compile_on((1, 1), program, ((128, 128), P()), ((128, 128), P()))
    (loop,) = [run for run in hlo.executions(found) if run.instruction.opcode == "while"]
    assert hlo.trip_count(found, loop.instruction) is None
    assert hlo.flops(found) == 2 * 128**3


def test_one_branch_of_a_conditional_counts(compile_on):
    def program(x, w):
        y = jax.lax.cond(jnp.max(x) > 0, lambda x: (x @ w) @ w, lambda x: x @ w, x)
        return y @ w

    found = compile_on((1, 1), program, ((256, 256), P()), ((256, 256), P()))
    assert hlo.flops(found) == 2 * 256**3 * 2  # the branch for "false", and the product behind


@pytest.mark.parametrize("queries", [1, 16])
def test_attention_counts_whichever_unit_multiplies(compile_on, queries):
    """One query against a cache becomes sums on the vector unit, several become products on the matrix unit."""

    def program(q, k, v):
        scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores).astype(q.dtype)
        return jnp.einsum("BKTS,BKSH->BKTH", weights, v, preferred_element_type=jnp.float32)

    cache = ((2, 4, 512, 128), P("data", "tensor"))
    found = compile_on((1, 2), program, ((2, 4, queries, 128), P("data", "tensor")), cache, cache)
    assert hlo.flops(found) == 4 * 2 * 4 * queries * 512 * 128 / 2


def test_convolutions(compile_on):
    """Strides, padding and dilation: taps that meet padding do not count."""

    def program(x, w):
        return jax.lax.conv_general_dilated(x, w, (2,), [(1, 0)], dimension_numbers=("NWC", "WIO", "NWC"))

    found = compile_on((1, 1), program, ((1, 8, 128), P()), ((3, 128, 256), P()))
    # 4 outputs, of which the first sees 2 taps: -1 is padding.
    assert hlo.flops(found) == 2 * 128 * 256 * (2 + 3 * 3)


def test_collectives_in_loops(compile_on):
    """A layer with its two sums, three times; each device multiplies its quarter."""

    def layer(x, w):
        up, down = w
        return jax.lax.with_sharding_constraint(jax.nn.gelu(x @ up) @ down, P(None, None)), None

    def program(x, up, down):
        x, _ = jax.lax.scan(layer, x, (up, down))
        return x

    found = compile_on(
        (1, 4),
        program,
        ((32, 256), P()),
        ((3, 256, 1024), P(None, None, "tensor")),
        ((3, 1024, 256), P(None, "tensor")),
    )
    (one,) = hlo.collectives(found)
    assert (one.kind, one.count, one.trip_count, one.group) == ("all-reduce", 3, 3, (0, 1, 2, 3))
    assert one.bytes == 32 * 256 * 2
    assert hlo.flops(found) == 3 * 2 * 2 * 32 * 256 * 1024 / 4


def test_groups_follow_the_mesh(compile_on):
    def program(x):
        return jax.shard_map(
            lambda x: jax.lax.psum(x, "data"), in_specs=P("data", "tensor"), out_specs=P(None, "tensor")
        )(x)

    (one,) = hlo.collectives(compile_on((2, 2), program, ((256, 256), P("data", "tensor"))))
    assert (one.kind, one.count, one.group) == ("all-reduce", 1, (0, 2))


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        (", replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true", (0, 4)),
        (", replica_groups=[2,4]<=[8], use_global_device_ids=true", (0, 1, 2, 3)),
        (", replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true", (0, 4)),
        (", replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use_global_device_ids=true", (0, 4)),
        (", source_target_pairs={{0,2},{2,4},{4,0},{1,3}}", (0, 2, 4)),
        (", replica_groups={}", ()),
    ],
)
def test_replica_groups(attributes, group):
    assert hlo.replica_group(attributes) == group


def test_splash_attention_kernels(compile_on):
    """Forward and backward, causal: the blocks that touch or lie below the diagonal, 6 of 9."""
    heads, length, head_dim, block = 2, 1536, 128, 512
    sizes = splash.BlockSizes(*[block] * 8)
    mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def program(q, k, v):
        return jax.grad(lambda *args: jnp.sum(jax.vmap(kernel)(*args).astype(jnp.float32)), argnums=(0, 1, 2))(q, k, v)

    found = compile_on((1, 1), program, *[((3, heads, length, head_dim), P())] * 3)
    counted = {run.instruction.name: hlo.kernel_flops(run.instruction) for run in hlo.executions(found)}
    product = 2 * 3 * heads * head_dim * 6 * block**2
    expected = {"fwd": 2 * product, "dq": 3 * product, "dkv": 4 * product}
    assert sorted(filter(None, counted.values())) == sorted(expected.values())
    assert hlo.flops(found) == 9 * product


def test_kernels_state_their_own_cost_or_are_refused():
    call = partial(hlo.Instruction, "mine.1", "custom-call", (), (), is_root=False)
    attributes = ', custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"%s}}'
    stated = ',"cost_estimate":{"flops":"2097152","transcendentals":"4096"}'
    assert hlo.kernel_flops(call(attributes=attributes % stated)) == 2097152
    with pytest.raises(ValueError, match=r"mine\.1 has no cost_estimate"):
        hlo.kernel_flops(call(attributes=attributes % ""))


def test_copies_are_seen(compile_on):
    """A transpose that nothing can absorb is a copy of everything."""
    shape = ((8, 512, 1024), P())
    assert not hlo.copies(compile_on((1, 1), lambda x: x + 1, shape), 1 << 20)
    found = hlo.copies(compile_on((1, 1), lambda x: jnp.sort(jnp.swapaxes(x, 0, 2), axis=0), shape), 1 << 20)
    assert found
    assert {size for _, size in found} == {8 * 512 * 1024 * 2}


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")

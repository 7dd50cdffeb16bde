"""The time of a schedule: small programs written by hand, walked against times by hand."""

import pytest

from internvl_jax.aot import hlo, schedule
from internvl_jax.aot.network import Transfer
from internvl_jax.aot.topology import Link


def wire(collective, latency=0.0):
    """A second per 10 bytes of the result; devices lie on one line, and permutes use the links between neighbors."""
    links = frozenset(Link((source,), 0, (target > source) * 2 - 1) for source, target in collective.pairs)
    return Transfer(collective.bytes / 10 + latency, latency, links)


# One device: 1000 FLOPs and 100 bytes a second.
RATES = schedule.Rates(flops=1000.0, hbm_bandwidth=100.0, wire=wire)
ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def walk(entry, before="", num_layers=1, rates=RATES):
    lines = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    return schedule.walk(hlo.parse(f"{before}\nENTRY %main (x: f32[]) -> f32[] {{\n{lines}\n}}\n"), rates, num_layers)


def test_an_instruction_takes_the_longer_of_compute_and_memory():
    """[10,10] @ [10,10]: 2000 FLOPs are 2 s, 3 x 400 bytes are 12 s, of which VMEM saves what lies there."""
    dot = "f32[10,10]{1,0%s} dot(%%x, %%y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    found = walk(f"%x = f32[10,10] parameter(0)\n%y = f32[10,10] parameter(1)\nROOT %z = {dot % ''}")
    assert (found.seconds, found.compute_seconds, found.hbm_bytes) == (12, 2, 1200)
    on_chip = ":T(8,128)S(1)"
    found = walk(
        f"%x = f32[10,10]{{1,0{on_chip}}} parameter(0)\n%y = f32[10,10]{{1,0{on_chip}}} parameter(1)\n"
        f"ROOT %z = {dot % on_chip}"
    )
    assert (found.seconds, found.compute_seconds, found.hbm_bytes) == (2, 2, 0)


def test_fusions_read_what_they_slice_and_write_what_they_update():
    fused = """%fused (stack: f32[4,100], row: f32[1,100], at: s32[]) -> f32[4,100] {
  %stack = f32[4,100] parameter(0)
  %row = f32[1,100] parameter(1)
  %at = s32[] parameter(2)
  %one = f32[1,100] dynamic-slice(%stack, %at, %at), dynamic_slice_sizes={1,100}
  %new = f32[1,100] add(%one, %row)
  ROOT %out = f32[4,100] dynamic-update-slice(%stack, %new, %at, %at)
}
"""
    entry = """%stack = f32[4,100] parameter(0)
%row = f32[1,100] parameter(1)
%at = s32[] parameter(2)
ROOT %f = f32[4,100] fusion(%stack, %row, %at), kind=kLoop, calls=%fused"""
    assert walk(entry, fused).hbm_bytes == 400 + 400 + 4 + 400  # a slice, the row, the index; the update


def test_a_slice_of_an_array_in_other_tiles_is_a_slice():
    fused = """%tiles (x: f32[4,100]) -> f32[4,100] {
  %x = f32[4,100] parameter(0)
  ROOT %y = f32[4,100] copy(%x)
}
%fused (stack: f32[4,100], at: s32[]) -> f32[1,100] {
  %stack = f32[4,100] parameter(0)
  %at = s32[] parameter(1)
  %tiled = f32[4,100] fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  ROOT %one = f32[1,100] dynamic-slice(%tiled, %at, %at), dynamic_slice_sizes={1,100}
}
"""
    entry = """%stack = f32[4,100] parameter(0)
%at = s32[] parameter(1)
ROOT %f = f32[1,100] fusion(%stack, %at), kind=kLoop, calls=%fused"""
    assert walk(entry, fused).hbm_bytes == 400 + 4 + 400
    assert walk(entry, fused.replace(", output_to_operand_aliasing={{}: (0, {})}", "")).hbm_bytes == 1600 + 4 + 400


def test_what_only_names_an_array_is_free():
    fused = """%casts (x: f32[100]) -> f32[10,10] {
  %x = f32[100] parameter(0)
  ROOT %y = f32[10,10] bitcast(%x)
}
"""
    entry = """%x = f32[100] parameter(0)
%y = f32[10,10] fusion(%x), kind=kLoop, calls=%casts
%z = f32[100] custom-call(%y), custom_call_target="ConcatBitcast"
%n = s32[] parameter(1)
%m = s32[] add(%n, %n)
ROOT %t = (f32[100], s32[]) tuple(%z, %m)"""
    found = walk(entry, fused)
    assert (found.seconds, found.instructions_per_layer) == (0, 0)


ADD_100 = "%{0} = f32[100] add(%x, %x)\n"  # 1200 bytes, 12 s


def test_a_synchronous_collective_is_exposed():
    entry = "%x = f32[100] parameter(0)\nROOT %r = f32[100] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"
    found = walk(entry, ADD)
    assert (found.seconds, found.network_seconds, found.exposed_network_seconds) == (40, 40, 40)
    assert (found.hidden_network_seconds, found.exposed_latency_seconds) == (0, 0)
    late = schedule.Rates(1000.0, 100.0, lambda collective: wire(collective, latency=2.0))
    found = walk(entry, ADD, rates=late)
    assert (found.seconds, found.exposed_network_seconds, found.exposed_latency_seconds) == (42, 42, 2)


@pytest.mark.parametrize(("beside", "exposed"), [(1, 28), (3, 4), (4, 0)])
def test_an_asynchronous_collective_runs_beside_what_follows(beside, exposed):
    entry = "%x = f32[100] parameter(0)\n"
    entry += "%s = (f32[100], f32[100]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}\n"
    entry += "".join(ADD_100.format(f"y{n}") for n in range(beside))
    entry += "ROOT %d = f32[100] collective-permute-done(%s)"
    found = walk(entry)
    assert (found.network_seconds, found.exposed_network_seconds) == (40, exposed)
    assert found.hidden_network_seconds == 40 - exposed
    assert found.seconds == 12 * beside + exposed
    assert found.costliest[0].seconds == max(12, exposed)
    late = schedule.Rates(1000.0, 100.0, lambda collective: wire(collective, latency=10.0))
    assert walk(entry, rates=late).exposed_latency_seconds == min(10, 50 - 12 * beside)


@pytest.mark.parametrize("channel", ["", ", channel_id=3"])
def test_an_asynchronous_computation_is_what_it_does(channel):
    """async-start names what runs beside the rest, async-update passes it on, async-done waits for it."""
    before = f"""{ADD}%sums (x: f32[100]) -> f32[100] {{
  %x = f32[100] parameter(0)
  ROOT %r = f32[100] all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add{channel}
}}
"""
    entry = "%x = f32[100] parameter(0)\n%s = ((f32[100]), f32[100], s32[]) async-start(%x), calls=%sums\n"
    entry += "%u = ((f32[100]), f32[100], s32[]) async-update(%s)\n" + ADD_100.format("y")
    entry += "ROOT %d = f32[100] async-done(%u)"
    on_sparse_core = entry.replace("async-start(%x), calls", "call-start(%x), to_apply").replace(
        "async-done", "call-done"
    )
    for lines in (entry, on_sparse_core):
        found = walk(lines, before)
        assert (found.seconds, found.exposed_network_seconds, found.hidden_network_seconds) == (40, 28, 12)


def test_of_an_asynchronous_gather_the_results_count():
    """40 s of the two results, whose operands are half as large."""
    entry = """%x = f32[25] parameter(0)
%s = ((f32[25], f32[25]), (f32[50], f32[50])) all-gather-start(%x, %x), replica_groups={{0,1}}, dimensions={0}
ROOT %d = (f32[50], f32[50]) all-gather-done(%s)"""
    assert walk(entry).network_seconds == 40


def test_permutes_over_different_links_run_at_once():
    def entry(second):
        return f"""%x = f32[100] parameter(0)
%a = (f32[100], f32[100]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,2}}}}
%b = (f32[100], f32[100]) collective-permute-start(%x), source_target_pairs={second}
%c = f32[100] collective-permute-done(%a)
ROOT %d = f32[100] collective-permute-done(%b)"""

    found = walk(entry("{{1,0},{2,1}}"))  # in the other direction
    assert (found.seconds, found.network_seconds) == (40, 80)
    assert walk(entry("{{1,2},{2,3}}")).seconds == 80
    gather = "%g = f32[200] all-gather(%x), replica_groups={{0,1}}, dimensions={0}\n%c = "
    assert walk(entry("{{1,0},{2,1}}").replace("%c = ", gather)).seconds == 40 + 80


def test_copies_have_the_bandwidth_that_is_left():
    """400 bytes into VMEM, 4 s. A sum of 12 s of HBM leaves nothing; a product of 16 s with 12 s of HBM leaves 4 s."""
    copy = "%c = (f32[100]{0:S(1)}, f32[100], u32[]) copy-start(%x)\n"
    done = "ROOT %d = f32[100]{0:S(1)} copy-done(%c)"
    found = walk("%x = f32[100] parameter(0)\n" + copy + ADD_100.format("y") + done, num_layers=1)
    assert (found.seconds, found.exposed_copy_seconds, found.hbm_bytes) == (12 + 4, 4, 1600)
    assert (found.instructions_per_layer, found.copies_per_layer) == (1, 1)
    product = "%y = f32[1,100] dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    arrays = (
        "%x = f32[100] parameter(0)\n%w = f32[1,40]{1,0:S(1)} parameter(1)\n%v = f32[40,100]{1,0:S(1)} parameter(2)\n"
    )
    found = walk(arrays + copy + product + done)  # 8 s of compute, 4 s of HBM for the result
    assert (found.seconds, found.exposed_copy_seconds) == (8, 0)


def test_of_a_slice_the_result_counts():
    entry = """%x = f32[10,100] parameter(0)
%s = ((f32[10,100]), f32[1,100]{1,0:S(1)}, s32[]) slice-start(%x), slice={[0:1], [0:100]}
ROOT %d = f32[1,100]{1,0:S(1)} slice-done(%s)"""
    assert walk(entry).hbm_bytes == 400
    dynamic = "dynamic-slice-start(%x, %n, %n)"
    entry = entry.replace("slice-start(%x)", dynamic).replace("((f32[10,100])", "((f32[10,100], s32[], s32[])")
    assert walk("%n = s32[] parameter(1)\n" + entry).hbm_bytes == 400


def test_of_an_update_the_update_counts():
    entry = """%x = f32[10,100] parameter(0)
%y = f32[1,100]{1,0:S(1)} parameter(1)
%n = s32[] parameter(2)
%s = ((f32[10,100], f32[1,100]{1,0:S(1)}, s32[], s32[]), f32[10,100], s32[]) dynamic-update-slice-start(%x, %y, %n, %n)
ROOT %d = f32[10,100] dynamic-update-slice-done(%s)"""
    assert walk(entry).hbm_bytes == 400


def test_kernels_read_what_they_say():
    """Of a stack of four layers one."""
    entry = """%stack = f32[4,100] parameter(0)
ROOT %k = f32[100] custom-call(%stack), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"3000","bytes_accessed":"800"}}}"""
    found = walk(entry)
    assert (found.seconds, found.compute_seconds, found.hbm_bytes) == (8, 3, 800)


@pytest.mark.parametrize("kind", ["fwd", "dq", "dkv"])
def test_splash_attention_visits_blocks_that_the_mask_leaves(kind):
    """2 heads of 1024 tokens in blocks of 512, causal: 3 of 4. What belongs to the inner blocks is read in each."""
    suffix = "" if kind == "fwd" else f"_{kind}"
    head = "bf16[2,1024,128]"
    operands = ["s8[1,2,2]", head, head, head]
    if kind != "fwd":
        operands += ["f32[2,8,1024]", head, "f32[2,8,1024]"]
    operands += ["s32[8,1024]" if kind == "dkv" else "s32[1024,128]"]  # positions of the queries, for the mask
    names = ", ".join(f"%a{index}" for index in range(len(operands)))
    lines = [f"%a{index} = {shape} parameter({index})" for index, shape in enumerate(operands)]
    lines.append(
        f'ROOT %splash_mha_{kind}.1 = {head} custom-call({names}), custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{{', '.join(f'{shape}{{0}}' for shape in operands)}}}, "
        f'frontend_attributes={{kernel_metadata={{"block_q{suffix}":512,"block_kv{suffix}":512}}}}'
    )
    found = walk("\n".join(lines))
    products = {"fwd": 2, "dq": 3, "dkv": 4}[kind]
    assert found.compute_seconds == products * 2 * 2 * 3 * 512 * 512 * 128 / 1000
    array, sums = 2 * 1024 * 128 * 2, 2 * 8 * 1024 * 4
    expected = {
        "fwd": array + 2 * array * 1.5 + 2 * 1024 * 128 * 4,
        "dq": 2 * array + 2 * array * 1.5 + 2 * sums + 2 * 1024 * 128 * 4,
        "dkv": 2 * array + 2 * array * 1.5 + 2 * sums * 1.5 + 2 * 1.5 * 8 * 1024 * 4,
    }[kind]
    assert found.hbm_bytes == expected + array + 4  # and the result, and which blocks the mask leaves


LOOP = """%body (c: (s32[], f32[100])) -> (s32[], f32[100]) {
  %c = (s32[], f32[100]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %x = f32[100] get-tuple-element(%c), index=1
  %one = s32[] constant(STEP)
  %m = s32[] add(%n, %one)
  %y = f32[100] negate(%x)
  %r = f32[100] all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[100]) tuple(%m, %r)
}
%condition (c: (s32[], f32[100])) -> pred[] {
  %c = (s32[], f32[100]) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}
"""


@pytest.mark.parametrize(("step", "trips"), [(1, 6), (2, 3)])
def test_loops_take_their_body_once_per_trip(step, trips):
    """8 s of HBM and 40 s of network in each trip; XLA's windowed loops count by two."""
    entry = """%n = s32[] constant(0)
%x = f32[100] parameter(0)
%t = (s32[], f32[100]) tuple(%n, %x)
ROOT %w = (s32[], f32[100]) while(%t), condition=%condition, body=%body"""
    found = walk(entry, ADD + LOOP.replace("STEP", str(step)), num_layers=trips)
    assert found.seconds == trips * 48
    assert found.exposed_network_seconds == trips * 40
    assert found.instructions_per_layer == 2
    assert [(cost.name, cost.count, cost.seconds) for cost in found.costliest] == [
        ("r", trips, trips * 40),
        ("y", trips, trips * 8),
    ]


def test_a_reduction_that_is_sliced_at_once_is_a_reduce_scatter():
    fused = """%scatter (x: f32[100], at: s32[]) -> f32[50] {
  %x = f32[100] parameter(0)
  %at = s32[] parameter(1)
  %all = f32[100] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %half = f32[50] dynamic-slice(%all, %at), dynamic_slice_sizes={50}
}
"""
    seen = []
    module = hlo.parse(
        f"{ADD}{fused}ENTRY %main (x: f32[100], at: s32[]) -> f32[50] {{\n  %x = f32[100] parameter(0)\n"
        "  %at = s32[] parameter(1)\n  ROOT %f = f32[50] fusion(%x, %at), kind=kCustom, calls=%scatter\n}\n"
    )
    schedule.walk(module, schedule.Rates(1, 1, lambda one: seen.append((one.kind, one.bytes)) or wire(one)))
    assert seen == [("reduce-scatter", 200)]


def test_a_collective_that_is_split_over_fusions():
    """Started by one, beside the product of the next, awaited by a third: they share a channel."""
    before = """%start (x: f32[100]) -> f32[200] {
  %x = f32[100] parameter(0)
  %g = f32[200] all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = f32[200] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (g: f32[200], w: f32[1,100], v: f32[100,100]) -> (f32[200], f32[1,100]) {
  %g = f32[200] parameter(0)
  %w = f32[1,100]{1,0:S(1)} parameter(1)
  %v = f32[100,100]{1,0:S(1)} parameter(2)
  %step = f32[200] all-gather(%g), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  %y = f32[1,100]{1,0:S(1)} dot(%w, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[200], f32[1,100]{1,0:S(1)}) tuple(%step, %y)
}
%done (g: f32[200]) -> f32[200] {
  %g = f32[200] parameter(0)
  %e = f32[200] all-gather(%g), channel_id=7, replica_groups={{0,1}}, dimensions={0}
  ROOT %c = f32[200] custom-call(%e), custom_call_target="AsyncCollectiveDone"
}
"""
    entry = """%x = f32[100] parameter(0)
%w = f32[1,100]{1,0:S(1)} parameter(1)
%v = f32[100,100]{1,0:S(1)} parameter(2)
%async-collective-start.1 = f32[200] fusion(%x), kind=kCustom, calls=%start
%s = f32[200] bitcast(%async-collective-start.1)
%f = (f32[200], f32[1,100]{1,0:S(1)}) fusion(%s, %w, %v), kind=kOutput, calls=%async_collective_fusion.1
%g = f32[200] get-tuple-element(%f), index=0
ROOT %async-collective-done.1 = f32[200] fusion(%g), kind=kCustom, calls=%done"""
    found = walk(entry, before)
    assert (found.compute_seconds, found.network_seconds) == (20, 80)
    assert (found.exposed_network_seconds, found.seconds, found.hbm_bytes) == (60, 80, 0)

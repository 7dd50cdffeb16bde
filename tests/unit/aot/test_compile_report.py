"""Reports of a small model compiled ahead of time for TPU slices, against figures computed by hand."""

import importlib.util
import json
from dataclasses import replace

import pytest

from internvl_jax.aot import compiled_program, planner
from internvl_jax.aot.programs import PROGRAMS, decode_state_bytes
from internvl_jax.aot.topology import CHIPS, GIB, Topology, TopologyError, parse_topology
from internvl_jax.aot.workload import WorkloadRequest, make_workload
from internvl_jax.cli.main import main
from internvl_jax.config import PRESETS, config_to_hf, vision_tower_name, vision_tower_to_hf
from internvl_jax.parallel.mesh import MeshError

LONG = pytest.mark.long
LAYERS, WIDTH, HIDDEN, HEADS, HEAD_DIM, VOCABULARY = 4, 512, 768, 8, 128, 1000


@pytest.fixture(scope="module")
def compile_report():
    pytest.importorskip("libtpu")
    from internvl_jax.aot import compile_report

    return compile_report


def workload(preset="internvl_chat_v1_1", **options):
    return make_workload(WorkloadRequest(preset=preset, **options))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with the config.json of a small V1-1: 224 pixels, 5 vision heads, 8 language heads of 128."""
    full = replace(PRESETS["internvl_chat_v1_1"](), image_size=224)
    vision = replace(full.vision, hidden_size=640, num_attention_heads=5, intermediate_size=512, num_hidden_layers=6)
    vision = replace(vision, image_size=224)
    projector = replace(full.projector, in_features=4 * 640, out_features=WIDTH)
    text = replace(
        full.text,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
    )
    directory = tmp_path_factory.mktemp("small")
    config = replace(full, vision=vision, projector=projector, text=text)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    return str(directory)


@pytest.fixture(scope="module")
def generated(compile_report, small):
    """encode, prefill, decode and all of them, once: batch 2, 1024 tokens, on 4 chips."""
    load = workload(small, topology="v5e-4", mesh="tensor=4", batch=2, length=1024)
    done = compile_report.make_report(load, "generate")
    return load, done, {part.program: part for part in done.parts}


def test_decode_figures(generated):
    _, _, parts = generated
    done = parts["decode"]
    assert done.fits
    assert (done.topology, done.chips, done.mesh) == ("v5e:2x2", 4, "tensor=4")
    matrices = LAYERS * WIDTH * (4 * HEADS * HEAD_DIM + 3 * HIDDEN)
    attention = 2 * LAYERS * 1024 * HEADS * HEAD_DIM  # scores and weighted sum, all slots
    assert done.ideal_flops_per_chip == 2 * 2 * (matrices + attention + WIDTH * VOCABULARY) / 4
    padded = 2 * 2 * WIDTH * (1024 - VOCABULARY) / 4  # the vocabulary's pads
    assert done.flops_per_chip == done.ideal_flops_per_chip + padded

    cache = 2 * LAYERS * 2 * HEADS * 1024 * HEAD_DIM * 2 // 4  # k and v, bfloat16, heads over 4 chips
    assert cache <= done.hbm_bytes["aliased"] <= 1.02 * cache  # donated: never held twice
    assert done.hbm_bytes["outputs"] - done.hbm_bytes["aliased"] < 2048
    assert done.hbm_bytes["arguments"] >= done.hbm_bytes["parameters"] + cache
    norms = (2 * LAYERS + 1) * WIDTH
    assert done.hbm_bytes["parameters"] == 2 * ((matrices + 2 * WIDTH * 1024) // 4 + norms)

    (sums,) = [one for one in done.collectives if one["kind"] == "all-reduce"]
    assert (sums["count_per_layer"], sums["bytes_per_layer"]) == (2, 2 * 2 * WIDTH * 2)
    table = 2 * WIDTH * 1024 // 4  # of which few rows are read
    read = done.hbm_bytes["arguments"] + done.hbm_bytes["outputs"] - done.hbm_bytes["aliased"] - table
    assert done.roofline_seconds["hbm"] == pytest.approx(read / 819e9)
    assert done.bound_by == "hbm"
    assert done.throughput_bound == {"value": pytest.approx(2 / (read / 819e9)), "unit": "tokens/s"}

    timed = done.schedule
    assert done.ideal_seconds == done.roofline_seconds["hbm"]
    assert timed.compute_seconds == pytest.approx(done.roofline_seconds["compute"])
    # So little is sent that all of it is latency: 2 hops there and 2 back.
    assert timed.network_seconds == pytest.approx(timed.exposed_network_seconds)
    assert timed.network_seconds - timed.exposed_latency_seconds == pytest.approx(done.roofline_seconds["network"])
    assert timed.network_seconds > 2 * LAYERS * 4e-6
    assert timed.hidden_network_seconds == pytest.approx(0)
    assert timed.ratio_to_ideal == timed.seconds / done.ideal_seconds
    assert timed.estimated_seconds == timed.estimated_cycles / 1.5e9
    assert timed.hbm_bytes > read  # so small a cache is moved into VMEM and back besides
    assert done.ideal_seconds < timed.seconds < timed.hbm_bytes / 819e9 + timed.network_seconds + 1e-6
    assert 10 < timed.instructions_per_layer < 40
    assert timed.estimated_cycles > 0
    assert timed.costliest[0].seconds >= timed.costliest[-1].seconds > 0


def test_prefill_and_encode_figures(generated):
    _, _, parts = generated
    prefill, encode = parts["prefill"], parts["encode"]
    matrices = LAYERS * WIDTH * (4 * HEADS * HEAD_DIM + 3 * HIDDEN)
    half = 2 * LAYERS * 1024**2 * HEADS * HEAD_DIM
    assert prefill.ideal_flops_per_chip == 2 * (2 * 1024 * matrices + half + 2 * WIDTH * VOCABULARY) / 4
    # At least all layers and the causal half of attention, at most the other half and the vocabulary's pads more.
    assert 1 <= prefill.flops_per_chip / prefill.ideal_flops_per_chip < 1.01 + half / prefill.ideal_flops_per_chip
    per_layer = {one["kind"]: one["count_per_layer"] for one in prefill.collectives}
    # Tokens are gathered before the parallel parts; a sum of which each chip keeps its tokens is XLA's all-reduce too.
    assert {kind: count for kind, count in per_layer.items() if count} == {"all-gather": 2, "all-reduce": 2}

    layer = 2 * 257 * (4 * 640**2 + 2 * 640 * 512) + 4 * 257**2 * 640
    ends = 2 * 256 * 3 * 14**2 * 640 + 2 * 64 * (4 * 640 + WIDTH) * WIDTH
    assert encode.ideal_flops_per_chip == 2 * (3 * layer + ends) / 4  # select_layer -4: 3 of 6 layers run
    # 5 heads padded to 8, and the unsplit patch embedding on every chip.
    assert 1 < encode.flops_per_chip / encode.ideal_flops_per_chip < 2
    per_layer = {one["kind"]: one["count_per_layer"] for one in encode.collectives}
    assert per_layer == {"all-reduce": 3}  # attention, mlp, and the small sum of the q/k norm


def test_generate_keeps_all_parameters_beside_each_program(generated, compile_report):
    load, done, parts = generated
    everything = load.param_bytes()
    assert done.hbm_bytes["parameters"] == everything
    peaks = [part.hbm_bytes["peak"] - part.hbm_bytes["parameters"] + everything for part in parts.values()]
    assert done.hbm_bytes["peak"] == max(peaks)
    assert done.fits
    assert done.throughput_bound == parts["decode"].throughput_bound
    assert json.loads(json.dumps(done.to_dict()))["parts"][0]["program"] == "encode"
    assert len([line for line in compile_report.format_report(done) if "fits" in line]) == 4


def test_what_does_not_fit_is_a_result_with_advice_that_holds(compile_report, small):
    load = workload(small, topology="v5e-4", mesh="tensor=4", batch=2048, length=4096)
    done = compile_report.make_report(load, "decode")
    assert not done.fits
    assert done.hbm_bytes["peak"] > done.hbm_capacity_bytes == int(15.75 * GIB)
    assert done.flops_per_chip is None
    assert done.throughput_bound["value"] is None
    over, rows, *_ = done.advice
    assert f"{(done.hbm_bytes['peak'] - done.hbm_capacity_bytes) / GIB:.2f} GiB more" in over
    number = int(rows.split()[1])
    assert 256 < number < 2048
    again = replace(load, batch=number * 98 // 100)
    assert compile_report.make_report(again, "decode").fits
    assert not compile_report.make_report(replace(load, batch=number * 103 // 100), "decode").fits


def test_quantized_weights_and_cache(compile_report, small, generated):
    plain, _, parts = generated
    load = workload(small, topology="v5e-4", mesh="tensor=4", batch=2, length=1024, quantize="int8", cache_dtype="int8")
    done = compile_report.make_report(load, "decode")
    assert (done.quantize, done.cache_dtype) == ("int8", "int8")
    # Bytes instead of pairs of bytes, and scales: one per output channel, one per token and head.
    assert 0.5 < done.hbm_bytes["parameters"] / parts["decode"].hbm_bytes["parameters"] < 0.65
    assert 0.5 < decode_state_bytes(load) / decode_state_bytes(plain) < 0.55
    assert done.hbm_bytes["peak"] < 0.75 * parts["decode"].hbm_bytes["peak"]
    assert done.flops_per_chip == parts["decode"].flops_per_chip
    assert any("int8 weights, int8 cache" in line for line in compile_report.format_report(done))


def test_images_over_all_chips_need_no_sums(compile_report, small):
    load = workload(small, topology="v5e-4", mesh="tensor=4", batch=4, vision="data")
    done = compile_report.make_report(load, "encode")
    assert not any(one["count_per_layer"] for one in done.collectives)
    assert done.flops_per_chip == done.ideal_flops_per_chip  # no padded heads


@pytest.mark.parametrize(
    ("preset", "true_width"),
    [
        ("llava_1_5_13b", False),
        pytest.param("llava_1_5_13b", True, marks=LONG),
        pytest.param("internvl_chat_v1_0_13b", True, marks=LONG),
    ],
)
def test_the_other_systems(compile_report, tmp_path, preset, true_width):
    """One layer of the tower, at its true width or small, from the files of a directory."""
    full = PRESETS[preset]()
    vision = replace(full.vision, num_hidden_layers=-full.select_layer)  # one of them runs
    config = replace(full, vision=vision, text=replace(full.text, num_hidden_layers=2))
    if not true_width:
        vision = replace(vision, hidden_size=256, num_attention_heads=4, intermediate_size=512)
        text = replace(config.text, hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=4, vocab_size=1000)
        projector = replace(full.projector, in_features=256, out_features=WIDTH)
        config = replace(config, vision=vision, text=text, projector=projector)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    inside = tmp_path / vision_tower_name(config_to_hf(config))
    inside.mkdir()
    (inside / "config.json").write_text(json.dumps(vision_tower_to_hf(config)))
    load = workload(str(tmp_path), topology="v5e-1", batch=1, length=1024)
    assert load.config == config
    encode = compile_report.make_report(load, "encode")
    assert encode.fits
    tokens, tower, hidden, width = 577, vision.hidden_size, vision.intermediate_size, config.text.hidden_size
    projected = 2 * (tokens - 1) * (tower + width) * width
    layer = 2 * tokens * (4 * tower**2 + 2 * tower * hidden) + 4 * tokens**2 * tower
    patches = 2 * (tokens - 1) * 3 * 14**2 * tower
    assert encode.ideal_flops_per_chip == layer + patches + projected
    assert encode.hbm_bytes["parameters"] == load.param_bytes(("vision_model", "mlp1"))


def test_two_devices_of_a_chip_count_together(compile_report, small):
    load = workload(small, topology="tpu7x", batch=2, length=1024)
    done = compile_report.make_report(load, "decode")
    assert (done.topology, done.chips, done.mesh) == ("tpu7x:2x2x1", 4, "tensor=8")
    assert done.ideal_flops_per_chip <= done.flops_per_chip < 1.05 * done.ideal_flops_per_chip
    assert done.hbm_bytes["parameters"] == load.param_bytes(("language_model",))


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e-8", "v5e:2x4", 8),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v6e-1", "v6e:1x1", 1),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-16", "v4:2x2x2", 8),
        ("tpu7x", "tpu7x:2x2x1", 4),
        ("tpu7x-16", "tpu7x:2x2x2", 8),
        ("v6e", "v6e:1x1", 1),
        ("v5e:2x4", "v5e:2x4", 8),
        ("v5p:4x4x4", "v5p:4x4x4", 64),
    ],
)
def test_names_of_slices(text, name, chips):
    topology = parse_topology(text)
    assert (topology.name, topology.chips) == (name, chips)
    assert parse_topology(topology.slice_name) == topology


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-7", r"no slice 'v5e-7'; v5e has v5e-1 \(v5e:1x1\), v5e-4"),
        ("v5p-4", r"no slice .* v5p-8 \(v5p:2x2x1\).* the number counts cores, 2 per chip"),
        ("v9-8", "not known: write for example v5e-8.* generations are v4, v5e"),
        ("v5p:2x2", "a v5p slice has 3 dimensions, not 2x2"),
        ("", "not known"),
    ],
)
def test_slices_that_do_not_exist(text, message):
    with pytest.raises(TopologyError, match=message):
        parse_topology(text)


def test_every_slice_is_known_to_the_compiler():
    pytest.importorskip("libtpu")
    for chip in CHIPS.values():
        devices = parse_topology(chip.name).devices()
        assert len(devices) == chip.smallest * chip.devices
    with pytest.raises(TopologyError, match="does not know the slice v5e:3x3"):
        Topology(CHIPS["v5e"], (3, 3)).devices()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mesh": "tensor=16"}, "needs 16 devices, there are 4"),
        ({"mesh": "tensor=2"}, "uses 2 of the 4 devices of v5e:2x2"),
        ({"mesh": "data=2,tensor=2", "batch": 3}, "a batch of 3 rows does not divide"),
        ({"length": 5000}, "the model's context"),
        ({"length": 100, "prompt": 101}, "1 <= prompt <= length"),
        ({"batch": 0}, "at least one row"),
        ({"preset": "internvl_chat_v2"}, f"neither one of {', '.join(PRESETS)} nor a directory"),
        ({"vision": "fsdp"}, "vision mode 'fsdp' is not one of"),
    ],
)
def test_what_cannot_be_compiled_is_refused(compile_report, small, asked, message):
    with pytest.raises(ValueError, match=message):
        workload(**{"preset": small, "topology": "v5e-4", **asked})


def test_heads_that_do_not_divide(compile_report):
    with pytest.raises(MeshError, match=r"heads \(40\); legal sizes of tensor on 16 devices are 1, 2, 4, 8"):
        workload(topology="v5e-16", mesh="tensor=16")


def test_messages_of_the_compiler():
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.06G) "
    )
    assert compiled_program.exhausted_bytes(temporaries + "exceeds available HBM (15.75G).") == int(28.06 * GIB)
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G."
    assert compiled_program.exhausted_bytes(used) == int(17.5 * GIB)
    assert compiled_program.exhausted_bytes("INVALID_ARGUMENT: Used 17.50G of 15.75G hbm") is None


def test_full_size_ideals(compile_report):
    """Counts that others arrive at too, for LLaMA2-13B with 32000 tokens of vocabulary on 8 chips."""
    load = workload(topology="v5e-8", mesh="tensor=8", batch=8, length=2048, prompt=512)
    config = replace(load.config, text=replace(load.config.text, vocab_size=32000))
    load = replace(load, config=config)
    assert PROGRAMS["prefill"].ideal_flops(load) / 8 == pytest.approx(1.30999e13, rel=1e-5)
    attention = 4 * 8 * 2048 * 5120 * 40 / 8
    assert PROGRAMS["decode"].ideal_flops(load) / 8 - attention == pytest.approx(2.5703e10, rel=1e-4)
    assert PROGRAMS["encode"].ideal_flops(load) / 8 == pytest.approx(11.99e12, rel=1e-3)


def test_plan(compile_report, small):
    request = WorkloadRequest("v5e-4", small, length=4096, batch=4)
    ranked = planner.rank_candidates(request)
    assert {one.mesh for one in ranked} == {"tensor=4", "data=2,tensor=2", "data=4"}
    assert ranked[0].mesh == "tensor=4"  # every chip reads its share of the weights only
    assert all(one.batch == 4 and one.parameter_bytes < one.resident_bytes for one in ranked)

    free = planner.rank_candidates(replace(request, batch=None))[0]
    load = make_workload(replace(request, mesh=free.mesh, batch=free.batch))
    assert free.resident_bytes == load.param_bytes() + decode_state_bytes(load)
    assert free.resident_bytes <= 15.75 * GIB < free.parameter_bytes + 2 * (free.resident_bytes - free.parameter_bytes)


def test_plan_compiles_what_it_recommends(compile_report):
    said = []
    made = planner.plan_mesh(WorkloadRequest("v5e-4", "nano", length=128, batch=4), said.append)
    assert made.recommended.fits
    assert (made.recommended.batch, made.recommended.program) == (4, "generate")
    assert any("compiling prefill" in line for line in said)
    assert f"--mesh {made.recommended.mesh} --batch-size 4" in planner.format_plan(made)[-1]


def test_plan_where_nothing_fits(compile_report):
    full = WorkloadRequest("v6e-1")
    made = planner.plan_mesh(full, precisions=[planner.Precision()])
    assert made.recommended is None
    assert "34.92 GiB of parameters: too large" in planner.format_plan(made)[1]
    assert "larger slice" in planner.format_plan(made)[-1]
    # In 8 bits the parameters leave room for half a dozen rows and more.
    (quantized,) = planner.rank_candidates(replace(full, quantize="int8", cache_dtype="int8"))
    assert quantized.batch >= 8
    with pytest.raises(MeshError, match="use a multiple of 32 rows"):
        planner.rank_candidates(replace(full, topology="v5e-256", batch=8))


def test_command(compile_report, small, capsys, tmp_path):
    arguments = [
        "compile-report",
        "--preset",
        small,
        "--topology",
        "v5e:2x2",
        "--mesh",
        "tensor=4",
        "--batch-size",
        "2",
    ]
    dump = ["--dump-hlo", str(tmp_path / "hlo")]
    assert main([*arguments, "--max-seq-length", "1024", "--program", "decode", "--json", *dump]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (tmp_path / "hlo" / "decode.txt").read_text().startswith("HloModule")
    assert set(printed["schedule"]["costliest"][0]) == {"name", "op_name", "seconds", "count", "is_copy"}
    assert printed["schedule"]["ratio_to_ideal"] == printed["schedule"]["seconds"] / printed["ideal_seconds"]
    assert {"exposed_network_seconds", "hidden_network_seconds", "exposed_latency_seconds"} < set(printed["schedule"])
    assert printed["program"] == "decode"
    assert printed["fits"]
    assert set(printed["hbm_bytes"]) >= {"arguments", "outputs", "temporaries", "aliased", "peak"}
    assert set(printed["roofline_seconds"]) == {"compute", "hbm", "network"}
    assert set(printed["throughput_bound"]) == {"value", "unit"}
    assert main([*arguments, "--program", "decode", "--flags=--xla_no_such=1"]) == 2
    assert "the TPU compiler does not know the flag --xla_no_such" in capsys.readouterr().err
    assert main([*arguments, "--program", "trane"]) == 2
    assert "there are encode, prefill, decode, generate" in capsys.readouterr().err


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'internvl-jax\[tpu\]'"):
        parse_topology("v5e-8").devices()

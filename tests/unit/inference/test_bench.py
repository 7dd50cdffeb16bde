"""The benchmark: what it measures and refuses, its figures against a clock and chips that the test makes up."""

import importlib
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.paths import ROOT

from internvl_jax.aot.topology import CHIPS
from internvl_jax.config import PRESETS
from internvl_jax.inference import bench
from internvl_jax.inference.load_options import LoadOptions

NANO = PRESETS["nano"]()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "REPEATS", 2)
        patch.setattr(bench, "STEPS", 3)
        jax.clear_caches()  # tests before these may have compiled the same programs
        return bench.run(preset="nano", batch_sizes=(1, 3), prompt_tokens=96, profile=folder), folder


def test_every_program_at_every_batch(result):
    found, _ = result
    assert [(m.program, m.batch) for m in found.measurements] == [
        (program, batch) for batch in (1, 3) for program in ("encode", "prefill", "decode")
    ]
    for one in found.measurements:
        amount = {"encode": one.batch, "prefill": 96 * one.batch, "decode": one.batch}[one.program]
        assert one.rate == pytest.approx(amount / one.seconds)
        assert 0 < one.fastest <= one.seconds <= one.slowest
        assert one.mfu is one.roofline is None  # a CPU's figures are not known
    assert found.time_to_first_token > 0
    assert found.memory_of == "process"
    assert 50e6 < found.memory_peak_bytes < 50e9
    assert (found.model, found.dtype, found.device, found.devices, found.processes) == ("nano", "float32", "cpu", 1, 1)


def test_compiling_is_told_apart(result):
    """The first run of a program takes much longer than the following ones; that is not in the rate."""
    found, _ = result
    encode = found.measurements[0]
    assert encode.compile_seconds > 2 * encode.seconds


def test_json_and_table(result):
    found, _ = result
    values = json.loads(json.dumps(found.to_dict()))
    assert values["measurements"][0]["unit"] == "images/s"
    table = bench.lines(found)
    assert len(table) == 9
    assert table[0].startswith("nano: ")
    assert "time to first token" in table[-1]
    assert len({len(line) for line in table[1:-1]}) == 1


def test_a_trace_is_written(result):
    _, folder = result
    assert list(folder.rglob("*.xplane.pb"))


def test_random_weights_are_random_everywhere():
    generator = bench.random_model(NANO, LoadOptions())
    tower = generator.params["vision_model"]["layers"]
    assert len(tower) == NANO.num_vision_layers
    values = np.asarray(tower[0]["mlp"]["fc1"]["kernel"])
    assert 0.015 < values.std() < 0.025
    assert not np.array_equal(values, np.asarray(tower[1]["mlp"]["fc1"]["kernel"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "giant"}, "preset 'giant' is not one of"),
        ({}, "give one of them"),
        ({"preset": "nano", "checkpoint": "x"}, "give one of them"),
        ({"preset": "nano", "batch_sizes": (0,)}, "positive numbers"),
        ({"preset": "nano", "prompt_tokens": 100000}, "a prompt has .* tokens here"),
        ({"preset": "nano", "prompt_tokens": 3}, "a prompt has .* tokens here"),
        ({"preset": "nano", "options": LoadOptions(quantize="int8")}, "quantize a checkpoint"),
        ({"preset": "nano", "options": LoadOptions(mesh="tensor=1000")}, "needs 1000 devices"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        bench.run(**{"batch_sizes": (1,), **options})


def test_default_prompts_fit_the_context():
    for config in (PRESETS["internvl_chat_v1_1"](), NANO):
        prompt = bench.choose_prompt_tokens(config, None)
        assert config.tokens_per_image < prompt <= 512
    assert bench.choose_prompt_tokens(PRESETS["internvl_chat_v1_1"](), None) == 512


def test_figures_on_a_chip():
    """MFU and roofline of V1-1's decoding on v5e, recomputed from the chip's figures and the model's sizes."""
    config, chip = PRESETS["internvl_chat_v1_1"](), CHIPS["v5e"]
    text = config.text
    weights = SimpleNamespace(nbytes=26_000_000_000)
    generator = SimpleNamespace(
        config=config,
        mesh=SimpleNamespace(size=8),
        params={"language_model": {"w": weights}},
        cache_dtype=np.dtype(np.float16),
    )
    seconds, batch, context = 0.010, 8, 1024
    mfu, roofline = bench.efficiency(generator, chip, "decode", batch, context, seconds)
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    layer = 4 * width * heads + 3 * width * text.intermediate_size
    per_row = 2 * text.num_hidden_layers * layer + 2 * width * text.vocab_size
    per_row += 4 * context * heads * text.num_hidden_layers
    assert mfu == pytest.approx(batch * per_row / (seconds * 8 * 197e12))
    cache = batch * 2 * text.num_hidden_layers * context * heads * 2
    assert roofline == pytest.approx((weights.nbytes + cache) / (8 * 819e9) / seconds)
    assert 0.4 < roofline < 0.6


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "tpu7x")],
)
def test_chips_by_their_names_in_jax(kind, name):
    assert bench.chip_of(SimpleNamespace(device_kind=kind)) is CHIPS[name]
    assert bench.chip_of(SimpleNamespace(device_kind="cpu")) is None
    assert set(bench.DEVICE_KINDS.values()) == set(CHIPS)


def test_names_are_those_of_the_compilers_devices():
    pytest.importorskip("libtpu")
    from internvl_jax.aot.topology import parse_topology

    device = parse_topology("v5e-1").devices()[0]
    assert bench.chip_of(device) is CHIPS["v5e"]
    assert math.isclose(bench.chip_of(device).bf16_flops, 197e12)


@pytest.fixture(scope="module")
def beside_torch():
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("losses_vs_torch")


@pytest.mark.long  # losses and gradients of a step are tested against golden ones
def test_twenty_steps_of_training_lose_what_torchs_do(beside_torch, tmp_path):
    """All parts trained in float32, the loss going down by more than half. How far float32 alone drives two runs apart
    in so many steps is measured: torch from weights that are moved by one rounding."""
    result = beside_torch.run("full", 20)
    assert result.ours[0] == pytest.approx(result.original, abs=1e-5)
    assert max(result.ours[16:]) < result.ours[0] / 2
    np.testing.assert_allclose(result.ours[:5], result.torch[:5], rtol=0, atol=5e-5)  # 2e-5 was seen
    np.testing.assert_allclose(result.ours, result.torch, rtol=0, atol=1e-3)  # 2e-4 was seen
    assert 1e-5 < result.rounding < 5e-3  # 6e-4 was seen
    pytest.importorskip("matplotlib")
    beside_torch.plot(result, "full", tmp_path / "plots" / "losses.svg")
    plot = (tmp_path / "plots" / "losses.svg").read_text()
    assert plot.count('id="torch"') == plot.count('id="ours"') == 1
    assert plot.count('id="difference-') == 20

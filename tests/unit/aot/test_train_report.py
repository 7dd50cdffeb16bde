"""A training step of a small model compiled ahead of time for TPU slices, against figures computed by hand."""

import json
from dataclasses import replace

import pytest
from support.golden import DATA

from internvl_jax.cli.main import main
from internvl_jax.config import PRESETS, config_to_hf
from internvl_jax.models.chat_model import count_params
from internvl_jax.parallel.mesh import MeshError

pytest.importorskip("libtpu")

from internvl_jax.aot import train_report
from internvl_jax.aot.compiled_program import bytes_per_device, mesh_name
from internvl_jax.aot.schedule import Schedule
from internvl_jax.aot.train_report import TrainReport, TrainRequest, make_train_workload


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with the config.json of a small V1-1 whose heads are those of the full one."""
    full = replace(PRESETS["internvl_chat_v1_1"](), image_size=224)
    sizes = {"hidden_size": 640, "num_attention_heads": 5, "intermediate_size": 512, "num_hidden_layers": 5}
    vision = replace(full.vision, **sizes, image_size=224)
    projector = replace(full.projector, in_features=4 * 640, out_features=512)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    text = replace(full.text, **heads, hidden_size=512, intermediate_size=768, num_hidden_layers=3, vocab_size=1000)
    directory = tmp_path_factory.mktemp("small")
    config = replace(full, vision=vision, projector=projector, text=text)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    return str(directory)


@pytest.fixture(scope="module")
def compiled(small):
    work = make_train_workload(TrainRequest("v5e-4", small, length=512, batch=8))
    return work, train_report.make_train_report(work)


def test_figures_of_a_step(compiled):
    work, done = compiled
    state, frozen, _ = train_report.abstract_arguments(work)
    assert (done.mesh, done.vision, done.batch, done.chips) == ("fsdp=4", "data", 8, 4)
    assert done.fits
    trained = count_params(state.trained)
    assert set(state.trained) == {"mlp1", "language_model"}
    assert set(frozen) == {"vision_model"}
    assert count_params(state.optimizer) == pytest.approx(2 * trained, rel=1e-5)  # two moments, and the steps' count
    inputs = 8 * (4 * 512 * 4 + 3 * 224**2 * 4)
    expected = (12 * trained + 2 * count_params(frozen) + inputs) / 4
    assert expected < done.hbm_bytes["arguments"] < 1.1 * expected  # norms, biases and patches are whole on every chip
    # What is trained lies where it lay: donated.
    assert done.hbm_bytes["outputs"] - done.hbm_bytes["aliased"] < 2**16
    # Forward once more for the backward pass but for what only made the next layer's input, and whole attention blocks.
    assert 1.15 < done.flops_per_chip / done.ideal_flops_per_chip < 1.5
    assert any(one["count"] for one in done.collectives)
    assert max(done.roofline_seconds.values()) == done.step_seconds > 0
    assert json.loads(json.dumps(done.to_dict()))["recipe"] == "stage2"
    text = "\n".join(train_report.format_train_report(done))
    assert "train stage2: v5e:2x2 (4 chips), fsdp=4, 8 rows of 512 tokens with 1 image each, remat full" in text


def test_storing_in_bfloat16_takes_less(compiled):
    work, done = compiled
    state, *rest = train_report.abstract_arguments(replace(work, request=replace(work.request, param_dtype="bfloat16")))
    held = bytes_per_device((state, rest))
    # Two bytes of four for what is trained, of which norms and biases are whole on every chip; moments stay float32.
    assert done.hbm_bytes["arguments"] - held == pytest.approx(2 * count_params(state.trained) / 4, rel=0.05)


def by_arithmetic(work):
    """A report as if the compiler needed a tenth more than arithmetic says."""
    chip = work.topology.chip
    peak = int(1.1 * work.estimated_bytes)
    fits = peak <= chip.hbm_bytes
    flops = work.ideal_flops / work.topology.chips
    return TrainReport(
        topology=work.topology.name,
        chips=work.topology.chips,
        recipe=work.context.recipe.name,
        mesh=mesh_name(work.mesh),
        vision=work.context.placement.vision,
        batch=work.batch,
        length=work.request.length,
        images=work.images,
        remat=work.request.remat,
        param_dtype=work.request.param_dtype,
        dtype=work.request.dtype,
        flags=dict(work.flags),
        hbm_bytes={"peak": peak},
        hbm_capacity_bytes=chip.hbm_bytes,
        fits=fits,
        flops_per_chip=flops if fits else None,
        ideal_flops_per_chip=flops,
        collectives=[{"bytes": 2**30}],
        roofline_seconds=dict.fromkeys(("compute", "hbm", "network"), 2.0) if fits else {},
        ideal_seconds=1.5 if fits else 0.0,
        schedule=Schedule(seconds=3.0, exposed_network_seconds=0.75) if fits else None,
        compile_seconds=0.0,
    )


def test_plan_chooses_what_fits_at_full_size():
    said = []
    done = train_report.plan_training(TrainRequest("v5e-16"), said.append, by_arithmetic)
    assert (done.param_dtype, done.remat, done.fits) == ("bfloat16", "full", True)
    assert any("remat full, float32" in line for line in said)  # close enough that the compiler was asked
    most = make_train_workload(TrainRequest("v5e-16", param_dtype="bfloat16", batch=2 * done.batch))
    assert not by_arithmetic(most).fits
    roomy = train_report.plan_training(TrainRequest("v5p-16", recipe="lora"), compile_step=by_arithmetic)
    assert (roomy.param_dtype, roomy.remat) == ("float32", "dots")
    assert roomy.batch > 8
    assert train_report.plan_training(TrainRequest("v5e-8", recipe="full"), compile_step=by_arithmetic) is None


def test_table():
    made = []

    def compile_step(work):
        made.append(by_arithmetic(work))
        return made[-1]

    request = TrainRequest("")
    lines = train_report.train_table(request, ["v5e-8", "v5e-16"], ["full", "stage2"], compile_step=compile_step)
    head, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert {len(row) for row in rows} == {len(head)} == {len(rule)}
    found = {(row[0], row[1]): dict(zip(head, row)) for row in rows}
    assert list(found) == [(t, r) for t in ("v5e-8", "v5e-16") for r in ("full", "stage2")]
    assert found["v5e-8", "full"]["rows"] == "does not fit"
    assert found["v5e-16", "stage2"]["mesh"] == "fsdp=16"
    stage2 = found["v5e-16", "stage2"]
    assert stage2["collective bytes"] == "1 GiB"
    assert (stage2["step-time lower bound"], stage2["step by the schedule"]) == ("2.00 s", "3.00 s")
    assert stage2["exposed network"] == "25.0%"
    # The slice and recipe of the last row; the ideal grows with the rows alone.
    ideal = made[-1].ideal_flops_per_chip / made[-1].batch * int(stage2["rows"])
    assert stage2["model FLOPs utilization"] == f"{ideal / 3 / 197e12:.0%}"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"recipe": "stage3"}, "recipe 'stage3' is not known"),
        ({"remat": "some"}, "remat 'some' is not one of full, dots, none"),
        ({"length": 9000}, "a row has 2 to 4096 tokens"),
        ({"images": 9}, "9 images of 64 tokens do not leave room for text in a row of 512"),
        ({"batch": 6}, "a batch of 6 rows does not divide"),
        ({"mesh": "fsdp=2"}, "uses 2 of the 4 devices"),
    ],
)
def test_what_cannot_be_compiled_is_refused(small, asked, message):
    with pytest.raises((ValueError, MeshError), match=message):
        make_train_workload(TrainRequest(**{"preset": small, "topology": "v5e-4", "length": 512, **asked}))


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = json.loads((DATA / "intern_vit" / "checkpoint_bin" / "config.json").read_text())


@pytest.fixture
def language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def test_a_language_model_alone(language_model):
    """Rows of text, forward and backward: three times the products with weights, and with the head."""
    work = make_train_workload(TrainRequest("v5e-4", language_model, length=64, batch=4))
    assert (work.images, work.context.recipe.train) == (0, ("language_model",))
    products = 2 * (4 * 64**2 + 3 * 64 * 128) + 64 * 100
    attention = 2 * 64**2 * 64 * 2  # scores and weighted sum, the causal half
    assert work.ideal_flops == 3 * 4 * (64 * 2 * products + attention)
    done = train_report.make_train_report(work)
    assert done.fits
    assert done.flops_per_chip > done.ideal_flops_per_chip
    assert done.schedule.seconds > done.ideal_seconds > 0
    assert "4 rows of 64 tokens with no images, remat full" in train_report.format_train_report(done)[0]
    request = TrainRequest("v5e-4", language_model, recipe="lora", length=64)
    assert train_report.plan_training(request, compile_step=by_arithmetic).remat == "dots"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"recipe": "stage1"}, "recipe 'stage1' trains vision_model, mlp1, which .* does not have"),
        ({"images": 1}, "has no vision tower: leave out --images-per-row"),
    ],
)
def test_a_language_model_has_no_images(language_model, asked, message):
    with pytest.raises(ValueError, match=message):
        make_train_workload(TrainRequest("v5e-4", language_model, length=64, **asked))


def test_a_vision_tower_alone_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(TOWER))
    for more in ([], ["--plan"], ["--table"]):
        asked = ["compile-report", "--program", "train", "--topology", "v5e-4", "--preset", str(tmp_path), *more]
        assert main(asked) == 2
        assert f"error: {tmp_path} is neither a chat model nor a language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--program", "train", "--quantize", "int8"], "--quantize does not apply to --program train"),
        (["--program", "decode", "--recipe", "lora"], "--recipe belongs to --program train"),
        (["--table", "--json"], "--table prints Markdown: leave --json out"),
        (["--program", "train", "--plan", "--batch-size", "8"], "choose --batch-size, --remat and --param-dtype"),
    ],
)
def test_options_that_do_not_belong_together(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["compile-report", "--topology", "v5e-8", *arguments])
    assert message in capsys.readouterr().err

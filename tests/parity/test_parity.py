"""The parity command: its reference is anchored to the goldens, and what is wrong on purpose is found where it is."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support.parity_cases import chain, names, text, vision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rich.console import Console  # noqa: E402
from support.golden import DATA, assert_close, bundle, spread  # noqa: E402

from checkpoints_convert.parity.inputs import RANDOM_TOKENS  # noqa: E402
from checkpoints_convert.parity.reference import Reference  # noqa: E402
from checkpoints_convert.parity.report import Distribution, Errors, Stage  # noqa: E402
from checkpoints_convert.parity.run import ParityError, run_parity  # noqa: E402
from checkpoints_convert.readers import open_weights, split_packed  # noqa: E402
from internvl_jax.cli import main  # noqa: E402
from internvl_jax.config import (  # noqa: E402
    PRESETS,
    config_to_hf,
    load_config,
    vision_tower_name,
    vision_tower_to_hf,
)
from internvl_jax.processing.images import ImageError, load_image  # noqa: E402

CHAT = DATA / "internvl_chat_v1_1" / "checkpoint"
VIT = DATA / "intern_vit" / "checkpoint_bin"
LLAVA = DATA / "llava_1_5" / "original"
RGB = DATA / "internvl_chat_v1_1" / "images" / "rgb.png"


def reference_of(directory):
    with open_weights(directory) as weights:
        split_packed(weights, load_config(directory))
        state = {key: weights.read(key) for key in weights.shapes}
    return Reference(directory, list(state), state.__getitem__)


# The reference is right: the original code's own hidden states.


def test_reference_vision_equals_the_goldens():
    arrays, _ = bundle("internvl_chat_v1_1")
    reference = reference_of(CHAT)
    pixels = reference.pixels(load_image(RGB, honor_exif=False))
    np.testing.assert_array_equal(pixels[0], arrays["images/rgb/eval"])
    states = chain([reference.vision_layer(n) for n in range(6)], reference.vision_embeddings()(pixels))
    assert_close(states, arrays["vision/hidden_states"], 5e-5, "hidden states")
    assert reference.num_vision_layers == 3  # hidden_states[-4] of 7
    folded = reference.features()(states[3:4])
    assert_close(folded[0], arrays["vision/pixel_shuffle_v1"].reshape(16, 320), 5e-5, "pixel_shuffle v1")
    assert_close(reference.projector()(folded)[0], arrays["vision/mlp1_v1"], 2e-5, "mlp1")
    probe = reference.projector()(arrays["probe/mlp1_input"][None])[0]
    assert_close(probe, arrays["probe/mlp1_output"], 1e-5, "mlp1 of tiny variance")


def test_reference_folds_v2_as_the_goldens_do(tmp_path):
    arrays, _ = bundle("internvl_chat_v1_1")
    config = json.loads((CHAT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "ps_version": "v2"}))
    state = arrays["vision/hidden_states"][3:4]
    folded = Reference(tmp_path, [], {}.__getitem__).features()(state)
    assert_close(folded[0], arrays["vision/pixel_shuffle_v2"].reshape(16, 320), 0, "pixel_shuffle v2")


def test_reference_language_equals_the_goldens():
    arrays, facts = bundle("internvl_chat_v1_1")
    reference = reference_of(CHAT)
    ids = arrays["logits/en_single/input_ids"]
    image_token_id = facts["config"]["token_ids"]["<IMG_CONTEXT>"]
    x = reference.text_embeddings(ids, image_token_id)(arrays["vision/mlp1_v1"][None])
    states = chain([reference.text_layer(n) for n in range(4)], x)
    normed = reference.text_norm()(states[-1:])
    states[-1] = normed[0]
    assert_close(states, arrays["logits/en_single/llm_hidden_states"], 5e-5, "hidden states")
    assert_close(reference.logits()(normed)[0], arrays["logits/en_single/fp32"], 1e-4, "logits")


NEWER = ("internvl_chat_v1_2", "internvl2_internlm2", "internvl2_5_qwen2", "internvl3_5_qwen3")


@pytest.mark.parametrize("name", NEWER)
def test_reference_of_newer_systems_equals_the_goldens(name):
    """Its language model, in hidden states and logits that the original code computed."""
    arrays, facts = bundle(name)
    directory = DATA / name / "checkpoint"
    reference = reference_of(directory)
    ids = arrays["logits/en_single/input_ids"]
    config = load_config(directory)
    image_token_id = facts["config"]["token_ids"]["<IMG_CONTEXT>"]
    expected = arrays["logits/en_single/llm_hidden_states"]
    features = expected[0][ids == image_token_id]  # as the original wrote them into the embeddings
    x = reference.text_embeddings(ids, image_token_id)(features[None])
    states = chain([reference.text_layer(n) for n in range(config.text.num_hidden_layers)], x)
    normed = reference.text_norm()(states[-1:])
    states[-1] = normed[0]
    assert_close(states, expected, 5e-5, "hidden states")
    assert_close(reference.logits()(normed)[0], arrays["logits/en_single/fp32"], 1e-4, "logits")


@pytest.mark.parametrize("name", NEWER)
def test_newer_systems_pass(name):
    report = run_parity(DATA / name / "checkpoint")
    assert report.passed
    assert report.distribution.greedy_agreement == 1


def test_reference_of_a_bare_tower_equals_the_goldens():
    arrays, _ = bundle("intern_vit")
    reference = reference_of(VIT)
    states = chain([reference.vision_layer(n) for n in range(5)], reference.vision_embeddings()(arrays["pixel_values"]))
    assert_close(states[::2], arrays["hidden_states"], 5e-5, "hidden states of the first image")
    for case in ("interp_up_168", "interp_down_70"):
        embedded = reference.vision_embeddings()(arrays[f"{case}/pixel_values"][None])
        assert_close(embedded[0], arrays[f"{case}/embeddings"], 1e-5, case)


# What is right passes.


@pytest.fixture(scope="module")
def chat_report():
    return run_parity(CHAT, image=RGB)


def test_golden_chat_model_passes(chat_report):
    assert names(chat_report) == [
        "pixels",
        "vision.embeddings",
        "vision.layers.0",
        "vision.layers.0~0",
        "vision.layers.1",
        "vision.layers.2",
        "features",
        "projector",
        "projector~0",
        "text.embeddings",
        "text.layers.0",
        "text.layers.0~0",
        "text.layers.1",
        "text.layers.2",
        "text.layers.3",
        "text.norm",
        "logits",
    ]
    assert chat_report.passed
    assert chat_report.culprits == []
    assert chat_report.stages[-1].accumulated.max_abs <= 2e-4
    assert chat_report.distribution.greedy_agreement == 1
    assert chat_report.peak_rss > 10**8


@pytest.mark.parametrize("directory", [VIT, VIT.parent / "checkpoint_safetensors"], ids=["bin", "safetensors"])
def test_golden_tower_passes(directory):
    report = run_parity(directory)
    assert report.passed
    assert names(report)[-1] == "vision.layers.4"
    assert report.distribution is None
    assert (report.prompt_tokens, report.prompt) == (0, None)


def test_long_prompt_and_turned_image_pass():
    turned = RGB.with_name("exif_rot.jpg")
    report = run_parity(CHAT, image=turned, prompt="Is the shop open or closed? 这是什么？ " * 24)
    assert report.prompt_tokens > 400
    assert report.passed


def internvl_directory(path, family="Llama", tied=False, **vision):
    text = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    tower = transformers.InternVLVisionConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=5, image_size=56, **vision
    )
    config = transformers.InternVLConfig(
        vision_config=tower.to_dict(), text_config=text.to_dict(), image_token_id=96, image_seq_length=4,
        vision_feature_layer=-2, tie_word_embeddings=tied,
    )  # fmt: skip
    spread(transformers.InternVLForConditionalGeneration(config), seed=1).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "vision",
    [{"norm_type": "rms_norm", "use_qk_norm": True}, {"norm_type": "layer_norm", "attention_bias": True}],
    ids=["rms_norm", "layer_norm"],
)
def test_transformers_internvl_passes(tmp_path, vision):
    report = run_parity(internvl_directory(tmp_path, **vision))
    assert report.passed
    assert report.image == "random"
    assert names(report)[0] == "vision.embeddings"  # no processor, so no pixels
    assert "vision.layers.1" in names(report)
    assert "vision.layers.2" not in names(report)  # past vision_feature_layer


@pytest.mark.parametrize(("family", "tied"), [("Qwen2", False), ("Qwen3", True)])
def test_transformers_internvl_with_qwen_passes(tmp_path, family, tied):
    report = run_parity(internvl_directory(tmp_path, family, tied, attention_bias=True))
    assert report.passed
    assert "logits" in names(report)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_llama_passes(tmp_path, tied):
    scaling = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=256, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=tied, rope_parameters=scaling,
    )  # fmt: skip
    spread(transformers.LlamaForCausalLM(config), seed=2).save_pretrained(tmp_path)
    report = run_parity(tmp_path)
    assert report.passed
    assert names(report)[0] == "text.embeddings"
    assert (report.image, report.prompt, report.prompt_tokens) == (None, None, RANDOM_TOKENS)


@pytest.mark.parametrize("reference", [None, CHAT], ids=["alone", "published"])
def test_converted_directory_passes(converted, reference, chat_report):
    report = run_parity(converted, reference=reference, image=RGB)
    assert report.passed
    # The same weights on the same way: the same figures, to the bit.
    assert report.stages == chat_report.stages


def test_quantized_directory_is_refused(tmp_path):
    from checkpoints_convert.convert import convert

    convert(CHAT, tmp_path / "jax", quantize="int8")
    with pytest.raises(ParityError, match="without --quantize"):
        run_parity(tmp_path / "jax")


def test_converted_internvl_passes(tmp_path):
    from checkpoints_convert.convert import convert

    published = internvl_directory(tmp_path / "hf", norm_type="rms_norm", use_qk_norm=True)
    convert(published, tmp_path / "jax")
    assert run_parity(tmp_path / "jax").passed  # q, k and v are parts of one of our leaves
    assert run_parity(tmp_path / "jax", reference=published).passed


# The measures themselves.


def test_errors():
    a = np.array([[3.0, 4.0, 0.0, 0.0]], np.float32)
    b = a.copy()
    b[0, 2] = 0.25
    errors = Errors.of(a, b)
    assert errors.max_abs == 0.25
    assert errors.mean_abs == 0.0625
    assert errors.relative == pytest.approx(0.25 / 2.5)
    assert errors.cosine == pytest.approx(25 / (5 * np.sqrt(25.0625)))
    zero = Errors.of(np.zeros(4, np.float32), np.zeros(4, np.float32))
    assert (zero.relative, zero.cosine) == (0, 1)
    with pytest.raises(ParityError, match=r"\[4\].*\[3\]"):
        Errors.of(np.zeros(4, np.float32), np.zeros(3, np.float32))


def test_numbers_that_are_not_finite_fail():
    a = np.ones((1, 2, 4), np.float32)
    b = a.copy()
    b[0, 1, 2] = np.nan
    stage = Stage("logits", "op", Errors.of(a, b), None)
    assert not stage.passed
    assert not Distribution.of(a, b).passed


def test_distribution():
    a = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], np.float32))
    b = np.log(np.array([[[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]], np.float32)) + 3
    d = Distribution.of(a, b)
    assert d.max_kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2), abs=1e-6)
    assert d.mean_kl == pytest.approx(d.max_kl / 2, abs=1e-6)
    assert d.greedy_agreement == 0.5
    assert not d.greedy_passed
    tie = np.array([[[1.0, 1.0 - 1e-5, 0.0]]], np.float32)
    swapped = tie[..., [1, 0, 2]]
    assert Distribution.of(tie, swapped).greedy_agreement == 0
    assert Distribution.of(tie, swapped).passed  # the reference itself holds them for equal


# The command.


def test_json(capsys):
    assert main.main(["parity", str(CHAT), "--image", str(RGB), "--prompt", "What is it?", "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(result) == {
        "passed", "culprits", "checkpoint", "reference", "image", "prompt", "prompt_tokens", "stages", "logits",
        "versions", "seconds", "peak_rss_bytes",
    }  # fmt: skip
    assert result["passed"] is True
    assert result["prompt"] == "What is it?"
    for row in result["stages"]:
        assert set(row) == {"stage", "passed", "limits", "local", "accumulated"}
        for scope in ("local", "accumulated"):
            assert (row[scope] is None) == (row["limits"][scope] is None)
            if row[scope] is not None:
                assert set(row[scope]) == {"max_abs", "mean_abs", "relative", "cosine"}
                assert row[scope]["relative"] <= row["limits"][scope]
    assert result["logits"]["max_kl"] <= result["logits"]["kl_limit"]
    assert set(result["versions"]) == {"jax", "torch", "transformers"}


def test_table(chat_report):
    console = Console(record=True, width=80, file=open(os.devnull, "w"))
    chat_report.print(console)
    lines = console.export_text().splitlines()
    rows = [line for line in lines if line.rstrip().endswith(" ok")]
    assert len(rows) == len(chat_report.stages) + 1  # and the logits' line
    assert all(len(line) <= 80 for line in lines[: len(chat_report.stages) + 2])
    assert lines[-1].startswith("passed")
    assert any("peak memory" in line and "iB" in line for line in lines)


def test_progress_ends_at_its_total():
    seen = []
    run_parity(VIT, progress=lambda done, total, what: seen.append((done, total, what)))
    done, total, what = seen[-1]
    assert done == total > 0
    assert what == "vision.layers.4"
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        run_parity(CHAT, image=tmp_path / "no.png")
    with pytest.raises(ParityError, match=r"no language model.*--prompt"):
        run_parity(VIT, prompt="hello")
    with pytest.raises(ParityError, match="context 512"):
        run_parity(CHAT, prompt="long " * 600)
    with pytest.raises(ParityError, match="not the same model"):
        run_parity(CHAT, reference=VIT)
    with pytest.raises(ValueError, match="not a directory"):
        run_parity(CHAT, reference=tmp_path / "none")
    lonely = internvl_directory(tmp_path / "hf")
    with pytest.raises(ParityError, match=r"preprocessor_config\.json.*--image"):
        run_parity(lonely, image=RGB)
    with pytest.raises(ParityError, match=r"no tokenizer.*--prompt"):
        run_parity(lonely, prompt="hello")


def test_missing_packages_are_named(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from internvl_jax.cli import main as cli\n"
        f"sys.exit(cli.main(['parity', {str(VIT)!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "pip install 'internvl-jax[convert]'" in " ".join(run.stderr.split())


def full_width(directory, depth, preset):
    """A system's true widths with `depth` layers in either tower, random weights, one layer in memory at a time."""
    from safetensors.torch import save_file

    from checkpoints_convert.mapping import tensors

    # All layers run. Small images: what counts here are the weights.
    config = dataclasses.replace(PRESETS[preset](), select_layer=-1, image_size=112)
    config = text(vision(config, num_hidden_layers=depth), num_hidden_layers=depth)
    directory.mkdir()
    if config.layout == "llava":
        tower = directory / vision_tower_name(config_to_hf(config))
        tower.mkdir()
        (tower / "config.json").write_text(json.dumps(vision_tower_to_hf(config)))
    for path in (LLAVA if config.layout == "llava" else CHAT).iterdir():
        if path.suffix in (".json", ".model") and "index" not in path.name:
            shutil.copy(path, directory)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    generator, weight_map, shard, size = torch.Generator().manual_seed(0), {}, {}, 0
    everything = tensors(config)
    for tensor in everything:
        values = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(generator=generator)
        if values.ndim >= 2:
            values /= values[0].numel() ** 0.5
        shard[tensor.key], size = values, size + values.nbytes
        if size > 5e8 or tensor is everything[-1]:
            name = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, directory / name)
            weight_map |= dict.fromkeys(shard, name)
            shard, size = {}, 0
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["internvl_chat_v1_1", "llava_1_5_13b"])
def test_memory_does_not_grow_with_depth(tmp_path, preset):
    """Two full-width checkpoints of 2 + 2 and 4 + 4 layers (7 GB on disk, some minutes)."""
    peaks = {}
    for depth in (2, 4):
        full_width(tmp_path / "checkpoint", depth, preset)
        command = [sys.executable, "-m", "internvl_jax.cli.main", "parity", str(tmp_path / "checkpoint"), "--json"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr + run.stdout
        peaks[depth] = json.loads(run.stdout)["peak_rss_bytes"]
        shutil.rmtree(tmp_path / "checkpoint")
    assert abs(peaks[4] - peaks[2]) < 0.1 * peaks[2], peaks
    assert peaks[4] < 5e9, peaks

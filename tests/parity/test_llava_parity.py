"""The parity command on LLaVA-1.5 and InternVL-Chat-V1-0: its reference against the goldens, and what is wrong on
purpose is found where it is."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.golden import assert_close, bundle, spread  # noqa: E402
from support.llava_cases import LLAVA, SIZES, V1_0, expand  # noqa: E402
from support.parity_cases import add, chain, names, text, vision  # noqa: E402
from support.published import CLIP, assert_same_bits, state_of, with_tower  # noqa: E402  # noqa: E402

from checkpoints_convert.convert import convert  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import TOWER  # noqa: E402
from checkpoints_convert.parity import run as parity  # noqa: E402
from checkpoints_convert.parity.reference import Reference  # noqa: E402
from checkpoints_convert.parity.run import ParityError, run_parity  # noqa: E402
from checkpoints_convert.readers import open_checkpoint  # noqa: E402
from internvl_jax.cli import main  # noqa: E402
from internvl_jax.config import ConfigError, load_config  # noqa: E402
from internvl_jax.processing.images import load_image  # noqa: E402

INTERN = "InternViT-6B-224px"
IMAGES = ("rgb", "exif_rot", "rgba", "gray", "palette")


def v1_0(root, size=SIZES["r1"]):
    """The golden V1-0 and its tower's directory in `root`, at one of the golden image sizes."""
    shutil.copytree(V1_0 / INTERN, root / INTERN)
    shutil.copytree(V1_0 / "checkpoint", root / "v1_0")
    path = root / "v1_0" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "force_image_size": size}))
    return root / "v1_0"


def llava(root):
    """The golden LLaVA and its tower in `root`."""
    shutil.copytree(LLAVA / CLIP, root / CLIP)
    shutil.copytree(LLAVA / "original", root / "llava")
    return root / "llava"


def hf(root):
    """The golden LLaVA in transformers' layout, as pickles, which `change` can write."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(LLAVA / "hf", dtype=torch.float32)
    shutil.copytree(LLAVA / "hf", root / "hf", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    torch.save(model.state_dict(), root / "hf" / "pytorch_model.bin")
    return root / "hf"


def change(directory, key, edit):
    """Change one tensor of pickled weights in place."""
    for path in directory.glob("*.bin"):
        tensors = torch.load(path, weights_only=True)
        if key in tensors:
            edit(tensors[key])
            torch.save(tensors, path)
            return
    raise AssertionError(f"{key} is not in {directory}")


def reference_of(directory, tower=None):
    with open_checkpoint(directory) as weights:
        state = {key: weights.read(key) for key in weights.shapes if not key.endswith(("inv_freq", "position_ids"))}
    return Reference(directory, list(state), state.__getitem__, tower)


def golden_image(root, name):
    return load_image(next((root / "images").glob(f"{name}.*")), honor_exif=False)


# The reference is right: the original code's own hidden states.


def test_reference_of_v1_0_equals_the_goldens(tmp_path):
    arrays, facts = bundle("internvl_chat_v1_0")
    reference = reference_of(v1_0(tmp_path), tmp_path / INTERN)
    for name in IMAGES:
        pixels = reference.pixels(golden_image(V1_0, name))
        np.testing.assert_array_equal(pixels[0], arrays[f"images/{name}/pixel_values_r1"], err_msg=name)
    assert reference.num_vision_layers == 3  # hidden_states[-4] of 7
    wanted = (arrays[f"vision/{name}_r1"] for name in ("hidden_states", "selected", "projected"))
    projected = check_tower(reference, reference.pixels(golden_image(V1_0, "rgb")), 6, *wanted)
    check_language(reference, facts["prompts"], arrays, projected, "logits/en_single/llm_hidden_states")
    small = reference_of(v1_0(tmp_path / "small", SIZES["r2"]), tmp_path / INTERN)
    np.testing.assert_array_equal(small.pixels(golden_image(V1_0, "rgb"))[0], arrays["images/rgb/pixel_values_r2"])


def test_reference_of_llava_equals_the_goldens():
    arrays, facts = bundle("llava_1_5")
    reference = reference_of(LLAVA / "original", LLAVA / CLIP)
    for name in IMAGES:
        pixels = reference.pixels(golden_image(LLAVA, name))
        np.testing.assert_array_equal(pixels[0], arrays[f"orig/pixel_values/{name}"], err_msg=name)
    assert reference.num_vision_layers == 4  # hidden_states[-2] of 6
    vision = "orig/vision"
    wanted = arrays[f"{vision}/hidden_states"], arrays[f"{vision}/selected"], arrays[f"{vision}/projected_all"][0]
    projected = check_tower(reference, reference.pixels(golden_image(LLAVA, "rgb")), 5, *wanted)
    check_language(reference, facts["orig_prompts"], arrays, projected, "orig/llm_hidden_states/en_single")


def check_tower(reference, pixels, depth, hidden_states, selected, projected):
    """Returns what the projector makes of the image."""
    layers = [reference.vision_layer(number) for number in range(depth)]
    states = chain(layers, reference.vision_embeddings()(pixels))
    assert_close(states, hidden_states, 5e-5, "hidden states")
    features = reference.features()(states[reference.num_vision_layers][None])
    assert_close(features[0], selected, 5e-5, "selected")
    made = reference.projector()(features)
    assert_close(made[0], projected, 5e-5, "projected")
    return made


def check_language(reference, prompts, arrays, projected, states_name):
    case = next(case for case in prompts if case["id"] == "en_single")
    ids = np.array(expand(case["input_ids"], projected.shape[1]))
    states = chain([reference.text_layer(n) for n in range(3)], reference.text_embeddings(ids, -200)(projected))
    normed = reference.text_norm()(states[-1:])
    states[-1] = normed[0]
    assert_close(states, arrays[states_name], 5e-5, "hidden states")
    logits = next(name for name in ("logits/en_single/fp32", "orig/logits/en_single") if name in arrays)
    assert_close(reference.logits()(normed)[0], arrays[logits], 1e-4, "logits")


def test_reference_of_transformers_layout_equals_the_goldens():
    arrays, facts = bundle("llava_1_5")
    reference = reference_of(LLAVA / "hf")
    for name in IMAGES[:3]:
        pixels = reference.pixels(golden_image(LLAVA, name))
        np.testing.assert_array_equal(pixels[0], arrays[f"hf/pixel_values/{name}"], err_msg=name)
    case = facts["hf_prompts"][0]
    x = reference.vision_embeddings()(arrays["hf/pixel_values/rgb"][None])
    for layer in range(reference.num_vision_layers):
        x = reference.vision_layer(layer)(x)
    projected = reference.projector()(reference.features()(x))
    assert_close(projected[0], arrays["hf/vision/projected_rgb"], 5e-5, "projected")
    ids = np.array(expand(case["input_ids"][0], 36, 860))
    x = reference.text_embeddings(ids, 860)(projected)
    for layer in range(3):
        x = reference.text_layer(layer)(x)
    assert_close(reference.logits()(reference.text_norm()(x))[0], arrays["hf/logits/hf_en"], 1e-4, "logits")


# What is right passes.

STAGES = [
    "pixels",
    "vision.embeddings",
    "vision.layers.0",
    "vision.layers.0~0",
    "vision.layers.1",
    "vision.layers.2",
    "vision.layers.3",
    "features",
    "projector",
    "projector~0",
    "text.embeddings",
    "text.layers.0",
    "text.layers.0~0",
    "text.layers.1",
    "text.layers.2",
    "text.norm",
    "logits",
]


@pytest.mark.parametrize("name", ["original", "hf"])
def test_llava_passes(name):
    report = run_parity(LLAVA / name, image=LLAVA / "images" / "rgb.png", prompt="Please describe the image shortly.")
    assert names(report) == STAGES
    assert report.passed
    assert report.culprits == []
    # The golden prompt. After its image the original code, which tokenizes piece by piece, has a word-start mark.
    assert report.prompt_tokens == {"original": 112, "hf": 111}[name]
    assert report.stages[-1].accumulated.max_abs <= 2e-4
    assert report.distribution.greedy_agreement == 1


def test_v1_0_passes_at_both_sizes(tmp_path):
    """As it is published, 336 pixels by the tower's name, positions resized; and at the tower's own size."""
    report = run_parity(V1_0 / "checkpoint")
    assert report.passed
    assert names(report) == [name for name in STAGES if name != "vision.layers.3"]
    assert report.prompt_tokens > 576
    assert report.image == "drawn"
    report = run_parity(v1_0(tmp_path, SIZES["r2"]), image=V1_0 / "images" / "exif_rot.jpg")
    assert report.passed
    assert 16 < report.prompt_tokens < 100


@pytest.mark.parametrize("name", ["llava", "hf"])
def test_converted_directory_passes(tmp_path, name):
    source = LLAVA / ("original" if name == "llava" else "hf")
    convert(source, tmp_path / "jax")
    published = run_parity(source)
    for reference in (None, source):
        report = run_parity(tmp_path / "jax", reference=reference)
        assert report.passed
        assert report.stages == published.stages


def test_tower_inside_passes(tmp_path):
    shutil.copytree(LLAVA / CLIP, tmp_path / CLIP, ignore=shutil.ignore_patterns("*.bin"))
    assert run_parity(with_tower(tmp_path / "llava"), reference=LLAVA / "original").passed


def test_without_tokenizer_and_processor(tmp_path):
    """Random tokens of which none is the image's, and random pixels, of a model that transformers makes."""
    tower = transformers.CLIPVisionConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=5, image_size=56, patch_size=14
    )
    language = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower.to_dict(), text_config=language.to_dict(), image_token_index=96, tie_word_embeddings=False
    )
    spread(transformers.LlavaForConditionalGeneration(config), seed=3).save_pretrained(tmp_path)
    report = run_parity(tmp_path)
    assert report.passed
    assert (report.image, report.prompt) == ("random", None)


# What is wrong is found, where it is.

CHANGES = {
    "llava": [
        (f"{CLIP}:vision_model.pre_layrnorm.weight", add(0.01, 3), ["vision.embeddings"]),
        (f"{CLIP}:vision_model.embeddings.position_embedding.weight", add(0.05, 7, 3), ["vision.embeddings"]),
        (f"{CLIP}:vision_model.encoder.layers.1.self_attn.v_proj.weight", add(0.05, 9, 2), ["vision.layers.1"]),
        (f"{CLIP}:vision_model.encoder.layers.2.self_attn.q_proj.bias", add(0.05, 17), ["vision.layers.2"]),
        (f"{CLIP}:vision_model.encoder.layers.3.layer_norm2.bias", add(0.01, 5), ["vision.layers.3"]),
        ("model.mm_projector.2.weight", add(0.05, 1, 2), ["projector", "projector~0"]),
        ("model.layers.1.mlp.up_proj.weight", add(0.05, 160, 1), ["text.layers.1"]),
    ],
    "v1_0": [
        (f"{TOWER}embeddings.position_embedding", add(0.05, 0, 7, 3), ["vision.embeddings"]),
        (f"{TOWER}encoder.layers.2.attn.q_norm.weight", add(0.05, 79), ["vision.layers.2"]),
        ("model.mm_projector.0.bias", add(0.05, 9), ["projector", "projector~0"]),
        ("lm_head.weight", add(0.05, 800, 5), ["logits"]),
    ],
    "hf": [
        ("model.vision_tower.encoder.layers.1.mlp.fc1.weight", add(0.05, 30, 8), ["vision.layers.1"]),
        ("model.multi_modal_projector.linear_1.weight", add(0.05, 1, 2), ["projector"]),
        ("model.language_model.norm.weight", add(0.01, 17), ["text.norm"]),
    ],
}
MAKERS = {"llava": llava, "v1_0": v1_0, "hf": hf}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_tensors_are_located(tmp_path, name):
    """All at once: each comparison is local, so every one shows where it is, and nothing else does."""
    right, wrong = MAKERS[name](tmp_path / "right"), MAKERS[name](tmp_path / "wrong")
    expected = []
    for key, edit, culprits in CHANGES[name]:
        where, _, key = key.rpartition(":")
        change(wrong.parent / where if where else wrong, key, edit)
        expected += culprits
    report = run_parity(wrong, reference=right)
    assert not report.passed
    assert sorted(report.culprits) == sorted(set(expected))
    assert run_parity(right, reference=right).passed


def test_layers_past_select_layer_do_not_matter(tmp_path):
    directory = llava(tmp_path)
    change(tmp_path / CLIP, "vision_model.encoder.layers.4.layer_norm1.weight", lambda w: w.mul_(2))
    assert run_parity(directory, reference=LLAVA / "original").passed


BROKEN_CONFIGS = {
    "gelu for quick_gelu": (lambda c: vision(c, hidden_act="gelu"), {f"vision.layers.{n}" for n in range(4)}),
    "vision eps": (lambda c: vision(c, layer_norm_eps=1e-4), {"vision.layers.0~0"}),
    "select_layer one deeper": (lambda c: dataclasses.replace(c, select_layer=-1), {"features"}),
    "select_layer one higher": (lambda c: dataclasses.replace(c, select_layer=-3), {"features"}),
    "not padded": (lambda c: dataclasses.replace(c, pad_to_square=False), set()),
    "text eps": (lambda c: text(c, rms_norm_eps=1e-6), {"text.layers.0~0"}),
}


@pytest.mark.parametrize(("break_it", "culprits"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_misread_configuration_is_located(monkeypatch, break_it, culprits):
    right = load_config(LLAVA / "original")
    monkeypatch.setattr(parity, "load_config", lambda path, tower: break_it(right))
    report = run_parity(LLAVA / "original", image=LLAVA / "images" / "rgb.png")
    assert not report.passed
    assert culprits <= set(report.culprits)
    if not culprits:  # pixels have no local comparison: they are where the chains begin
        assert not report.stages[0].passed


# Where the tower lies.


def test_a_tower_elsewhere(tmp_path, capsys):
    """The command finds it by --vision-tower, and what is converted needs no such option."""
    tower, source = tmp_path / "towers" / "clip", tmp_path / "llava"
    shutil.copytree(LLAVA / CLIP, tower)
    shutil.copytree(LLAVA / "original", source)
    assert main.main(["parity", str(source)]) == 2
    assert "published separately: put its directory" in " ".join(capsys.readouterr().err.split())
    assert main.main(["parity", str(source), "--vision-tower", str(tmp_path / "towers")]) == 2
    assert "has no config.json: name the directory of the vision tower" in " ".join(capsys.readouterr().err.split())
    assert main.main(["parity", str(source), "--vision-tower", str(tower)]) == 0
    assert main.main(["convert", str(source), str(tmp_path / "jax"), "--vision-tower", str(tower)]) == 0
    assert (tmp_path / "jax" / CLIP / "preprocessor_config.json").is_file()
    shutil.rmtree(tmp_path / "towers")
    capsys.readouterr()
    assert main.main(["parity", str(tmp_path / "jax"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == "drawn"
    assert run_parity(tmp_path / "jax", reference=LLAVA / "original").passed
    with pytest.raises(ConfigError, match=r"has no separate vision tower: leave out"):
        run_parity(LLAVA / "hf", vision_tower=tower)


def test_a_tower_without_the_prefix(tmp_path):
    """The state_dict of transformers 5's CLIPVisionModel has no `vision_model.`; it comes back as it was."""
    directory = llava(tmp_path)
    model = transformers.CLIPVisionModel.from_pretrained(LLAVA / CLIP, dtype=torch.float16)
    state = {key.removeprefix("vision_model."): values for key, values in model.state_dict().items()}
    torch.save(state, tmp_path / CLIP / "pytorch_model.bin")
    assert run_parity(directory, reference=LLAVA / "original").passed
    convert(directory, tmp_path / "jax")
    assert run_parity(tmp_path / "jax", reference=LLAVA / "original").passed
    export(tmp_path / "jax", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back" / CLIP), state)


def test_quantized_is_refused(tmp_path):
    convert(LLAVA / "original", tmp_path / "jax", quantize="int8")
    with pytest.raises(ParityError, match="without --quantize"):
        run_parity(tmp_path / "jax")

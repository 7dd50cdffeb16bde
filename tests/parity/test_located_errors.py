"""Changed tensors, misread configurations and wrong formulas are located at their stage."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import pytest
from support.parity_cases import add, text, vision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support.golden import DATA  # noqa: E402

from checkpoints_convert.parity import run as parity  # noqa: E402
from checkpoints_convert.parity.run import run_parity  # noqa: E402
from internvl_jax.cli import main  # noqa: E402
from internvl_jax.config import load_config  # noqa: E402
from internvl_jax.models import intern_vit  # noqa: E402

CHAT = DATA / "internvl_chat_v1_1" / "checkpoint"
VIT = DATA / "intern_vit" / "checkpoint_bin"
LLAVA = DATA / "llava_1_5" / "original"
RGB = DATA / "internvl_chat_v1_1" / "images" / "rgb.png"


def mutated(tmp_path, key, change):
    """A copy of the golden checkpoint with one tensor changed in place."""
    directory = tmp_path / "mutated"
    shutil.copytree(CHAT, directory)
    index = json.loads((directory / "pytorch_model.bin.index.json").read_text())["weight_map"]
    shard = directory / index[key]
    tensors = torch.load(shard, weights_only=True)
    change(tensors[key])
    torch.save(tensors, shard)
    return directory


def test_a_changed_tensor_fails_at_its_stage(tmp_path, capsys):
    directory = mutated(tmp_path, "vision_model.encoder.layers.1.norm1.weight", lambda w: w.mul_(1.1))
    assert main.main(["parity", str(directory), "--reference", str(CHAT), "--image", str(RGB), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["passed"] is False
    assert result["culprits"] == ["vision.layers.1"]
    passed = {row["stage"]: row["passed"] for row in result["stages"]}
    assert all(passed[stage] for stage in ("pixels", "vision.embeddings", "vision.layers.0", "vision.layers.0~0"))
    # From there on the chains differ, although each later stage is right by itself.
    assert not any(passed[stage] for stage in ("vision.layers.1", "vision.layers.2", "features", "text.layers.3"))


@pytest.mark.parametrize(
    ("key", "change", "culprits"),
    [
        ("vision_model.embeddings.position_embedding", add(0.02, 0, 7, 3), ["vision.embeddings"]),
        ("vision_model.embeddings.patch_embedding.weight", add(0.02, 5, 2, 13, 0), ["vision.embeddings"]),
        ("vision_model.encoder.layers.2.ls1", lambda w: w.mul_(1.01), ["vision.layers.2"]),
        ("vision_model.encoder.layers.2.attn.qkv.weight", add(0.05, 100, 33), ["vision.layers.2"]),
        ("vision_model.encoder.layers.1.attn.k_norm.weight", add(0.05, 79), ["vision.layers.1"]),
        ("vision_model.encoder.layers.1.mlp.fc2.bias", add(0.01, 0), ["vision.layers.1"]),
        ("mlp1.3.weight", add(0.05, 1, 2), ["projector", "projector~0"]),
        ("language_model.model.layers.2.self_attn.q_proj.weight", add(0.05, 3, 60), ["text.layers.2"]),
        ("language_model.model.layers.3.mlp.up_proj.weight", add(0.05, 170, 1), ["text.layers.3"]),
        ("language_model.model.norm.weight", add(0.01, 17), ["text.norm"]),
        ("language_model.lm_head.weight", add(0.01, 800, 5), ["logits"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_changed_tensor_is_located(tmp_path, key, change, culprits):
    report = run_parity(mutated(tmp_path, key, change), reference=CHAT, image=RGB)
    assert not report.passed
    assert report.culprits == culprits


def test_a_changed_converted_tensor_is_located(tmp_path, converted):
    directory = mutated(tmp_path, "language_model.model.layers.1.mlp.gate_proj.weight", lambda w: w.mul_(1.02))
    report = run_parity(converted, reference=directory, image=RGB)
    assert report.culprits == ["text.layers.1"]


def test_layers_past_select_layer_do_not_matter(tmp_path):
    directory = mutated(tmp_path, "vision_model.encoder.layers.3.ls1", lambda w: w.mul_(2))
    assert run_parity(directory, reference=CHAT, image=RGB).passed


BROKEN_CONFIGS = {
    "vision eps": (lambda c: vision(c, layer_norm_eps=1e-5), {"vision.layers.0~0"}),
    "text eps": (lambda c: text(c, rms_norm_eps=1e-6), {"text.layers.0~0"}),
    "projector eps": (
        lambda c: dataclasses.replace(c, projector=dataclasses.replace(c.projector, layer_norm_eps=1e-6)),
        {"projector~0"},
    ),
    "ps_version": (lambda c: dataclasses.replace(c, ps_version="v2"), {"features"}),
    "select_layer one deeper": (lambda c: dataclasses.replace(c, select_layer=-3), {"features"}),
    "select_layer one higher": (lambda c: dataclasses.replace(c, select_layer=-5), {"features"}),
    "rope theta": (
        lambda c: text(c, rope_theta=11000.0),
        {"text.layers.0", "text.layers.0~0", "text.layers.1", "text.layers.2", "text.layers.3"},
    ),
}


@pytest.mark.parametrize(("break_it", "culprits"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_misread_configuration_is_located(monkeypatch, break_it, culprits):
    right = load_config(CHAT)
    monkeypatch.setattr(parity, "load_config", lambda path, tower: break_it(right))
    report = run_parity(CHAT, image=RGB)
    assert not report.passed
    assert culprits <= set(report.culprits)
    tower = {"vision": "vision.", "text": "text.", "features": "features", "projector": "projector"}
    allowed = tower[sorted(culprits)[0].split(".")[0].removesuffix("~0")]
    assert all(name.startswith(allowed) for name in report.culprits)


@pytest.fixture
def compile_anew():
    """What is patched is traced again, here and by those who come after."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("compile_anew")
def test_tanh_gelu_is_located(monkeypatch):
    monkeypatch.setitem(intern_vit.ACTIVATIONS, "gelu", partial(jax.nn.gelu, approximate=True))
    report = run_parity(CHAT, image=RGB)
    assert report.culprits
    assert all(name.startswith("vision.layers.") for name in report.culprits)
    assert "vision.layers.1" in report.culprits


@pytest.mark.usefixtures("compile_anew")
def test_norm_per_head_is_located(monkeypatch):
    class PerHead(intern_vit.RMSNorm):
        def __call__(self, x):
            y = super().__call__(x)
            if len(self.shape) == 1:
                return y
            rms = [jax.numpy.sqrt((x * x).mean(axis, keepdims=True)) for axis in ((-2, -1), -1)]
            return y * rms[0] / rms[1]

    monkeypatch.setattr(intern_vit, "RMSNorm", PerHead)
    assert "vision.layers.1" in run_parity(VIT).culprits

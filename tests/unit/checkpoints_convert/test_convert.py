"""Conversion there and back, on golden checkpoints and on transformers' own."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from support.published import V1_1, VIT_BIN, VIT_SAFE, assert_same_bits, single_file, state_of  # noqa: E402

from checkpoints_convert import convert as convert_module  # noqa: E402
from checkpoints_convert import export as export_module  # noqa: E402
from checkpoints_convert import synthetic  # noqa: E402
from checkpoints_convert.convert import convert, load_hf  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import ConversionError, tensors  # noqa: E402
from checkpoints_convert.synthetic import write_synthetic  # noqa: E402
from checkpoints_convert.writers import assign_files  # noqa: E402
from internvl_jax import checkpoint  # noqa: E402
from internvl_jax.config import config_to_hf, load_config  # noqa: E402
from internvl_jax.models import chat_model  # noqa: E402

published = pytest.mark.parametrize("source", [V1_1, VIT_BIN, VIT_SAFE], ids=["v1_1", "vit_bin", "vit_safetensors"])


def assert_equal(ours, theirs):
    for (name, a), (_, b) in zip(checkpoint.named_leaves(ours), checkpoint.named_leaves(theirs), strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def by_hand(config, state):
    """The tree in float32 from torch tensors, by the tables, without any of the code that streams."""
    tree = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), chat_model.abstract_params(config))
    leaves = dict(checkpoint.named_leaves(tree))
    for tensor in tensors(config):
        leaves[tensor.path][tensor.index] = tensor.to_ours(state[tensor.key].float().numpy())
    return tree


def abstract(config, dtype=jnp.float32):
    return chat_model.abstract_params(config, dtype)


# There and back.


@published
def test_convert_load_export(source, tmp_path):
    config, state = load_config(source), state_of(source)
    calls = []
    report = convert(source, tmp_path / "ours", progress=lambda *call: calls.append(call))
    size = sum(values.nbytes for values in state.values())
    assert (report.tensors, report.bytes) == (len(state), size)
    assert f"{len(state)} tensors" in report.summary()
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][:2] == (size, size)

    expected = by_hand(config, state)
    assert_equal(checkpoint.load(tmp_path / "ours", abstract(config)), expected)
    assert_equal(load_hf(source, abstract(config)), expected)
    stored = checkpoint.stored_tree(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}

    report = export(tmp_path / "ours", tmp_path / "back")
    assert (report.tensors, report.bytes) == (len(state), size)
    assert_same_bits(state_of(tmp_path / "back"), state)
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(source))
    for path in source.iterdir():
        if path.suffix != ".bin":  # torch writes its zips differently from version to version
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
        else:
            back = tmp_path / "back" / path.name
            assert list(torch.load(back, weights_only=True)) == list(torch.load(path, weights_only=True))
            with zipfile.ZipFile(back) as archive:
                assert archive.testzip() is None


def test_fewer_vision_layers_are_read(monkeypatch):
    """load_hf leaves out what select_layer leaves out, and reads nothing of it."""
    config = load_config(V1_1)
    whole = load_hf(V1_1, abstract(config))
    wanted = abstract(config)
    layers = wanted["vision_model"]["layers"]
    wanted["vision_model"]["layers"] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.num_vision_layers, *leaf.shape[1:]), leaf.dtype), layers
    )
    read, calls = [], []
    original = convert_module.Weights.read
    monkeypatch.setattr(convert_module.Weights, "read", lambda self, key: read.append(key) or original(self, key))
    loaded = load_hf(V1_1, wanted, progress=lambda *call: calls.append(call))
    assert config.num_vision_layers < config.vision.num_hidden_layers
    whole["vision_model"]["layers"] = jax.tree.map(
        lambda leaf: leaf[: config.num_vision_layers], whole["vision_model"]["layers"]
    )
    assert_equal(loaded, whole)
    assert len(read) == len(set(read))
    assert not any(f"encoder.layers.{config.vision.num_hidden_layers - 1}." in key for key in read)
    assert calls[-1][0] == calls[-1][1] == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("safe", [True, False])
def test_export_in_the_other_form(safe, tmp_path, monkeypatch):
    """Keys and bits stay, files are chosen anew, by size."""
    source = VIT_BIN if safe else VIT_SAFE
    convert(source, tmp_path / "ours")
    monkeypatch.setattr(export_module, "MAX_SHARD", 300_000)
    export(tmp_path / "ours", tmp_path / "back", safe_serialization=safe)
    files = [path for path in (tmp_path / "back").iterdir() if path.suffix in (".bin", ".safetensors")]
    suffix = ".safetensors" if safe else ".bin"
    assert len(files) == 3
    assert {path.suffix for path in files} == {suffix}
    assert all(path.stat().st_size < 330_000 for path in files)
    assert_same_bits(state_of(tmp_path / "back"), state_of(source))
    convert(tmp_path / "back", tmp_path / "again")
    assert_equal(*(checkpoint.load(tmp_path / name, abstract(load_config(source))) for name in ("ours", "again")))


def test_export_of_what_never_was_published(tmp_path):
    """Parameters that were made here come out as one file, which reads back as they were."""
    config = load_config(V1_1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(jnp.bfloat16), abstract(config))
    checkpoint.save(tmp_path / "ours", params)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config_to_hf(config)))
    export(tmp_path / "ours", tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == ["config.json", "pytorch_model.bin"]
    assert_equal(load_hf(tmp_path / "back", abstract(config, jnp.bfloat16)), params)


def llama(dtype=None, **options):
    transformers = pytest.importorskip("transformers")
    values = {
        "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(dtype or torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_llama_of_transformers(dtype, tmp_path):
    """GQA, biases, several shards, every dtype kept; transformers loads what is exported."""
    transformers = pytest.importorskip("transformers")
    model = llama(dtype, attention_bias=True, mlp_bias=True)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    convert(tmp_path / "hf", tmp_path / "ours")
    stored = jax.tree.leaves(checkpoint.stored_tree(tmp_path / "ours"))
    assert {leaf.dtype.name for leaf in stored} == {str(dtype).removeprefix("torch.")}
    export(tmp_path / "ours", tmp_path / "back")
    assert sorted(os.listdir(tmp_path / "back")) == sorted(os.listdir(tmp_path / "hf"))
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype)
    assert_same_bits(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("stored", [False, True])
def test_tied_heads(stored, tmp_path):
    """A tied head has no leaf of its own; where a file repeats it, the export does too."""
    transformers = pytest.importorskip("transformers")
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "hf")
    state = safetensors_torch.load_file(tmp_path / "hf" / "model.safetensors")
    if stored:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        safetensors_torch.save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert ("lm_head.weight" in state) == stored
    convert(tmp_path / "hf", tmp_path / "ours")
    assert "lm_head" not in checkpoint.stored_tree(tmp_path / "ours")["language_model"]
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)


def test_a_head_that_only_claims_to_be_tied(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "hf")
    state = safetensors_torch.load_file(tmp_path / "hf" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    safetensors_torch.save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "ours")


def test_buffers_come_back(tmp_path):
    """Older transformers stored rotary tables; they are no parameters, and still part of what was published."""
    llama(torch.float16).save_pretrained(tmp_path / "hf")
    state = safetensors_torch.load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for layer in range(3):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4).to(torch.bfloat16)
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    convert(tmp_path / "hf", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state)


@pytest.mark.parametrize("tied", [False, True])
def test_internvl_of_transformers(tied, tmp_path):
    """InternVLForConditionalGeneration: read, written back to the same files, and loaded by transformers again."""
    transformers = pytest.importorskip("transformers")
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 56,
            "image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": True, "attention_bias": True,
        },
        text_config={
            "model_type": "llama", "vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 80,
            "tie_word_embeddings": tied,
        },
        image_token_id=7, image_seq_length=4, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.InternVLForConditionalGeneration(config)
    for values in model.parameters():
        values.data.normal_()
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    convert(tmp_path / "hf", tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "unknown")
    (tmp_path / "unknown" / "published.json").unlink()
    for name in ("ours", "unknown"):
        export(tmp_path / name, tmp_path / f"{name}-back")
        back = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / f"{name}-back")
        assert_same_bits(back.state_dict(), model.state_dict())
    assert_same_bits(state_of(tmp_path / "ours-back"), state_of(tmp_path / "hf"))


def test_synthetic_checkpoint(tmp_path):
    """Holes read as zeros, random layers as seeded values, through torch and through the converter."""
    size = write_synthetic(tmp_path / "zero", preset="nano")
    write_synthetic(tmp_path / "random", preset="nano", random_layers=1)
    zero, random = state_of(tmp_path / "zero"), state_of(tmp_path / "random")
    assert sum(values.nbytes for values in zero.values()) == size
    assert not any(values.any() for values in zero.values())
    assert {key for key, values in random.items() if not values.any()} == {
        key for key in random if any(f"layers.{layer}." in key for layer in range(1, 6))
    }
    kernel = random["language_model.model.layers.0.mlp.down_proj.weight"].float()
    assert 0.9 < kernel.std() * kernel.shape[1] ** 0.5 < 1.1
    convert(tmp_path / "random", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), random)


@pytest.mark.parametrize("preset", ["llava_1_5_13b", "internvl_chat_v1_0_13b"])
def test_synthetic_checkpoint_with_a_tower(preset, tmp_path, monkeypatch):
    """The tower's directory lies where the layout has it, with the weights where they are published."""
    full = synthetic.PRESETS[preset]()
    text = dataclasses.replace(
        full.text, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, intermediate_size=96,
        num_hidden_layers=2, vocab_size=99,
    )  # fmt: skip
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 96}
    small = dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, hidden_size=64, **sizes),
        projector=dataclasses.replace(full.projector, in_features=64, out_features=64),
        text=text,
    )
    monkeypatch.setattr(synthetic, "PRESETS", {preset: lambda: small})
    size = write_synthetic(tmp_path / "random", preset=preset, random_layers=5)
    tower = {"llava_1_5_13b": "clip-vit-large-patch14-336", "internvl_chat_v1_0_13b": "InternViT-6B-224px"}[preset]
    apart = preset == "llava_1_5_13b"
    assert set(os.listdir(tmp_path / "random" / tower)) == {
        "config.json", "preprocessor_config.json", *(["pytorch_model.bin"] if apart else [])
    }  # fmt: skip
    assert load_config(tmp_path / "random") == small
    state = state_of(tmp_path / "random")
    assert any("vision_tower" in key for key in state) != apart
    report = convert(tmp_path / "random", tmp_path / "ours")
    assert report.bytes == size
    params = checkpoint.load(tmp_path / "ours", abstract(small))
    assert all(leaf.any() for leaf in jax.tree.leaves(params))
    export(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(state_of(tmp_path / "back"), state)
    if apart:
        assert_same_bits(state_of(tmp_path / "back" / tower), state_of(tmp_path / "random" / tower))


# Memory.


FULL_SIZE = """
import sys
from checkpoints_convert.convert import convert
from checkpoints_convert.export import export
run = {"convert": convert, "export": export}[sys.argv[1]]
report = run(*sys.argv[2:])
print(report.bytes, report.peak_rss, round(report.seconds))
"""


@pytest.mark.slow
def test_peak_memory_at_full_size(tmp_path):
    """38 GB in the published sharding, there and back: memory stays near the largest tensor. Needs 45 GB of disk."""
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of free disk space")
    write_synthetic(tmp_path / "published")
    try:
        for run, *paths in (("convert", "published", "ours"), ("export", "ours", "back")):
            command = [sys.executable, "-c", FULL_SIZE, run, *(str(tmp_path / path) for path in paths)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            size, peak, seconds = map(int, result.stdout.split())
            print(f"{run}: {size / 1e9:.1f} GB, peak {peak / 1e9:.2f} GB, {seconds} s")
            assert size == 38_234_412_800
            assert peak < 2.5e9
            if run == "convert":  # the zeros become holes, which makes room for the way back
                files = [str(path) for path in (tmp_path / "ours").rglob("*") if path.is_file()]
                for file in files:
                    subprocess.run(["fallocate", "--dig-holes", file], check=True)
        for file in (tmp_path / "published").glob("*.bin"):
            assert (tmp_path / "back" / file.name).stat().st_size == file.stat().st_size
    finally:
        for name in ("ours", "back"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    """Mapped pages are let go: of 2 GB read one tensor after the other, a few hundred MB are in memory at once."""
    weights = {f"t{number}": torch.zeros(32 * 2**20, dtype=torch.bfloat16) for number in range(4)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    script = (
        "import resource, sys; from checkpoints_convert import readers; readers.REMAP = 2**20\n"
        "weights = readers.open_weights(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "weights.read('t0'); first = peak()\n"
        "for key in weights.shapes: weights.read(key)\n"
        "print((peak() - first) * (1 if sys.platform == 'darwin' else 1024))"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 32 * 2**20


def test_single_files(tmp_path):
    directory = single_file(tmp_path, lambda state: None)
    convert(directory, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "bin")
    assert sorted(os.listdir(tmp_path / "bin")) == ["config.json", "pytorch_model.bin"]
    export(tmp_path / "ours", tmp_path / "safe", safe_serialization=True)
    assert sorted(os.listdir(tmp_path / "safe")) == ["config.json", "model.safetensors"]
    for name in ("bin", "safe"):
        assert_same_bits(state_of(tmp_path / name), state_of(VIT_BIN))


def test_assign_files():
    assert assign_files({"a": 3, "b": 4}, 7, "model.safetensors") == dict.fromkeys("ab", "model.safetensors")
    assert assign_files({"a": 3, "b": 5, "c": 9, "d": 1}, 7, "pytorch_model.bin") == {
        "a": "pytorch_model-00001-of-00004.bin",
        "b": "pytorch_model-00002-of-00004.bin",
        "c": "pytorch_model-00003-of-00004.bin",
        "d": "pytorch_model-00004-of-00004.bin",
    }


def test_command_line(tmp_path, capsys):
    from internvl_jax.cli.main import main

    assert main(["convert", str(VIT_BIN), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--safetensors"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "peak memory" in captured.err
    assert_same_bits(state_of(tmp_path / "back"), state_of(VIT_BIN))
    assert main(["convert", str(VIT_BIN), str(tmp_path / "ours")]) == 2
    assert "exists already" in " ".join(capsys.readouterr().err.split())

"""Conversion there and back, on golden checkpoints and on transformers' own; every error before anything is written."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from checkpoints_convert import convert as convert_module  # noqa: E402
from checkpoints_convert import export as export_module  # noqa: E402
from checkpoints_convert.convert import convert, load_hf  # noqa: E402
from checkpoints_convert.export import export  # noqa: E402
from checkpoints_convert.mapping import ConversionError, tensors  # noqa: E402
from checkpoints_convert.readers import open_weights  # noqa: E402
from checkpoints_convert.synthetic import write_synthetic  # noqa: E402
from checkpoints_convert.writers import assign_files  # noqa: E402
from internvl_jax import checkpoint  # noqa: E402
from internvl_jax.config import ChatConfig, ConfigError  # noqa: E402
from internvl_jax.models import chat_model  # noqa: E402

DATA = Path(__file__).parent / "data"
V1_1 = DATA / "internvl_chat_v1_1" / "checkpoint"
VIT_BIN = DATA / "intern_vit" / "checkpoint_bin"
VIT_SAFE = DATA / "intern_vit" / "checkpoint_safetensors"
published = pytest.mark.parametrize("source", [V1_1, VIT_BIN, VIT_SAFE], ids=["v1_1", "vit_bin", "vit_safetensors"])


def state_of(directory):
    """key -> tensor of a published directory, by torch and safetensors alone."""
    state = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".bin":
            state.update(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            state.update(safetensors_torch.load_file(path))
    return state


def assert_same_bits(ours, theirs):
    assert set(ours) == set(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].shape == theirs[key].shape, key
        a, b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (ours[key], theirs[key]))
        assert torch.equal(a, b), key


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
    config, state = ChatConfig.from_file(source), state_of(source)
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
    config = ChatConfig.from_file(V1_1)
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
    assert_equal(
        *(checkpoint.load(tmp_path / name, abstract(ChatConfig.from_file(source))) for name in ("ours", "again"))
    )


def test_export_of_what_never_was_published(tmp_path):
    """Parameters that were made here come out as one file, which reads back as they were."""
    config = ChatConfig.from_file(V1_1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(jnp.bfloat16), abstract(config))
    checkpoint.save(tmp_path / "ours", params)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config.to_hf()))
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
    """38 GB in the published sharding: memory stays near the largest tensor. Needs 38 GB of disk."""
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of free disk space")
    write_synthetic(tmp_path / "published")
    command = [sys.executable, "-c", FULL_SIZE, "convert", str(tmp_path / "published"), str(tmp_path / "ours")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
    size, peak, seconds = map(int, result.stdout.split())
    print(f"{size / 1e9:.1f} GB, peak {peak / 1e9:.2f} GB, {seconds} s")
    assert size == 38_234_412_800
    assert peak < 2.5e9


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


# What goes wrong, before anything is written.


@pytest.fixture(params=["bin", "safetensors"])
def broken(request, tmp_path):
    """A copy of a golden checkpoint to break, and its second shard."""
    source = VIT_BIN if request.param == "bin" else VIT_SAFE
    shutil.copytree(source, tmp_path / "hf")
    return tmp_path / "hf", next((tmp_path / "hf").glob("*model-00002*"))


def refused(source, tmp_path, error=ConversionError):
    """Convert, and read, what cannot be: nothing may be left; returns the message."""
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "made" / "ours")
    assert not (tmp_path / "made").exists()
    wanted = abstract(ChatConfig.from_file(VIT_BIN))
    with pytest.raises(error) as direct:
        load_hf(source, wanted)
    assert str(direct.value) == str(caught.value)
    return str(caught.value)


def test_missing_shards(broken, tmp_path):
    directory, shard = broken
    names = [path.name for path in directory.iterdir() if path.suffix == shard.suffix]
    for name in names:
        (directory / name).unlink()
    message = refused(directory, tmp_path)
    assert all(f"missing: {name}" in message for name in names)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.99])
def test_truncated_shard(broken, keep, tmp_path):
    directory, shard = broken
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    message = refused(directory, tmp_path)
    assert f"{shard.name} is truncated or damaged" in message
    assert "download it again" in message


def test_shard_of_noise(broken, tmp_path):
    directory, shard = broken
    shard.write_bytes(np.random.default_rng(0).bytes(5000))
    assert f"{shard.name} is truncated or damaged" in refused(directory, tmp_path)


def test_damaged_pickle(tmp_path):
    """A zip that is whole around a pickle that is not."""
    shutil.copytree(VIT_BIN, tmp_path / "hf")
    shard = tmp_path / "hf" / "pytorch_model-00001-of-00002.bin"
    data = bytearray(shard.read_bytes())
    where = data.index(b"encoder.layers.0")
    data[where - 5 : where + 40] = bytes(45)
    shard.write_bytes(data)
    assert shard.name in refused(tmp_path / "hf", tmp_path)


def test_git_lfs_pointer(broken, tmp_path):
    directory, shard = broken
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9931000000\n")
    assert "git lfs pull" in refused(directory, tmp_path)


def rewrite(shard, change):
    if shard.suffix == ".bin":
        state = torch.load(shard, weights_only=True)
        change(state)
        torch.save(state, shard)
    else:
        state = safetensors_torch.load_file(shard)
        state = {key: values.clone() for key, values in state.items()}
        change(state)
        safetensors_torch.save_file(state, shard)


def test_index_and_shard_differ(broken, tmp_path):
    directory, shard = broken
    gone = []

    def change(state):
        gone.append(sorted(state)[0])
        state["stowaway"] = state.pop(gone[0])

    rewrite(shard, change)
    message = refused(directory, tmp_path)
    assert f"{shard.name} lacks {gone[0]}" in message
    assert f"{shard.name} holds stowaway, which the index does not name there" in message


def single_file(tmp_path, change):
    """V1-1's vision tower in one pytorch_model.bin, changed."""
    directory = tmp_path / "hf"
    directory.mkdir()
    shutil.copy(VIT_BIN / "config.json", directory)
    state = state_of(VIT_BIN)
    change(state)
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def test_single_files(tmp_path):
    directory = single_file(tmp_path, lambda state: None)
    convert(directory, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "bin")
    assert sorted(os.listdir(tmp_path / "bin")) == ["config.json", "pytorch_model.bin"]
    export(tmp_path / "ours", tmp_path / "safe", safe_serialization=True)
    assert sorted(os.listdir(tmp_path / "safe")) == ["config.json", "model.safetensors"]
    for name in ("bin", "safe"):
        assert_same_bits(state_of(tmp_path / name), state_of(VIT_BIN))


def test_missing_unexpected_and_misshapen_are_all_listed(tmp_path):
    def change(state):
        del state["encoder.layers.0.ls1"], state["encoder.layers.4.mlp.fc2.bias"]
        state["encoder.layers.5.ls1"] = torch.ones(80)
        state["head.weight"] = torch.ones(3, 80)
        state["encoder.layers.1.norm1.weight"] = torch.ones(81)

    message = refused(single_file(tmp_path, change), tmp_path)
    for line in (
        "missing: encoder.layers.0.ls1 [80]",
        "missing: encoder.layers.4.mlp.fc2.bias [80]",
        "unexpected: encoder.layers.5.ls1 [80]",
        "unexpected: head.weight [3, 80]",
        "misshapen: encoder.layers.1.norm1.weight is [81], config.json asks for [80]",
    ):
        assert line in message


def test_dtypes_that_cannot_be_kept(tmp_path):
    def change(state):
        state["encoder.layers.0.ls1"] = torch.ones(80, dtype=torch.int8)
        state["encoder.layers.2.ls2"] = state["encoder.layers.2.ls2"].float()

    message = refused(single_file(tmp_path, change), tmp_path)
    assert "encoder.layers.0.ls1 is int8: only float32, float16, bfloat16 can be read" in message
    assert "encoder.layers.2.ls2 is float32, the same tensor of an earlier layer bfloat16" in message


class Code:
    def __reduce__(self):
        return os.system, ("echo was run >&2",)


def test_pickle_with_code_is_not_run(tmp_path, capfd):
    message = refused(single_file(tmp_path, lambda state: state.update(code=Code())), tmp_path)
    assert f"pytorch_model.bin holds more than tensors, it asks for {os.system.__module__}.system" in message
    assert "never run" in message
    assert "was run" not in capfd.readouterr().err


def test_pickle_of_other_things(tmp_path):
    message = refused(single_file(tmp_path, lambda state: state.update(epoch=3)), tmp_path)
    assert "epoch is a int, not a tensor" in message
    torch.save([torch.ones(3)], tmp_path / "hf" / "pytorch_model.bin")
    assert "holds a list" in refused(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {"a": "../other/pytorch_model.bin"}}', "outside its directory"),
    ],
)
def test_unreadable_index(content, words, broken, tmp_path):
    directory, _ = broken
    next(directory.glob("*.index.json")).write_text(content)
    message = refused(directory, tmp_path)
    assert words in message
    assert ".index.json" in message


def test_shards_without_index(broken, tmp_path):
    directory, shard = broken
    index = next(directory.glob("*.index.json"))
    index.unlink()
    assert f"{shard.name} but no {index.name}" in refused(directory, tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "hf").mkdir()
    shutil.copy(VIT_BIN / "config.json", tmp_path / "hf")
    assert "has no weights" in refused(tmp_path / "hf", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not readable JSON"), ('{"model_type": "qwen2_vl"}', "model_type 'qwen2_vl'"), (None, "does not exist")],
)
def test_config_that_cannot_be_read(content, words, broken, tmp_path):
    directory, _ = broken
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    message = refused(directory, tmp_path, ConfigError)
    assert words in message
    assert "config.json" in message


def test_source_is_no_directory(tmp_path):
    with pytest.raises(ConversionError, match="is not a directory"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_converted_already(tmp_path):
    convert(VIT_BIN, tmp_path / "ours")
    with pytest.raises(ConversionError, match="converted already"):
        convert(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="convert a checkpoint"):
        export(VIT_BIN, tmp_path / "again")
    assert os.listdir(tmp_path) == ["ours"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_destination_exists(kind, tmp_path):
    convert(VIT_BIN, tmp_path / "ours")
    there = tmp_path / "there"
    {"directory": there.mkdir, "file": there.touch, "dangling link": lambda: there.symlink_to("nowhere")}[kind]()
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        with pytest.raises(ConversionError, match="exists already"):
            run(source, there)
    assert sorted(os.listdir(tmp_path)) == ["ours", "there"]


@pytest.mark.parametrize("change", ["config", "published", "damaged"])
def test_export_of_what_does_not_fit(change, tmp_path):
    ours = tmp_path / "ours"
    convert(VIT_BIN, ours)
    if change == "config":
        config = json.loads((ours / "config.json").read_text())
        (ours / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        words = "do not agree"
    elif change == "published":
        record = json.loads((ours / "published.json").read_text())
        del record["weight_map"]["encoder.layers.0.ls1"]
        (ours / "published.json").write_text(json.dumps(record))
        words = r"does not name encoder\.layers\.0\.ls1"
    else:
        next((ours / "params" / "vision_model.layers.ls1").glob("0.*")).unlink()
        words = "damaged or incomplete"
    with pytest.raises(ValueError, match=words):
        export(ours, tmp_path / "back")
    assert os.listdir(tmp_path) == ["ours"]


# What goes wrong while writing.


def test_not_enough_space(tmp_path, monkeypatch):
    convert(VIT_BIN, tmp_path / "ours")
    (tmp_path / "new.tmp-7").mkdir()
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2e6, 1e6, 1e6))
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        with pytest.raises(ConversionError, match=r"needs 0\.02 GB, .* has 0\.00 GB left.*new\.tmp-7 there is left"):
            run(source, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new.tmp-7", "ours"]


# TensorStore's words when a disk is full, and the system's.
FULL = (
    ValueError(
        'RESOURCE_EXHAUSTED: Failed to write 30208 bytes to file 4: No space left on device [os_error_code="28"]'
    ),
    OSError(28, "No space left on device"),
)


@pytest.mark.parametrize("error", [*FULL, KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_failure_in_the_middle_leaves_nothing(error, tmp_path, monkeypatch):
    convert(VIT_BIN, tmp_path / "ours")
    full = error in FULL

    def fail_later(function):
        calls = []

        def wrapper(*args):
            calls.append(args)
            if len(calls) > 20:
                assert any(".tmp-" in name for name in os.listdir(tmp_path))
                raise error
            return function(*args)

        return wrapper

    monkeypatch.setattr(checkpoint.Writer, "write", fail_later(checkpoint.Writer.write))
    monkeypatch.setattr(export_module, "write_at", fail_later(export_module.write_at))
    for run, source in ((convert, VIT_BIN), (export, tmp_path / "ours")):
        with pytest.raises(ConversionError if full else type(error)) as caught:
            run(source, tmp_path / "new")
        assert ("is full" in str(caught.value)) == full
        assert os.listdir(tmp_path) == ["ours"]


def test_interrupt_by_the_user(tmp_path):
    """Ctrl-C reaches the converter in the middle of a write."""

    def interrupt(done, total, what):
        if done > total / 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(VIT_BIN, tmp_path / "new", progress=interrupt)
    assert not os.listdir(tmp_path)


def test_killed(tmp_path):
    """A process that cannot clean up leaves a temporary name only, and the next run is not disturbed by it."""
    script = (
        "import os, signal, sys; from checkpoints_convert.convert import convert\n"
        "kill = lambda done, total, what: done > total / 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert(*sys.argv[1:], progress=kill)"
    )
    result = subprocess.run([sys.executable, "-c", script, VIT_BIN, tmp_path / "new"], check=False)
    assert result.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith("new.tmp-")
    assert not checkpoint.is_converted(tmp_path / left)
    convert(VIT_BIN, tmp_path / "new")
    assert checkpoint.is_converted(tmp_path / "new")


def test_assign_files():
    assert assign_files({"a": 3, "b": 4}, 7, "model.safetensors") == dict.fromkeys("ab", "model.safetensors")
    assert assign_files({"a": 3, "b": 5, "c": 9, "d": 1}, 7, "pytorch_model.bin") == {
        "a": "pytorch_model-00001-of-00004.bin",
        "b": "pytorch_model-00002-of-00004.bin",
        "c": "pytorch_model-00003-of-00004.bin",
        "d": "pytorch_model-00004-of-00004.bin",
    }


def test_command_line(tmp_path, capsys):
    from internvl_jax.cli import main

    assert main(["convert", str(VIT_BIN), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--safetensors"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "peak memory" in captured.err
    assert_same_bits(state_of(tmp_path / "back"), state_of(VIT_BIN))
    assert main(["convert", str(VIT_BIN), str(tmp_path / "ours")]) == 2
    assert "exists already" in " ".join(capsys.readouterr().err.split())

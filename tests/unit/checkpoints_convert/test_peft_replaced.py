"""Parameters that were trained as a whole beside adapters."""

import json

import jax
import numpy as np
import pytest
from support.adapter_cases import PLAIN_LORA
from support.golden import DATA, assert_close
from support.tiny_model import random_params, tiny

torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints_convert.adapters.peft_adapters import BESIDE, CONFIG, WEIGHTS, export_peft, import_peft  # noqa: E402
from checkpoints_convert.mapping import ConversionError  # noqa: E402
from internvl_jax import checkpoint, lora  # noqa: E402
from internvl_jax.config import load_config  # noqa: E402
from internvl_jax.lora import REPLACED, LoraError  # noqa: E402
from internvl_jax.quantize import is_quantized, quantize_params  # noqa: E402


@pytest.fixture(scope="module")
def llava():
    """LLaVA's own layout, and random weights for its projector by the names of its files."""
    directory = DATA / "llava_1_5" / "original"
    config = load_config(directory)
    inputs, width = config.projector.in_features, config.projector.out_features
    generator = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (width, inputs), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    projector = {
        f"base_model.model.model.mm_projector.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return config, random_params(config), projector


def write_llava(directory, config, projector):
    width, layers = config.text.hidden_size, config.text.num_hidden_layers
    directory.mkdir(parents=True)
    save_file(
        {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
            for layer in range(layers)
            for side, shape in (("A", (4, width)), ("B", (width, 4)))
        },
        directory / WEIGHTS,
    )
    (directory / CONFIG).write_text(json.dumps({**PLAIN_LORA, "target_modules": ["q_proj"]}))
    torch.save(projector, directory / BESIDE)
    return directory


def test_llavas_projector_comes_with_its_adapter(tmp_path, llava):
    config, params, projector = llava
    source = write_llava(tmp_path / "lora", config, projector)
    adapters, settings = import_peft(source, config)
    first = projector["base_model.model.model.mm_projector.0.weight"].numpy()
    np.testing.assert_array_equal(adapters[REPLACED]["mlp1"]["fc1"]["kernel"], first.T)
    lora.save(tmp_path / "ours", adapters, settings)
    again, _ = lora.load(tmp_path / "ours", params)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)

    attached, merged = lora.attach(params, again, settings)["params"], lora.merge(params, again, settings)
    for tree in (attached, merged):
        for name, part in (("0", "fc1"), ("2", "fc2")):
            kernel, bias = tree["mlp1"][part]["kernel"], tree["mlp1"][part]["bias"]
            key = f"base_model.model.model.mm_projector.{name}"
            np.testing.assert_array_equal(kernel, projector[f"{key}.weight"].numpy().T)
            np.testing.assert_array_equal(bias, projector[f"{key}.bias"].numpy())
    assert np.abs(np.asarray(params["mlp1"]["fc1"]["kernel"]) - first.T).max() > 0.1  # params stays as it was
    low = lora.attach(quantize_params(params, "int8"), again, settings)["params"]["mlp1"]["fc1"]["kernel"]
    assert is_quantized(low)
    assert_close(np.asarray(low.qvalue, np.float32) * np.asarray(low.scale), first.T, 0.03, "projector in 8 bits")

    checkpoint.save(tmp_path / "base", params)
    (tmp_path / "base" / "config.json").write_text("{}")
    lora.merge_checkpoint(tmp_path / "merged", tmp_path / "base", tmp_path / "ours")
    stored = checkpoint.load(tmp_path / "merged", checkpoint.stored_tree(tmp_path / "merged"))
    jax.tree.map(
        lambda a, b: assert_close(a, b, 1e-6, "merged on disk"), jax.device_get(stored), jax.device_get(merged)
    )

    export_peft(tmp_path / "theirs", again, settings, config)
    assert (tmp_path / "theirs" / "language_model" / BESIDE).exists()
    jax.tree.map(np.testing.assert_array_equal, import_peft(tmp_path / "theirs", config)[0], adapters)


def test_what_lies_beside_an_adapter_is_taken_or_named(tmp_path, llava):
    config, params, projector = llava
    source = write_llava(tmp_path / "towers" / "language_model", config, {})
    assert REPLACED not in import_peft(tmp_path / "towers", config)[0]
    torch.save(projector, tmp_path / "towers" / BESIDE)
    adapters, settings = import_peft(tmp_path / "towers", config)
    assert set(adapters[REPLACED]["mlp1"]) == {"fc1", "fc2"}
    short = dict(list(projector.items())[:-1])
    for change, message in (
        (short, "missing: model.mm_projector.2.bias of the projector"),
        ({**projector, "model.vision_tower.x.weight": torch.ones(2)}, "x.weight, which has no place beside adapters"),
        ({**short, list(projector)[-1]: torch.full((64,), float("inf"))}, "2.bias"),
    ):
        torch.save(change, tmp_path / "towers" / BESIDE)
        with pytest.raises(ConversionError, match=message):
            import_peft(tmp_path / "towers", config)
    assert source.is_dir()
    narrow = jax.tree.map(lambda leaf: leaf[..., :1], adapters[REPLACED])
    with pytest.raises(LoraError, match=r"mlp1/fc1/bias is \[1\], the model has"):
        lora.check(params, {**adapters, REPLACED: narrow})
    with pytest.raises(LoraError, match="mlp1/fc9/bias: no such parameter"):
        lora.check(params, {**adapters, REPLACED: {"mlp1": {"fc9": {"bias": np.ones(3)}}}})
    assert settings["language_model"].rank == 4


def test_a_tied_embedding_is_not_replaced(tmp_path):
    config = tiny(tie_word_embeddings=True)
    width, words = config.text.hidden_size, config.text.vocab_size
    source = write_llava(tmp_path / "adapter", config, {})
    (source / BESIDE).unlink()
    tensors = load_file(source / WEIGHTS)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": torch.ones(words, width)}, source / WEIGHTS)
    with pytest.raises(ConversionError, match="the head shares the embedding of this model"):
        import_peft(source, config)
